/* Causal self-attention, backward, for heads of 64 on sm_90, by wgmma. Sources: Dao 2023, arXiv:2307.08691, algorithm 2; Shah et
 * al. 2024, arXiv:2407.08608. Refuses atomics and sums in memory: each of dq, dk and dv has one owner, for two more products per
 * pair of blocks. */
#include "kernels/cuda/attention_sm90.cuh"

/* One kernel for both passes, with "own" and "other" as in attention_own_bwd.cu, in blocks of 128 rows:
 *            own rows  other rows   s = own1 other1^T     t = own2 other2^T
 *   dq       q, dout   k, v         p = 2^(s - lse)       ds = p (t - delta)    dq = ds k / sqrt(D)
 *   dk, dv   k, v      q, dout      p^T                   ds^T                  dk = ds^T q / sqrt(D), dv = p^T dout
 * Two warpgroups have 64 own rows each and know nothing of one another; while one has its probabilities made the other keeps the
 * tensor cores busy. p and ds stay in registers, as left operands of the second products. A third warpgroup sends for the operands.
 */

namespace {

struct stage {
    pair_of_boxes other;
    float shift[BLOCK], delta[BLOCK]; /* of queries */
};
struct shared_memory {
    pair_of_boxes own[2];
    stage stages[STAGES];
    uint64_t own_full[2], own_empty[2], full[STAGES], empty[STAGES];
};

struct problem {
    int pieces, H, blocks; /* blocks of a head */
    float scale;
    const float *shift, *delta; /* [B,H,T]: log2(e) lse; sum over D of dout out */
    void *dqkv;
};
struct maps {
    CUtensorMap qkv, dout;
};

template <bool KEYS> __device__ __forceinline__ int others(int block, int blocks) {
    return KEYS ? blocks - block : block + 1;
}
/* The one on the diagonal comes first. */
template <bool KEYS> __device__ __forceinline__ int other_of(int block, int i) {
    return KEYS ? block + i : block - i;
}

/* shift and delta [B,H,T]; eight lanes a row. */
template <typename T>
__global__ void __launch_bounds__(256)
    rows_kernel(float *shift, float *delta, const T *dout, const T *out, const float *lse, int64_t count, int tokens, int H) {
    int64_t row = blockIdx.x * (int64_t)32 + threadIdx.x / 8;
    float sum = 0;
    if (row < count) {
        int64_t head = row / tokens, t = row % tokens, at = ((head / H * tokens + t) * H + head % H) * HEAD + threadIdx.x % 8 * 8;
        words<T> x = load_words(dout + at), y = load_words(out + at);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum = fmaf(x.f32(i), y.f32(i), sum);
        }
    }
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    if (threadIdx.x % 8 == 0 && row < count) {
        shift[row] = LOG2_E * lse[row];
        delta[row] = sum;
    }
}

/* A block of k and v, or of q and dout. */
template <bool KEYS>
__device__ __forceinline__ void load_block(pair_of_boxes &to, const maps &map, uint64_t *full, int row, int column, int C) {
    box_load(to.first, &map.qkv, full, KEYS ? C + column : column, row);
    if (KEYS) {
        box_load(to.second, &map.qkv, full, 2 * C + column, row);
    } else {
        box_load(to.second, &map.dout, full, column, row);
    }
}

template <bool KEYS> __device__ void produce(shared_memory &m, const maps &map, const problem &p) {
    int step = 0, turn = 0, C = p.H * HEAD;
    for (int number = blockIdx.x; number < p.pieces; number += gridDim.x) {
        piece work(number, p.blocks);
        int first = work.head / p.H * p.blocks, column = work.head % p.H * HEAD;
        for (int part = 0; part < work.count; part++, turn++) {
            int own = work.block(part), count = others<KEYS>(own, p.blocks);
            wait_empty(m.own_empty, turn);
            barrier_expect(&m.own_full[turn % 2], 2 * BOX);
            load_block<KEYS>(m.own[turn % 2], map, &m.own_full[turn % 2], (first + own) * BLOCK, column, C);
            for (int i = 0; i < count; i++, step++) {
                int other = other_of<KEYS>(own, i);
                stage &to = m.stages[step % STAGES];
                uint64_t *full = &m.full[step % STAGES];
                wait_empty(m.empty, step);
                barrier_expect(full, 2 * BOX + (KEYS ? 2 * (int)sizeof to.shift : 0));
                load_block<!KEYS>(to.other, map, full, (first + other) * BLOCK, column, C);
                if (KEYS) {
                    int64_t row = ((int64_t)work.head * p.blocks + other) * BLOCK;
                    bytes_load(to.shift, p.shift + row, sizeof to.shift, full);
                    bytes_load(to.delta, p.delta + row, sizeof to.delta, full);
                }
            }
        }
    }
}

template <typename T, bool KEYS> struct consumer {
    shared_memory &m;
    const problem &p;
    int group;
    float own_shift[2], own_delta[2]; /* of queries, where they are the own rows: of rows lane / 4 and + 8 */

    /* Whether element 4 j + 2 r + k of a block on the diagonal is a key after its query. */
    __device__ __forceinline__ bool is_future(int j, int r, int k) const {
        int row = group * HEAD + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r,
            column = 8 * j + threadIdx.x % 4 * 2 + k;
        return KEYS ? row > column : column > row;
    }
    /* Those of columns 8 j + 2 (lane % 4) and the next. */
    static __device__ __forceinline__ float2 pair_of(const float *x, int j) {
        return KEYS ? *reinterpret_cast<const float2 *>(x + 8 * j + threadIdx.x % 4 * 2) : float2{};
    }
    /* s becomes p. DIAGONAL: with keys after their query left out, by selection. */
    template <bool DIAGONAL> __device__ __forceinline__ void probabilities(float (&s)[64], const stage &from, float scale2) const {
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float2 of_columns = pair_of(from.shift, j);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float shift = KEYS ? (e % 2 == 0 ? of_columns.x : of_columns.y) : own_shift[e / 2];
                float x = exp2_fast(fmaf(s[4 * j + e], scale2, -shift));
                s[4 * j + e] = DIAGONAL && is_future(j, e / 2, e % 2) ? 0.0f : x;
            }
        }
    }
    /* p as a left operand, for keys, and ds from p and t. */
    template <bool DIAGONAL>
    __device__ __forceinline__ void gradients(uint32_t (&left_p)[32], uint32_t (&left_ds)[32], const float (&s)[64],
                                              const float (&t)[64], const stage &from) const {
#pragma unroll
        for (int j = 0; j < 16; j++) {
            float2 of_columns = pair_of(from.delta, j);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float ds[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int at = 4 * j + 2 * r + k;
                    float delta = KEYS ? (k == 0 ? of_columns.x : of_columns.y) : own_delta[r];
                    ds[k] = s[at] * (t[at] - delta);
                    ds[k] = DIAGONAL && is_future(j, r, k) ? 0.0f : ds[k];
                }
                if (KEYS) {
                    left_p[2 * j + r] = pack<T>(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
                }
                left_ds[2 * j + r] = pack<T>(ds[0], ds[1]);
            }
        }
    }

    /* One other block. d1: dq or dk; d2: dv. */
    __device__ __forceinline__ void block(float (&d1)[32], float (&d2)[32], const pair_of_boxes &own, int step, bool first) const {
        const stage &from = m.stages[step % STAGES];
        float s[64], t[64], scale2 = p.scale * LOG2_E;
        uint32_t left_p[32], left_ds[32];
        wait_full(m.full, step);
        mma_fence();
        multiply_first<T>(s, own.first, from.other.first, group);
        multiply_first<T>(t, own.second, from.other.second, group);
        mma_wait<1>(); /* s, and the last product with the block before */
        if (!first) {
            let_go(&m.empty[(step - 1) % STAGES]);
        }
        if (first) {
            probabilities<true>(s, from, scale2);
        } else {
            probabilities<false>(s, from, scale2);
        }
        mma_wait<0>();
        if (first) {
            gradients<true>(left_p, left_ds, s, t, from);
        } else {
            gradients<false>(left_p, left_ds, s, t, from);
        }
        mma_fence();
        if (KEYS) {
            multiply_second<T>(d2, left_p, from.other.second, first);
        }
        multiply_second<T>(d1, left_ds, from.other.first, first);
        mma_commit();
        mma_wait<0>(); /* there are no registers for what comes next beside left_p and left_ds */
    }

    __device__ __forceinline__ void run() {
        float d1[32], d2[32];
        int step = 0, turn = 0;
        int64_t C = (int64_t)p.H * HEAD;
        for (int number = blockIdx.x; number < p.pieces; number += gridDim.x) {
            piece work(number, p.blocks);
            for (int part = 0; part < work.count; part++, turn++) {
                int own = work.block(part), count = others<KEYS>(own, p.blocks);
                int64_t row = (int64_t)own * BLOCK + group * HEAD, rows = (int64_t)work.head / p.H * p.blocks * BLOCK;
                if (!KEYS) {
                    int64_t at = (int64_t)work.head * p.blocks * BLOCK + row + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4;
                    own_shift[0] = p.shift[at];
                    own_shift[1] = p.shift[at + 8];
                    own_delta[0] = p.delta[at];
                    own_delta[1] = p.delta[at + 8];
                }
                wait_full(m.own_full, turn);
                for (int i = 0; i < count; i++, step++) {
                    block(d1, d2, m.own[turn % 2], step, i == 0);
                }
                mma_wait<0>();
                let_go(&m.empty[(step - 1) % STAGES]);
                let_go(&m.own_empty[turn % 2]);
                T *to = (T *)p.dqkv + (rows + row) * 3 * C + work.head % p.H * HEAD;
                put<T>(to + (KEYS ? C : 0), 3 * C, d1, p.scale, p.scale);
                if (KEYS) {
                    put<T>(to + 2 * C, 3 * C, d2, 1.0f, 1.0f);
                }
            }
        }
    }
};

template <typename T, bool KEYS>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const __grid_constant__ maps map, const __grid_constant__ problem p) {
    extern __shared__ unsigned char memory[];
    shared_memory &m = *reinterpret_cast<shared_memory *>(memory + (1024 - shared_address(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        barriers_init(m);
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)PRODUCER_REGISTERS));
        if (threadIdx.x == 0) {
            produce<KEYS>(m, map, p);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)CONSUMER_REGISTERS));
        consumer<T, KEYS>{m, p, (int)threadIdx.x / GROUP - 1, {}, {}}.run();
    }
}

template <typename T>
cpl_status backward(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x, float *shift) {
    maps map;
    cpl_status st = CPL_OK;
    int64_t count = s->B * s->H * s->T;
    float *delta = shift + count;
    const problem p = {pieces_of(s), (int)s->H, (int)(s->T / BLOCK), 1.0f / sqrtf((float)HEAD), shift, delta, x->dqkv};
    CPL_TRY(cpl_tensor_map(&map.qkv, s->dt, x->qkv, s->B * s->T, 3 * s->H * HEAD, BLOCK));
    CPL_TRY(cpl_tensor_map(&map.dout, s->dt, x->dout, s->B * s->T, s->H * HEAD, BLOCK));
    rows_kernel<T><<<(unsigned)cpl_ceil_div(count, 32), 256, 0, cpl_cuda_stream(dev)>>>(
        shift, delta, (const T *)x->dout, (const T *)x->out, x->lse, count, (int)s->T, (int)s->H);
    CPL_TRY((launch<shared_memory>(dev, backward_kernel<T, true>, "attention_bwd", p.pieces, map, p)));
    CPL_TRY((launch<shared_memory>(dev, backward_kernel<T, false>, "attention_bwd", p.pieces, map, p)));
done:
    return st;
}

} // namespace

extern "C" bool cpl_attention_sm90_usable(const cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    return cpl_cuda_of(dev)->capability == 90 && cpl_attention_sm90_scratch(s) > 0 && cpl_tensor_map_found() &&
           aligned16(x->qkv, x->out, x->dout, x->dqkv);
}

extern "C" cpl_status cpl_attention_sm90_bwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    float *shift = nullptr;
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ATTENTION, cpl_attention_sm90_scratch(s), &shift);
    if (st != CPL_OK) {
        return st;
    }
    return s->dt == CPL_BF16 ? backward<__nv_bfloat16>(dev, s, x, shift) : backward<__half>(dev, s, x, shift);
}

/* Causal self-attention, forward, for heads of 64 on sm_90, by wgmma. Sources: Dao 2023, arXiv:2307.08691, algorithm 1; Shah et al.
 * 2024, arXiv:2407.08608.
 * Refuses to let a score in the future reach a result, whatever it is. */
#include "kernels/cuda/attention_sm90.cuh"

/* Two warpgroups have 64 queries each and go over the blocks of keys, the one on the diagonal first, with a running maximum; a
 * third one sends for the operands. */

namespace {

constexpr float LN_2 = 0.6931471805599453f;

struct shared_memory {
    unsigned char q[2][BOX];
    pair_of_boxes stages[STAGES]; /* k, v */
    uint64_t own_full[2], own_empty[2], full[STAGES], empty[STAGES];
};

struct problem {
    int pieces, H, blocks; /* blocks of a head */
    float scale2;          /* log2(e) / sqrt(D) */
    void *out;
    float *lse;
};

__device__ void produce(shared_memory &m, const CUtensorMap &qkv, const problem &p) {
    int step = 0, turn = 0, C = p.H * HEAD;
    for (int number = blockIdx.x; number < p.pieces; number += gridDim.x) {
        piece work(number, p.blocks);
        int first = work.head / p.H * p.blocks, column = work.head % p.H * HEAD;
        for (int part = 0; part < work.count; part++, turn++) {
            int own = work.block(part);
            wait_empty(m.own_empty, turn);
            barrier_expect(&m.own_full[turn % 2], BOX);
            box_load(m.q[turn % 2], &qkv, &m.own_full[turn % 2], column, (first + own) * BLOCK);
            for (int other = own; other >= 0; other--, step++) {
                pair_of_boxes &to = m.stages[step % STAGES];
                uint64_t *full = &m.full[step % STAGES];
                wait_empty(m.empty, step);
                barrier_expect(full, 2 * BOX);
                box_load(to.first, &qkv, full, C + column, (first + other) * BLOCK);
                box_load(to.second, &qkv, full, 2 * C + column, (first + other) * BLOCK);
            }
        }
    }
}

template <typename T> struct consumer {
    shared_memory &m;
    const problem &p;
    int group;
    float top[2], sum[2]; /* of rows lane / 4 and + 8 of a warp's; sum: of this lane's columns */

    /* s becomes p as a left operand; what was added up before is scaled down to the new maximum. FIRST: the block on the diagonal,
     * with nothing before it. */
    template <bool FIRST> __device__ __forceinline__ void softmax(uint32_t (&left)[32], float (&s)[64], float (&o)[32]) {
        int ahead = threadIdx.x % 4 * 2 - (group * HEAD + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high = FIRST ? -INFINITY : top[r], part = 0;
#pragma unroll
            for (int j = 0; j < 16; j++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float &x = s[4 * j + 2 * r + k];
                    x = FIRST && ahead + 8 * j + k > 8 * r ? -INFINITY : x; /* a key after its query */
                    high = fmaxf(high, x);
                }
            }
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
            high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
            float shift = high * p.scale2, keep = FIRST ? 0.0f : exp2_fast(fmaf(top[r], p.scale2, -shift));
#pragma unroll
            for (int j = 0; j < 16; j++) {
                float x0 = exp2_fast(fmaf(s[4 * j + 2 * r], p.scale2, -shift));
                float x1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], p.scale2, -shift));
                part += x0 + x1;
                left[2 * j + r] = pack<T>(x0, x1);
            }
            top[r] = high;
            sum[r] = FIRST ? part : fmaf(sum[r], keep, part);
            if (!FIRST) {
#pragma unroll
                for (int c = 0; c < 8; c++) {
                    o[4 * c + 2 * r] *= keep;
                    o[4 * c + 2 * r + 1] *= keep;
                }
            }
        }
    }

    __device__ __forceinline__ void block(float (&o)[32], const unsigned char *q, int step, bool first) {
        const pair_of_boxes &from = m.stages[step % STAGES];
        float s[64];
        uint32_t left[32];
        wait_full(m.full, step);
        mma_fence();
        multiply_first<T>(s, q, from.first, group);
        mma_wait<0>();
        if (first) {
            softmax<true>(left, s, o);
        } else {
            let_go(&m.empty[(step - 1) % STAGES]);
            softmax<false>(left, s, o);
        }
        mma_fence();
        multiply_second<T>(o, left, from.second, first);
        mma_commit();
    }

    __device__ __forceinline__ void run() {
        float o[32];
        int step = 0, turn = 0;
        int64_t C = (int64_t)p.H * HEAD, T_ = (int64_t)p.blocks * BLOCK;
        for (int number = blockIdx.x; number < p.pieces; number += gridDim.x) {
            piece work(number, p.blocks);
            for (int part = 0; part < work.count; part++, turn++) {
                int own = work.block(part);
                int64_t row = (int64_t)own * BLOCK + group * HEAD;
                wait_full(m.own_full, turn);
                for (int i = 0; i <= own; i++, step++) {
                    block(o, m.q[turn % 2], step, i == 0);
                }
                mma_wait<0>();
                let_go(&m.empty[(step - 1) % STAGES]);
                let_go(&m.own_empty[turn % 2]);
                float *lse = p.lse + work.head * T_ + row + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
                    sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
                    if (threadIdx.x % 4 == 0) {
                        lse[8 * r] = fmaf(top[r] * p.scale2, LN_2, logf(sum[r]));
                    }
                }
                put<T>((T *)p.out + (work.head / p.H * T_ + row) * C + work.head % p.H * HEAD, C, o, 1.0f / sum[0], 1.0f / sum[1]);
            }
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ problem p) {
    extern __shared__ unsigned char memory[];
    shared_memory &m = *reinterpret_cast<shared_memory *>(memory + (1024 - shared_address(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        barriers_init(m);
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)PRODUCER_REGISTERS));
        if (threadIdx.x == 0) {
            produce(m, qkv, p);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)CONSUMER_REGISTERS));
        consumer<T>{m, p, (int)threadIdx.x / GROUP - 1, {}, {}}.run();
    }
}

template <typename T> cpl_status forward(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    CUtensorMap qkv;
    cpl_status st = CPL_OK;
    const problem p = {pieces_of(s), (int)s->H, (int)(s->T / BLOCK), LOG2_E / sqrtf((float)HEAD), x->out, x->lse};
    CPL_TRY(cpl_tensor_map(&qkv, s->dt, x->qkv, s->B * s->T, 3 * s->H * HEAD, BLOCK));
    CPL_TRY(launch<shared_memory>(dev, forward_kernel<T>, "attention_fwd", p.pieces, qkv, p));
done:
    return st;
}

} // namespace

extern "C" cpl_status cpl_attention_sm90_fwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    return s->dt == CPL_BF16 ? forward<__nv_bfloat16>(dev, s, x) : forward<__half>(dev, s, x);
}

/* Causal self-attention, backward, for heads of 64 on sm_90, by wgmma. Sources: Dao 2023, arXiv:2307.08691, algorithm 2; Shah et
 * al. 2024, arXiv:2407.08608. Refuses atomics and sums in memory: each of dq, dk and dv has one owner, for two more products per
 * pair of blocks. */
#include "kernels/cuda/attention_sm90.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/scratch.h"

/* One kernel for both passes, with "own" and "other" as in attention_own_bwd.cu, in blocks of 128 rows:
 *            own rows  other rows   s = own1 other1^T     t = own2 other2^T
 *   dq       q, dout   k, v         p = 2^(s - lse)       ds = p (t - delta)    dq = ds k / sqrt(D)
 *   dk, dv   k, v      q, dout      p^T                   ds^T                  dk = ds^T q / sqrt(D), dv = p^T dout
 * Two warpgroups have 64 own rows each and take turns with the tensor cores: while one's products run the other makes its
 * probabilities. p and ds stay in registers, as left operands of the second products. A third warpgroup sends for the operands.
 * Column sums, where asked for, begin where a piece of rows is in hand: of dout with delta, of dq in registers. */

namespace {

enum { ROWS_THREADS = 256, PIECE = CPL_ATTENTION_PIECE };
static_assert((int)PIECE == (int)HEAD, "a piece is the own rows of a warpgroup");

/* shift = log2(e) lse and delta = sum over D of dout out of a block of queries, in the order in which the threads have columns:
 * lane % 4 has 8 j + 2 (lane % 4) + k at 2 j + k. LANE: a stride without bank conflicts. */
enum { LANE = 36, ROWS_OF_BLOCK = 4 * LANE };
struct of_queries {
    float shift[ROWS_OF_BLOCK], delta[ROWS_OF_BLOCK];
};
static_assert(sizeof(of_queries) / sizeof(float) == CPL_ATTENTION_SM90_FLOATS, "what is foretold");
__device__ __forceinline__ int place_of_row(int row) {
    return row % 8 / 2 * LANE + row / 8 * 2 + row % 2;
}

/* A result on its way out, of a warp: 16 rows of 64 columns, swizzled as the copy engine takes them. Stores of a warp's own, 16
 * bytes of each of 8 rows at a time, took a tenth of the pass; in the forward pass, which has a third of them, they are faster than
 * this. */
enum { RESULT_ROWS = 16 };
struct result {
    unsigned char rows[RESULT_ROWS * HEAD * 2];
};
/* scale x [64,64] of the warpgroup, this warp's rows; between results_begin, which waits for those of the time before to have left,
 * and results_end, after which the first lane may send them. */
template <typename T> __device__ __forceinline__ void put(result &to, const float (&x)[32], float scale) {
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            w[n] = pack<T>(scale * x[4 * c + 2 * n], scale * x[4 * c + 2 * n + 1]);
        }
        put_16x16(to.rows, 0, c, w);
    }
}
__device__ __forceinline__ void results_begin() {
    stores_have_read(); /* of the other lanes: none */
    __syncwarp();
}
__device__ __forceinline__ bool results_end() {
    shared_to_copies();
    __syncwarp();
    return threadIdx.x % 32 == 0;
}

struct stage {
    pair_of_boxes other;
    of_queries rows;
    unsigned char unused[1024 - sizeof(of_queries) % 1024]; /* boxes begin at multiples of 1024 */
};
struct shared_memory {
    pair_of_boxes own[2];
    result results[WARPS][2]; /* dq, or dk and dv */
    stage stages[STAGES];
    float2 sums[2][GROUP / 32][HEAD / 2]; /* of columns, of the warps of a group */
    task tasks[2];
    uint64_t own_full[2], own_empty[2], full[STAGES], empty[STAGES];
};

struct problem {
    int heads, H, blocks; /* heads of all sequences, of one; blocks of a head */
    float scale;
    const of_queries *rows; /* [B,H,blocks] */
    float *sums;            /* [B 2 blocks,C]: those of dq's columns over pieces of rows; or NULL */
};
struct maps {
    CUtensorMap qkv, dout, dqkv; /* dqkv: by results */
};

/* The own block with so many other blocks, and the i-th of those: the one on the diagonal comes first. */
template <bool KEYS> __device__ __forceinline__ int own_of(int length, int blocks) {
    return KEYS ? blocks - length : length - 1;
}
template <bool KEYS> __device__ __forceinline__ int other_of(int own, int i) {
    return KEYS ? own + i : own - i;
}

/* A block: a piece of rows of a head, eight lanes a row. sums [B 2 blocks,C]: those of dout's columns over the piece; or NULL. */
template <typename T>
__global__ void __launch_bounds__(ROWS_THREADS)
    rows_kernel(of_queries *rows, float *sums, const T *dout, const T *out, const float *lse, int tokens, int H) {
    __shared__ float parts[ROWS_THREADS / 32][HEAD];
    int pieces = tokens / PIECE, head = blockIdx.x / pieces, lane = threadIdx.x % 8;
    int64_t piece = head / H * pieces + blockIdx.x % pieces; /* of all sequences */
    float columns[8] = {};
#pragma unroll
    for (int n = 0; n < PIECE; n += ROWS_THREADS / 8) {
        int64_t in = n + threadIdx.x / 8, at = ((piece * PIECE + in) * H + head % H) * HEAD + lane * 8;
        int64_t row = blockIdx.x * (int64_t)PIECE + in;
        words<T> x = load_words(dout + at), y = load_words(out + at);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sum = fmaf(x.f32(i), y.f32(i), sum);
            columns[i] += x.f32(i);
        }
#pragma unroll
        for (int lanes = 4; lanes > 0; lanes /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        }
        if (lane == 0) {
            of_queries &to = rows[row / BLOCK];
            int place = place_of_row((int)(row % BLOCK));
            to.shift[place] = LOG2_E * lse[row];
            to.delta[place] = sum;
        }
    }
    if (sums == nullptr) {
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        columns[i] += __shfl_xor_sync(0xffffffffu, columns[i], 8);
        columns[i] += __shfl_xor_sync(0xffffffffu, columns[i], 16);
        if (threadIdx.x % 32 < 8) {
            parts[threadIdx.x / 32][lane * 8 + i] = columns[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < HEAD) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < ROWS_THREADS / 32; w++) {
            total += parts[w][threadIdx.x];
        }
        sums[(piece * H + head % H) * HEAD + threadIdx.x] = total;
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
    int C = p.H * HEAD;
    ring<2> use;
    ring<STAGES> step;
    for (walk w(p.heads, p.blocks); w.next(); use.advance()) {
        int first = w.now.head / p.H * p.blocks, column = w.now.head % p.H * HEAD, own = own_of<KEYS>(w.now.length, p.blocks);
        use.wait_empty(m.own_empty);
        hand_over(&m.tasks[use.at], w.now, &m.own_full[use.at], 2 * BOX);
        load_block<KEYS>(m.own[use.at], map, &m.own_full[use.at], (first + own) * BLOCK, column, C);
        for (int i = 0; i < w.now.length; i++, step.advance()) {
            int other = other_of<KEYS>(own, i);
            stage &to = m.stages[step.at];
            uint64_t *full = &m.full[step.at];
            step.wait_empty(m.empty);
            barrier_expect(full, 2 * BOX + (KEYS ? (int)sizeof to.rows : 0));
            load_block<!KEYS>(to.other, map, full, (first + other) * BLOCK, column, C);
            if (KEYS) {
                bytes_load(&to.rows, p.rows + w.now.head * p.blocks + other, sizeof to.rows, full);
            }
        }
    }
    use.wait_empty(m.own_empty);
    hand_over(&m.tasks[use.at], {0, 0}, &m.own_full[use.at], 0);
}

/* Turns are taken and passed on in strict alternation. */
__device__ __forceinline__ void take_turn(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(2 * GROUP) : "memory");
}
__device__ __forceinline__ void pass_turn_on(int group) {
    asm volatile("bar.arrive %0, %1;" ::"r"(2 - group), "n"(2 * GROUP) : "memory");
}

/* Column sums of factor x [64,64] of this warpgroup to `to` [64]. parts: free again once the group has met elsewhere. */
__device__ __forceinline__ void put_sums(float *to, float2 (&parts)[GROUP / 32][HEAD / 2], const float (&x)[32], float factor,
                                         int group) {
    int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP / 32;
    float2 sum[8];
#pragma unroll
    for (int c = 0; c < 8; c++) {
        sum[c] = make_float2(x[4 * c] + x[4 * c + 2], x[4 * c + 1] + x[4 * c + 3]);
    }
    /* half of the lanes go on with half of the columns, and so on: at last columns 2 lane and 2 lane + 1 are this lane's */
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        bool upper = (lane & 4 * half) != 0;
#pragma unroll
        for (int c = 0; c < half; c++) {
            float2 kept = upper ? sum[c + half] : sum[c], given = upper ? sum[c] : sum[c + half];
            sum[c] = make_float2(kept.x + __shfl_xor_sync(0xffffffffu, given.x, 4 * half),
                                 kept.y + __shfl_xor_sync(0xffffffffu, given.y, 4 * half));
        }
    }
    parts[warp][lane] = sum[0];
    asm volatile("bar.sync %0, %1;" ::"r"(group + 3), "n"((int)GROUP) : "memory");
    if (warp == 0) {
        float2 a = parts[0][lane], b = parts[1][lane], c = parts[2][lane], d = parts[3][lane];
        reinterpret_cast<float2 *>(to)[lane] =
            make_float2(factor * ((a.x + b.x) + (c.x + d.x)), factor * ((a.y + b.y) + (c.y + d.y)));
    }
}

template <typename T, bool KEYS> struct consumer {
    shared_memory &m;
    const problem &p;
    const maps &map;
    int group;
    float own_shift[2], own_delta[2]; /* of queries, where they are the own rows: of rows lane / 4 and + 8 */

    /* What queries have in columns 8 j + 2 (lane % 4), the next one, and those 8 further on. */
    static __device__ __forceinline__ void of_columns(float (&x)[4], const float *rows, int j) {
        *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(rows + threadIdx.x % 4 * LANE + 2 * j);
    }
    /* p, for keys, and ds as left operands. DIAGONAL: keys after their query are left out, by selection. N 32: of the half that
     * `sees_half` is about. */
    template <bool DIAGONAL, int N>
    __device__ __forceinline__ void left_operands(uint32_t (&left_p)[N / 2], uint32_t (&left_ds)[N / 2], const float (&s)[N],
                                                  const float (&t)[N], const of_queries &rows) const {
        int first = N == 64 ? group * HEAD : 0; /* own row, from the first other row */
        int ahead = (first + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4) - threadIdx.x % 4 * 2; /* row - column */
        float scale2 = p.scale * LOG2_E;
#pragma unroll
        for (int j = 0; j < N / 4; j += 2) {
            alignas(16) float shifts[4], deltas[4];
            if (KEYS) {
                of_columns(shifts, rows.shift, N == 64 ? j : HEAD / 8 + j);
                of_columns(deltas, rows.delta, N == 64 ? j : HEAD / 8 + j);
            }
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                int r = e % 4 / 2;
                float prob[2], ds[2];
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int at = 4 * j + e + k, column = e / 4 * 2 + k, row_ahead = ahead + 8 * r - 8 * (j + e / 4) - k;
                    bool future = DIAGONAL && (KEYS ? row_ahead > 0 : row_ahead < 0);
                    float x = exp2_fast(fmaf(s[at], scale2, -(KEYS ? shifts[column] : own_shift[r])));
                    float d = x * (t[at] - (KEYS ? deltas[column] : own_delta[r]));
                    prob[k] = future ? 0.0f : x;
                    ds[k] = future ? 0.0f : d;
                }
                if (KEYS) {
                    left_p[2 * j + e / 2] = pack<T>(prob[0], prob[1]);
                }
                left_ds[2 * j + e / 2] = pack<T>(ds[0], ds[1]);
            }
        }
    }

    /* The first queries see the first keys of the block on the diagonal, and the last keys are seen by its last queries: of the
     * other half nothing is computed. */
    __device__ __forceinline__ bool sees_half(bool first) const {
        return first && group == (KEYS ? 1 : 0);
    }

    /* One other block, begun and ended with the turn in hand. d1: dq or dk; d2: dv. first: the one on the diagonal; HALF: of that
     * the half. */
    template <bool HALF>
    __device__ __forceinline__ void block(float (&d1)[32], float (&d2)[32], const pair_of_boxes &own, const stage &from,
                                          bool first) {
        constexpr int N = HALF ? 32 : 64;
        float s[N], t[N];
        uint32_t left_p[N / 2], left_ds[N / 2];
        const unsigned char *other1 = from.other.first + (HALF && KEYS ? HALF_BOX : 0);
        const unsigned char *other2 = from.other.second + (HALF && KEYS ? HALF_BOX : 0);
        mma_fence();
        multiply_first<T>(s, own.first, other1, group);
        multiply_first<T>(t, own.second, other2, group);
        pass_turn_on(group);
        mma_wait<0>();
        mma_settled(s);
        mma_settled(t);
        if (HALF || first) {
            left_operands<true>(left_p, left_ds, s, t, from.rows);
        } else {
            left_operands<false>(left_p, left_ds, s, t, from.rows);
        }
        take_turn(group);
        mma_fence();
        if (KEYS) {
            multiply_second<T>(d2, left_p, other2, HALF || first);
        }
        multiply_second<T>(d1, left_ds, other1, HALF || first);
        mma_commit();
        mma_wait<0>(); /* there are no registers for what comes next beside left_p and left_ds */
    }

    __device__ __forceinline__ void run() {
        float d1[32], d2[32];
        int C = p.H * HEAD;
        ring<2> use;
        ring<STAGES> step;
        if (group == 1) {
            pass_turn_on(group); /* the first turn is group 0's */
        }
        for (;; use.advance()) {
            use.wait_full(m.own_full);
            task now = m.tasks[use.at];
            if (now.length == 0) {
                if (group == 0) {
                    take_turn(group); /* the last one that was passed on */
                }
                results_begin(); /* they have left */
                break;
            }
            int own = own_of<KEYS>(now.length, p.blocks);
            if (!KEYS) {
                const of_queries &from = p.rows[now.head * p.blocks + own];
                int place = place_of_row(group * HEAD + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    own_shift[r] = from.shift[place + 2 * r];
                    own_delta[r] = from.delta[place + 2 * r];
                }
            }
            take_turn(group);
            for (int i = 0; i < now.length; i++, step.advance()) {
                step.wait_full(m.full);
                if (sees_half(i == 0)) {
                    block<true>(d1, d2, m.own[use.at], m.stages[step.at], true);
                } else {
                    block<false>(d1, d2, m.own[use.at], m.stages[step.at], i == 0);
                }
                barrier_arrive(&m.empty[step.at]);
            }
            pass_turn_on(group);
            barrier_arrive(&m.own_empty[use.at]);
            int row = (now.head / p.H * p.blocks + own) * BLOCK + group * HEAD, column = now.head % p.H * HEAD;
            result(&out)[2] = m.results[threadIdx.x / 32 - GROUP / 32];
            results_begin();
            mma_settled(d1);
            put<T>(out[0], d1, p.scale);
            if (KEYS) {
                mma_settled(d2);
                put<T>(out[1], d2, 1.0f);
            }
            if (results_end()) {
                int own_row = row + threadIdx.x % GROUP / 32 * RESULT_ROWS;
                box_store(&map.dqkv, out[0].rows, (KEYS ? C : 0) + column, own_row);
                if (KEYS) {
                    box_store(&map.dqkv, out[1].rows, 2 * C + column, own_row);
                }
                stores_commit();
            }
            if (!KEYS && p.sums != nullptr) { /* the group meets before the next ones, to take its turn */
                put_sums(p.sums + (int64_t)(row / PIECE) * C + column, m.sums[group], d1, p.scale, group);
            }
        }
    }
};

template <typename T, bool KEYS>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const __grid_constant__ maps map, const __grid_constant__ problem p) {
    shared_memory &m = shared_begin<shared_memory>();
    int group = group_of_thread();
    if (group < 0) {
        give_registers();
        if (threadIdx.x == 0) {
            produce<KEYS>(m, map, p);
        }
    } else {
        take_registers();
        consumer<T, KEYS>{m, p, map, group, {}, {}}.run();
    }
}

/* sums: of dq, and behind them of dout; or NULL. */
template <typename T>
cpl_status backward(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x, of_queries *rows, float *sums) {
    maps map;
    cpl_status st = CPL_OK;
    int64_t R = s->B * s->T, C = s->H * HEAD, pieces = R / PIECE;
    const problem p = {(int)(s->B * s->H), (int)s->H, (int)(s->T / BLOCK), 1.0f / sqrtf((float)HEAD), rows, sums};
    CPL_TRY(cpl_tensor_map(&map.qkv, s->dt, x->qkv, R, 3 * C, BLOCK));
    CPL_TRY(cpl_tensor_map(&map.dout, s->dt, x->dout, R, C, BLOCK));
    CPL_TRY(cpl_tensor_map(&map.dqkv, s->dt, x->dqkv, R, 3 * C, RESULT_ROWS));
    rows_kernel<T><<<(unsigned)(pieces * s->H), ROWS_THREADS, 0, cpl_cuda_stream(dev)>>>(
        rows, sums == nullptr ? sums : sums + pieces * C, (const T *)x->dout, (const T *)x->out, x->lse, (int)s->T, (int)s->H);
    CPL_TRY((launch<shared_memory>(dev, backward_kernel<T, true>, "attention_bwd", p.heads * p.blocks, map, p)));
    CPL_TRY((launch<shared_memory>(dev, backward_kernel<T, false>, "attention_bwd", p.heads * p.blocks, map, p)));
    if (sums != nullptr) {
        add_partials(cpl_cuda_stream(dev), {{x->dbias, x->dbias + 2 * C}}, 2, sums, C, (int)pieces);
        CPL_TRY(cpl_cuda_launched(dev, "attention_bwd"));
    }
done:
    return st;
}

} // namespace

extern "C" bool cpl_attention_sm90_usable(const cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    return cpl_cuda_of(dev)->capability == 90 && cpl_attention_sm90_scratch(s) > 0 && cpl_tensor_map_found() &&
           aligned16(x->qkv, x->out, x->dout, x->dqkv);
}

extern "C" cpl_status cpl_attention_sm90_bwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    of_queries *rows = nullptr;
    float *sums = nullptr;
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ATTENTION, cpl_attention_sm90_scratch(s), &rows));
    if (x->dbias != nullptr) {
        CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ROWS, cpl_scratch_attention_bias(s->B * s->T, s->H * HEAD), &sums));
    }
    CPL_TRY(s->dt == CPL_BF16 ? backward<__nv_bfloat16>(dev, s, x, rows, sums) : backward<__half>(dev, s, x, rows, sums));
done:
    return st;
}

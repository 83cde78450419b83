/* Causal self-attention, forward, for heads of 64 on sm_90, by wgmma. Sources: Dao 2023, arXiv:2307.08691, algorithm 1; Shah et al.
 * 2024, arXiv:2407.08608.
 * Refuses to let a score in the future reach a result, whatever it is. */
#include "kernels/cuda/attention_sm90.cuh"

/* Two warpgroups have 64 queries each and go over the blocks of keys, the one on the diagonal first, with a running maximum. A
 * third one sends for the operands. */

namespace {

constexpr float LN_2 = 0.6931471805599453f;

struct shared_memory {
    unsigned char q[2][BOX];
    pair_of_boxes stages[STAGES]; /* k, v */
    task tasks[2];
    uint64_t own_full[2], own_empty[2], full[STAGES], empty[STAGES];
};

struct problem {
    int heads, H, blocks; /* heads of all sequences, of one; blocks of a head */
    float scale2;         /* log2(e) / sqrt(D) */
    void *out;
    float *lse;
};

__device__ void produce(shared_memory &m, const CUtensorMap &qkv, const problem &p) {
    int C = p.H * HEAD;
    ring<2> use;
    ring<STAGES> step;
    for (walk w(p.heads, p.blocks); w.next(); use.advance()) {
        int first = w.now.head / p.H * p.blocks, column = w.now.head % p.H * HEAD, own = w.now.length - 1;
        use.wait_empty(m.own_empty);
        hand_over(&m.tasks[use.at], w.now, &m.own_full[use.at], BOX);
        box_load(m.q[use.at], &qkv, &m.own_full[use.at], column, (first + own) * BLOCK);
        for (int other = own; other >= 0; other--, step.advance()) {
            pair_of_boxes &to = m.stages[step.at];
            uint64_t *full = &m.full[step.at];
            step.wait_empty(m.empty);
            barrier_expect(full, 2 * BOX);
            box_load(to.first, &qkv, full, C + column, (first + other) * BLOCK);
            box_load(to.second, &qkv, full, 2 * C + column, (first + other) * BLOCK);
        }
    }
    use.wait_empty(m.own_empty);
    hand_over(&m.tasks[use.at], {0, 0}, &m.own_full[use.at], 0);
}

/* [64, 64] of this warpgroup to rows of a matrix; to: its row 0, column 0. scale: of row lane / 4 of a warp's; scale8: of that + 8.
 */
template <typename T> __device__ __forceinline__ void put(T *to, int64_t stride, const float (&x)[32], float scale, float scale8) {
    int lane = threadIdx.x % 32;
    to += (threadIdx.x % GROUP / 32 * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++, to += 8 * stride) {
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float factor = r == 0 ? scale : scale8;
            *reinterpret_cast<uint32_t *>(to + 8 * c) = pack<T>(factor * x[4 * c + 2 * r], factor * x[4 * c + 2 * r + 1]);
        }
    }
}

template <typename T> struct consumer {
    shared_memory &m;
    const problem &p;
    int group;
    float top[2], sum[2]; /* of rows lane / 4 and + 8 of a warp's; sum: of this lane's columns */

    /* s becomes p over the maximum so far; keep: what is left of sums over the one before. FIRST: the block on the diagonal, with
     * nothing before it. */
    template <bool FIRST> __device__ __forceinline__ void softmax(float (&s)[64], float (&keep)[2]) {
        int ahead = threadIdx.x % 4 * 2 - (group * HEAD + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float high[4] = {FIRST ? -INFINITY : top[r], -INFINITY, -INFINITY, -INFINITY}, part[2] = {};
#pragma unroll
            for (int j = 0; j < 16; j++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    float &x = s[4 * j + 2 * r + k];
                    x = FIRST && ahead + 8 * j + k > 8 * r ? -INFINITY : x; /* a key after its query */
                    high[2 * (j % 2) + k] = fmaxf(high[2 * (j % 2) + k], x);
                }
            }
            high[0] = fmaxf(fmaxf(high[0], high[1]), fmaxf(high[2], high[3]));
            high[0] = fmaxf(high[0], __shfl_xor_sync(0xffffffffu, high[0], 1));
            high[0] = fmaxf(high[0], __shfl_xor_sync(0xffffffffu, high[0], 2));
            float shift = high[0] * p.scale2;
            keep[r] = FIRST ? 0.0f : exp2_fast(fmaf(top[r], p.scale2, -shift));
#pragma unroll
            for (int j = 0; j < 16; j++) {
                float x0 = exp2_fast(fmaf(s[4 * j + 2 * r], p.scale2, -shift));
                float x1 = exp2_fast(fmaf(s[4 * j + 2 * r + 1], p.scale2, -shift));
                part[0] += x0;
                part[1] += x1;
                s[4 * j + 2 * r] = x0;
                s[4 * j + 2 * r + 1] = x1;
            }
            top[r] = high[0];
            sum[r] = FIRST ? part[0] + part[1] : fmaf(sum[r], keep[r], part[0] + part[1]);
        }
    }

    /* One block of keys; first: the one on the diagonal. `before` is let go, if there is one. */
    __device__ __forceinline__ void block(float (&o)[32], const unsigned char *q, const pair_of_boxes &from, uint64_t *before,
                                          bool first) {
        float s[64], keep[2];
        uint32_t left[32];
        mma_fence();
        multiply_first<T>(s, q, from.first, group);
        mma_wait<0>(); /* for the second product with the block before, too */
        mma_settled(s);
        mma_settled(o);
        if (first) {
            softmax<true>(s, keep);
        } else {
            barrier_arrive(before);
            softmax<false>(s, keep);
#pragma unroll
            for (int i = 0; i < 32; i++) {
                o[i] *= keep[i / 2 % 2];
            }
        }
#pragma unroll
        for (int i = 0; i < 32; i++) {
            left[i] = pack<T>(s[2 * i], s[2 * i + 1]);
        }
        mma_fence();
        multiply_second<T>(o, left, from.second, first);
        mma_commit();
    }

    __device__ __forceinline__ void run() {
        float o[32];
        int C = p.H * HEAD;
        ring<2> use;
        ring<STAGES> step;
        for (;; use.advance()) {
            use.wait_full(m.own_full);
            task now = m.tasks[use.at];
            if (now.length == 0) {
                break;
            }
            int row = (now.length - 1) * BLOCK + group * HEAD; /* of the sequence */
            uint64_t *before = nullptr;
            for (int i = 0; i < now.length; i++, step.advance()) {
                step.wait_full(m.full);
                block(o, m.q[use.at], m.stages[step.at], before, i == 0);
                before = &m.empty[step.at];
            }
            mma_wait<0>();
            mma_settled(o);
            barrier_arrive(before);
            barrier_arrive(&m.own_empty[use.at]);
            float *lse = p.lse + (int64_t)now.head * p.blocks * BLOCK + row + threadIdx.x % GROUP / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
                sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
                if (threadIdx.x % 4 == 0) {
                    lse[8 * r] = fmaf(top[r] * p.scale2, LN_2, logf(sum[r]));
                }
            }
            T *to = (T *)p.out + (int64_t)(now.head / p.H * p.blocks * BLOCK + row) * C + now.head % p.H * HEAD;
            put<T>(to, C, o, 1.0f / sum[0], 1.0f / sum[1]);
        }
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    forward_kernel(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ problem p) {
    shared_memory &m = shared_begin<shared_memory>();
    int group = group_of_thread();
    if (group < 0) {
        give_registers();
        if (threadIdx.x == 0) {
            produce(m, qkv, p);
        }
    } else {
        take_registers();
        consumer<T>{m, p, group, {}, {}}.run();
    }
}

template <typename T> cpl_status forward(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    CUtensorMap qkv;
    cpl_status st = CPL_OK;
    const problem p = {(int)(s->B * s->H), (int)s->H, (int)(s->T / BLOCK), LOG2_E / sqrtf((float)HEAD), x->out, x->lse};
    CPL_TRY(cpl_tensor_map(&qkv, s->dt, x->qkv, s->B * s->T, 3 * s->H * HEAD, BLOCK));
    CPL_TRY(launch<shared_memory>(dev, forward_kernel<T>, "attention_fwd", p.heads * p.blocks, qkv, p));
done:
    return st;
}

} // namespace

extern "C" cpl_status cpl_attention_sm90_fwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    return s->dt == CPL_BF16 ? forward<__nv_bfloat16>(dev, s, x) : forward<__half>(dev, s, x);
}

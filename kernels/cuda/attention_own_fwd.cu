/* Causal self-attention, forward, our own kernels: a running softmax over blocks of keys (Dao 2023, arXiv:2307.08691, alg. 1), on
 * tensor cores for 16-bit heads of D % 8 == 0, D <= 128, in f32 otherwise. Refuses D > 256. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_tile.cuh"

/* Keys are taken from token 0 upwards: every row sees key 0, so that its running maximum is finite after the first block unless
 * scores are not, and then the row becomes NaN. A key in the future has score -inf and probability exactly 0. An infinite value of
 * v in the block that crosses the diagonal makes the rows of that block NaN (0 times inf), also rows before it. */

/* A block: R = 16 M queries of a head (longest rows first), all keys up to the last of them.
 * Shared: q [R, W], one of k and v [R, W], probabilities [R, R]. Scores in powers of two: scale2 = log2(e) / sqrt(D). */
template <typename T, int M, int W>
__global__ void __launch_bounds__(TILE_THREADS)
    forward_tile(T *out, float *lse, const T *qkv, int tokens, int H, int D, float scale2, bool vector) {
    constexpr int R = 16 * M;
    extern __shared__ float4 shared[];
    float *q = reinterpret_cast<float *>(shared), *kv = q + R * tile_ld<W>, *p = kv + R * tile_ld<W>;
    int64_t C = (int64_t)H * D;
    int blocks = (tokens + R - 1) / R, row0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * R;
    int64_t head = blockIdx.x / blocks, b = head / H, h = head % H;
    const T *x = qkv + b * tokens * 3 * C + h * D;
    float acc[M][W / 64][4] = {}, top[M], sum[M];
#pragma unroll
    for (int i = 0; i < M; i++) {
        top[i] = -INFINITY;
        sum[i] = 0.0f;
    }
    tile_load<T, M, W>(q, x, 3 * C, row0, tokens, D, vector);
    for (int k0 = 0; k0 < row0 + R && k0 < tokens; k0 += R) {
        float s[M][M];
        __syncthreads();
        tile_load<T, M, W>(kv, x + C, 3 * C, k0, tokens, D, vector);
        __syncthreads();
        tile_dots<M, W>(s, q, kv, D);
#pragma unroll
        for (int i = 0; i < M; i++) {
            float high = top[i], part = 0.0f;
#pragma unroll
            for (int j = 0; j < M; j++) {
                s[i][j] = k0 + tile_x() + 16 * j <= row0 + tile_y() + 16 * i ? s[i][j] * scale2 : -INFINITY;
                high = fmaxf(high, s[i][j]);
            }
            high = row_max(high);
            float keep = exp2f(top[i] - high);
#pragma unroll
            for (int j = 0; j < M; j++) {
                s[i][j] = exp2f(s[i][j] - high);
                part += s[i][j];
            }
            top[i] = high;
            sum[i] = sum[i] * keep + part;
#pragma unroll
            for (int c = 0; c < W / 64 * 4; c++) {
                acc[i][c / 4][c % 4] *= keep;
            }
        }
        tile_put<M>(p, s);
        __syncthreads();
        tile_load<T, M, W>(kv, x + 2 * C, 3 * C, k0, tokens, D, vector);
        __syncthreads();
        tile_accumulate<M, W>(acc, p, kv);
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        int row = row0 + tile_y() + 16 * i;
        sum[i] = row_sum(sum[i]);
        if (tile_x() == 0 && row < tokens) {
            lse[head * tokens + row] = top[i] * LN_2 + logf(sum[i]);
        }
        sum[i] = 1.0f / sum[i];
    }
    tile_store<T, M, W>(out + b * tokens * C + h * D, C, acc, sum, row0, tokens, D, vector);
}

template <typename T, int M, int W>
static void launch_tile(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    constexpr int R = 16 * M;
    int bytes = (int)sizeof(float) * R * (2 * tile_ld<W> + score_ld<M>);
    int64_t grid = s->B * s->H * cpl_ceil_div(s->T, R);
    bool vector = s->D % 4 == 0 && aligned16(x->qkv, x->out);
    cudaFuncSetAttribute(forward_tile<T, M, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    forward_tile<T, M, W><<<(unsigned)grid, TILE_THREADS, bytes, cpl_cuda_stream(dev)>>>(
        (T *)x->out, x->lse, (const T *)x->qkv, (int)s->T, (int)s->H, (int)s->D, LOG2_E / sqrtf((float)s->D), vector);
}

/* One step of the running softmax: scores s of this warp's rows become probabilities, o is rescaled. Row r of tile m: g + 8 r. */
template <int MT, int NT, int DT>
__device__ __forceinline__ void softmax_step(float (&s)[MT][NT][4], float (&o)[MT][DT][4], float (&top)[MT][2], float (&sum)[MT][2],
                                             float scale2) {
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        int m = i / 2, r = i % 2;
        float high = top[m][r], part = 0.0f;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            high = fmaxf(high, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        }
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
        float keep = exp2_fast((top[m][r] - high) * scale2), shift = high * scale2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            s[m][n][2 * r] = exp2_fast(fmaf(s[m][n][2 * r], scale2, -shift));
            s[m][n][2 * r + 1] = exp2_fast(fmaf(s[m][n][2 * r + 1], scale2, -shift));
            part += s[m][n][2 * r] + s[m][n][2 * r + 1];
        }
        top[m][r] = high;
        sum[m][r] = sum[m][r] * keep + part;
#pragma unroll
        for (int n = 0; n < DT; n++) {
            o[m][n][2 * r] *= keep;
            o[m][n][2 * r + 1] *= keep;
        }
    }
}

/* A block: 4 warps of 16 MT queries of a head, longest rows first; keys and values in two stages of BN tokens.
 * Shared: q [64 MT, HD], 2 x (k, v) [BN, HD]. */
template <typename T, int HD, int MT, int BN, bool KEEP>
__global__ void __launch_bounds__(MMA_THREADS, 2)
    forward_mma(T *out, float *lse, const T *qkv, int tokens, int H, int D, float scale) {
    constexpr int LD = mma_ld<HD>, BM = MMA_WARPS * 16 * MT, NT = BN / 8;
    extern __shared__ float4 shared[];
    T *q = reinterpret_cast<T *>(shared), *kv = q + BM * LD;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t C = (int64_t)H * D;
    int blocks = (tokens + BM - 1) / BM, row0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * BM;
    int64_t head = blockIdx.x / blocks, b = head / H, h = head % H;
    const T *x = qkv + b * tokens * 3 * C + h * D;
    int first = row0 + warp * 16 * MT, last = first + 16 * MT - 1; /* rows of this warp */
    int steps = ((row0 + BM < tokens ? row0 + BM : tokens) + BN - 1) / BN;
    float o[MT][HD / 8][4] = {}, top[MT][2], sum[MT][2] = {}, scale2 = scale * LOG2_E;
#pragma unroll
    for (int i = 0; i < MT * 2; i++) {
        top[i / 2][i % 2] = -INFINITY;
    }
    row_operand<T, MT, HD, KEEP> queries(q + warp * 16 * MT * LD, lane);
    mma_load<T, BM, HD>(q, x, 3 * C, row0, tokens, D);
    mma_load<T, BN, HD>(kv, x + C, 3 * C, 0, tokens, D);
    mma_load<T, BN, HD>(kv + BN * LD, x + 2 * C, 3 * C, 0, tokens, D);
    copies_end();
    for (int step = 0; step < steps; step++) {
        const T *k = kv + step % 2 * 2 * BN * LD;
        int k0 = step * BN;
        if (step + 1 < steps) {
            T *next = kv + (step + 1) % 2 * 2 * BN * LD;
            mma_load<T, BN, HD>(next, x + C, 3 * C, k0 + BN, tokens, D);
            mma_load<T, BN, HD>(next + BN * LD, x + 2 * C, 3 * C, k0 + BN, tokens, D);
        }
        copies_end();
        copies_wait<1>();
        __syncthreads();
        if (step == 0) {
            queries.load();
        }
        if (k0 <= last) {
            float s[MT][NT][4];
            mma_dots<T, MT, NT, HD, KEEP>(s, queries, k, lane);
            if (k0 + BN - 1 > first) {
#pragma unroll
                for (int i = 0; i < MT * NT * 4; i++) {
                    int m = i / (NT * 4), n = i / 4 % NT, e = i % 4;
                    int row = first + 16 * m + lane / 4 + e / 2 * 8, key = k0 + 8 * n + lane % 4 * 2 + e % 2;
                    s[m][n][e] = key <= row ? s[m][n][e] : -INFINITY;
                }
            }
            softmax_step<MT, NT, HD / 8>(s, o, top, sum, scale2);
            mma_accumulate<T, MT, NT, HD>(o, s, k + BN * LD, lane);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + 16 * m + lane / 4 + 8 * r;
            float total = sum[m][r];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            factor[r] = 1.0f / total;
            if (lane % 4 == 0 && row < tokens) {
                lse[head * tokens + row] = top[m][r] * scale + logf(total);
            }
        }
        mma_store<T, HD>(out + b * tokens * C + h * D, C, q + (warp * MT + m) * 16 * LD, o[m], factor[0], factor[1], first + 16 * m,
                         tokens, D, lane);
    }
}

template <typename T, int HD, int MT, int BN, bool KEEP>
static void launch_mma(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    constexpr int BM = MMA_WARPS * 16 * MT;
    int bytes = (int)sizeof(T) * mma_ld<HD> * (BM + 4 * BN);
    int64_t grid = s->B * s->H * cpl_ceil_div(s->T, BM);
    cudaFuncSetAttribute(forward_mma<T, HD, MT, BN, KEEP>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    forward_mma<T, HD, MT, BN, KEEP><<<(unsigned)grid, MMA_THREADS, bytes, cpl_cuda_stream(dev)>>>(
        (T *)x->out, x->lse, (const T *)x->qkv, (int)s->T, (int)s->H, (int)s->D, 1.0f / sqrtf((float)s->D));
}

template <typename T>
static bool forward_tensor_cores(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    if (s->D % 8 != 0 || s->D > 128 || !aligned16(x->qkv, x->out)) {
        return false;
    }
    if (s->D <= 32) {
        launch_mma<T, 32, 2, 64, true>(dev, s, x);
    } else if (s->D <= 64) {
        launch_mma<T, 64, 2, 64, true>(dev, s, x);
    } else if (s->D <= 96) {
        launch_mma<T, 96, 2, 32, false>(dev, s, x);
    } else {
        launch_mma<T, 128, 2, 32, false>(dev, s, x);
    }
    return true;
}
template <> bool forward_tensor_cores<float>(cpl_device *, const cpl_attention_shape *, const cpl_attention_buffers *) {
    return false;
}

extern "C" cpl_status cpl_attention_own_fwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    if (s->B * s->T * s->H * s->D == 0) {
        return CPL_OK;
    }
    if (cpl_attention_sm90_usable(dev, s, x)) {
        return cpl_attention_sm90_fwd(dev, s, x);
    }
    if (s->D > 256) {
        return cpl_fail(CPL_UNSUPPORTED, __FILE__, __LINE__, "attention on the GPU: heads of %lld; expected at most 256",
                        (long long)s->D);
    }
    cpl_dispatch(s->dt, [&](auto zero) {
        using T = decltype(zero);
        if (forward_tensor_cores<T>(dev, s, x)) {
            return;
        }
        if (s->D <= 64) {
            launch_tile<T, 4, 64>(dev, s, x);
        } else if (s->D <= 128) {
            launch_tile<T, 4, 128>(dev, s, x);
        } else {
            launch_tile<T, 2, 256>(dev, s, x);
        }
    });
    return cpl_cuda_launched(dev, "attention_fwd");
}

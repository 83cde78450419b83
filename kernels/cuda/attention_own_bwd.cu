/* Causal self-attention, backward, our own kernels: probabilities are made again from log-sum-exp (Dao 2023, arXiv:2307.08691, alg.
 * 2), on tensor cores for 16-bit heads of D % 8 == 0, D <= 128, in f32 otherwise. Refuses atomics and D > 256. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/attention_tile.cuh"

/* Three launches: delta = dout . out per row; dq, a block per block of queries over all its keys; dk and dv, a block per block of
 * keys over all its queries. Each sum has one owner and one order: the same bits on every run, for two more products per pair of
 * blocks than a kernel that adds dq in memory. With "own" and "other" the two are one kernel: own rows     other rows   s = own1
 * other1^T    t = own2 other2^T dq      q, dout      k, v         p = 2^(s - lse)      ds = p (t - delta)      dq = ds k / sqrt(D)
 *   dk, dv  k, v         q, dout      p^T                  ds^T                    dk = ds^T q / sqrt(D), dv = p^T dout
 * Pairs in the future get p = ds = 0 by selection, whatever their scores are; an inf or NaN of a pair in the past goes through. One
 * in dout reaches, as 0 times inf, also the dv of the keys after it in its tile. */

/* delta [B,H,T] = sum over D of dout * out.   dout, out [B,T,C] act; eight lanes a row. */
template <typename T>
__global__ void __launch_bounds__(256)
    row_dots(float *delta, const T *dout, const T *out, int64_t rows, int tokens, int H, int D, bool vector) {
    int64_t row = blockIdx.x * (int64_t)32 + threadIdx.x / 8;
    int lane = threadIdx.x % 8;
    float sum = 0.0f;
    if (row < rows) {
        int64_t head = row / tokens, t = row % tokens, at = ((head / H * tokens + t) * H + head % H) * D;
        if (vector) {
            constexpr int N = pack_of<T>;
            for (int d = lane * N; d < D; d += 8 * N) {
                packed<T, N> x = load<T, N>(dout + at + d), y = load<T, N>(out + at + d);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    sum = fmaf(x.f32(i), y.f32(i), sum);
                }
            }
        } else {
            for (int d = lane; d < D; d += 8) {
                sum = fmaf(to_f32(dout[at + d]), to_f32(out[at + d]), sum);
            }
        }
    }
#pragma unroll
    for (int lanes = 4; lanes > 0; lanes /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    }
    if (lane == 0 && row < rows) {
        delta[row] = sum;
    }
}

/* p and ds of one pair from s = q . k and t = dout . v; shift = log2(e) lse of the query. */
__device__ __forceinline__ void pair_gradient(float &s, float &t, bool seen, float scale2, float shift, float delta) {
    s = seen ? exp2f(fmaf(s, scale2, -shift)) : 0.0f;
    t = seen ? s * (t - delta) : 0.0f;
}

/* A block: R = 16 M own rows of a head. Shared: own1, own2, other1, other2 [R, W], p or ds [R, R]. */
template <typename T, int M, int W, bool KEYS>
__global__ void __launch_bounds__(TILE_THREADS)
    backward_tile(T *dqkv, const T *dout, const T *qkv, const float *lse, const float *delta, int tokens, int H, int D, float scale,
                  bool vector) {
    constexpr int R = 16 * M, TILE = R * tile_ld<W>;
    extern __shared__ float4 shared[];
    float *own1 = reinterpret_cast<float *>(shared), *own2 = own1 + TILE, *other1 = own2 + TILE, *other2 = other1 + TILE;
    float *p = other2 + TILE;
    int64_t C = (int64_t)H * D;
    int blocks = (tokens + R - 1) / R, at = (int)(blockIdx.x % blocks),
        row0 = (KEYS ? at : blocks - 1 - at) * R; /* longest first */
    int64_t head = blockIdx.x / blocks, b = head / H, h = head % H;
    const T *q = qkv + b * tokens * 3 * C + h * D, *k = q + C, *v = k + C, *dy = dout + b * tokens * C + h * D;
    float acc1[M][W / 64][4] = {}, acc2[M][W / 64][4] = {}, shift[M], centre[M], scale2 = scale * LOG2_E;
    lse += head * tokens;
    delta += head * tokens;
    tile_load<T, M, W>(own1, KEYS ? k : q, 3 * C, row0, tokens, D, vector);
    tile_load<T, M, W>(own2, KEYS ? v : dy, KEYS ? 3 * C : C, row0, tokens, D, vector);
    for (int c0 = KEYS ? row0 : 0; c0 < (KEYS ? tokens : row0 + R) && c0 < tokens; c0 += R) {
        float s[M][M], t[M][M];
        __syncthreads();
        tile_load<T, M, W>(other1, KEYS ? q : k, 3 * C, c0, tokens, D, vector);
        tile_load<T, M, W>(other2, KEYS ? dy : v, KEYS ? C : 3 * C, c0, tokens, D, vector);
#pragma unroll
        for (int i = 0; i < M; i++) {
            int query = KEYS ? c0 + tile_x() + 16 * i : row0 + tile_y() + 16 * i;
            shift[i] = query < tokens ? LOG2_E * lse[query] : 0.0f;
            centre[i] = query < tokens ? delta[query] : 0.0f;
        }
        __syncthreads();
        tile_dots<M, W>(s, own1, other1, D);
        tile_dots<M, W>(t, own2, other2, D);
#pragma unroll
        for (int i = 0; i < M * M; i++) {
            int row = row0 + tile_y() + 16 * (i / M), column = c0 + tile_x() + 16 * (i % M), query = KEYS ? column : row;
            bool seen = (KEYS ? row : column) <= query && query < tokens;
            pair_gradient(s[i / M][i % M], t[i / M][i % M], seen, scale2, shift[KEYS ? i % M : i / M],
                          centre[KEYS ? i % M : i / M]);
        }
        if (KEYS) {
            tile_put<M>(p, s);
            __syncwarp();
            tile_accumulate<M, W>(acc2, p, other2);
            __syncwarp();
        }
        tile_put<M>(p, t);
        __syncwarp();
        tile_accumulate<M, W>(acc1, p, other1);
    }
#pragma unroll
    for (int i = 0; i < M; i++) {
        shift[i] = scale;
        centre[i] = 1.0f;
    }
    T *to = dqkv + b * tokens * 3 * C + h * D + (KEYS ? C : 0);
    tile_store<T, M, W>(to, 3 * C, acc1, shift, row0, tokens, D, vector);
    if (KEYS) {
        tile_store<T, M, W>(to + C, 3 * C, acc2, centre, row0, tokens, D, vector);
    }
}

/* pair_gradient of a warp's 16 x 8 NT pairs. Rows `row`, row + 8 of this lane; columns from `column`. Queries are the rows, with
 * shift and centre, or (KEYS) the columns, with lse and delta in shared memory. ALL: none is in the future or past the last token.
 */
template <bool KEYS, bool ALL, int NT>
__device__ __forceinline__ void warp_gradient(float (&s)[NT][4], float (&t)[NT][4], float scale2, const float (&shift)[2],
                                              const float (&centre)[2], const float *lse, const float *delta, int row, int column,
                                              int tokens) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        float2 l = make_float2(0.0f, 0.0f), d = l;
        if (KEYS) {
            l = *reinterpret_cast<const float2 *>(lse + 8 * n);
            d = *reinterpret_cast<const float2 *>(delta + 8 * n);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int r = row + e / 2 * 8, c = column + 8 * n + e % 2, query = KEYS ? c : r;
            bool seen = ALL || ((KEYS ? r : c) <= query && query < tokens);
            float high = KEYS ? LOG2_E * (e % 2 == 0 ? l.x : l.y) : shift[e / 2];
            float middle = KEYS ? (e % 2 == 0 ? d.x : d.y) : centre[e / 2];
            s[n][e] = seen ? exp2_fast(fmaf(s[n][e], scale2, -high)) : 0.0f;
            t[n][e] = seen ? s[n][e] * (t[n][e] - middle) : 0.0f;
        }
    }
}

/* A block: 4 warps of 16 own rows of a head; other rows in two stages of BN.
 * Shared: own1, own2 [64, HD], 2 x (other1, other2) [BN, HD], and for KEYS 2 x (lse, delta) [BN] f32. */
template <typename T, int HD, int BN, bool KEEP, bool KEYS>
__global__ void __launch_bounds__(MMA_THREADS, HD <= 64 ? 3 : 2)
    backward_mma(T *dqkv, const T *dout, const T *qkv, const float *lse, const float *delta, int tokens, int H, int D,
                 float scale) {
    constexpr int LD = mma_ld<HD>, BM = MMA_WARPS * 16, NT = BN / 8;
    extern __shared__ float4 shared[];
    T *own1 = reinterpret_cast<T *>(shared), *own2 = own1 + BM * LD, *others = own2 + BM * LD;
    float *rows = reinterpret_cast<float *>(others + 4 * BN * LD);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t C = (int64_t)H * D;
    int blocks = (tokens + BM - 1) / BM, at = (int)(blockIdx.x % blocks),
        row0 = (KEYS ? at : blocks - 1 - at) * BM; /* longest first */
    int64_t head = blockIdx.x / blocks, b = head / H, h = head % H;
    const T *q = qkv + b * tokens * 3 * C + h * D, *k = q + C, *v = k + C, *dy = dout + b * tokens * C + h * D;
    const T *from1 = KEYS ? q : k, *from2 = KEYS ? dy : v;
    int64_t stride2 = KEYS ? C : 3 * C;
    int first = row0 + warp * 16, last = first + 15; /* rows of this warp */
    int begin = KEYS ? row0 : 0, end = KEYS || row0 + BM > tokens ? tokens : row0 + BM, steps = (end - begin + BN - 1) / BN;
    float acc1[1][HD / 8][4] = {}, acc2[1][KEYS ? HD / 8 : 1][4] = {}, shift[2] = {}, centre[2] = {}, scale2 = scale * LOG2_E;
    lse += head * tokens;
    delta += head * tokens;
    if (!KEYS) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + lane / 4 + 8 * r;
            shift[r] = row < tokens ? LOG2_E * lse[row] : 0.0f;
            centre[r] = row < tokens ? delta[row] : 0.0f;
        }
    }
    auto load_stage = [&](int step) {
        T *to = others + step % 2 * 2 * BN * LD;
        int c0 = begin + step * BN;
        mma_load<T, BN, HD>(to, from1, 3 * C, c0, tokens, D);
        mma_load<T, BN, HD>(to + BN * LD, from2, stride2, c0, tokens, D);
        if (KEYS && (int)threadIdx.x < 2 * BN) {
            int i = threadIdx.x % BN;
            const float *from = (int)threadIdx.x < BN ? lse : delta;
            copy4(shared_at(rows + step % 2 * 2 * BN + threadIdx.x), c0 + i < tokens ? from + c0 + i : from, c0 + i < tokens);
        }
    };
    row_operand<T, 1, HD, KEEP> left1(own1 + warp * 16 * LD, lane), left2(own2 + warp * 16 * LD, lane);
    mma_load<T, BM, HD>(own1, KEYS ? k : q, 3 * C, row0, tokens, D);
    mma_load<T, BM, HD>(own2, KEYS ? v : dy, KEYS ? 3 * C : C, row0, tokens, D);
    load_stage(0);
    copies_end();
    for (int step = 0; step < steps; step++) {
        const T *other1 = others + step % 2 * 2 * BN * LD, *other2 = other1 + BN * LD;
        const float *row_lse = rows + step % 2 * 2 * BN + lane % 4 * 2, *row_delta = row_lse + BN;
        int c0 = begin + step * BN;
        if (step + 1 < steps) {
            load_stage(step + 1);
        }
        copies_end();
        copies_wait<1>();
        __syncthreads();
        if (step == 0) {
            left1.load();
            left2.load();
        }
        if (KEYS ? c0 + BN - 1 >= first : c0 <= last) {
            float s[1][NT][4], t[1][NT][4];
            mma_dots<T, 1, NT, HD, KEEP>(s, left1, other1, lane);
            mma_dots<T, 1, NT, HD, KEEP>(t, left2, other2, lane);
            int row = first + lane / 4, column = c0 + lane % 4 * 2;
            if (KEYS ? c0 >= last && c0 + BN <= tokens : c0 + BN - 1 <= first && last < tokens) {
                warp_gradient<KEYS, true, NT>(s[0], t[0], scale2, shift, centre, row_lse, row_delta, row, column, tokens);
            } else {
                warp_gradient<KEYS, false, NT>(s[0], t[0], scale2, shift, centre, row_lse, row_delta, row, column, tokens);
            }
            if constexpr (KEYS) {
                mma_accumulate<T, 1, NT, HD>(acc2, s, other2, lane);
            }
            mma_accumulate<T, 1, NT, HD>(acc1, t, other1, lane);
        }
        __syncthreads();
    }
    T *to = dqkv + b * tokens * 3 * C + h * D + (KEYS ? C : 0);
    mma_store<T, HD>(to, 3 * C, own1 + warp * 16 * LD, acc1[0], scale, scale, first, tokens, D, lane);
    if constexpr (KEYS) {
        mma_store<T, HD>(to + C, 3 * C, own2 + warp * 16 * LD, acc2[0], 1.0f, 1.0f, first, tokens, D, lane);
    }
}

/* Of one call, what both launches need. */
struct backward {
    cudaStream_t stream;
    const cpl_attention_shape *s;
    const cpl_attention_buffers *x;
    const float *delta;
    int64_t heads;
    float scale;
    bool vector; /* 4 elements may be read at once */
};

template <typename T, int M, int W, bool KEYS> static void launch_tile(const backward &w) {
    constexpr int R = 16 * M;
    int bytes = (int)sizeof(float) * R * (4 * tile_ld<W> + score_ld<M>);
    unsigned grid = (unsigned)(w.heads * cpl_ceil_div(w.s->T, R));
    cudaFuncSetAttribute(backward_tile<T, M, W, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    backward_tile<T, M, W, KEYS><<<grid, TILE_THREADS, bytes, w.stream>>>((T *)w.x->dqkv, (const T *)w.x->dout, (const T *)w.x->qkv,
                                                                          w.x->lse, w.delta, (int)w.s->T, (int)w.s->H, (int)w.s->D,
                                                                          w.scale, w.vector);
}

template <typename T, int HD, int BN, bool KEEP, bool KEYS> static void launch_mma(const backward &w) {
    constexpr int BM = MMA_WARPS * 16;
    int bytes = (int)sizeof(T) * mma_ld<HD> * (2 * BM + 4 * BN) + 4 * BN * (int)sizeof(float);
    unsigned grid = (unsigned)(w.heads * cpl_ceil_div(w.s->T, BM));
    cudaFuncSetAttribute(backward_mma<T, HD, BN, KEEP, KEYS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    backward_mma<T, HD, BN, KEEP, KEYS><<<grid, MMA_THREADS, bytes, w.stream>>>((T *)w.x->dqkv, (const T *)w.x->dout,
                                                                                (const T *)w.x->qkv, w.x->lse, w.delta, (int)w.s->T,
                                                                                (int)w.s->H, (int)w.s->D, w.scale);
}

template <typename T> static bool backward_tensor_cores(const backward &w) {
    int64_t D = w.s->D;
    if (D % 8 != 0 || D > 128 || !aligned16(w.x->qkv, w.x->dout, w.x->dqkv)) {
        return false;
    }
    if (D <= 32) {
        launch_mma<T, 32, 64, true, false>(w);
        launch_mma<T, 32, 32, true, true>(w);
    } else if (D <= 64) {
        launch_mma<T, 64, 64, true, false>(w);
        launch_mma<T, 64, 32, true, true>(w);
    } else if (D <= 96) {
        launch_mma<T, 96, 32, false, false>(w);
        launch_mma<T, 96, 32, false, true>(w);
    } else {
        launch_mma<T, 128, 32, false, false>(w);
        launch_mma<T, 128, 32, false, true>(w);
    }
    return true;
}
template <> bool backward_tensor_cores<float>(const backward &) {
    return false;
}

template <typename T> static void backward_of(const backward &w) {
    const cpl_attention_shape *s = w.s;
    int64_t rows = w.heads * s->T;
    bool vector = s->D % pack_of<T> == 0 && aligned16(w.x->dout, w.x->out);
    row_dots<T><<<(unsigned)cpl_ceil_div(rows, 32), 256, 0, w.stream>>>((float *)w.delta, (const T *)w.x->dout, (const T *)w.x->out,
                                                                        rows, (int)s->T, (int)s->H, (int)s->D, vector);
    if (backward_tensor_cores<T>(w)) {
        return;
    }
    if (s->D <= 64) {
        launch_tile<T, 4, 64, false>(w);
        launch_tile<T, 4, 64, true>(w);
    } else if (s->D <= 128) {
        launch_tile<T, 2, 128, false>(w);
        launch_tile<T, 2, 128, true>(w);
    } else {
        launch_tile<T, 1, 256, false>(w);
        launch_tile<T, 1, 256, true>(w);
    }
}

extern "C" cpl_status cpl_attention_own_bwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    float *delta = nullptr;
    if (s->B * s->T * s->H * s->D == 0) {
        return CPL_OK;
    }
    if (cpl_attention_sm90_usable(dev, s, x)) {
        return cpl_attention_sm90_bwd(dev, s, x);
    }
    if (s->D > 256) {
        return cpl_fail(CPL_UNSUPPORTED, __FILE__, __LINE__, "attention on the GPU: heads of %lld; expected at most 256",
                        (long long)s->D);
    }
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ATTENTION, cpl_attention_delta(s), &delta);
    if (st != CPL_OK) {
        return st;
    }
    bool vector = s->D % 4 == 0 && aligned16(x->qkv, x->dout, x->dqkv);
    const backward w = {cpl_cuda_stream(dev), s, x, delta, s->B * s->H, 1.0f / sqrtf((float)s->D), vector};
    cpl_dispatch(s->dt, [&](auto zero) { backward_of<decltype(zero)>(w); });
    return cpl_cuda_launched(dev, "attention_bwd");
}

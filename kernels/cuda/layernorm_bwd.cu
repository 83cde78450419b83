/* Backward of LayerNorm, with the residual gradient added behind it. Source: Ba et al. 2016, arXiv:1607.06450.
 * Refuses float atomics: sums over rows are partial sums of a fixed share of rows, added in order. */
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/product.h"
#include "kernels/cuda/scratch.h"

namespace {

enum { BACKWARD_THREADS = 256, WARPS = CPL_NORM_ROWS };
enum { WIDE_THREADS = 384 };

/* A block has rows blockIdx.x, + gridDim.x, ... in steps of its warps, a warp a row at a time; dx = rstd (g dy - a - xhat c) with
 * a, c the means of g dy and of g dy xhat. partial [2][blocks][C]: sums of dy xhat and of dy over the rows of the block. KEPT:
 * packs of N elements that a lane keeps of a row. */
template <typename T, int N, int KEPT>
__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward_kernel(T *dx, float *partial, const T *dy, const T *dres, const T *x, const float *mean, const float *rstd, const T *g,
                    int64_t R, int C) {
    extern __shared__ float gathered[]; /* [2][C] */
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, packs = C / N;
    packed<T, N> gain[KEPT];
    float dg[KEPT][N] = {}, db[KEPT][N] = {};
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + 32 * k < packs) {
            gain[k] = load<T, N>(g + (lane + 32 * k) * N);
        }
    }
    for (int64_t row = blockIdx.x * (int64_t)WARPS + warp; row < R; row += (int64_t)gridDim.x * WARPS) {
        packed<T, N> up[KEPT], in[KEPT];
        float m = mean[row], r = rstd[row], a = 0, c = 0;
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (lane + 32 * k < packs) {
                up[k] = load<T, N>(dy + row * C + (lane + 32 * k) * N);
                in[k] = load<T, N>(x + row * C + (lane + 32 * k) * N);
            }
        }
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (lane + 32 * k < packs) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float hat = (in[k].f32(j) - m) * r, t = gain[k].f32(j) * up[k].f32(j);
                    a += t;
                    c = fmaf(t, hat, c);
                    dg[k][j] = fmaf(up[k].f32(j), hat, dg[k][j]);
                    db[k][j] += up[k].f32(j);
                }
            }
        }
        a = warp_sum(a) / (float)C;
        c = warp_sum(c) / (float)C;
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (lane + 32 * k < packs) {
                packed<T, N> rest, out;
                if (dres != nullptr) {
                    rest = load<T, N>(dres + row * C + (lane + 32 * k) * N);
                }
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float hat = (in[k].f32(j) - m) * r;
                    float d = r * (gain[k].f32(j) * up[k].f32(j) - a - hat * c);
                    out.set(j, dres != nullptr ? d + rest.f32(j) : d);
                }
                store(dx + row * C + (lane + 32 * k) * N, out);
            }
        }
    }
    for (int turn = 0; turn < WARPS; turn++) { /* the warps one after another: a fixed order */
        if (warp == turn) {
#pragma unroll
            for (int k = 0; k < KEPT; k++) {
                if (lane + 32 * k < packs) {
#pragma unroll
                    for (int j = 0; j < N; j++) {
                        int at = (lane + 32 * k) * N + j;
                        gathered[at] = turn == 0 ? dg[k][j] : gathered[at] + dg[k][j];
                        gathered[C + at] = turn == 0 ? db[k][j] : gathered[C + at] + db[k][j];
                    }
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < C; i += BACKWARD_THREADS) {
        partial[blockIdx.x * (int64_t)C + i] = gathered[i];
        partial[(gridDim.x + blockIdx.x) * (int64_t)C + i] = gathered[C + i];
    }
}

/* What a thread has of a row. */
template <typename T> struct row_part {
    words<T> up, in, rest; /* of dy, x, dres */
    float shift, rstd;     /* normalised: x rstd + shift */
    __device__ __forceinline__ void read(int64_t row, int64_t C, int column, const T *dy, const T *dres, const T *x,
                                         const float *means, const float *rstds) {
        up = load_words(dy + row * C + column);
        in = load_words(x + row * C + column);
        if (dres != nullptr) {
            rest = load_words(dres + row * C + column);
        }
        rstd = rstds[row];
        shift = -means[row] * rstd;
    }
    __device__ __forceinline__ float hat(int j) const { return fmaf(in.f32(j), rstd, shift); }
};

/* Rows of whole warps, a thread N columns of them: a block has blockDim.x / across groups of `across` = C / N threads, each of
 * which takes one row at a time while the next is under way. A thread's sums over rows are SUMS * N numbers. partial
 * [SUMS][blocks][C]. The last rows come first: what the product before wrote last is in the cache still, and what the next one
 * reads first will be. */
template <typename T, int N, int SUMS>
__global__ void __launch_bounds__(WIDE_THREADS, 2)
    backward_wide_kernel(T *dx, float *partial, const T *dy, const T *dres, const T *x, const float *mean, const float *rstd,
                         const T *g, int64_t R, int C) {
    extern __shared__ float gathered[];            /* [groups][SUMS][C], at the end */
    __shared__ float2 parts[2][WIDE_THREADS / 32]; /* sums of a row over a warp; rows take turns */
    int across = C / N, group = threadIdx.x / across, groups = blockDim.x / across, column = threadIdx.x % across * N;
    int warps = across / 32, turn = 0;
    float sum[SUMS][N] = {}, per_column = 1.0f / (float)C;
    words<T> gain = load_words(g + column);
    row_part<T> own, next;
    int64_t row = R - 1 - ((int64_t)blockIdx.x * groups + group), stride = (int64_t)gridDim.x * groups;
    if (row >= 0) {
        next.read(row, C, column, dy, dres, x, mean, rstd);
    }
    for (; row + group >= 0; row -= stride, turn ^= 1) { /* as often in every group, though the last time some have no row */
        own = next;
        if (row >= stride) {
            next.read(row - stride, C, column, dy, dres, x, mean, rstd);
        }
        float a = 0, c = 0;
        if (row >= 0) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                float d = own.up.f32(j), hat = own.hat(j), t = gain.f32(j) * d;
                a += t;
                c = fmaf(t, hat, c);
                sum[0][j] = fmaf(d, hat, sum[0][j]);
                sum[1][j] += d;
            }
        }
        a = warp_sum(a);
        c = warp_sum(c);
        if (threadIdx.x % 32 == 0) {
            parts[turn][threadIdx.x / 32] = make_float2(a, c);
        }
        asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "r"(across) : "memory"); /* of this group alone */
        if (row < 0) {
            break;
        }
        a = c = 0;
#pragma unroll 1
        for (int w = group * warps; w < (group + 1) * warps; w++) {
            a += parts[turn][w].x;
            c += parts[turn][w].y;
        }
        a *= -per_column * own.rstd;
        c *= -per_column * own.rstd;
        words<T> out;
        constexpr int PAIR = N / 4;
#pragma unroll
        for (int j = 0; j < N; j += PAIR) {
            float d[2];
#pragma unroll
            for (int k = 0; k < PAIR; k++) {
                d[k] = fmaf(own.hat(j + k), c, fmaf(gain.f32(j + k) * own.up.f32(j + k), own.rstd, a));
                d[k] = dres != nullptr ? d[k] + own.rest.f32(j + k) : d[k];
                if (SUMS > 2) {
                    sum[SUMS - 1][j + k] += d[k];
                }
            }
            out.set(j / PAIR, d[0], d[PAIR - 1]);
        }
        store_words(dx + row * C + column, out);
    }
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            gathered[(group * SUMS + s) * C + column + j] = sum[s][j];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SUMS * C; i += blockDim.x) {
        float total = 0;
        for (int t = 0; t < groups; t++) { /* a fixed order */
            total += gathered[t * SUMS * C + i];
        }
        partial[(i / C * (int64_t)gridDim.x + blockIdx.x) * C + i % C] = total;
    }
}

/* Any row: dx by a warp a row; the sums over rows by the kernel after it. */
template <typename T>
__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward_any_kernel(T *dx, const T *dy, const T *dres, const T *x, const float *mean, const float *rstd, const T *g, int64_t R,
                        int64_t C) {
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (row >= R) {
        return;
    }
    float m = mean[row], r = rstd[row], a = 0, c = 0;
    for (int64_t i = lane; i < C; i += 32) {
        float t = to_f32(g[i]) * to_f32(dy[row * C + i]);
        a += t;
        c = fmaf(t, (to_f32(x[row * C + i]) - m) * r, c);
    }
    a = warp_sum(a) / (float)C;
    c = warp_sum(c) / (float)C;
    for (int64_t i = lane; i < C; i += 32) {
        float hat = (to_f32(x[row * C + i]) - m) * r;
        float d = r * (to_f32(g[i]) * to_f32(dy[row * C + i]) - a - hat * c);
        dx[row * C + i] = from_f32<T>(dres != nullptr ? d + to_f32(dres[row * C + i]) : d);
    }
}

/* Before dx is written, which may be dy: thread a column, block a share of rows. */
template <typename T>
__global__ void backward_any_sums_kernel(float *partial, const T *dy, const T *x, const float *mean, const float *rstd, int64_t R,
                                         int64_t C) {
    int64_t column = blockIdx.y * (int64_t)blockDim.x + threadIdx.x;
    if (column >= C) {
        return;
    }
    float dg = 0, db = 0;
    for (int64_t row = blockIdx.x; row < R; row += gridDim.x) {
        float up = to_f32(dy[row * C + column]);
        dg = fmaf(up, (to_f32(x[row * C + column]) - mean[row]) * rstd[row], dg);
        db += up;
    }
    partial[blockIdx.x * C + column] = dg;
    partial[(gridDim.x + blockIdx.x) * C + column] = db;
}

template <typename T, int N>
static bool backward_kept(cpl_device *dev, int pieces, T *dx, float *partial, const T *dy, const T *dres, const T *x,
                          const float *mean, const float *rstd, const T *g, int64_t R, int64_t C) {
    cudaStream_t stream = cpl_cuda_stream(dev);
    if (C % N != 0 || !aligned16(dx, dy, dres, x, g)) {
        return false;
    }
    int64_t each = cpl_ceil_div(C / N, 32);
    size_t shared = 2 * (size_t)C * sizeof(float);
#define CPL_KEPT(kept)                                                                                                             \
    do {                                                                                                                           \
        if (each <= (kept)) {                                                                                                      \
            backward_kernel<T, N, kept>                                                                                            \
                <<<pieces, BACKWARD_THREADS, shared, stream>>>(dx, partial, dy, dres, x, mean, rstd, g, R, (int)C);                \
            return true;                                                                                                           \
        }                                                                                                                          \
    } while (0)
    CPL_KEPT(1);
    CPL_KEPT(2);
    CPL_KEPT(3);
    CPL_KEPT(4);
    CPL_KEPT(6);
#undef CPL_KEPT
    return false;
}

/* False: not rows of whole warps. */
template <typename T, int N>
static bool backward_wide(cpl_device *dev, int pieces, T *dx, float *partial, bool biased, const T *dy, const T *dres, const T *x,
                          const float *mean, const float *rstd, const T *g, int64_t R, int64_t C) {
    if (C % (32 * N) != 0 || C / N > WIDE_THREADS || !aligned16(dx, dy, dres, x, g)) {
        return false;
    }
    int across = (int)(C / N), threads = WIDE_THREADS / across * across;
    size_t shared = 3 * (size_t)threads * N * sizeof(float);
    (biased ? backward_wide_kernel<T, N, 3> : backward_wide_kernel<T, N, 2>)<<<pieces, threads, shared, cpl_cuda_stream(dev)>>>(
        dx, partial, dy, dres, x, mean, rstd, g, R, (int)C);
    return true;
}

} // namespace

extern "C" cpl_status CPL_CUDA(layernorm_bwd)(cpl_device *dev, cpl_dtype dt, void *dx, float *dg, float *db, float *dbias,
                                              const void *dy, const void *dres, const void *x, const float *mean, const float *rstd,
                                              const void *g, int64_t R, int64_t C) {
    float *partial = NULL;
    if (R == 0) {
        return CPL_OK;
    }
    int64_t sm_count = cpl_cuda_of(dev)->sm_count;
    int pieces = (int)cpl_scratch_norm_pieces(R, sm_count);
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ROWS, cpl_scratch_norm(R, C, sm_count), &partial);
    if (st != CPL_OK) {
        return st;
    }
    cudaStream_t stream = cpl_cuda_stream(dev);
    bool biased = false; /* the sums of dx are among the partial ones */
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        if (backward_wide<T, N>(dev, pieces, (T *)dx, partial, dbias != NULL, (const T *)dy, (const T *)dres, (const T *)x, mean,
                                rstd, (const T *)g, R, C)) {
            biased = dbias != NULL;
        } else if (!backward_kept<T, N>(dev, pieces, (T *)dx, partial, (const T *)dy, (const T *)dres, (const T *)x, mean, rstd,
                                        (const T *)g, R, C)) {
            dim3 grid((unsigned)pieces, (unsigned)cpl_ceil_div(C, 128));
            backward_any_sums_kernel<T><<<grid, 128, 0, stream>>>(partial, (const T *)dy, (const T *)x, mean, rstd, R, C);
            backward_any_kernel<T><<<(unsigned)cpl_ceil_div(R, WARPS), BACKWARD_THREADS, 0, stream>>>(
                (T *)dx, (const T *)dy, (const T *)dres, (const T *)x, mean, rstd, (const T *)g, R, C);
        }
    });
    add_partials(stream, {{dg, db, dbias}}, biased ? 3 : 2, partial, C, pieces);
    st = cpl_cuda_launched(dev, "layernorm_bwd");
    return st != CPL_OK || dbias == NULL || biased ? st : cpl_cuda_column_sums(dev, dt, dbias, dx, C, R, C);
}

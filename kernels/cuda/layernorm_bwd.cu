/* Backward of LayerNorm, with the residual gradient added behind it. Source: Ba et al. 2016, arXiv:1607.06450.
 * Refuses float atomics: sums over rows are partial sums of a fixed share of rows, added in order. */
#include "kernels/cuda/norm_rows.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/product.h"
#include "kernels/cuda/scratch.h"

namespace {

/* Rows of a warp in shared memory: one at work, the others, 9 kB or more, under way. */
template <int PACKS> constexpr int stages = 1 + (PACKS < 3 ? 6 / PACKS : 2);
/* Warps of a block, which is alone on its multiprocessor: as many as have registers for a lane's sums, xhat, g dy and g. */
template <typename T, int PACKS> constexpr int most_warps = PACKS > (sizeof(T) == 4 ? 4 : 3) ? 8 : 12;

/* Of dy, x and dres. */
template <typename T, int PACKS> using backward_ring = row_ring<T, PACKS, 3, stages<PACKS>>;

/* Of a row of several warps: its sums a, c over all of them. parts: a place a warp, which its next row but one may take again. */
template <typename T, int PACKS>
__device__ __forceinline__ void add_group(float2 *parts, const backward_ring<T, PACKS> &ring, float *a, float *c) {
    int across = blockDim.x / 32, first = ring.group * across;
    if (ring.lane == 0) {
        parts[ring.warp] = make_float2(*a, *c);
    }
    asm volatile("bar.sync %0, %1;" ::"r"(ring.group + 1), "r"(blockDim.x) : "memory"); /* of this group alone */
    *a = *c = 0;
#pragma unroll 1
    for (int w = first; w < first + across; w++) {
        *a += parts[w].x;
        *c += parts[w].y;
    }
}

/* The warps' sums over rows, through shared memory where their rows were, to partial [SUMS][blocks][C]. */
template <typename T, int PACKS, int SUMS>
__device__ __forceinline__ void write_sums(float *partial, uint4 *shared, const backward_ring<T, PACKS> &ring, int C,
                                           const float (&sum)[SUMS][PACKS][pack_of<T>]) {
    constexpr int N = pack_of<T>, FOURS = PACKS * N / 4 * 32; /* of a warp: [PACKS][N / 4][32] */
    constexpr int APART = stages<PACKS> * 3 * PACKS * 32;     /* 16-byte places of a warp */
    static_assert(SUMS * FOURS <= APART);
    float4 *gathered = (float4 *)shared;
    copies_wait<0>(); /* zeros in place of rows that there were not */
    __syncwarp();
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                const float *four = &sum[s][k][j];
                gathered[ring.warp * APART + s * FOURS + (k * N + j) * 8 + ring.lane] =
                    make_float4(four[0], four[1], four[2], four[3]);
            }
        }
    }
    __syncthreads();
    int across = blockDim.x / 32, threads = blockDim.x * blockDim.y;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < across * SUMS * FOURS; i += threads) {
        int member = i / (SUMS * FOURS), at = i % (SUMS * FOURS), four = at % FOURS;
        int within = four / (N * 8) * (32 * N) + four % 32 * N + four / 32 % (N / 4) * 4, column = member * ring.share + within;
        float4 total = {};
        for (int w = member; w < threads / 32; w += across) { /* a fixed order */
            float4 one = gathered[w * APART + at];
            total = make_float4(total.x + one.x, total.y + one.y, total.z + one.z, total.w + one.w);
        }
        if (within < ring.share && column < C) {
            *(float4 *)&partial[(at / FOURS * (int64_t)gridDim.x + blockIdx.x) * C + column] = total;
        }
    }
}

/* dx = rstd (g dy - a - xhat c) + dres with a, c the means of g dy and of g dy xhat. partial [SUMS][blocks][C]: sums of dy xhat, of
 * dy and of dx over the rows of a block, which has a row a warp, or WIDE: a row several. */
template <typename T, int PACKS, int SUMS, bool WIDE>
__global__ void __launch_bounds__(32 * most_warps<T, PACKS>, 1)
    backward_kernel(T *dx, float *partial, const T *dy, const T *dres, const T *x, const float *mean, const float *rstd, const T *g,
                    int64_t R, int C) {
    using ring_of = backward_ring<T, PACKS>;
    constexpr int N = pack_of<T>, PAIR = N / 4, SPAN = ring_of::SPAN, PART = ring_of::PART, AHEAD = stages<PACKS> - 1;
    extern __shared__ uint4 shared[];
    __shared__ float2 parts[2][most_warps<T, PACKS>]; /* WIDE */
    const ring_of ring(shared, C, WIDE);
    words<T> gain[PACKS];
    float sum[SUMS][PACKS][N] = {}, means = 0, rstds = 0, per_column = 1.0f / (float)C;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        gain[k] = k * SPAN < ring.own ? load_words(g + ring.column + k * SPAN) : words<T>{};
    }
    int64_t row = ring.first(R), stride = ring.stride();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        ring.send(s * ring_of::ROW, row - s * stride, C, dres, dy, x);
    }
    int64_t after = WIDE ? ring.group * (int64_t)gridDim.x : 0; /* the block's first group, whose row comes before */
#pragma unroll 1
    for (int full = 0, empty = ring_of::LAST, turn = 0; row + after >= 0; row -= stride, turn++) {
        float t[PACKS][N], hat[PACKS][N], a = 0, c = 0;
        if (WIDE && row < 0) { /* groups come to their barriers equally often, though the last time some have no row */
            add_group(parts[turn % 2], ring, &a, &c);
            break;
        }
        ring.send(empty, row - AHEAD * stride, C, dres, dy, x);
        if (turn % 32 == 0 && row >= ring.lane * stride) { /* of the next 32 rows, one a lane */
            means = mean[row - ring.lane * stride];
            rstds = rstd[row - ring.lane * stride];
        }
        float r = __shfl_sync(0xffffffffu, rstds, turn % 32), shift = -r * __shfl_sync(0xffffffffu, means, turn % 32);
        copies_wait<AHEAD>();
        const T *own = ring.at + full;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            words<T> up = load_words(own + k * SPAN), in = load_words(own + PART + k * SPAN);
            held(&gain[k]);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float d = up.f32(j);
                hat[k][j] = fmaf(in.f32(j), r, shift);
                t[k][j] = gain[k].f32(j) * d;
                a += t[k][j];
                c = fmaf(t[k][j], hat[k][j], c);
                sum[0][k][j] = fmaf(d, hat[k][j], sum[0][k][j]);
                sum[1][k][j] += d;
            }
        }
        a = warp_sum(a);
        c = warp_sum(c);
        if (WIDE) {
            add_group(parts[turn % 2], ring, &a, &c);
        }
        a *= -per_column * r;
        c *= -per_column * r;
        T *to = dx + row * C + ring.column;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            words<T> rest = load_words(own + 2 * PART + k * SPAN), out;
#pragma unroll
            for (int j = 0; j < N; j += PAIR) {
                float d[2];
#pragma unroll
                for (int i = 0; i < PAIR; i++) {
                    d[i] = fmaf(hat[k][j + i], c, fmaf(t[k][j + i], r, a)) + rest.f32(j + i);
                    if (SUMS > 2) {
                        sum[SUMS - 1][k][j + i] += d[i];
                    }
                }
                out.set(j / PAIR, d[0], d[PAIR - 1]);
            }
            if (k * SPAN < ring.own) {
                store_words(to + k * SPAN, out);
            }
        }
        empty = full;
        full = full == ring_of::LAST ? 0 : full + ring_of::ROW;
    }
    write_sums<T, PACKS, SUMS>(partial, shared, ring, C, sum);
}

/* Any row: dx by a warp a row; the sums over rows by the kernel after it. */
template <typename T>
__global__ void __launch_bounds__(ANY_THREADS) backward_any_kernel(T *dx, const T *dy, const T *dres, const T *x, const float *mean,
                                                                   const float *rstd, const T *g, int64_t R, int64_t C) {
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)ANY_WARPS + threadIdx.x / 32;
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

template <typename T>
using backward_plan =
    row_plan<T *, float *, const T *, const T *, const T *, const float *, const float *, const T *, int64_t, int>;
template <typename T, int PACKS, bool WIDE = false> backward_plan<T> plan_of(bool biased) {
    using ring = backward_ring<T, PACKS>;
    return {biased ? backward_kernel<T, PACKS, 3, WIDE> : backward_kernel<T, PACKS, 2, WIDE>, most_warps<T, PACKS>, ring::PART,
            (int64_t)sizeof(T) * stages<PACKS> * ring::ROW};
}
template <typename T> backward_plan<T> plan_for(int64_t C, bool biased) {
    int64_t packs = cpl_ceil_div(C, 32 * pack_of<T>);
    if constexpr (sizeof(T) == 4) {
        if (packs > 4 && packs <= 8) {
            return packs > 6 ? plan_of<T, 8>(biased) : plan_of<T, 6>(biased);
        }
    }
    return packs > 4   ? plan_of<T, 24 / pack_of<T>, true>(biased)
           : packs > 3 ? plan_of<T, 4>(biased)
           : packs > 2 ? plan_of<T, 3>(biased)
           : packs > 1 ? plan_of<T, 2>(biased)
                       : plan_of<T, 1>(biased);
}

/* *done false: rows that are not aligned, or wider than a block takes. */
template <typename T>
cudaError_t backward_aligned(bool *done, cpl_device *dev, int pieces, T *dx, float *partial, bool biased, const T *dy,
                             const T *dres, const T *x, const float *mean, const float *rstd, const T *g, int64_t R, int64_t C) {
    *done = false;
    if (C % pack_of<T> != 0 || !aligned16(dx, dy, dres, x, g)) {
        return cudaSuccess;
    }
    return launch_rows(done, dev, plan_for<T>(C, biased), C, pieces, dx, partial, dy, dres, x, mean, rstd, g, R, (int)C);
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
    bool aligned = false; /* then the sums of dx are among the partial ones */
    cudaError_t error = cudaSuccess;
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        error = backward_aligned<T>(&aligned, dev, pieces, (T *)dx, partial, dbias != NULL, (const T *)dy, (const T *)dres,
                                    (const T *)x, mean, rstd, (const T *)g, R, C);
        if (error == cudaSuccess && !aligned) {
            dim3 grid((unsigned)pieces, (unsigned)cpl_ceil_div(C, 128));
            backward_any_sums_kernel<T><<<grid, 128, 0, stream>>>(partial, (const T *)dy, (const T *)x, mean, rstd, R, C);
            backward_any_kernel<T><<<(unsigned)cpl_ceil_div(R, ANY_WARPS), ANY_THREADS, 0, stream>>>(
                (T *)dx, (const T *)dy, (const T *)dres, (const T *)x, mean, rstd, (const T *)g, R, C);
        }
    });
    if (error != cudaSuccess) {
        return cpl_cuda_status(error, __FILE__, __LINE__, "layernorm_bwd");
    }
    add_partials(stream, {{dg, db, dbias}}, aligned && dbias != NULL ? 3 : 2, partial, C, pieces);
    st = cpl_cuda_launched(dev, "layernorm_bwd");
    return st != CPL_OK || dbias == NULL || aligned ? st : cpl_cuda_column_sums(dev, dt, dbias, dx, C, R, C);
}

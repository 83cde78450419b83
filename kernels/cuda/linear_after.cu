/* What follows a matrix product where it is not done in the same pass: bias and residual, GELU's derivative, column sums.
 * Refuses float atomics: column sums are partial sums of fixed pieces of rows, added in order. */
#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/product.h"
#include "kernels/cuda/scratch.h"

enum { THREADS = 256, SUM_COLUMNS = 64, SUM_LANES = 8 };

template <typename T, int N> __global__ void gelu_grad_kernel(T *dx, const T *pre, int64_t packs) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < packs; i += (int64_t)gridDim.x * blockDim.x) {
        packed<T, N> p = load<T, N>(pre + i * N), d = load<T, N>(dx + i * N);
#pragma unroll
        for (int j = 0; j < N; j++) {
            d.set(j, d.f32(j) * cpl_gelu_grad(p.f32(j)));
        }
        store(dx + i * N, d);
    }
}

extern "C" cpl_status cpl_cuda_gelu_grad(cpl_device *dev, cpl_dtype dt, void *dx, const void *pre, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        if (aligned16(dx, pre) && n % N == 0) {
            gelu_grad_kernel<T, N>
                <<<grid_for(dev, n / N, THREADS, 16), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)dx, (const T *)pre, n / N);
        } else {
            gelu_grad_kernel<T, 1><<<grid_for(dev, n, THREADS, 16), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)dx, (const T *)pre, n);
        }
    });
    return cpl_cuda_launched(dev, "gelu_grad");
}

template <typename T>
__global__ void add_apart_kernel(T *y, const float *sum, const T *bias, const T *residual, int64_t n, int64_t N) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        float v = sum[i];
        v += bias != nullptr ? to_f32(bias[i % N]) : 0;
        v += residual != nullptr ? to_f32(residual[i]) : 0;
        y[i] = from_f32<T>(v);
    }
}

extern "C" cpl_status cpl_cuda_add_apart(cpl_device *dev, cpl_dtype dt, void *y, const float *sum, const void *bias,
                                         const void *residual, int64_t R, int64_t N) {
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        add_apart_kernel<T><<<grid_for(dev, R * N, THREADS, 16), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, sum, (const T *)bias,
                                                                                                     (const T *)residual, R * N, N);
    });
    return cpl_cuda_launched(dev, "what follows a product");
}

/* partial[piece, column]: a block has SUM_COLUMNS columns of one piece of rows; SUM_LANES rows at a time, V columns a thread. The
 * last piece comes first, for it may be in the cache still. */
template <typename T, int V>
__global__ void column_partials_kernel(float *partial, const T *x, int64_t ld, int64_t R, int64_t N, int64_t rows_each) {
    __shared__ float sums[SUM_LANES][SUM_COLUMNS + 1];
    constexpr int ACROSS = SUM_COLUMNS / V;
    int lane = threadIdx.x / ACROSS, part = threadIdx.x % ACROSS;
    int64_t column = blockIdx.x * (int64_t)SUM_COLUMNS + part * V;
    int64_t piece = gridDim.y - 1 - blockIdx.y, first = piece * rows_each, last = first + rows_each < R ? first + rows_each : R;
    float sum[V] = {};
    if (column < N) {
#pragma unroll 4
        for (int64_t r = first + lane; r < last; r += SUM_LANES) {
            packed<T, V> row = load<T, V>(x + r * ld + column);
#pragma unroll
            for (int j = 0; j < V; j++) {
                sum[j] += row.f32(j);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < V; j++) {
        sums[lane][part * V + j] = sum[j];
    }
    __syncthreads();
    int64_t own = blockIdx.x * (int64_t)SUM_COLUMNS + threadIdx.x;
    if (threadIdx.x < SUM_COLUMNS && own < N) {
        float total = 0;
#pragma unroll
        for (int l = 0; l < SUM_LANES; l++) {
            total += sums[l][threadIdx.x];
        }
        partial[piece * N + own] = total;
    }
}

template <typename T, int V>
static void column_partials(cpl_device *dev, float *partial, const void *x, int64_t ld, int64_t R, int64_t N, int pieces,
                            int64_t rows_each) {
    dim3 grid((unsigned)cpl_ceil_div(N, SUM_COLUMNS), (unsigned)pieces);
    column_partials_kernel<T, V>
        <<<grid, SUM_COLUMNS / V * SUM_LANES, 0, cpl_cuda_stream(dev)>>>(partial, (const T *)x, ld, R, N, rows_each);
}

extern "C" cpl_status cpl_cuda_column_sums(cpl_device *dev, cpl_dtype dt, float *sums, const void *x, int64_t ld, int64_t R,
                                           int64_t N) {
    float *partial = NULL;
    int64_t rows_each = cpl_scratch_column_rows(R);
    int pieces = (int)cpl_ceil_div(R, rows_each);
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ROWS, cpl_scratch_columns(R, N), &partial);
    if (st != CPL_OK) {
        return st;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int V = pack_of<T>;
        if (aligned16(x) && ld % V == 0 && N % V == 0) {
            column_partials<T, V>(dev, partial, x, ld, R, N, pieces, rows_each);
        } else {
            column_partials<T, 1>(dev, partial, x, ld, R, N, pieces, rows_each);
        }
    });
    add_partials(cpl_cuda_stream(dev), {{sums}}, 1, partial, N, pieces);
    return cpl_cuda_launched(dev, "column_sums");
}

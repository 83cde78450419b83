/* What the operations over flat f32 buffers share: magnitudes as integers, chunk sums, counters that lanes do not fight over.
 * Refuses to know what the buffers hold. */
#ifndef CPL_KERNELS_CUDA_FLAT_CUH
#define CPL_KERNELS_CUDA_FLAT_CUH

#include "kernels/cuda/device.cuh"

/* |x| as an integer, ordered as the magnitudes are; +0 and -0 are equal. */
__device__ __forceinline__ uint32_t key_of(float x) {
    return __float_as_uint(x) & 0x7fffffffu;
}
/* Keys from here on are inf, above it nan. */
enum { CPL_KEY_INF = 0x7f800000 };

/* This thread's part of a chunk of at most CPL_SUM_CHUNK elements, THREADS a block, in f64, where squares of f32 are exact. A whole
 * chunk is asked for before any of it is added. */
template <bool SQUARED> __device__ __forceinline__ double chunk_term(double sum, float x) {
    double v = (double)x;
    return SQUARED ? fma(v, v, sum) : sum + v;
}
template <bool SQUARED, int THREADS> __device__ __forceinline__ double chunk_part(const float *x, int64_t count, bool wide) {
    constexpr int LOADS = CPL_SUM_CHUNK / (4 * THREADS);
    double sum = 0;
    if (wide && count == CPL_SUM_CHUNK) {
        packed<float, 4> v[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            v[k] = load<float, 4>(x + (k * THREADS + threadIdx.x) * 4);
        }
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                sum = chunk_term<SQUARED>(sum, v[k].at[j]);
            }
        }
        return sum;
    }
    /* the same elements in the same order, so that alignment does not show */
    for (int i = threadIdx.x * 4; i < count; i += THREADS * 4) {
        for (int j = i; j < i + 4 && j < count; j++) {
            sum = chunk_term<SQUARED>(sum, x[j]);
        }
    }
    return sum;
}

/* sums[i] = sum of chunk i, of its squares where SQUARED; a block a chunk. */
template <bool SQUARED, int THREADS>
__global__ void __launch_bounds__(THREADS) chunk_kernel(double *sums, const float *x, int64_t n, bool wide) {
    __shared__ double shared[32];
    int64_t first = blockIdx.x * (int64_t)CPL_SUM_CHUNK, left = n - first;
    double sum = block_sum(chunk_part<SQUARED, THREADS>(x + first, left < CPL_SUM_CHUNK ? left : CPL_SUM_CHUNK, wide), shared);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
    }
}

/* Sum of this thread's column-wise view of row `row` of counters [rows][COLUMNS]: every thread of a warp takes another row and
 * starts at another column, so that no two meet in a bank of shared memory. */
template <int COLUMNS, typename F> __device__ __forceinline__ void over_columns(const uint32_t *table, int row, F f) {
#pragma unroll 8
    for (int c = 0; c < COLUMNS; c++) {
        f(table[row * COLUMNS + (c + threadIdx.x) % COLUMNS]);
    }
}

#endif

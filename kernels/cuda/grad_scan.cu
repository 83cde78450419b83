/* What a step must know of its gradient: where it is not finite, its sums of squares, its exponents.
 * Refuses float atomics: one f64 partial sum a chunk; bits and counts are integers, whose order does not matter. */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256, PIECE = 16384, EXPONENTS = 256 };

__device__ __forceinline__ uint32_t key_of(float x) {
    return __float_as_uint(x) & 0x7fffffffu;
}

/* The tensor that element i of the buffer is in: begin[t] <= i < begin[t + 1], or -1. */
__device__ int64_t tensor_of(const int64_t *begin, int64_t tensors, int64_t i) {
    int64_t low = 0, high = tensors;
    if (i < begin[0] || i >= begin[tensors]) {
        return -1;
    }
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (begin[middle] <= i) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ void mark(uint32_t *kinds, uint32_t *any, const int64_t *begin, int64_t tensors, int64_t i, uint32_t key) {
    int64_t t = tensor_of(begin, tensors, i);
    if (t >= 0) {
        atomicOr(&kinds[t], key == 0x7f800000u ? 1u : 2u);
        atomicOr(any, 1u);
    }
}

/* N elements an access. The usual piece is finite and costs one comparison of its largest key. */
template <int N>
__global__ void scan_kernel(uint32_t *kinds, uint32_t *any, const float *grad, const int64_t *begin, int64_t tensors, int64_t n) {
    int64_t first = blockIdx.x * (int64_t)PIECE, last = first + PIECE < n ? first + PIECE : n;
    uint32_t largest = 0;
#pragma unroll 8
    for (int64_t i = first + threadIdx.x * N; i < last; i += THREADS * N) {
        packed<float, N> x = load<float, N>(grad + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            largest = max(largest, key_of(x.at[j]));
        }
    }
    if (largest >= 0x7f800000u) {
        for (int64_t i = first + threadIdx.x * N; i < last; i += THREADS * N) {
            for (int j = 0; j < N; j++) {
                uint32_t key = key_of(grad[i + j]);
                if (key >= 0x7f800000u) {
                    mark(kinds, any, begin, tensors, i + j, key);
                }
            }
        }
    }
}

/* begin[0] is where the first tensor begins; the scan covers [0, begin[tensors]) from there on. */
extern "C" cpl_status CPL_CUDA(grad_scan)(cpl_device *dev, uint32_t *kinds, uint32_t *any, const float *grad, const int64_t *begin,
                                          int64_t tensors) {
    const void *table = NULL;
    cpl_status st = CPL_CUDA(zero)(dev, kinds, (size_t)tensors * sizeof *kinds);
    if (st != CPL_OK || tensors == 0 || begin[tensors] == 0) {
        return st;
    }
    st = cpl_cuda_constant(dev, begin, ((size_t)tensors + 1) * sizeof *begin, &table);
    if (st != CPL_OK) {
        return st;
    }
    int64_t n = begin[tensors];
    unsigned pieces = (unsigned)cpl_ceil_div(n, PIECE);
    if (aligned16(grad) && n % 4 == 0) {
        scan_kernel<4><<<pieces, THREADS, 0, cpl_cuda_stream(dev)>>>(kinds, any, grad, (const int64_t *)table, tensors, n);
    } else {
        scan_kernel<1><<<pieces, THREADS, 0, cpl_cuda_stream(dev)>>>(kinds, any, grad, (const int64_t *)table, tensors, n);
    }
    return cpl_cuda_launched(dev, "grad_scan");
}

/* A block a chunk; squares of f32 are exact in f64. */
template <int N> __global__ void squares_kernel(double *chunk_sums, const float *x, int64_t n) {
    __shared__ double shared[32];
    int64_t first = blockIdx.x * (int64_t)CPL_SUM_CHUNK, last = first + CPL_SUM_CHUNK < n ? first + CPL_SUM_CHUNK : n;
    double sum = 0;
#pragma unroll 4
    for (int64_t i = first + threadIdx.x * N; i < last; i += THREADS * N) {
        packed<float, N> v = load<float, N>(x + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum = fma((double)v.at[j], (double)v.at[j], sum);
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        chunk_sums[blockIdx.x] = sum;
    }
}

extern "C" cpl_status CPL_CUDA(sum_squares)(cpl_device *dev, double *chunk_sums, const float *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    unsigned chunks = (unsigned)cpl_ceil_div(n, CPL_SUM_CHUNK);
    if (aligned16(x) && n % 4 == 0) {
        squares_kernel<4><<<chunks, THREADS, 0, cpl_cuda_stream(dev)>>>(chunk_sums, x, n);
    } else {
        squares_kernel<1><<<chunks, THREADS, 0, cpl_cuda_stream(dev)>>>(chunk_sums, x, n);
    }
    return cpl_cuda_launched(dev, "sum_squares");
}

/* Counts of a block in shared memory, one table a warp; the largest magnitude as a key, which orders like the value. */
__global__ void exponents_kernel(unsigned long long *counts, uint32_t *max_abs, const float *x, int64_t n, float factor) {
    __shared__ uint32_t count[THREADS / 32][EXPONENTS];
    for (int i = threadIdx.x; i < THREADS / 32 * EXPONENTS; i += THREADS) {
        count[i / EXPONENTS][i % EXPONENTS] = 0;
    }
    __syncthreads();
    uint32_t largest = 0;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        uint32_t key = key_of(__fmul_rn(factor, x[i]));
        largest = key < 0x7f800000u ? max(largest, key) : largest;
        atomicAdd(&count[threadIdx.x / 32][key >> 23], 1u);
    }
    atomicMax(max_abs, largest);
    __syncthreads();
    for (int e = threadIdx.x; e < EXPONENTS; e += THREADS) {
        unsigned long long sum = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            sum += count[w][e];
        }
        if (sum > 0) {
            atomicAdd(&counts[e], sum);
        }
    }
}

extern "C" cpl_status CPL_CUDA(exponents)(cpl_device *dev, int64_t *counts, float *max_abs, const float *x, int64_t n,
                                          float factor) {
    if (n == 0) {
        return CPL_OK;
    }
    exponents_kernel<<<grid_for(dev, n, THREADS * 16, 4), THREADS, 0, cpl_cuda_stream(dev)>>>((unsigned long long *)counts,
                                                                                              (uint32_t *)max_abs, x, n, factor);
    return cpl_cuda_launched(dev, "exponents");
}

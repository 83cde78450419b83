/* Casting, adding and summing flat buffers.
 * Refuses float atomics: sums are one f64 partial a chunk, added in an order that only the length decides. */
#include "kernels/cuda/flat.cuh"
#include "kernels/cuda/scratch.h"

namespace {

enum { THREADS = 256, LOADS = 4, TOTAL_THREADS = 1024, AT_ONCE = 32768 };

/* NaN keeps its sign and leading payload bits, as on the CPU (kernels/dtype.h); the conversion instructions would lose them. */
__device__ __forceinline__ float cast(float x, float) {
    return x;
}
__device__ __forceinline__ __nv_bfloat16 cast(float x, __nv_bfloat16) {
    uint32_t u = __float_as_uint(x);
    __nv_bfloat16 nan = __ushort_as_bfloat16((unsigned short)((u >> 16) | 0x40u));
    return (u & 0x7fffffffu) > CPL_KEY_INF ? nan : __float2bfloat16_rn(x);
}
__device__ __forceinline__ __half cast(float x, __half) {
    uint32_t u = __float_as_uint(x);
    __half nan = __ushort_as_half((unsigned short)(((u >> 16) & 0x8000u) | 0x7e00u | ((u >> 13) & 0x3ffu)));
    return (u & 0x7fffffffu) > CPL_KEY_INF ? nan : __float2half_rn(x);
}
__device__ __forceinline__ float cast(__nv_bfloat16 x, float) {
    return __uint_as_float((uint32_t)__bfloat16_as_ushort(x) << 16);
}
__device__ __forceinline__ float cast(__half x, float) {
    uint32_t u = __half_as_ushort(x);
    float nan = __uint_as_float((u & 0x8000u) << 16 | 0x7fc00000u | (u & 0x3ffu) << 13);
    return (u & 0x7fffu) > 0x7c00u ? nan : __half2float(x);
}

/* LOADS accesses of N elements a thread, all asked for before one is used; the first block also takes the n % N last elements. */
template <int N, typename To, typename From>
__global__ void __launch_bounds__(THREADS) cast_kernel(To *y, const From *x, int64_t n) {
    int64_t packs = n / N, first = blockIdx.x * (int64_t)(THREADS * LOADS) + threadIdx.x;
    packed<From, N> in[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        if (first + k * THREADS < packs) {
            in[k] = load<From, N>(x + (first + k * THREADS) * N);
        }
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        if (first + k * THREADS < packs) {
            packed<To, N> out;
#pragma unroll
            for (int j = 0; j < N; j++) {
                out.at[j] = cast(in[k].at[j], To{});
            }
            store(y + (first + k * THREADS) * N, out);
        }
    }
    int64_t rest = packs * N + threadIdx.x;
    if (N > 1 && blockIdx.x == 0 && rest < n) {
        y[rest] = cast(x[rest], To{});
    }
}

template <int N> __global__ void __launch_bounds__(THREADS) add_kernel(float *y, const float *x, int64_t n) {
    int64_t packs = n / N, first = blockIdx.x * (int64_t)(THREADS * LOADS) + threadIdx.x;
    packed<float, N> a[LOADS], b[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        if (first + k * THREADS < packs) {
            a[k] = load<float, N>(y + (first + k * THREADS) * N);
            b[k] = load<float, N>(x + (first + k * THREADS) * N);
        }
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        if (first + k * THREADS < packs) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                a[k].at[j] += b[k].at[j];
            }
            store(y + (first + k * THREADS) * N, a[k]);
        }
    }
    int64_t rest = packs * N + threadIdx.x;
    if (N > 1 && blockIdx.x == 0 && rest < n) {
        y[rest] += x[rest];
    }
}

unsigned blocks_for(int64_t packs) {
    int64_t blocks = cpl_ceil_div(packs, THREADS * LOADS);
    return (unsigned)(blocks < 1 ? 1 : blocks);
}

/* One block: a buffer that is small, or the sums of the chunks of one that is not. */
template <typename T> __global__ void __launch_bounds__(TOTAL_THREADS) total_kernel(double *sum, const T *x, int64_t n) {
    __shared__ double shared[32];
    double own = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < n; i += TOTAL_THREADS) {
        own += (double)x[i];
    }
    own = block_sum(own, shared);
    if (threadIdx.x == 0) {
        *sum += own;
    }
}

} // namespace

/* 4 elements an access are 16 bytes of f32 and 8 of the types of 2 bytes. */
extern "C" cpl_status CPL_CUDA(cast_from_f32)(cpl_device *dev, cpl_dtype dt, void *y, const float *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        if (aligned16(x) && (uintptr_t)y % (4 * sizeof(T)) == 0) {
            cast_kernel<4><<<blocks_for(n / 4), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, x, n);
        } else {
            cast_kernel<1><<<blocks_for(n), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, x, n);
        }
    });
    return cpl_cuda_launched(dev, "cast_from_f32");
}

extern "C" cpl_status CPL_CUDA(cast_to_f32)(cpl_device *dev, cpl_dtype dt, float *y, const void *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        if (aligned16(y) && (uintptr_t)x % (4 * sizeof(T)) == 0) {
            cast_kernel<4><<<blocks_for(n / 4), THREADS, 0, cpl_cuda_stream(dev)>>>(y, (const T *)x, n);
        } else {
            cast_kernel<1><<<blocks_for(n), THREADS, 0, cpl_cuda_stream(dev)>>>(y, (const T *)x, n);
        }
    });
    return cpl_cuda_launched(dev, "cast_to_f32");
}

extern "C" cpl_status CPL_CUDA(add_f32)(cpl_device *dev, float *y, const float *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    if (aligned16(x, y)) {
        add_kernel<4><<<blocks_for(n / 4), THREADS, 0, cpl_cuda_stream(dev)>>>(y, x, n);
    } else {
        add_kernel<1><<<blocks_for(n), THREADS, 0, cpl_cuda_stream(dev)>>>(y, x, n);
    }
    return cpl_cuda_launched(dev, "add_f32");
}

/* Losses of a micro-batch fit one block, and are worth one launch only. */
extern "C" cpl_status CPL_CUDA(sum_f32)(cpl_device *dev, double *sum, const float *x, int64_t n) {
    double *partial = NULL;
    int64_t chunks = cpl_ceil_div(n, CPL_SUM_CHUNK);
    if (n == 0) {
        return CPL_OK;
    }
    if (n <= AT_ONCE) {
        total_kernel<<<1, TOTAL_THREADS, 0, cpl_cuda_stream(dev)>>>(sum, x, n);
        return cpl_cuda_launched(dev, "sum_f32");
    }
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, cpl_scratch_flat(n), &partial);
    if (st != CPL_OK) {
        return st;
    }
    chunk_kernel<false, THREADS><<<(unsigned)chunks, THREADS, 0, cpl_cuda_stream(dev)>>>(partial, x, n, aligned16(x));
    total_kernel<<<1, TOTAL_THREADS, 0, cpl_cuda_stream(dev)>>>(sum, partial, chunks);
    return cpl_cuda_launched(dev, "sum_f32");
}

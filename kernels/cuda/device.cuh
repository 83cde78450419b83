/* What the kernels share: conversions, 128-bit accesses, asynchronous copies, reductions in a fixed order.
 * Refuses atomics whose order could show in a result. */
#ifndef CPL_KERNELS_CUDA_DEVICE_CUH
#define CPL_KERNELS_CUDA_DEVICE_CUH

#include "kernels/cuda/cuda.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cstring>
#include <type_traits>

/* Storage type of a cpl_dtype: cpl_dispatch(dt, [&](auto zero) { using T = decltype(zero); ... }). */
template <typename F> static inline void cpl_dispatch(cpl_dtype dt, F f) {
    if (cpl_dtype_storage(dt) == CPL_F32) {
        f(float{});
    } else if (dt == CPL_BF16) {
        f(__nv_bfloat16{});
    } else {
        f(__half{});
    }
}

__device__ __forceinline__ float to_f32(float x) {
    return x;
}
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_f32(__half x) {
    return __half2float(x);
}
/* Nearest even; f16 overflows to inf. */
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) {
    return x;
}
template <> __device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ __half from_f32<__half>(float x) {
    return __float2half_rn(x);
}

/* N elements of T, loaded and stored at once. */
template <typename T, int N> struct alignas(sizeof(T) * N) packed {
    T at[N];
    __device__ __forceinline__ float f32(int i) const { return to_f32(at[i]); }
    __device__ __forceinline__ void set(int i, float x) { at[i] = from_f32<T>(x); }
};
/* 16 bytes of T as 4 registers. The compiler gives each element of a packed<16-bit type> a register of its own where it must live
 * long; of words it keeps the words and converts where an element is used. */
template <typename T> struct words {
    uint32_t at[4];
    __device__ __forceinline__ float f32(int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(at[i]);
        } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            return __uint_as_float(i % 2 ? at[i / 2] & 0xffff0000u : at[i / 2] << 16);
        } else {
            return __half2float(__ushort_as_half((unsigned short)(i % 2 ? at[i / 2] >> 16 : at[i / 2] & 0xffffu)));
        }
    }
    /* Elements 2 i and 2 i + 1, or element i of f32 (b unused). */
    __device__ __forceinline__ void set(int i, float a, float b) {
        if constexpr (sizeof(T) == 4) {
            at[i] = __float_as_uint(a);
        } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
            __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
            memcpy(&at[i], &pair, 4);
        } else {
            __half2 pair = __floats2half2_rn(a, b);
            memcpy(&at[i], &pair, 4);
        }
    }
};
template <typename T> __device__ __forceinline__ words<T> load_words(const T *p) {
    uint4 x = *reinterpret_cast<const uint4 *>(p);
    return {{x.x, x.y, x.z, x.w}};
}
template <typename T> __device__ __forceinline__ void store_words(T *p, const words<T> &x) {
    *reinterpret_cast<uint4 *>(p) = make_uint4(x.at[0], x.at[1], x.at[2], x.at[3]);
}
/* Elements of T in 16 bytes. */
template <typename T> constexpr int pack_of = 16 / sizeof(T);
template <typename T, int N> __device__ __forceinline__ packed<T, N> load(const T *p) {
    return *reinterpret_cast<const packed<T, N> *>(p);
}
template <typename T, int N> __device__ __forceinline__ void store(T *p, const packed<T, N> &x) {
    *reinterpret_cast<packed<T, N> *>(p) = x;
}
/* Whether 16-byte accesses may be used: all pointers aligned and the row length a multiple. */
template <typename... P> static inline bool aligned16(P... p) {
    return (((uintptr_t)p % 16 == 0) && ...);
}

__device__ __forceinline__ uint32_t shared_at(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
/* Asynchronous copies to shared memory; where !valid zeros arrive and nothing is read. */
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copies_end() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Sum or maximum over the 32 lanes, in every lane; a butterfly, so always the same order. */
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    }
    return x;
}
/* Over a block of whole warps, in every thread; `shared` has 32 elements and may be used again after the call. */
template <typename T> __device__ __forceinline__ T block_sum(T x, T *shared) {
    int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    if (warps > 1) {
        if (threadIdx.x % 32 == 0) {
            shared[warp] = x;
        }
        __syncthreads();
        x = warp_sum((int)(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : T(0));
        __syncthreads();
    }
    return x;
}
__device__ __forceinline__ float block_max(float x, float *shared) {
    int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    x = warp_max(x);
    if (warps > 1) {
        if (threadIdx.x % 32 == 0) {
            shared[warp] = x;
        }
        __syncthreads();
        x = warp_max((int)(threadIdx.x % 32) < warps ? shared[threadIdx.x % 32] : -INFINITY);
        __syncthreads();
    }
    return x;
}

static inline int64_t cpl_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}
/* Blocks for a loop over n items with a grid stride, at most `waves` full waves of `per_sm` blocks. */
static inline int grid_for(const cpl_device *dev, int64_t items, int64_t per_block, int per_sm) {
    int64_t blocks = cpl_ceil_div(items, per_block), most = (int64_t)cpl_cuda_of(dev)->sm_count * per_sm;
    return (int)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

/* Shared memory that a block may have, less some that it declares itself. */
static inline cudaError_t shared_limit(const cpl_device *dev, size_t *bytes) {
    int most = 0;
    cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cpl_cuda_of(dev)->ordinal);
    *bytes = error == cudaSuccess && most > 4096 ? (size_t)most - 4096 : 0;
    return error;
}

#endif

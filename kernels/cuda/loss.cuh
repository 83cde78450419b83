/* What cross_entropy.cu and distill_loss.cu share: rows in packs of 16 bytes, running maximum and sum of exponentials.
 * Refuses to hide a bad logit: inf or nan in a row makes its loss and its gradient nan, for the overflow check to find. */
#ifndef CPL_KERNELS_CUDA_LOSS_CUH
#define CPL_KERNELS_CUDA_LOSS_CUH

#include "kernels/cuda/device.cuh"

enum { CPL_IGNORED = -100, CPL_LOSS_THREADS = 512, CPL_SHARED_MOST = 110 * 1024 }; /* two blocks a multiprocessor of sm_90 */

/* sm_80, sm_90 and the like have it; of sm_86, sm_89 and sm_12x a block gets 99 KiB. */
static inline bool has_large_shared(const cpl_device *dev) {
    return cpl_cuda_of(dev)->capability % 10 == 0 && cpl_cuda_of(dev)->capability < 120;
}

/* Sum of e^((x - top) * factor) with the largest x so far. */
struct running {
    float top, sum;
    __device__ running() : top(-INFINITY), sum(0) {}
    /* n elements whose own maximum is `most`. */
    template <int N> __device__ __forceinline__ void add(const float (&x)[N], float most, float factor) {
        if (most > top) {
            sum *= __expf((top - most) * factor); /* top -inf: sum is 0 and the exponential too */
            top = most;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum += x[j] == -INFINITY ? 0.0f : __expf((x[j] - top) * factor); /* also while top is -inf */
        }
    }
};

/* The sum over the block, with the block's maximum in *top. */
__device__ __forceinline__ float block_running(const running &r, float factor, float *top, float *shared) {
    *top = block_max(r.top, shared);
    float own = r.sum == 0.0f ? 0.0f : r.sum * __expf((r.top - *top) * factor);
    return block_sum(own, shared);
}

/* Columns behind V read as -inf: they count for nothing. */
template <typename T, int N> __device__ __forceinline__ void widen(float (&x)[N], const packed<T, N> &p, int64_t at, int64_t V) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        x[j] = at + j < V ? p.f32(j) : -INFINITY;
    }
}
template <int N> __device__ __forceinline__ float largest(const float (&x)[N]) {
    float most = x[0];
#pragma unroll
    for (int j = 1; j < N; j++) {
        most = fmaxf(most, x[j]);
    }
    return most;
}

template <typename T> __device__ __forceinline__ void clear_row(T *row, int64_t ld) {
    for (int64_t i = threadIdx.x; i < ld; i += blockDim.x) {
        row[i] = from_f32<T>(0.0f);
    }
}

#endif

/* GELU of a buffer.
 * Refuses another rounding than that of the linear layer, which calls this. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/elementary.cuh"

enum { THREADS = 256 };

template <typename T, int N> __global__ void gelu_kernel(T *y, const T *x, int64_t packs) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < packs; i += (int64_t)gridDim.x * blockDim.x) {
        packed<T, N> in = load<T, N>(x + i * N), out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            out.set(j, cpl_gelu(in.f32(j)));
        }
        store(y + i * N, out);
    }
}

/* y may be x. */
extern "C" cpl_status CPL_CUDA(gelu_fwd)(cpl_device *dev, cpl_dtype dt, void *y, const void *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        if (aligned16(y, x) && n % N == 0) {
            gelu_kernel<T, N><<<grid_for(dev, n / N, THREADS, 32), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, (const T *)x, n / N);
        } else {
            gelu_kernel<T, 1><<<grid_for(dev, n, THREADS, 32), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, (const T *)x, n);
        }
    });
    return cpl_cuda_launched(dev, "gelu_fwd");
}

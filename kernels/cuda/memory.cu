/* Casting, adding and summing flat buffers.
 * Refuses float atomics: sums are one f64 partial a chunk, added in order of the index. */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256, PER_SM = 8, LANES = 512 };

template <typename T, int N> __global__ void cast_from_kernel(T *y, const float *x, int64_t packs) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < packs; i += (int64_t)gridDim.x * blockDim.x) {
        packed<float, N> in = load<float, N>(x + i * N);
        packed<T, N> out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            out.set(j, in.at[j]);
        }
        store(y + i * N, out);
    }
}

template <typename T, int N> __global__ void cast_to_kernel(float *y, const T *x, int64_t packs) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < packs; i += (int64_t)gridDim.x * blockDim.x) {
        packed<T, N> in = load<T, N>(x + i * N);
        packed<float, N> out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            out.at[j] = in.f32(j);
        }
        store(y + i * N, out);
    }
}

/* packed<float, 4> is 16 bytes; of 16-bit types 4 elements are then 8. */
extern "C" cpl_status CPL_CUDA(cast_from_f32)(cpl_device *dev, cpl_dtype dt, void *y, const float *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        if (aligned16(x, y) && n % 4 == 0) {
            cast_from_kernel<T, 4><<<grid_for(dev, n / 4, THREADS, PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, x, n / 4);
        } else {
            cast_from_kernel<T, 1><<<grid_for(dev, n, THREADS, PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>((T *)y, x, n);
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
        if (aligned16(x, y) && n % 4 == 0) {
            cast_to_kernel<T, 4>
                <<<grid_for(dev, n / 4, THREADS, PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>(y, (const T *)x, n / 4);
        } else {
            cast_to_kernel<T, 1><<<grid_for(dev, n, THREADS, PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>(y, (const T *)x, n);
        }
    });
    return cpl_cuda_launched(dev, "cast_to_f32");
}

template <int N> __global__ void add_kernel(float *y, const float *x, int64_t packs) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < packs; i += (int64_t)gridDim.x * blockDim.x) {
        packed<float, N> a = load<float, N>(y + i * N), b = load<float, N>(x + i * N);
#pragma unroll
        for (int j = 0; j < N; j++) {
            a.at[j] += b.at[j];
        }
        store(y + i * N, a);
    }
}

extern "C" cpl_status CPL_CUDA(add_f32)(cpl_device *dev, float *y, const float *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    if (aligned16(x, y) && n % 4 == 0) {
        add_kernel<4><<<grid_for(dev, n / 4, THREADS, PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>(y, x, n / 4);
    } else {
        add_kernel<1><<<grid_for(dev, n, THREADS, PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>(y, x, n);
    }
    return cpl_cuda_launched(dev, "add_f32");
}

/* --- sum --- */

__global__ void chunk_sums_kernel(double *partial, const float *x, int64_t n) {
    __shared__ double shared[32];
    int64_t first = blockIdx.x * (int64_t)CPL_SUM_CHUNK, last = first + CPL_SUM_CHUNK < n ? first + CPL_SUM_CHUNK : n;
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
        sum += (double)x[i];
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

__global__ void total_kernel(double *sum, const double *partial, int64_t chunks) {
    __shared__ double shared[32];
    double own = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) {
        own += partial[i];
    }
    own = block_sum(own, shared);
    if (threadIdx.x == 0) {
        *sum += own;
    }
}

extern "C" cpl_status CPL_CUDA(sum_f32)(cpl_device *dev, double *sum, const float *x, int64_t n) {
    double *partial = NULL;
    int64_t chunks = cpl_ceil_div(n, CPL_SUM_CHUNK);
    if (n == 0) {
        return CPL_OK;
    }
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, (size_t)chunks * sizeof *partial, &partial);
    if (st != CPL_OK) {
        return st;
    }
    chunk_sums_kernel<<<(unsigned)chunks, THREADS, 0, cpl_cuda_stream(dev)>>>(partial, x, n);
    total_kernel<<<1, LANES, 0, cpl_cuda_stream(dev)>>>(sum, partial, chunks);
    return cpl_cuda_launched(dev, "sum_f32");
}

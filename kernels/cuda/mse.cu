/* Squared distance of two hidden states and its gradient. Source: Romero et al. 2015 (FitNets), arXiv:1412.6550.
 * Refuses to lose a small difference: a - b is taken in f32 of the stored values, its square and sums in f64. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/scratch.h"

enum { THREADS = 256, LANES = 512 };

/* A block a chunk, N elements an access; all that a thread reads is under way before its first store. */
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    mse_kernel(double *partial, T *grad, const T *a, const T *b, const cpl_step_state *state, float coefficient, int64_t n) {
    constexpr int TURNS = CPL_SUM_CHUNK / (THREADS * N), EACH = TURNS < 4 ? TURNS : 4;
    __shared__ double shared[32];
    int64_t first = blockIdx.x * (int64_t)CPL_SUM_CHUNK, last = first + CPL_SUM_CHUNK < n ? first + CPL_SUM_CHUNK : n;
    float factor = state != nullptr ? state->loss_scale * (2.0f * coefficient) : 0.0f;
    double sum = 0;
    for (int turn = 0; turn < TURNS; turn += EACH) {
        packed<T, N> x[EACH], y[EACH], g[EACH];
        int64_t at = first + ((int64_t)turn * THREADS + threadIdx.x) * N;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            int64_t i = at + (int64_t)k * THREADS * N;
            if (i < last) {
                x[k] = load<T, N>(a + i);
                y[k] = load<T, N>(b + i);
                if (state != nullptr) {
                    g[k] = load<T, N>(grad + i);
                }
            }
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            int64_t i = at + (int64_t)k * THREADS * N;
            if (i < last) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float diff = x[k].f32(j) - y[k].f32(j);
                    sum = fma((double)diff, (double)diff, sum);
                    if (state != nullptr) {
                        g[k].set(j, g[k].f32(j) + factor * diff);
                    }
                }
                if (state != nullptr) {
                    store(grad + i, g[k]);
                }
            }
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

__global__ void mse_total_kernel(double *sum, const double *partial, float coefficient, int64_t chunks) {
    __shared__ double shared[32];
    double own = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += LANES) {
        own += partial[i];
    }
    own = block_sum(own, shared);
    if (threadIdx.x == 0) {
        *sum += (double)coefficient * own;
    }
}

extern "C" cpl_status CPL_CUDA(mse)(cpl_device *dev, cpl_dtype dt, double *sum, void *grad, const void *a, const void *b,
                                    const cpl_step_state *state, float coefficient, int64_t n) {
    double *partial = NULL;
    int64_t chunks = cpl_ceil_div(n, CPL_SUM_CHUNK);
    if (n == 0) {
        return CPL_OK;
    }
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, cpl_scratch_flat(n), &partial);
    if (st != CPL_OK) {
        return st;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        auto go = [&](auto kernel) {
            kernel<<<(unsigned)chunks, THREADS, 0, cpl_cuda_stream(dev)>>>(partial, (T *)grad, (const T *)a, (const T *)b, state,
                                                                           coefficient, n);
        };
        if (n % N == 0 && aligned16(a, b, grad)) {
            go(mse_kernel<T, N>);
        } else {
            go(mse_kernel<T, 1>);
        }
    });
    mse_total_kernel<<<1, LANES, 0, cpl_cuda_stream(dev)>>>(sum, partial, coefficient, chunks);
    return cpl_cuda_launched(dev, "mse");
}

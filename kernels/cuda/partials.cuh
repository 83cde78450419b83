/* Sums over rows that came as partial sums of pieces of rows: added in order of the pieces.
 * Refuses float atomics. */
#ifndef CPL_KERNELS_CUDA_PARTIALS_CUH
#define CPL_KERNELS_CUDA_PARTIALS_CUH

#include "kernels/cuda/device.cuh"

constexpr int CPL_TOTAL_THREADS = 256;

/* to.at[s][column] += sum over pieces of partial [sums][pieces][N]: 8 shares of the pieces a column, then one sum of 8. */
struct total_targets {
    float *at[3];
};
static __global__ void __launch_bounds__(CPL_TOTAL_THREADS)
    add_partials_kernel(total_targets to, const float *partial, int64_t N, int pieces) {
    __shared__ float shared[CPL_TOTAL_THREADS / 32][33];
    int64_t column = blockIdx.x * 32ll + threadIdx.x % 32;
    int part = threadIdx.x / 32;
    const float *from = partial + (int64_t)blockIdx.y * pieces * N;
    float sum = 0;
    if (column < N) {
#pragma unroll 8
        for (int p = part; p < pieces; p += CPL_TOTAL_THREADS / 32) {
            sum += from[p * N + column];
        }
    }
    shared[part][threadIdx.x % 32] = sum;
    __syncthreads();
    if (part == 0 && column < N) {
        float total = 0;
        for (int p = 0; p < CPL_TOTAL_THREADS / 32; p++) {
            total += shared[p][threadIdx.x];
        }
        to.at[blockIdx.y][column] += total;
    }
}

static inline void add_partials(cudaStream_t stream, const total_targets &to, int sums, const float *partial, int64_t N,
                                int pieces) {
    add_partials_kernel<<<dim3((unsigned)cpl_ceil_div(N, 32), (unsigned)sums), CPL_TOTAL_THREADS, 0, stream>>>(to, partial, N,
                                                                                                               pieces);
}

#endif

/* LayerNorm with the residual addition before it. Source: Ba et al. 2016, arXiv:1607.06450. Backward: layernorm_bwd.cu.
 * Refuses one-pass variances: mean first, then squared deviations, of the row in registers. */
#include "kernels/cuda/device.cuh"

enum { FORWARD_THREADS = 256 };

/* Packs of N elements that a lane of a warp keeps of a row: rows of up to 32 * N * KEPT elements stay in registers. The last rows
 * come first: what the product before wrote last is in the cache still, and what the next one reads first will be. */
template <typename T, int N, int KEPT>
__global__ void __launch_bounds__(FORWARD_THREADS)
    forward_kernel(T *sum, T *y, float *mean, float *rstd, const T *x, const T *delta, const T *g, const T *b, int64_t R, int C) {
    int lane = threadIdx.x % 32;
    int64_t row = R - 1 - (blockIdx.x * (int64_t)(FORWARD_THREADS / 32) + threadIdx.x / 32);
    if (row < 0) {
        return;
    }
    int packs = C / N;
    packed<T, N> kept[KEPT], added[KEPT];
    float total = 0;
#pragma unroll
    for (int k = 0; k < KEPT; k++) { /* all loads before the first store: sum may be x, so none could pass it */
        int i = lane + 32 * k;
        if (i < packs) {
            kept[k] = load<T, N>(x + row * C + i * N);
            if (delta != nullptr) {
                added[k] = load<T, N>(delta + row * C + i * N);
            }
        }
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int i = lane + 32 * k;
        if (i < packs) {
            if (delta != nullptr) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    kept[k].set(j, kept[k].f32(j) + added[k].f32(j));
                }
                store(sum + row * C + i * N, kept[k]);
            }
#pragma unroll
            for (int j = 0; j < N; j++) {
                total += kept[k].f32(j);
            }
        }
    }
    float m = warp_sum(total) / (float)C, squares = 0;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + 32 * k < packs) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                float d = kept[k].f32(j) - m;
                squares = fmaf(d, d, squares);
            }
        }
    }
    float r = rsqrtf(warp_sum(squares) / (float)C + 1e-5f);
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int i = lane + 32 * k;
        if (i < packs) {
            packed<T, N> gain = load<T, N>(g + i * N), bias = load<T, N>(b + i * N), out;
#pragma unroll
            for (int j = 0; j < N; j++) {
                out.set(j, fmaf(gain.f32(j), (kept[k].f32(j) - m) * r, bias.f32(j)));
            }
            store(y + row * C + i * N, out);
        }
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

/* Any row, a warp a row, read again for each pass. */
template <typename T>
__global__ void __launch_bounds__(FORWARD_THREADS)
    forward_any_kernel(T *sum, T *y, float *mean, float *rstd, const T *x, const T *delta, const T *g, const T *b, int64_t R,
                       int64_t C) {
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)(FORWARD_THREADS / 32) + threadIdx.x / 32;
    if (row >= R) {
        return;
    }
    const T *from = delta != nullptr ? sum : x;
    float total = 0, squares = 0;
    for (int64_t i = lane; i < C; i += 32) {
        float v = to_f32(x[row * C + i]);
        if (delta != nullptr) {
            T s = from_f32<T>(v + to_f32(delta[row * C + i]));
            sum[row * C + i] = s;
            v = to_f32(s);
        }
        total += v;
    }
    float m = warp_sum(total) / (float)C;
    for (int64_t i = lane; i < C; i += 32) { /* each lane reads what it wrote itself */
        float d = to_f32(from[row * C + i]) - m;
        squares = fmaf(d, d, squares);
    }
    float r = rsqrtf(warp_sum(squares) / (float)C + 1e-5f);
    for (int64_t i = lane; i < C; i += 32) {
        y[row * C + i] = from_f32<T>(fmaf(to_f32(g[i]), (to_f32(from[row * C + i]) - m) * r, to_f32(b[i])));
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

template <typename T, int N>
static bool forward_kept(cpl_device *dev, T *sum, T *y, float *mean, float *rstd, const T *x, const T *delta, const T *g,
                         const T *b, int64_t R, int64_t C) {
    unsigned blocks = (unsigned)cpl_ceil_div(R, FORWARD_THREADS / 32);
    cudaStream_t stream = cpl_cuda_stream(dev);
    if (C % N != 0 || !aligned16(sum, y, x, delta, g, b)) {
        return false;
    }
    int64_t each = cpl_ceil_div(C / N, 32);
#define CPL_KEPT(kept)                                                                                                             \
    do {                                                                                                                           \
        if (each <= (kept)) {                                                                                                      \
            forward_kernel<T, N, kept><<<blocks, FORWARD_THREADS, 0, stream>>>(sum, y, mean, rstd, x, delta, g, b, R, (int)C);     \
            return true;                                                                                                           \
        }                                                                                                                          \
    } while (0)
    CPL_KEPT(1);
    CPL_KEPT(2);
    CPL_KEPT(3);
    CPL_KEPT(4);
    CPL_KEPT(6);
    CPL_KEPT(8);
    CPL_KEPT(12);
#undef CPL_KEPT
    return false;
}

extern "C" cpl_status CPL_CUDA(layernorm_fwd)(cpl_device *dev, cpl_dtype dt, void *sum, void *y, float *mean, float *rstd,
                                              const void *x, const void *delta, const void *g, const void *b, int64_t R,
                                              int64_t C) {
    if (R == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        if (!forward_kept<T, pack_of<T>>(dev, (T *)sum, (T *)y, mean, rstd, (const T *)x, (const T *)delta, (const T *)g,
                                         (const T *)b, R, C)) {
            forward_any_kernel<T><<<(unsigned)cpl_ceil_div(R, FORWARD_THREADS / 32), FORWARD_THREADS, 0, cpl_cuda_stream(dev)>>>(
                (T *)sum, (T *)y, mean, rstd, (const T *)x, (const T *)delta, (const T *)g, (const T *)b, R, C);
        }
    });
    return cpl_cuda_launched(dev, "layernorm_fwd");
}

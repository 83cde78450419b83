/* LayerNorm with the residual addition before it, forward and backward. Source: Ba et al. 2016, arXiv:1607.06450.
 * Refuses float atomics: gradients of gain and bias are partial sums of a fixed share of rows, added in order. */
#include "kernels/cuda/device.cuh"

enum { FORWARD_THREADS = 256, BACKWARD_THREADS = 256, WARPS = 8, TOTAL_THREADS = 256, PIECES_PER_SM = 2 };

/* Packs of N elements that a lane of a warp keeps of a row: rows of up to 32 * N * KEPT elements stay in registers. */
template <typename T, int N, int KEPT>
__global__ void __launch_bounds__(FORWARD_THREADS)
    forward_kernel(T *sum, T *y, float *mean, float *rstd, const T *x, const T *delta, const T *g, const T *b, int64_t R, int C) {
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)(FORWARD_THREADS / 32) + threadIdx.x / 32;
    if (row >= R) {
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

/* --- backward --- */

/* A block has rows blockIdx.x, + gridDim.x, ... in steps of its warps, a warp a row at a time; dx = rstd (g dy - a - xhat c) with
 * a, c the means of g dy and of g dy xhat. partial [2][blocks][C]: sums of dy xhat and of dy over the rows of the block. KEPT as
 * above. */
template <typename T, int N, int KEPT>
__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward_kernel(T *dx, float *partial, const T *dy, const T *dres, const T *x, const float *mean, const float *rstd, const T *g,
                    int64_t R, int C) {
    extern __shared__ float gathered[]; /* [2][C] */
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, packs = C / N;
    packed<T, N> gain[KEPT];
    float dg[KEPT][N] = {}, db[KEPT][N] = {};
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        if (lane + 32 * k < packs) {
            gain[k] = load<T, N>(g + (lane + 32 * k) * N);
        }
    }
    for (int64_t row = blockIdx.x * (int64_t)WARPS + warp; row < R; row += (int64_t)gridDim.x * WARPS) {
        packed<T, N> up[KEPT], in[KEPT];
        float m = mean[row], r = rstd[row], a = 0, c = 0;
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (lane + 32 * k < packs) {
                up[k] = load<T, N>(dy + row * C + (lane + 32 * k) * N);
                in[k] = load<T, N>(x + row * C + (lane + 32 * k) * N);
            }
        }
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (lane + 32 * k < packs) {
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float hat = (in[k].f32(j) - m) * r, t = gain[k].f32(j) * up[k].f32(j);
                    a += t;
                    c = fmaf(t, hat, c);
                    dg[k][j] = fmaf(up[k].f32(j), hat, dg[k][j]);
                    db[k][j] += up[k].f32(j);
                }
            }
        }
        a = warp_sum(a) / (float)C;
        c = warp_sum(c) / (float)C;
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (lane + 32 * k < packs) {
                packed<T, N> rest, out;
                if (dres != nullptr) {
                    rest = load<T, N>(dres + row * C + (lane + 32 * k) * N);
                }
#pragma unroll
                for (int j = 0; j < N; j++) {
                    float hat = (in[k].f32(j) - m) * r;
                    float d = r * (gain[k].f32(j) * up[k].f32(j) - a - hat * c);
                    out.set(j, dres != nullptr ? d + rest.f32(j) : d);
                }
                store(dx + row * C + (lane + 32 * k) * N, out);
            }
        }
    }
    for (int turn = 0; turn < WARPS; turn++) { /* the warps one after another: a fixed order */
        if (warp == turn) {
#pragma unroll
            for (int k = 0; k < KEPT; k++) {
                if (lane + 32 * k < packs) {
#pragma unroll
                    for (int j = 0; j < N; j++) {
                        int at = (lane + 32 * k) * N + j;
                        gathered[at] = turn == 0 ? dg[k][j] : gathered[at] + dg[k][j];
                        gathered[C + at] = turn == 0 ? db[k][j] : gathered[C + at] + db[k][j];
                    }
                }
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < C; i += BACKWARD_THREADS) {
        partial[blockIdx.x * (int64_t)C + i] = gathered[i];
        partial[(gridDim.x + blockIdx.x) * (int64_t)C + i] = gathered[C + i];
    }
}

/* Any row: dx by a warp a row; the sums over rows by the kernel after it. */
template <typename T>
__global__ void __launch_bounds__(BACKWARD_THREADS)
    backward_any_kernel(T *dx, const T *dy, const T *dres, const T *x, const float *mean, const float *rstd, const T *g, int64_t R,
                        int64_t C) {
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32;
    if (row >= R) {
        return;
    }
    float m = mean[row], r = rstd[row], a = 0, c = 0;
    for (int64_t i = lane; i < C; i += 32) {
        float t = to_f32(g[i]) * to_f32(dy[row * C + i]);
        a += t;
        c = fmaf(t, (to_f32(x[row * C + i]) - m) * r, c);
    }
    a = warp_sum(a) / (float)C;
    c = warp_sum(c) / (float)C;
    for (int64_t i = lane; i < C; i += 32) {
        float hat = (to_f32(x[row * C + i]) - m) * r;
        float d = r * (to_f32(g[i]) * to_f32(dy[row * C + i]) - a - hat * c);
        dx[row * C + i] = from_f32<T>(dres != nullptr ? d + to_f32(dres[row * C + i]) : d);
    }
}

/* Before dx is written, which may be dy: thread a column, block a share of rows. */
template <typename T>
__global__ void backward_any_sums_kernel(float *partial, const T *dy, const T *x, const float *mean, const float *rstd, int64_t R,
                                         int64_t C) {
    int64_t column = blockIdx.y * (int64_t)blockDim.x + threadIdx.x;
    if (column >= C) {
        return;
    }
    float dg = 0, db = 0;
    for (int64_t row = blockIdx.x; row < R; row += gridDim.x) {
        float up = to_f32(dy[row * C + column]);
        dg = fmaf(up, (to_f32(x[row * C + column]) - mean[row]) * rstd[row], dg);
        db += up;
    }
    partial[blockIdx.x * C + column] = dg;
    partial[(gridDim.x + blockIdx.x) * C + column] = db;
}

/* A warp 32 columns wide and `rows` deep would leave most of the GPU idle: 8 lanes of pieces a column, then one sum of 8. */
__global__ void totals_kernel(float *dg, float *db, const float *partial, int64_t C, int pieces) {
    __shared__ float shared[TOTAL_THREADS / 32][33];
    int64_t column = blockIdx.x * 32ll + threadIdx.x % 32;
    int part = threadIdx.x / 32;
    const float *from = partial + (blockIdx.y == 0 ? 0 : pieces * C);
    float sum = 0;
    if (column < C) {
        for (int p = part; p < pieces; p += TOTAL_THREADS / 32) {
            sum += from[p * C + column];
        }
    }
    shared[part][threadIdx.x % 32] = sum;
    __syncthreads();
    if (part == 0 && column < C) {
        float total = 0;
        for (int p = 0; p < TOTAL_THREADS / 32; p++) {
            total += shared[p][threadIdx.x];
        }
        float *to = blockIdx.y == 0 ? dg : db;
        to[column] += total;
    }
}

template <typename T, int N>
static bool backward_kept(cpl_device *dev, int pieces, T *dx, float *partial, const T *dy, const T *dres, const T *x,
                          const float *mean, const float *rstd, const T *g, int64_t R, int64_t C) {
    cudaStream_t stream = cpl_cuda_stream(dev);
    if (C % N != 0 || !aligned16(dx, dy, dres, x, g)) {
        return false;
    }
    int64_t each = cpl_ceil_div(C / N, 32);
    size_t shared = 2 * (size_t)C * sizeof(float);
#define CPL_KEPT(kept)                                                                                                             \
    do {                                                                                                                           \
        if (each <= (kept)) {                                                                                                      \
            backward_kernel<T, N, kept>                                                                                            \
                <<<pieces, BACKWARD_THREADS, shared, stream>>>(dx, partial, dy, dres, x, mean, rstd, g, R, (int)C);                \
            return true;                                                                                                           \
        }                                                                                                                          \
    } while (0)
    CPL_KEPT(1);
    CPL_KEPT(2);
    CPL_KEPT(3);
    CPL_KEPT(4);
    CPL_KEPT(6);
#undef CPL_KEPT
    return false;
}

extern "C" cpl_status CPL_CUDA(layernorm_bwd)(cpl_device *dev, cpl_dtype dt, void *dx, float *dg, float *db, const void *dy,
                                              const void *dres, const void *x, const float *mean, const float *rstd, const void *g,
                                              int64_t R, int64_t C) {
    float *partial = NULL;
    if (R == 0) {
        return CPL_OK;
    }
    int pieces = grid_for(dev, R, WARPS, PIECES_PER_SM);
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ROWS, 2 * (size_t)pieces * (size_t)C * sizeof *partial, &partial);
    if (st != CPL_OK) {
        return st;
    }
    cudaStream_t stream = cpl_cuda_stream(dev);
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        if (!backward_kept<T, pack_of<T>>(dev, pieces, (T *)dx, partial, (const T *)dy, (const T *)dres, (const T *)x, mean, rstd,
                                          (const T *)g, R, C)) {
            dim3 grid((unsigned)pieces, (unsigned)cpl_ceil_div(C, 128));
            backward_any_sums_kernel<T><<<grid, 128, 0, stream>>>(partial, (const T *)dy, (const T *)x, mean, rstd, R, C);
            backward_any_kernel<T><<<(unsigned)cpl_ceil_div(R, WARPS), BACKWARD_THREADS, 0, stream>>>(
                (T *)dx, (const T *)dy, (const T *)dres, (const T *)x, mean, rstd, (const T *)g, R, C);
        }
    });
    totals_kernel<<<dim3((unsigned)cpl_ceil_div(C, 32), 2), TOTAL_THREADS, 0, stream>>>(dg, db, partial, C, pieces);
    return cpl_cuda_launched(dev, "layernorm_bwd");
}

/* LayerNorm. Source: Ba et al. 2016, arXiv:1607.06450. Backward: layernorm_bwd.cu.
 * Refuses one-pass variances: mean first, then squared deviations, of the row in registers. */
#include "kernels/cuda/norm_rows.cuh"
#include "kernels/cuda/scratch.h"

namespace {

enum { PACKS_MOST = 12 };
/* Rows of a warp in shared memory, and warps of a block: 96 kB in all, 48 kB or more of them under way. */
template <int PACKS> constexpr int stages = PACKS < 6 ? 12 / PACKS : 2;
template <int PACKS> constexpr int most_warps = 192 / (PACKS * stages<PACKS>);
template <typename T, int PACKS> using forward_ring = row_ring<T, PACKS, 1, stages<PACKS>>;

/* A warp a row, PACKS packs of it a lane. */
template <typename T, int PACKS>
__global__ void __launch_bounds__(32 * most_warps<PACKS>, 1)
    forward_kernel(T *y, float *mean, float *rstd, const T *x, const T *g, const T *b, int64_t R, int C) {
    using ring_of = forward_ring<T, PACKS>;
    constexpr int N = pack_of<T>, PAIR = N / 4, SPAN = ring_of::SPAN, AHEAD = stages<PACKS> - 1;
    extern __shared__ uint4 shared[];
    const ring_of ring(shared, C, false);
    words<T> gain[PACKS], bias[PACKS];
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        bool there = k * SPAN < ring.own;
        gain[k] = there ? load_words(g + ring.column + k * SPAN) : words<T>{};
        bias[k] = there ? load_words(b + ring.column + k * SPAN) : words<T>{};
    }
    int64_t row = ring.first(R), stride = ring.stride();
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        ring.send(s * ring_of::ROW, row - s * stride, C, x);
    }
#pragma unroll 1
    for (int full = 0, empty = ring_of::LAST; row >= 0; row -= stride) {
        float v[PACKS][N], total = 0, squares = 0;
        ring.send(empty, row - AHEAD * stride, C, x);
        copies_wait<AHEAD>();
        const T *own = ring.at + full;
        int64_t to = row * C + ring.column;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            words<T> in = load_words(own + k * SPAN);
#pragma unroll
            for (int j = 0; j < N; j++) {
                v[k][j] = in.f32(j);
                total += v[k][j];
            }
        }
        float m = warp_sum(total) / (float)C;
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            bool there = k * SPAN < ring.own;
#pragma unroll
            for (int j = 0; j < N; j++) {
                v[k][j] -= m;
                squares = there ? fmaf(v[k][j], v[k][j], squares) : squares;
            }
        }
        float r = rsqrtf(warp_sum(squares) / (float)C + 1e-5f);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            words<T> out;
            held(&gain[k]);
            held(&bias[k]);
#pragma unroll
            for (int j = 0; j < N; j += PAIR) {
                int l = j + PAIR - 1;
                out.set(j / PAIR, fmaf(gain[k].f32(j), v[k][j] * r, bias[k].f32(j)),
                        fmaf(gain[k].f32(l), v[k][l] * r, bias[k].f32(l)));
            }
            if (k * SPAN < ring.own) {
                store_words(y + to + k * SPAN, out);
            }
        }
        if (ring.lane == 0) {
            mean[row] = m;
            rstd[row] = r;
        }
        empty = full;
        full = full == ring_of::LAST ? 0 : full + ring_of::ROW;
    }
    copies_wait<0>(); /* zeros in place of rows that there were not, before the shared memory is another block's */
}

/* Any row, a warp a row, read again for each pass. */
template <typename T>
__global__ void __launch_bounds__(ANY_THREADS)
    forward_any_kernel(T *y, float *mean, float *rstd, const T *x, const T *g, const T *b, int64_t R, int64_t C) {
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * (int64_t)ANY_WARPS + threadIdx.x / 32;
    if (row >= R) {
        return;
    }
    float total = 0, squares = 0;
    for (int64_t i = lane; i < C; i += 32) {
        total += to_f32(x[row * C + i]);
    }
    float m = warp_sum(total) / (float)C;
    for (int64_t i = lane; i < C; i += 32) {
        float d = to_f32(x[row * C + i]) - m;
        squares = fmaf(d, d, squares);
    }
    float r = rsqrtf(warp_sum(squares) / (float)C + 1e-5f);
    for (int64_t i = lane; i < C; i += 32) {
        y[row * C + i] = from_f32<T>(fmaf(to_f32(g[i]), (to_f32(x[row * C + i]) - m) * r, to_f32(b[i])));
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

template <typename T> using forward_plan = row_plan<T *, float *, float *, const T *, const T *, const T *, int64_t, int>;
template <typename T, int PACKS> forward_plan<T> plan_of() {
    using ring = forward_ring<T, PACKS>;
    return {forward_kernel<T, PACKS>, most_warps<PACKS>, ring::PART, (int64_t)sizeof(T) * stages<PACKS> * ring::ROW};
}
template <typename T> forward_plan<T> plan_for(int64_t packs) {
    return packs > 8   ? plan_of<T, PACKS_MOST>()
           : packs > 6 ? plan_of<T, 8>()
           : packs > 4 ? plan_of<T, 6>()
           : packs > 3 ? plan_of<T, 4>()
           : packs > 2 ? plan_of<T, 3>()
           : packs > 1 ? plan_of<T, 2>()
                       : plan_of<T, 1>();
}

/* *done false: rows that are not aligned, or wider than a warp takes. */
template <typename T>
cudaError_t forward_aligned(bool *done, cpl_device *dev, T *y, float *mean, float *rstd, const T *x, const T *g, const T *b,
                            int64_t R, int64_t C) {
    int64_t packs = cpl_ceil_div(C, 32 * pack_of<T>);
    *done = false;
    if (C % pack_of<T> != 0 || packs > PACKS_MOST || !aligned16(y, x, g, b)) {
        return cudaSuccess;
    }
    int blocks = (int)cpl_scratch_norm_pieces(R, cpl_cuda_of(dev)->sm_count);
    return launch_rows(done, dev, plan_for<T>(packs), C, blocks, y, mean, rstd, x, g, b, R, (int)C);
}

} // namespace

extern "C" cpl_status CPL_CUDA(layernorm_fwd)(cpl_device *dev, cpl_dtype dt, void *y, float *mean, float *rstd, const void *x,
                                              const void *g, const void *b, int64_t R, int64_t C) {
    if (R == 0) {
        return CPL_OK;
    }
    cudaError_t error = cudaSuccess;
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        bool aligned = false;
        error = forward_aligned<T>(&aligned, dev, (T *)y, mean, rstd, (const T *)x, (const T *)g, (const T *)b, R, C);
        if (error == cudaSuccess && !aligned) {
            forward_any_kernel<T><<<(unsigned)cpl_ceil_div(R, ANY_WARPS), ANY_THREADS, 0, cpl_cuda_stream(dev)>>>(
                (T *)y, mean, rstd, (const T *)x, (const T *)g, (const T *)b, R, C);
        }
    });
    if (error != cudaSuccess) {
        return cpl_cuda_status(error, __FILE__, __LINE__, "layernorm_fwd");
    }
    return cpl_cuda_launched(dev, "layernorm_fwd");
}

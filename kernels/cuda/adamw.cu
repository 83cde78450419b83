/* AdamW with decoupled weight decay, unscaling, clipping, masking and rounding of the working copy in one pass over memory.
 * Refuses to write anything on a step that the consensus skips. */
#include "kernels/cuda/device.cuh"

namespace {

enum { THREADS = 256, LOADS = 2 };

/* Constants of a step: m^ = m * unbias_m, sqrt(v^) = sqrt(v) * unbias_v. */
struct constants {
    float grad_factor, beta1, beta2, rest1, rest2; /* rest = 1 - beta */
    float unbias_m, unbias_v, eps, lr, decay;
};

/* beta^t by squaring, in f64: its relative error of about t * 2^-53 matters where beta^t is near 1 only, hence not in f32. */
__device__ double power(double beta, int64_t t) {
    double result = 1;
    for (; t > 0; t >>= 1) {
        result = t & 1 ? result * beta : result;
        beta *= beta;
    }
    return result;
}

/* Roundings are those of kernels/cpu/adamw.c: an operation contracted there is fmaf here, all others are kept apart. */
__device__ __forceinline__ void update(const constants &s, float &param, float &m, float &v, float grad, bool kept) {
    float g = __fmul_rn(grad, s.grad_factor);
    float mi = fmaf(s.beta1, m, __fmul_rn(s.rest1, g));
    float vi = fmaf(s.beta2, v, __fmul_rn(__fmul_rn(s.rest2, g), g));
    float direction = __fdiv_rn(__fmul_rn(mi, s.unbias_m), fmaf(__fsqrt_rn(vi), s.unbias_v, s.eps));
    float p = __fsub_rn(param, __fmul_rn(s.lr, fmaf(s.decay, param, direction)));
    m = kept ? mi : 0.0f;
    v = kept ? vi : 0.0f;
    param = kept ? p : 0.0f;
}

/* The same places of other devices' working copies. */
template <typename T> struct places {
    T *at[CPL_REACH_MOST - 1];
    int count;
};

/* N elements an access, LOADS of them a thread; all are asked for before the constants are made. The mask is u8. */
template <typename T, int N, bool MASKED, bool FAR>
__global__ void __launch_bounds__(THREADS, 3)
    adamw_kernel(float *param, T *work, const places<T> others, float *m, float *v, const float *grad, const uint8_t *mask,
                 int64_t packs, float decay, const cpl_step_state *state, cpl_step_rules rules) {
    __shared__ float unbias[2];
    int64_t first = blockIdx.x * (int64_t)(THREADS * LOADS) + threadIdx.x;
    packed<float, N> g[LOADS], p[LOADS], mi[LOADS], vi[LOADS];
    packed<uint8_t, N> keep[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int64_t i = (first + k * THREADS) * N;
        if (first + k * THREADS < packs) {
            g[k] = load<float, N>(grad + i);
            p[k] = load<float, N>(param + i);
            mi[k] = load<float, N>(m + i);
            vi[k] = load<float, N>(v + i);
            if (MASKED) {
                keep[k] = load<uint8_t, N>(mask + i);
            }
        }
    }
    if (state->skip) {
        return;
    }
    if (threadIdx.x == 0) {
        unbias[0] = (float)(1.0 / (1.0 - power((double)rules.beta1, state->adam_step)));
    } else if (threadIdx.x == 32) { /* another warp, beside the first */
        unbias[1] = (float)(1.0 / sqrt(1.0 - power((double)rules.beta2, state->adam_step)));
    }
    __syncthreads();
    const constants s = {state->grad_factor, rules.beta1, rules.beta2, 1.0f - rules.beta1, 1.0f - rules.beta2,
                         unbias[0],          unbias[1],   rules.eps,   state->lr,          decay};
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int64_t i = (first + k * THREADS) * N;
        if (first + k * THREADS < packs) {
            packed<T, N> w;
#pragma unroll
            for (int j = 0; j < N; j++) {
                update(s, p[k].at[j], mi[k].at[j], vi[k].at[j], g[k].at[j], !MASKED || keep[k].at[j] != 0);
                w.set(j, p[k].at[j]);
            }
            store(param + i, p[k]);
            store(m + i, mi[k]);
            store(v + i, vi[k]);
            if (work != nullptr) {
                store(work + i, w);
            }
            for (int r = 0; FAR && r < others.count; r++) {
                store(others.at[r] + i, w);
            }
        }
    }
}

template <typename T, int N>
void launch(cudaStream_t stream, float *param, T *work, const places<T> &others, float *m, float *v, const float *grad,
            const uint8_t *mask, int64_t packs, float decay, const cpl_step_state *state, const cpl_step_rules &rules) {
    unsigned blocks = (unsigned)cpl_ceil_div(packs, THREADS * LOADS);
    auto *kernel = others.count > 0 ? (mask != nullptr ? adamw_kernel<T, N, true, true> : adamw_kernel<T, N, false, true>)
                                    : (mask != nullptr ? adamw_kernel<T, N, true, false> : adamw_kernel<T, N, false, false>);
    kernel<<<blocks, THREADS, 0, stream>>>(param, work, others, m, v, grad, mask, packs, decay, state, rules);
}

} // namespace

/* state->adam_step counts this update already: step_control comes before. */
extern "C" cpl_status CPL_CUDA(adamw)(cpl_device *dev, cpl_dtype dt, float *param, void *work, const cpl_reach *others, float *m,
                                      float *v, const float *grad, const uint8_t *mask, int64_t n, float weight_decay,
                                      const cpl_step_state *state, const cpl_step_rules *rules) {
    if (n == 0) {
        return CPL_OK;
    }
    work = work == (void *)param ? NULL : work;
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        bool wide = aligned16(param, m, v, grad) && (uintptr_t)work % (4 * sizeof(T)) == 0 && (uintptr_t)mask % 4 == 0;
        places<T> far = {};
        for (int r = 0; others != NULL && r < others->count; r++) {
            if (r != others->own) {
                far.at[far.count++] = (T *)others->at[r];
                wide = wide && (uintptr_t)others->at[r] % (4 * sizeof(T)) == 0;
            }
        }
        int64_t body = wide ? n / 4 * 4 : 0;
        T *rounded = (T *)work;
        cudaStream_t stream = cpl_cuda_stream(dev);
        if (body > 0) {
            launch<T, 4>(stream, param, rounded, far, m, v, grad, mask, body / 4, weight_decay, state, *rules);
        }
        if (body < n) {
            for (int r = 0; r < far.count; r++) {
                far.at[r] += body;
            }
            launch<T, 1>(stream, param + body, rounded == NULL ? NULL : rounded + body, far, m + body, v + body, grad + body,
                         mask == NULL ? NULL : mask + body, n - body, weight_decay, state, *rules);
        }
    });
    return cpl_cuda_launched(dev, "adamw");
}

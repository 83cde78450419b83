/* AdamW with decoupled weight decay, unscaling, clipping, masking and rounding of the working copy in one pass over memory.
 * Refuses to write anything on a step that the consensus skips. */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256 };

/* Constants of a step: m^ = m * unbias_m, sqrt(v^) = sqrt(v) * unbias_v. */
struct step {
    float grad_factor, beta1, beta2, rest1, rest2; /* rest = 1 - beta */
    float unbias_m, unbias_v, eps, lr, decay;
};

__device__ step step_of(const cpl_step_state *state, const cpl_step_rules &rules, float decay) {
    double t = (double)state->adam_step;
    step s;
    s.grad_factor = state->grad_factor;
    s.beta1 = rules.beta1;
    s.beta2 = rules.beta2;
    s.rest1 = 1.0f - rules.beta1;
    s.rest2 = 1.0f - rules.beta2;
    s.unbias_m = (float)(1.0 / (1.0 - pow((double)rules.beta1, t)));
    s.unbias_v = (float)(1.0 / sqrt(1.0 - pow((double)rules.beta2, t)));
    s.eps = rules.eps;
    s.lr = state->lr;
    s.decay = decay;
    return s;
}

/* N elements a thread: 16 bytes of each f32 buffer where N is 4. param is written first and work after it, which may be param. */
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(float *param, T *work, float *m, float *v, const float *grad, const uint8_t *mask, int64_t packs, float decay,
                 const cpl_step_state *state, cpl_step_rules rules) {
    __shared__ step shared;
    if (state->skip) {
        return;
    }
    if (threadIdx.x == 0) {
        shared = step_of(state, rules, decay);
    }
    __syncthreads();
    const step s = shared;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < packs; i += (int64_t)gridDim.x * THREADS) {
        packed<float, N> g = load<float, N>(grad + i * N), p = load<float, N>(param + i * N);
        packed<float, N> mi = load<float, N>(m + i * N), vi = load<float, N>(v + i * N);
        packed<uint8_t, N> keep;
        if (mask != nullptr) {
            keep = load<uint8_t, N>(mask + i * N);
        }
        packed<T, N> w;
#pragma unroll
        for (int j = 0; j < N; j++) {
            float gj = g.at[j] * s.grad_factor;
            float mj = fmaf(s.beta1, mi.at[j], s.rest1 * gj);
            float vj = fmaf(s.beta2, vi.at[j], s.rest2 * gj * gj);
            float direction = mj * s.unbias_m / fmaf(sqrtf(vj), s.unbias_v, s.eps);
            float pj = p.at[j] - s.lr * fmaf(s.decay, p.at[j], direction);
            bool kept = mask == nullptr || keep.at[j] != 0;
            mi.at[j] = kept ? mj : 0.0f;
            vi.at[j] = kept ? vj : 0.0f;
            p.at[j] = kept ? pj : 0.0f;
            w.set(j, p.at[j]);
        }
        store(m + i * N, mi);
        store(v + i * N, vi);
        store(param + i * N, p);
        if (work != nullptr) {
            store(work + i * N, w);
        }
    }
}

/* state->adam_step counts this update already: step_control comes before. */
extern "C" cpl_status CPL_CUDA(adamw)(cpl_device *dev, cpl_dtype dt, float *param, void *work, float *m, float *v,
                                      const float *grad, const uint8_t *mask, int64_t n, float weight_decay,
                                      const cpl_step_state *state, const cpl_step_rules *rules) {
    if (n == 0) {
        return CPL_OK;
    }
    work = work == (void *)param ? NULL : work;
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        bool wide = aligned16(param, m, v, grad) && (uintptr_t)work % (4 * sizeof(T)) == 0 && (uintptr_t)mask % 4 == 0;
        int64_t body = wide ? n / 4 * 4 : 0;
        cudaStream_t stream = cpl_cuda_stream(dev);
        if (body > 0) {
            adamw_kernel<T, 4><<<grid_for(dev, body / 4, THREADS, 64), THREADS, 0, stream>>>(param, (T *)work, m, v, grad, mask,
                                                                                             body / 4, weight_decay, state, *rules);
        }
        if (body < n) {
            adamw_kernel<T, 1><<<grid_for(dev, n - body, THREADS, 64), THREADS, 0, stream>>>(
                param + body, work == NULL ? NULL : (T *)work + body, m + body, v + body, grad + body,
                mask == NULL ? NULL : mask + body, n - body, weight_decay, state, *rules);
        }
    });
    return cpl_cuda_launched(dev, "adamw");
}

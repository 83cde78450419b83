/* AdamW with decoupled weight decay, unscaling, clipping, masking and rounding of the working copy in one pass over memory.
 * Refuses to write anything on a step that the consensus skips. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector.h"
#include <math.h>

enum { PIECE = 1024 };

/* Constants of a step: m^ = m * unbias_m, sqrt(v^) = sqrt(v) * unbias_v with unbias_m = 1/(1-beta1^t), unbias_v = (1-beta2^t)^-1/2.
 */
typedef struct {
    float grad_factor, beta1, beta2, rest1, rest2; /* rest = 1 - beta */
    float unbias_m, unbias_v, eps, lr, decay;
} step;

/* [n] of each; mask NULL: none kept from moving. */
static inline void update(const step *s, float *restrict param, float *restrict m, float *restrict v, const float *restrict grad,
                          const uint8_t *restrict mask, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * s->grad_factor;
        float mi = CPL_FMA(s->beta1, m[i], s->rest1 * g);
        float vi = CPL_FMA(s->beta2, v[i], s->rest2 * g * g);
        float direction = mi * s->unbias_m / CPL_FMA(__builtin_sqrtf(vi), s->unbias_v, s->eps);
        float p = param[i] - s->lr * CPL_FMA(s->decay, param[i], direction);
        bool keep = !mask || mask[i] != 0;
        m[i] = keep ? mi : 0.0f;
        v[i] = keep ? vi : 0.0f;
        param[i] = keep ? p : 0.0f;
    }
}

/* state->adam_step counts this update already: step_control comes before. */
cpl_status CPL_CPU(adamw)(cpl_device *dev, cpl_dtype dt, float *param, void *work, const cpl_reach *others, float *m, float *v,
                          const float *grad, const uint8_t *mask, int64_t n, float weight_decay, const cpl_step_state *state,
                          const cpl_step_rules *rules) {
    if (state->skip) {
        return CPL_OK;
    }
    double t = (double)state->adam_step;
    const step s = {.grad_factor = state->grad_factor,
                    .beta1 = rules->beta1,
                    .beta2 = rules->beta2,
                    .rest1 = 1.0f - rules->beta1,
                    .rest2 = 1.0f - rules->beta2,
                    .unbias_m = (float)(1.0 / (1.0 - pow((double)rules->beta1, t))),
                    .unbias_v = (float)(1.0 / sqrt(1.0 - pow((double)rules->beta2, t))),
                    .eps = rules->eps,
                    .lr = state->lr,
                    .decay = weight_decay};
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
    for (int64_t at = 0; at < n; at += PIECE) {
        int64_t count = cpl_min_i64(n - at, PIECE);
        if (mask) {
            update(&s, param + at, m + at, v + at, grad + at, mask + at, count);
        } else {
            update(&s, param + at, m + at, v + at, grad + at, NULL, count);
        }
        if (work && work != (void *)param) {
            cpl_store_act(dt, work, at, param + at, count);
        }
        for (int r = 0; others != NULL && r < others->count; r++) {
            if (r != others->own) {
                cpl_store_act(dt, others->at[r], at, param + at, count);
            }
        }
    }
    return CPL_OK;
}

/* The decision of a training step: norm, clip factor, skip or go on, the loss scale's next value, Adam's step count.
 * Refuses to decide from what one rank alone has seen: flag and sums come in combined over all ranks. */
#include "kernels/cpu/cpu.h"
#include <math.h>

/* The dynamic loss scaler (Micikevicius et al. 2017, arXiv:1710.03740) on a step whose gradient overflowed.
 * hysteresis_left counts down to 0 over consecutive overflows and stays there: every further one in the row backs off, so that
 * hysteresis 1 backs off on each. The scale that is stuck is the one that was already at min when the step began; a scale that is
 * not dynamic cannot be lowered and is stuck on every overflow. */
static void overflowed(cpl_step_state *state, const cpl_step_rules *rules) {
    bool at_min = !rules->dynamic || state->loss_scale <= rules->min_scale;
    state->stuck_steps = at_min ? state->stuck_steps + (state->stuck_steps < INT32_MAX) : 0;
    state->good_steps = 0;
    if (!rules->dynamic) {
        return;
    }
    state->hysteresis_left = state->hysteresis_left > 0 ? state->hysteresis_left - 1 : 0;
    if (state->hysteresis_left == 0) {
        float lower = state->loss_scale * rules->backoff;
        state->loss_scale = lower > rules->min_scale ? lower : rules->min_scale;
    }
}

/* One good step refills the hysteresis; good_steps returns to 0 at growth, or the scale would grow on every later step. */
static void succeeded(cpl_step_state *state, const cpl_step_rules *rules) {
    state->adam_step += 1;
    state->stuck_steps = 0;
    if (!rules->dynamic) {
        return;
    }
    state->hysteresis_left = rules->hysteresis;
    state->good_steps += 1;
    if (state->good_steps >= rules->growth_interval) {
        float higher = state->loss_scale * rules->growth;
        state->loss_scale = higher < rules->max_scale ? higher : rules->max_scale;
        state->good_steps = 0;
    }
}

/* unscale     = inv_micro_batches / loss_scale                                      (f64, as all of this but the results)
 * grad_norm   = sqrt(sum of chunk_sums in order of their index) * unscale
 * grad_factor = unscale * min(1, clip / (grad_norm + 1e-6)), clip 0: unscale        (torch.nn.utils.clip_grad_norm_)
 * with the loss scale that this step's backward pass used. Skipped where a rank saw an overflow and also where the f32 norm is not
 * finite, for sums of finite parts may overflow; then grad_factor is 0 and grad_norm is not finite. */
cpl_status CPL_CPU(step_control)(cpl_device *dev, cpl_step_state *state, const cpl_step_rules *rules, const uint32_t *overflow,
                                 const double *chunk_sums, int64_t chunks) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; i++) {
        sum += chunk_sums[i];
    }
    double unscale = (double)rules->inv_micro_batches / (double)state->loss_scale;
    double norm = sqrt(sum) * unscale;
    bool finite = isfinite((float)norm);
    state->skip = *overflow != 0 || !finite;
    state->grad_norm = state->skip && finite ? INFINITY : (float)norm;
    if (state->skip) {
        state->grad_factor = 0;
        overflowed(state, rules);
        return CPL_OK;
    }
    double clip_factor = rules->clip > 0 ? (double)rules->clip / (norm + 1e-6) : 1;
    state->grad_factor = (float)(unscale * (clip_factor < 1 ? clip_factor : 1));
    succeeded(state, rules);
    return CPL_OK;
}

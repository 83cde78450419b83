/* Cross-entropy of next-token prediction and, in place of the logits, its gradient.
 * Refuses to hide a bad logit: inf or nan in a row makes its loss and its gradient nan, for the overflow check to find. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/loss.h"

/* Row of f32 logits x [V]: x becomes e^(x - max), *sum their sum in f64 over blocks of f32; returns the row's loss.
 * An infinite logit gives inf - inf = nan. */
static float row_loss(float *x, int32_t target, int64_t V, float *sum) {
    float top = cpl_max(x, V);
    float chosen = x[target];
    double total = cpl_loss_exp(x, x, 1.0f, top, V);
    *sum = (float)total;
    return (float)(log(total) + ((double)top - (double)chosen));
}

/* x [V] = factor * (x / sum - onehot) */
static void row_gradient(float *x, int32_t target, int64_t V, float sum, float factor) {
    float each = factor / sum;
    float chosen = x[target];
    for (int64_t v = 0; v < V; v++) {
        x[v] *= each;
    }
    x[target] = factor * (chosen / sum - 1.0f);
}

cpl_status CPL_CPU(cross_entropy)(cpl_device *dev, cpl_dtype dt, void *logits, float *losses, const int32_t *targets,
                                  const cpl_step_state *state, float row_weight, int64_t R, int64_t V, int64_t ld) {
    cpl_status st = CPL_OK;
    float *rows; /* one of [V] a thread */
    int team = cpl_cpu_team(dev, R * V);
    int64_t stride = cpl_loss_stride(V);
    CPL_TRY(cpl_loss_check(targets, R, V, ld));
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_FLAT, (size_t)team * (size_t)stride * sizeof *rows, &rows));
    float factor = state ? state->loss_scale * row_weight : 0;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t r = 0; r < R; r++) {
        float *x = rows + omp_get_thread_num() * stride;
        if (targets[r] == CPL_IGNORED) {
            losses[r] = 0;
            if (state) {
                cpl_loss_clear(dt, logits, r * ld, ld);
            }
            continue;
        }
        float sum;
        cpl_load_act(dt, x, logits, r * ld, V);
        losses[r] = row_loss(x, targets[r], V, &sum);
        if (state) {
            row_gradient(x, targets[r], V, sum, factor);
            cpl_store_act(dt, logits, r * ld, x, V);
            cpl_loss_clear(dt, logits, r * ld + V, ld - V);
        }
    }
done:
    return st;
}

/* Squared distance of two hidden states and its gradient.
 * Refuses to lose a small difference: a - b is taken in f32 of the stored values, its square and sums in f64. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sums.h"
#include "kernels/cpu/vector.h"

enum { PIECE = CPL_SUM_CHUNK, ROUND = 1024 };

/* Sum of (a-b)^2 of one chunk; diff [n] receives a - b. */
static double chunk_distance(float *restrict diff, const float *restrict a, const float *restrict b, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        diff[i] = a[i] - b[i];
    }
    return cpl_chunk_square(diff, n);
}

static void add_gradient(cpl_dtype dt, void *grad, int64_t at, const float *diff, float factor, int64_t n) {
    float buffer[PIECE];
    cpl_load_act(dt, buffer, grad, at, n);
    for (int64_t i = 0; i < n; i++) {
        buffer[i] += factor * diff[i];
    }
    cpl_store_act(dt, grad, at, buffer, n);
}

/* Source: Romero et al. 2015 (FitNets), arXiv:1412.6550. */
cpl_status CPL_CPU(mse)(cpl_device *dev, cpl_dtype dt, double *sum, void *grad, const void *a, const void *b,
                        const cpl_step_state *state, float coefficient, int64_t n) {
    double part[ROUND], total = 0;
    float factor = state ? state->loss_scale * (2.0f * coefficient) : 0;
    for (int64_t start = 0; start < n; start += (int64_t)ROUND * PIECE) {
        int64_t chunks = cpl_min_i64(cpl_ceil_div(n - start, PIECE), ROUND);
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
        for (int64_t c = 0; c < chunks; c++) {
            float wide_a[PIECE], wide_b[PIECE], diff[PIECE];
            int64_t at = start + c * PIECE, count = cpl_min_i64(n - at, PIECE);
            part[c] = chunk_distance(diff, cpl_view_act(dt, wide_a, a, at, count), cpl_view_act(dt, wide_b, b, at, count), count);
            if (state) {
                add_gradient(dt, grad, at, diff, factor, count);
            }
        }
        for (int64_t c = 0; c < chunks; c++) {
            total += part[c];
        }
    }
    *sum += (double)coefficient * total;
    return CPL_OK;
}

/* GELU of a whole buffer, for the recomputation of activations.
 * Refuses an approximation of its own: it shares cpl_geluf with linear_gelu_fwd, bit for bit. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector.h"

cpl_status CPL_CPU(gelu_fwd)(cpl_device *dev, cpl_dtype dt, void *y, const void *x, int64_t n) {
    enum { BLOCK = 1024 };
#pragma omp parallel for num_threads(cpl_cpu_team(dev, n)) schedule(static)
    for (int64_t i = 0; i < n; i += BLOCK) {
        float in[BLOCK];
        float out[BLOCK];
        int64_t m = cpl_min_i64(BLOCK, n - i);
        const float *restrict a = cpl_view_act(dt, in, x, i, m);
        float *restrict b = cpl_target_act(dt, out, y, i);
#pragma omp simd
        for (int64_t j = 0; j < m; j++) {
            b[j] = cpl_geluf(a[j]);
        }
        cpl_commit_act(dt, y, i, b, m);
    }
    return CPL_OK;
}

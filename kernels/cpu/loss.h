/* What cross_entropy.c and distill_loss.c share: checks, exponentials of a row and their sum.
 * Refuses to pass a target that is no token. */
#ifndef CPL_KERNELS_CPU_LOSS_H
#define CPL_KERNELS_CPU_LOSS_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector.h"
#include <math.h>
#include <omp.h>

enum { CPL_IGNORED = -100, CPL_LOSS_BLOCK = 1024 };

/* Elements between rows of scratch: whole cache lines. */
static inline int64_t cpl_loss_stride(int64_t V) {
    return (V + 15) / 16 * 16;
}

static inline cpl_status cpl_loss_check(const int32_t *targets, int64_t R, int64_t V, int64_t ld) {
    cpl_status st = CPL_OK;
    if (V < 1 || ld < V) {
        CPL_FAIL(CPL_INTERNAL, "loss of %lld logits in rows of %lld, expected 1 or more in at least as many", (long long)V,
                 (long long)ld);
    }
    for (int64_t r = 0; r < R; r++) {
        if (targets[r] != CPL_IGNORED && (targets[r] < 0 || targets[r] >= V)) {
            CPL_FAIL(CPL_INPUT, "target %lld of the micro-batch is %d, expected 0 to %lld, or -100 for none", (long long)r,
                     (int)targets[r], (long long)(V - 1));
        }
    }
done:
    return st;
}

/* y = e^((x - top) * factor), returns their sum: f32 within blocks, f64 over them, so that 10^5 terms cost no digits. y may be x.
 * x - top comes first: it is exact near the maximum, where it matters, and no finite logit overflows the exponential. */
static inline double cpl_loss_exp(float *y, const float *x, float factor, float top, int64_t n) {
    double sum = 0;
    for (int64_t at = 0; at < n; at += CPL_LOSS_BLOCK) {
        int64_t count = cpl_min_i64(n - at, CPL_LOSS_BLOCK);
#pragma omp simd
        for (int64_t i = at; i < at + count; i++) {
            y[i] = cpl_expf((x[i] - top) * factor);
        }
        sum += (double)cpl_sum(y + at, count);
    }
    return sum;
}

/* Elements at .. at+n of an act buffer to 0. */
static inline void cpl_loss_clear(cpl_dtype dt, void *x, int64_t at, int64_t n) {
    size_t size = cpl_dtype_size(dt);
    memset((char *)x + (size_t)at * size, 0, (size_t)n * size);
}

#endif

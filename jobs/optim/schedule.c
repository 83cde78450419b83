/* Learning-rate schedules.
 * Refuses to keep state. */
#include "jobs/optim/schedule.h"
#include <math.h>

double cpl_schedule_lr(const cpl_training *t, int64_t step, int64_t steps) {
    if (step < t->warmup) {
        return t->lr * (double)(step + 1) / (double)t->warmup;
    }
    int64_t from = t->warmup;
    if (t->schedule == CPL_SCHEDULE_WSD) {
        int64_t start = steps - (int64_t)((double)steps * t->decay);
        from = start > from ? start : from;
        if (step < from) {
            return t->lr;
        }
    }
    double x = steps > from ? (double)(step - from) / (double)(steps - from) : 1;
    x = x > 1 ? 1 : x;
    switch (t->schedule) {
    case CPL_SCHEDULE_COSINE:
        return t->lr * (t->min_lr + (1 - t->min_lr) * 0.5 * (1 + cos(M_PI * x)));
    case CPL_SCHEDULE_LINEAR:
    case CPL_SCHEDULE_WSD:
        return t->lr * (1 - (1 - t->min_lr) * x);
    default:
        return t->lr;
    }
}

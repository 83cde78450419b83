/* Learning-rate schedules: a function of the step alone, so that resuming needs nothing.
 * Refuses to keep state; skipped steps count like others. */
#ifndef CPL_JOBS_OPTIM_SCHEDULE_H
#define CPL_JOBS_OPTIM_SCHEDULE_H

#include "jobs/options.h"

/* Rate of step `step` (from 0) of `steps`. Warm-up: lr (step+1)/warmup. Then, with x the share of the remaining steps that is done:
 * constant lr; cosine from lr to lr min_lr (Loshchilov & Hutter 2017, arXiv:1608.03983); linear likewise; wsd: lr until the last
 * `decay` of all steps, then linearly to lr min_lr (Hu et al. 2024, arXiv:2404.06395). */
double cpl_schedule_lr(const cpl_training *t, int64_t step, int64_t steps);

#endif

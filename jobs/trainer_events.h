/* What a training loop notes beside its series: overflow events by rank and tensor, and the magnitudes of the gradient.
 * Refuses to decide anything but the end of a run whose overflows do not end. */
#ifndef CPL_JOBS_TRAINER_EVENTS_H
#define CPL_JOBS_TRAINER_EVENTS_H

#include "jobs/metrics.h"
#include "jobs/optim/optimizer.h"

/* Collective, on a skipped step: an event per rank that saw a non-finite value in its own gradient (the first tensor in the order
 * of the backward pass), into the series on every rank. kinds: host [tensors], of this rank's gradient (cpl_optimizer). scale: the
 * loss scale the step used. Errors: CPL_NUMERIC with step, rank,
 * tensor and kind when state->stuck_steps has reached `limit`. */
cpl_status cpl_trainer_overflow(cpl_comm *comm, const cpl_layout *layout, const uint32_t *kinds, cpl_metrics *metrics, int64_t step,
                                const char *label, const cpl_step_state *state, float scale, int64_t limit);
/* Collective, after a step: exponents of the unscaled, summed gradient by tensor group, and its largest magnitude. step: steps
 * done. */
cpl_status cpl_trainer_exponents(cpl_comm *comm, const cpl_optimizer *opt, cpl_metrics *metrics, int64_t step);

#endif

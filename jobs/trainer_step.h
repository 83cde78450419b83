/* The steps of a training loop: batches fed, forward, backward, reduction, decision and update enqueued, metrics drained behind.
 * Refuses to wait for the device inside a step where the device can record one: there the host runs up to CPL_STEPS_AHEAD ahead. */
#ifndef CPL_JOBS_TRAINER_STEP_H
#define CPL_JOBS_TRAINER_STEP_H

#include "jobs/optim/optimizer.h"
#include "jobs/trainer.h"

enum { CPL_STEPS_AHEAD = 4 };

typedef struct cpl_steps cpl_steps;

/* Everything is borrowed. Errors: CPL_NO_MEMORY; not collective. */
cpl_status cpl_steps_create(cpl_steps **out, const cpl_trainer_spec *spec, cpl_optimizer *opt, cpl_workspace *ws,
                            cpl_metrics *metrics);
void cpl_steps_destroy(cpl_steps **steps);
/* Device bytes beside the optimizer, the workspace and what reduction: tree needs, for the plan. */
int64_t cpl_steps_bytes(const cpl_layout *layout, const cpl_training *t, int ranks);

/* Collective: enqueues step `step` (counted from 0); *stop: a rank was told by a signal to stop after it. Errors: those of earlier
 * steps too. */
cpl_status cpl_steps_enqueue(cpl_steps *steps, int64_t step, bool *stop);
/* Collective: waits for all steps enqueued; their rows are then in the metrics. Errors: CPL_NUMERIC of cpl_trainer_overflow. */
cpl_status cpl_steps_drain(cpl_steps *steps);

#endif

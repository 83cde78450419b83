/* What the benches of a training step share: a trainer's steps over made-up tokens.
 * Refuses a step of its own: it is the trainer's (trainer_step.h). */
#ifndef CPL_JOBS_BENCH_TRAINING_H
#define CPL_JOBS_BENCH_TRAINING_H

#include "jobs/bench.h"
#include "jobs/trainer_step.h"

typedef struct {
    cpl_bench *b;     /* borrowed */
    cpl_arena *arena; /* owned, as all below */
    cpl_training options;
    cpl_trainer_spec spec;
    cpl_corpus *corpus;
    cpl_split text;
    cpl_metrics *metrics;
    cpl_optimizer *opt;
    cpl_workspace *ws;
    cpl_steps *steps;
    cpl_graph *decision; /* NULL: the step is not recorded here */
    double *seconds;     /* host, of steps */
    int32_t *tokens;     /* device [rows of a micro-batch] */
    float *losses;       /* the same */
    int64_t step;        /* the next to be enqueued */
    double step_seconds; /* median */
} cpl_bench_trainer;

/* Collective, after steps have run: the rows of a step by operation. */
cpl_status cpl_bench_profile(cpl_bench_trainer *t);

#endif

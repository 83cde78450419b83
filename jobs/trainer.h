/* The training loop that train, distill and fine-tuning share: micro-batches, the step's decision, evaluation, checkpoints,
 * resuming. Refuses to know where its first weights come from, and to read a clock for any decision that changes the result. */
#ifndef CPL_JOBS_TRAINER_H
#define CPL_JOBS_TRAINER_H

#include "comm/comm.h"
#include "io/corpus.h"
#include "jobs/metrics.h"
#include "jobs/model/model.h"
#include "jobs/options.h"
#include <signal.h>

typedef struct {
    cpl_comm *comm;              /* borrowed: the ranks that train this model */
    cpl_device *dev;             /* borrowed */
    const cpl_layout *layout;    /* borrowed */
    const cpl_training *options; /* borrowed */
    const cpl_run_options *run;  /* borrowed */
    int64_t steps;
    const cpl_split *train, *val; /* borrowed */
    uint64_t seed;
    const float *initial;              /* borrowed: host, this rank's shard (cpl_layout_shards) of the first weights */
    const uint8_t *mask;               /* borrowed: host, this rank's shard, or NULL */
    const cpl_model_loss *loss;        /* borrowed, or NULL for plain cross-entropy */
    const char *label;                 /* borrowed: in front of the progress line */
    const char *key;                   /* borrowed: the stage's key, checked when resuming */
    const char *folder;                /* borrowed: of the checkpoints, or NULL for none (a sweep's fine-tuning) */
    const volatile sig_atomic_t *stop; /* borrowed: set by a signal; NULL: none */
    bool quiet;                        /* no progress */
} cpl_trainer_spec;

typedef struct {
    cpl_metrics *metrics; /* owned */
    float *weights;       /* owned: host, this rank's shard of the final master weights */
    double val_loss;
    double wall_s;        /* of this process, without what came before a resume */
    int64_t resumed_from; /* step; 0: from the start */
} cpl_training_result;
void cpl_training_result_free(cpl_training_result *r);

/* What would end a training run at its first step: ranks, text, injection. layout: of the model. Errors: CPL_USAGE, CPL_INPUT. */
cpl_status cpl_training_ready(const cpl_training *t, const cpl_layout *layout, int64_t ranks, const cpl_split *train,
                              const cpl_split *val, const char *label);
/* Collective over spec->comm. Resumes from the newest good checkpoint in `folder`; ends with folder/step-<steps>.h5 written.
 * Errors: CPL_INPUT corpus too small; CPL_NUMERIC overflow with the scale at min overflow_limit times in a row, naming step, rank,
 * tensor, kind; CPL_STOPPED after a signal, with a checkpoint of the step reached. */
cpl_status cpl_trainer_run(const cpl_trainer_spec *spec, cpl_training_result *result);

#endif

/* What every stage that trains has in common: text, trainer, record.
 * Refuses to choose the first weights: the stage does. */
#ifndef CPL_JOBS_TRAINING_STAGE_H
#define CPL_JOBS_TRAINING_STAGE_H

#include "jobs/store.h"
#include "jobs/study/study.h"
#include "jobs/trainer.h"

/* Collective. Trains `steps` steps from the shard's weights (mask held where it has one), writes series, model attributes, seconds
 * and memory into the record, and leaves stage->model. loss: NULL for plain cross-entropy. */
cpl_status cpl_training_stage_run(cpl_context *ctx, cpl_stage *stage, cpl_record *record, const cpl_layout *layout,
                                  const cpl_training *options, int64_t steps, const cpl_shard *shard, const cpl_model_loss *loss);
/* Shape of a distill stage's student. Errors: CPL_USAGE at the option. */
cpl_status cpl_distill_shape(const cpl_stage *stage, const cpl_model_shape *teacher, cpl_model_shape *shape);
/* Layout in which it trains: with a projection at its end where hidden states of different widths are compared. */
cpl_status cpl_distill_layout(const cpl_stage *stage, const cpl_model_shape *teacher, const cpl_model_shape *student,
                              cpl_layout **layout);
/* Whole host weights [total] cut to this rank's shard (s->param). */
void cpl_shard_take(cpl_shard *s, const float *whole);
/* Bytes of a model with every parameter in 16 bits and nothing removed: what compression is measured against. */
static inline int64_t cpl_dense_bytes(const cpl_layout *l) {
    return 2 * l->parameters;
}

#endif

/* What every stage that trains has in common.
 * Refuses to choose the first weights. */
#include "jobs/training_stage.h"
#include "io/base/log.h"
#include "jobs/energy.h"
#include <math.h>
#include <string.h>

void cpl_shard_take(cpl_shard *s, const float *whole) {
    if (s->n > 0) {
        memcpy(s->param, whole + s->begin, (size_t)s->n * sizeof *whole);
    }
}

static cpl_status write_record(cpl_record *rec, const cpl_layout *layout, const cpl_training *t, const cpl_training_result *result,
                               bool hidden, const cpl_energy_drawn *energy) {
    cpl_status st = CPL_OK;
    double tokens = (double)(result->metrics->step.rows - result->resumed_from) * (double)(t->global_batch * layout->shape.context);
    CPL_TRY(cpl_record_model(rec, layout, result->val_loss, cpl_dense_bytes(layout)));
    CPL_TRY(cpl_metrics_record(result->metrics, rec, layout, t->global_batch * layout->shape.context, t->grad_exponents, hidden));
    CPL_TRY(cpl_record_i64(rec, "resumed_from_step", result->resumed_from));
    if (energy->joules > 0) { /* NAN: not known; 0: too short for the counter */
        CPL_TRY(cpl_record_f64(rec, "tokens_per_j", tokens / energy->joules));
    }
done:
    return st;
}

cpl_status cpl_training_stage_run(cpl_context *ctx, cpl_stage *stage, cpl_record *record, const cpl_layout *layout,
                                  const cpl_training *options, int64_t steps, const cpl_shard *shard, const cpl_model_loss *loss) {
    cpl_status st = CPL_OK;
    cpl_split train, val;
    cpl_training_result result = {0};
    cpl_energy_phase phase;
    cpl_energy_drawn energy;
    CPL_TRY(cpl_context_text(ctx, ctx->world, &layout->shape, &train, &val));
    cpl_trainer_spec spec = {.comm = ctx->world,
                             .dev = ctx->dev,
                             .layout = layout,
                             .options = options,
                             .run = &ctx->job->run,
                             .steps = steps,
                             .train = &train,
                             .val = &val,
                             .seed = (uint64_t)ctx->job->seed,
                             .initial = shard->param,
                             .mask = shard->mask,
                             .loss = loss,
                             .label = stage->name,
                             .key = stage->key,
                             .folder = stage->folder,
                             .stop = ctx->stop};
    cpl_energy_begin(&phase, ctx->dev);
    CPL_TRY(cpl_trainer_run(&spec, &result));
    CPL_TRY(cpl_energy_end(&phase, ctx->world, ctx->dev, &energy));
    bool hidden = loss != NULL && loss->hidden_weight != 0;
    CPL_TRY(cpl_agree(ctx->world, write_record(record, layout, options, &result, hidden, &energy)));
    cpl_log_info("%s: validation loss %.4f after %lld steps, %.1f s", stage->name, result.val_loss, (long long)steps,
                 result.wall_s);
done:
    cpl_training_result_free(&result);
    return st;
}

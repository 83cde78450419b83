/* Stage eval: validation loss and latency of a model.
 * Refuses to change anything. */
#include "jobs/evaluate.h"
#include "jobs/training_stage.h"
#include "io/base/log.h"
#include <math.h>

static cpl_status inputs(cpl_job *job, cpl_stage *stage) {
    return cpl_stage_add_input(job, stage, ((const cpl_eval_options *)stage->options)->model);
}

static cpl_status write_record(cpl_record *rec, const cpl_layout *layout, double loss, const cpl_latency *latency) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_record_model(rec, layout, loss, cpl_dense_bytes(layout)));
    CPL_TRY(cpl_record_f64(rec, "latency_p50_ms", latency->p50_ms));
    CPL_TRY(cpl_record_f64(rec, "latency_p99_ms", latency->p99_ms));
    CPL_TRY(cpl_record_f64(rec, "tokens_per_s", latency->tokens_per_s));
done:
    return st;
}

static cpl_status run(cpl_context *ctx, cpl_stage *stage, cpl_record *record) {
    cpl_status st = CPL_OK;
    const cpl_eval_options *o = stage->options;
    cpl_model model = {0};
    cpl_split train, val;
    cpl_workspace *ws = NULL;
    void *weights = NULL;
    double loss = NAN;
    cpl_latency latency = {NAN, NAN, NAN};
    cpl_dtype dt = cpl_precision_dtype(o->precision);
    CPL_TRY(cpl_model_load(&model, stage->input[0].path, ctx->world));
    CPL_TRY(cpl_context_text(ctx, ctx->world, &model.layout->shape, &train, &val));
    cpl_status local = cpl_model_upload(ctx->dev, model.layout, dt, model.weights, &weights);
    if (local == CPL_OK) {
        local = cpl_workspace_create(&ws, ctx->dev, model.layout, dt, o->micro_batch, false, CPL_RECOMPUTE_NONE, 0);
    }
    CPL_TRY(cpl_agree(ctx->world, local));
    CPL_TRY(cpl_evaluate(ctx->world, ctx->dev, ws, weights, &val, o->micro_batch, &loss));
    if (cpl_comm_rank(ctx->world) == 0) {
        local = cpl_measure_latency(ctx->dev, model.layout, dt, weights, &val, o->latency_runs, &latency);
        if (local == CPL_OK) {
            local = write_record(record, model.layout, loss, &latency);
        }
    }
    CPL_TRY(cpl_context_wait(ctx, ctx->world, local));
    cpl_log_info("%s: validation loss %.4f, perplexity %.3f", stage->name, loss, exp(loss));
done:
    cpl_workspace_destroy(&ws);
    cpl_device_free(ctx->dev, &weights);
    cpl_model_free(&model);
    return st;
}

const cpl_stage_kind cpl_stage_eval = {.name = "eval",
                                       .help = "validation loss and latency of a model",
                                       .table = &cpl_eval_table,
                                       .size = sizeof(cpl_eval_options),
                                       .inputs = inputs,
                                       .run = run};

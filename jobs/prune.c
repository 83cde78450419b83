/* Stage prune: exact magnitude pruning, each rank on its shard, and fine-tuning with the mask held.
 * Refuses to remove one weight more or less than asked. */
#include "jobs/training_stage.h"
#include "io/base/log.h"
#include "jobs/evaluate.h"
#include "jobs/select.h"
#include "jobs/size.h"
#include <math.h>
#include <string.h>

static cpl_status check(const cpl_stage *stage) {
    const cpl_prune_options *o = stage->options;
    cpl_status st = cpl_training_check(&o->training);
    return st == CPL_OK ? st : cpl_stage_fail(stage, NULL, "%s", cpl_status_message());
}

static cpl_status inputs(cpl_job *job, cpl_stage *stage) {
    return cpl_stage_add_input(job, stage, ((const cpl_prune_options *)stage->options)->model);
}

static int64_t final_step(const cpl_stage *stage) {
    return ((const cpl_prune_options *)stage->options)->finetune_steps;
}

cpl_status cpl_prune_record(cpl_record *rec, const cpl_layout *layout, const cpl_prune_options *o, const cpl_prune_report *r) {
    cpl_status st = CPL_OK;
    const char *dim = "tensor";
    const char **names = NULL;
    double *sparsity = NULL;
    CPL_TRY(cpl_alloc(&names, (size_t)layout->count, sizeof *names, "report"));
    CPL_TRY(cpl_alloc(&sparsity, (size_t)layout->count, sizeof *sparsity, "report"));
    for (int64_t i = 0; i < layout->count; i++) {
        names[i] = layout->param[i].name;
        sparsity[i] = (double)r->by_tensor[i] / (double)cpl_param_count(&layout->param[i]);
    }
    CPL_TRY(cpl_record_array(rec, dim, CPL_T_TEXT, 1, &layout->count, &dim, names, "", "parameter tensor"));
    CPL_TRY(cpl_record_array(rec, "tensor_sparsity", CPL_T_F64, 1, &layout->count, &dim, sparsity, "",
                             "share of the tensor's weights removed"));
    CPL_TRY(cpl_record_f64(rec, "requested_sparsity", (double)o->sparsity.num / (double)o->sparsity.den));
    CPL_TRY(cpl_record_i64(rec, "prunable_weights", r->population));
    CPL_TRY(cpl_record_i64(rec, "removed_weights", r->removed));
    CPL_TRY(cpl_record_f64(rec, "sparsity", r->population > 0 ? (double)r->removed / (double)r->population : 0));
    CPL_TRY(cpl_record_f64(rec, "sparsity_all", (double)r->removed / (double)layout->parameters));
    CPL_TRY(cpl_record_f64(rec, "threshold", r->threshold));
    CPL_TRY(cpl_record_i64(rec, "ties_at_threshold", r->ties));
done:
    cpl_free(&names);
    cpl_free(&sparsity);
    return st;
}

/* Without fine-tuning: validation loss of the pruned weights, and the model file. */
static cpl_status evaluate_and_save(cpl_context *ctx, cpl_stage *stage, cpl_record *rec, const cpl_layout *layout,
                                    const cpl_shard *shard) {
    cpl_status st = CPL_OK;
    const cpl_prune_options *o = stage->options;
    cpl_dtype dt = cpl_precision_dtype(o->training.precision);
    cpl_model model = {0};
    cpl_workspace *ws = NULL;
    void *weights = NULL;
    double loss = NAN;
    cpl_split train, val;
    CPL_TRY(cpl_store_save(stage->model, ctx->world, layout, stage->key, 0, shard, NULL, NULL));
    CPL_TRY(cpl_model_load(&model, stage->model, ctx->world));
    CPL_TRY(cpl_context_text(ctx, ctx->world, &layout->shape, &train, &val));
    cpl_status local = cpl_model_upload(ctx->dev, layout, dt, model.weights, &weights);
    if (local == CPL_OK) {
        local = cpl_workspace_create(&ws, ctx->dev, layout, dt, o->training.micro_batch, false, CPL_RECOMPUTE_NONE, 0);
    }
    CPL_TRY(cpl_agree(ctx->world, local));
    CPL_TRY(cpl_evaluate(ctx->world, ctx->dev, ws, weights, &val, o->training.micro_batch, &loss));
    CPL_TRY(cpl_agree(ctx->world, cpl_record_model(rec, layout, loss, cpl_dense_bytes(layout))));
    cpl_log_info("%s: validation loss %.4f", stage->name, loss);
done:
    cpl_workspace_destroy(&ws);
    cpl_device_free(ctx->dev, &weights);
    cpl_model_free(&model);
    return st;
}

static cpl_status run(cpl_context *ctx, cpl_stage *stage, cpl_record *record) {
    cpl_status st = CPL_OK;
    const cpl_prune_options *o = stage->options;
    cpl_store_head head;
    cpl_layout *layout = NULL;
    cpl_shard shard = {0};
    cpl_prune_report report = {0};
    CPL_TRY(cpl_store_head_read(stage->input[0].path, ctx->world, &head));
    CPL_TRY(cpl_agree(ctx->world, cpl_layout_create(&layout, &head.shape)));
    CPL_TRY(cpl_shard_create(&shard, layout, ctx->world, false, true));
    shard.masked = false; /* an older mask is not read: its zeros are the smallest weights there are */
    CPL_TRY(cpl_store_load(stage->input[0].path, ctx->world, layout, &shard));
    shard.masked = true;
    CPL_TRY(cpl_prune_weights(ctx->world, ctx->dev, layout, o, &shard, &report));
    cpl_log_info("%s: removed %lld of %lld weights, magnitudes up to %.6g", stage->name, (long long)report.removed,
                 (long long)report.population, report.threshold);
    if (o->finetune_steps > 0) {
        CPL_TRY(cpl_training_stage_run(ctx, stage, record, layout, &o->training, o->finetune_steps, &shard, NULL));
    } else {
        CPL_TRY(evaluate_and_save(ctx, stage, record, layout, &shard));
    }
    cpl_status local = cpl_prune_record(record, layout, o, &report);
    if (local == CPL_OK) {
        local = cpl_record_i64(record, "bytes", cpl_sparse_bytes(layout, report.by_tensor));
    }
    CPL_TRY(cpl_agree(ctx->world, local));
done:
    cpl_prune_report_free(&report);
    cpl_shard_free(&shard);
    cpl_layout_destroy(&layout);
    return st;
}

const cpl_stage_kind cpl_stage_prune = {.name = "prune",
                                        .help = "remove the smallest weights, exactly as many as asked",
                                        .table = &cpl_prune_table,
                                        .size = sizeof(cpl_prune_options),
                                        .check = check,
                                        .inputs = inputs,
                                        .final_step = final_step,
                                        .run = run};

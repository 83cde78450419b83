/* Stage quantize: a model's weights in 2 to 8 bits, packed as they would be shipped, and what that costs.
 * Refuses to call a size small that leaves out scales or zero points. */
#include "jobs/quantize_model.h"
#include "io/base/log.h"
#include "jobs/evaluate.h"
#include "jobs/training_stage.h"
#include <math.h>
#include <stdio.h>

static cpl_status check(const cpl_stage *stage) {
    cpl_status st = cpl_quantize_check(stage->options);
    return st == CPL_OK ? st : cpl_stage_fail(stage, NULL, "%s", cpl_status_message());
}

static cpl_status inputs(cpl_job *job, cpl_stage *stage) {
    return cpl_stage_add_input(job, stage, ((const cpl_quantize_options *)stage->options)->model);
}

static int64_t final_step(const cpl_stage *stage) {
    (void)stage;
    return 0;
}

/* Codes, scales and zero points of all ranks in one file beside the model. */
static cpl_status save_payload(cpl_context *ctx, const cpl_stage *stage, const cpl_quantize_options *o,
                               const cpl_quantize_report *r) {
    cpl_status st = CPL_OK;
    char path[4096];
    int64_t total[2] = {r->code_bytes, r->groups}, before[2];
    for (int i = 0; i < 2; i++) {
        CPL_TRY(cpl_comm_exscan_i64(ctx->world, total[i], &before[i]));
    }
    CPL_TRY(cpl_comm_allreduce_i64(ctx->world, total, 2, CPL_SUM));
    const cpl_ckpt_array arrays[] = {
        {"codes", CPL_T_U8, total[0], before[0], r->code_bytes, r->codes,
         "codes of the tensors one after another, rows padded to bytes, lowest bit first"},
        {"scales", CPL_T_F32, total[1], before[1], r->groups, r->scales,
         "one a group, in the order of the codes; exactly representable in scale_type"},
        {"zeros", CPL_T_U8, total[1], before[1], r->groups, r->zeros, "zero points, 0 for the symmetric scheme"}};
    const cpl_ckpt_attr attrs[] = {{.name = "key", .type = CPL_T_TEXT, .text = stage->key},
                                   {.name = "bits", .type = CPL_T_I64, .i = o->bits},
                                   {.name = "granularity", .type = CPL_T_TEXT, .text = o->granularity},
                                   {.name = "scheme", .type = CPL_T_TEXT, .text = o->scheme == 0 ? "symmetric" : "asymmetric"},
                                   {.name = "scale_type", .type = CPL_T_TEXT, .text = o->scale_type == 0 ? "fp16" : "fp32"}};
    snprintf(path, sizeof path, "%s/packed.h5", stage->folder);
    cpl_io_ranks ranks = cpl_store_ranks(ctx->world);
    CPL_TRY(cpl_checkpoint_write(path, &ranks, arrays, 3, attrs, sizeof attrs / sizeof attrs[0]));
done:
    return st;
}

cpl_status cpl_quantize_record(cpl_record *rec, const cpl_layout *layout, const cpl_quantize_report *r) {
    cpl_status st = CPL_OK;
    static const char *const names[] = {"sqnr_db", "mse", "max_error", "noise_ratio", "entropy", "bound_sqnr_db", "tensor_bytes"};
    static const char *const units[] = {"dB", "", "", "", "bit/weight", "dB", "byte"};
    static const char *const helps[] = {
        "signal to quantization noise",     "mean squared error of the weights",
        "largest error of a weight",        "mse over the uniform-noise model scale^2/12",
        "of the codes: an achievable rate", "what a Gaussian source allows at that rate: 6.02 dB a bit",
        "stored payload of the tensor"};
    const char *dim = "tensor", **tensors = NULL;
    double *column = NULL;
    CPL_TRY(cpl_alloc(&tensors, (size_t)layout->count, sizeof *tensors, "report"));
    CPL_TRY(cpl_alloc(&column, (size_t)layout->count, sizeof *column, "report"));
    for (int64_t i = 0; i < layout->count; i++) {
        tensors[i] = layout->param[i].name;
    }
    CPL_TRY(cpl_record_array(rec, dim, CPL_T_TEXT, 1, &layout->count, &dim, tensors, "", "parameter tensor"));
    for (int c = 0; c < CPL_QUALITY_COLUMNS; c++) {
        for (int64_t i = 0; i < layout->count; i++) {
            column[i] = ((const double *)&r->tensor[i])[c];
        }
        CPL_TRY(cpl_record_array(rec, names[c], CPL_T_F64, 1, &layout->count, &dim, column, units[c], helps[c]));
    }
    CPL_TRY(cpl_record_f64(rec, "sqnr_db", r->sqnr_db));
    CPL_TRY(cpl_record_i64(rec, "quantized_weights", r->quantized));
done:
    cpl_free(&tensors);
    cpl_free(&column);
    return st;
}

/* Validation loss of the weights the codes stand for, and the model file with them. */
static cpl_status evaluate_and_save(cpl_context *ctx, cpl_stage *stage, const cpl_model *model, double *loss) {
    cpl_status st = CPL_OK;
    cpl_shard shard = {0};
    cpl_workspace *ws = NULL;
    void *weights = NULL;
    cpl_split train, val;
    int64_t B = 8;
    CPL_TRY(cpl_context_text(ctx, ctx->world, &model->layout->shape, &train, &val));
    CPL_TRY(cpl_shard_create(&shard, model->layout, ctx->world, false, model->mask != NULL));
    cpl_shard_take(&shard, model->weights);
    for (int64_t i = 0; model->mask != NULL && i < shard.n; i++) {
        shard.mask[i] = model->mask[shard.begin + i];
    }
    CPL_TRY(cpl_store_save(stage->model, ctx->world, model->layout, stage->key, 0, &shard, NULL, NULL));
    cpl_status local = cpl_model_upload(ctx->dev, model->layout, CPL_F32, model->weights, &weights);
    local = local == CPL_OK ? cpl_workspace_create(&ws, ctx->dev, model->layout, CPL_F32, B, false, CPL_RECOMPUTE_NONE, 0) : local;
    CPL_TRY(cpl_agree(ctx->world, local));
    CPL_TRY(cpl_evaluate(ctx->world, ctx->dev, ws, weights, &val, B, loss));
done:
    cpl_workspace_destroy(&ws);
    cpl_device_free(ctx->dev, &weights);
    cpl_shard_free(&shard);
    return st;
}

static cpl_status run(cpl_context *ctx, cpl_stage *stage, cpl_record *record) {
    cpl_status st = CPL_OK;
    const cpl_quantize_options *o = stage->options;
    cpl_model model = {0};
    cpl_quantize_report report = {0};
    int64_t *removed = NULL;
    double loss = NAN;
    CPL_TRY(cpl_model_load(&model, stage->input[0].path, ctx->world));
    CPL_TRY(cpl_agree(ctx->world, cpl_alloc(&removed, (size_t)model.layout->count, sizeof *removed, "report")));
    cpl_mask_count(model.layout, model.mask, removed);
    CPL_TRY(cpl_quantize_weights(ctx->world, ctx->dev, model.layout, o, model.weights, removed, true, &report));
    CPL_TRY(save_payload(ctx, stage, o, &report));
    CPL_TRY(evaluate_and_save(ctx, stage, &model, &loss));
    cpl_status local = cpl_record_model(record, model.layout, loss, report.bytes);
    local = local == CPL_OK ? cpl_quantize_record(record, model.layout, &report) : local;
    CPL_TRY(cpl_agree(ctx->world, local));
    cpl_log_info("%s: validation loss %.4f, %lld bytes, SQNR %.1f dB", stage->name, loss, (long long)report.bytes, report.sqnr_db);
done:
    cpl_quantize_report_free(&report);
    cpl_free(&removed);
    cpl_model_free(&model);
    return st;
}

const cpl_stage_kind cpl_stage_quantize = {.name = "quantize",
                                           .help = "store weights in 2 to 8 bits",
                                           .table = &cpl_quantize_table,
                                           .size = sizeof(cpl_quantize_options),
                                           .check = check,
                                           .inputs = inputs,
                                           .final_step = final_step,
                                           .run = run};

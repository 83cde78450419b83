/* One trial of a sweep.
 * Refuses to leave half a result. */
#include "jobs/study/trial.h"
#include "io/base/log.h"
#include "jobs/energy.h"
#include "jobs/evaluate.h"
#include "jobs/quantize_model.h"
#include "jobs/select.h"
#include "jobs/size.h"
#include "jobs/study/study.h"
#include "jobs/trainer.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    cpl_context *ctx; /* borrowed */
    cpl_comm *group;  /* borrowed */
    bool metered;
    const cpl_sweep_options *o;    /* borrowed */
    const cpl_trial *trial;        /* borrowed */
    cpl_model model;               /* owned */
    int64_t *removed;              /* owned [tensors] */
    double *tensor_sparsity;       /* owned [tensors], into the record */
    cpl_quantize_report quantized; /* owned */
    cpl_trial_figures *f;          /* borrowed */
    char key[CPL_SHA256_HEX];
} work;

/* A host shard of each rank to the whole model on all. */
static cpl_status gather(work *w, const cpl_shard *shard) {
    cpl_status st = CPL_OK;
    float *all = NULL;
    uint8_t *mask = NULL;
    int64_t *begin = NULL;
    const cpl_layout *l = w->model.layout;
    cpl_device *dev = w->ctx->dev;
    size_t total = (size_t)l->total, n = (size_t)shard->n;
    int ranks = cpl_comm_size(w->group);
    cpl_status local = cpl_alloc(&begin, (size_t)ranks + 1, sizeof *begin, "shard table");
    local = local == CPL_OK && w->model.mask == NULL ? cpl_alloc(&w->model.mask, total, 1, "mask") : local;
    local = local == CPL_OK ? cpl_device_alloc(dev, &all, total, sizeof(float), "pruned weights") : local;
    local = local == CPL_OK ? cpl_device_alloc(dev, &mask, total, 1, "mask") : local;
    if (local == CPL_OK && n > 0) {
        local = CPL_OPS(dev, upload, all + shard->begin, shard->param, n * sizeof(float));
        local = local == CPL_OK ? CPL_OPS(dev, upload, mask + shard->begin, shard->mask, n) : local;
    }
    CPL_TRY(cpl_agree(w->group, local));
    cpl_layout_shards(l, ranks, begin);
    CPL_TRY(cpl_comm_allgather(w->group, dev, all, sizeof(float), begin));
    CPL_TRY(cpl_comm_allgather(w->group, dev, mask, 1, begin));
    local = CPL_OPS(dev, download, w->model.weights, all, total * sizeof(float));
    local = local == CPL_OK ? CPL_OPS(dev, download, w->model.mask, mask, total) : local;
    CPL_TRY(cpl_agree(w->group, local));
done:
    cpl_device_free(dev, &all);
    cpl_device_free(dev, &mask);
    cpl_free(&begin);
    return st;
}

static cpl_status finetune(work *w, cpl_shard *shard) {
    cpl_status st = CPL_OK;
    const cpl_prune_options *o = &w->trial->prune;
    cpl_training_result result = {0};
    cpl_split train, val;
    CPL_TRY(cpl_context_text(w->ctx, w->group, &w->model.layout->shape, &train, &val));
    cpl_trainer_spec spec = {.comm = w->group,
                             .dev = w->ctx->dev,
                             .layout = w->model.layout,
                             .options = &o->training,
                             .run = &w->ctx->job->run,
                             .steps = o->finetune_steps,
                             .train = &train,
                             .val = &val,
                             .seed = (uint64_t)w->ctx->job->seed,
                             .initial = shard->param,
                             .mask = shard->mask,
                             .label = "fine-tuning",
                             .key = w->key,
                             .stop = w->ctx->stop,
                             .quiet = true};
    CPL_TRY(cpl_trainer_run(&spec, &result));
    memcpy(shard->param, result.weights, (size_t)shard->n * sizeof(float));
done:
    cpl_training_result_free(&result);
    return st;
}

static cpl_status prune(work *w) {
    cpl_status st = CPL_OK;
    cpl_shard shard = {0};
    cpl_prune_report report = {0};
    CPL_TRY(cpl_shard_create(&shard, w->model.layout, w->group, false, true));
    memcpy(shard.param, w->model.weights + shard.begin, (size_t)shard.n * sizeof(float));
    CPL_TRY(cpl_prune_weights(w->group, w->ctx->dev, w->model.layout, &w->trial->prune, &shard, &report));
    if (w->trial->prune.finetune_steps > 0) {
        CPL_TRY(finetune(w, &shard));
    }
    CPL_TRY(gather(w, &shard));
done:
    cpl_prune_report_free(&report);
    cpl_shard_free(&shard);
    return st;
}

static cpl_status measure(work *w) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = w->model.layout;
    cpl_dtype dt = cpl_precision_dtype(w->o->precision);
    cpl_device *dev = w->ctx->dev;
    cpl_workspace *ws = NULL;
    void *weights = NULL;
    cpl_split train, val;
    cpl_latency latency = {NAN, NAN, NAN};
    cpl_energy_phase phase;
    cpl_energy_drawn energy;
    CPL_TRY(cpl_context_text(w->ctx, w->group, &l->shape, &train, &val));
    cpl_status local = cpl_model_upload(dev, l, dt, w->model.weights, &weights);
    local = local == CPL_OK ? cpl_workspace_create(&ws, dev, l, dt, w->o->micro_batch, false, CPL_RECOMPUTE_NONE, 0) : local;
    CPL_TRY(cpl_agree(w->group, local));
    cpl_energy_begin(&phase, dev);
    CPL_TRY(cpl_evaluate(w->group, dev, ws, weights, &val, w->o->micro_batch, &w->f->val_loss));
    CPL_TRY(cpl_energy_end(&phase, w->group, dev, &energy));
    w->f->energy_j = w->metered && energy.joules > 0 ? energy.joules : (double)NAN; /* 0: too short for the counter */
    w->f->perplexity = exp(w->f->val_loss);
    if (cpl_comm_rank(w->group) == 0) {
        local = cpl_measure_latency(dev, l, dt, weights, &val, w->o->latency_runs, &latency);
    }
    CPL_TRY(cpl_context_wait(w->ctx, w->group, local));
    w->f->latency_p50_ms = latency.p50_ms;
    w->f->latency_p99_ms = latency.p99_ms;
    w->f->tokens_per_s = latency.tokens_per_s;
done:
    cpl_workspace_destroy(&ws);
    cpl_device_free(dev, &weights);
    return st;
}

static cpl_status compress(work *w) {
    cpl_status st = CPL_OK;
    if (w->trial->prunes) {
        CPL_TRY(prune(w));
    }
    const cpl_layout *l = w->model.layout;
    cpl_status local = cpl_alloc(&w->removed, (size_t)l->count, sizeof *w->removed, "report");
    local = local == CPL_OK ? cpl_alloc(&w->tensor_sparsity, (size_t)l->count, sizeof(double), "report") : local;
    CPL_TRY(cpl_agree(w->group, local));
    cpl_mask_count(l, w->model.mask, w->removed);
    double gone = 0, population = 0;
    for (int64_t i = 0; i < l->count; i++) {
        bool counts = cpl_prune_includes(&w->trial->prune, &l->param[i]);
        gone += counts ? (double)w->removed[i] : 0;
        population += counts ? (double)cpl_param_count(&l->param[i]) : 0;
        w->tensor_sparsity[i] = (double)w->removed[i] / (double)cpl_param_count(&l->param[i]);
    }
    w->f->sparsity = population > 0 ? gone / population : 0;
    w->f->bytes = (double)cpl_sparse_bytes(l, w->removed);
    if (w->trial->quantizes) {
        CPL_TRY(cpl_quantize_weights(w->group, w->ctx->dev, l, &w->trial->quantize, w->model.weights, w->removed, false,
                                     &w->quantized));
        w->f->bytes = (double)w->quantized.bytes;
        w->f->sqnr_db = w->quantized.sqnr_db;
    }
    CPL_TRY(measure(w));
done:
    return st;
}

static cpl_status write_tensors(const work *w, cpl_record *rec) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = w->model.layout;
    const char *dim = "tensor", **names = NULL;
    double *sqnr = NULL;
    CPL_TRY(cpl_alloc(&names, (size_t)l->count, sizeof *names, "report"));
    CPL_TRY(cpl_alloc(&sqnr, (size_t)l->count, sizeof *sqnr, "report"));
    for (int64_t i = 0; i < l->count; i++) {
        names[i] = l->param[i].name;
        sqnr[i] = w->quantized.tensor == NULL ? NAN : w->quantized.tensor[i].sqnr_db;
    }
    CPL_TRY(cpl_record_array(rec, dim, CPL_T_TEXT, 1, &l->count, &dim, names, "", "parameter tensor"));
    CPL_TRY(cpl_record_array(rec, "tensor_sqnr_db", CPL_T_F64, 1, &l->count, &dim, sqnr, "dB", "signal to quantization noise"));
    CPL_TRY(cpl_record_array(rec, "tensor_sparsity", CPL_T_F64, 1, &l->count, &dim, w->tensor_sparsity, "",
                             "share of weights removed"));
done:
    cpl_free(&names);
    cpl_free(&sqnr);
    return st;
}

static cpl_status write_file(const work *w, const char *path, bool failed, const char *error) {
    cpl_status st = CPL_OK;
    cpl_record *rec = NULL;
    CPL_TRY(cpl_record_create(&rec));
    CPL_TRY(cpl_record_text(rec, "key", w->key));
    CPL_TRY(cpl_record_text(rec, "status", failed ? "failed" : "done"));
    CPL_TRY(cpl_record_text(rec, "error", failed ? error : ""));
#define WRITE(name, units, help) CPL_TRY(cpl_record_f64(rec, #name, w->f->name));
    CPL_TRIAL_FIGURES(WRITE)
#undef WRITE
    if (!failed) {
        CPL_TRY(write_tensors(w, rec));
    }
    CPL_TRY(cpl_record_write(rec, path));
done:
    cpl_record_destroy(&rec);
    return st;
}

static void no_figures(cpl_trial_figures *f) {
    double *value = (double *)f;
    for (int i = 0; i < CPL_TRIAL_FIGURE_COUNT; i++) {
        value[i] = NAN;
    }
}

cpl_status cpl_trial_run(cpl_context *ctx, cpl_comm *group, bool metered, const cpl_sweep_options *options, const cpl_trial *trial,
                         const char *model_path, const char *key, const char *path, cpl_trial_figures *figures,
                         cpl_status *outcome) {
    cpl_status st = CPL_OK;
    work w = {.ctx = ctx, .group = group, .metered = metered, .o = options, .trial = trial, .f = figures};
    double start = cpl_now();
    char error[CPL_MESSAGE_MAX] = "";
    snprintf(w.key, sizeof w.key, "%s", key);
    no_figures(figures);
    *outcome = cpl_model_load(&w.model, model_path, group);
    *outcome = *outcome == CPL_OK ? compress(&w) : *outcome;
    const bool failed = *outcome != CPL_OK;
    if (*outcome == CPL_STOPPED || *outcome == CPL_COMM) {
        st = *outcome;
        goto done;
    }
    if (failed) {
        snprintf(error, sizeof error, "%s", cpl_status_message());
        no_figures(figures);
    }
    figures->wall_s = cpl_now() - start;
    CPL_TRY(cpl_agree(group, cpl_comm_rank(group) == 0 ? write_file(&w, path, failed, error) : CPL_OK));
    if (failed) {
        cpl_status_set_message(error);
    }
done:
    cpl_quantize_report_free(&w.quantized);
    cpl_free(&w.removed);
    cpl_free(&w.tensor_sparsity);
    cpl_model_free(&w.model);
    return st;
}

cpl_status cpl_trial_read(const char *path, const char *key, cpl_trial_figures *figures, bool *failed, char **error,
                          cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *found = NULL, *status = NULL;
    no_figures(figures);
    CPL_TRY(cpl_record_read_text(path, "key", &found, arena));
    if (strcmp(found, key) != 0) {
        CPL_FAIL(CPL_NOT_FOUND, "%s: is of another trial", path);
    }
    CPL_TRY(cpl_record_read_text(path, "status", &status, arena));
    CPL_TRY(cpl_record_read_text(path, "error", error, arena));
    *failed = strcmp(status, "done") != 0;
#define READ(name, units, help) CPL_TRY(cpl_record_read_f64(path, #name, &figures->name));
    CPL_TRIAL_FIGURES(READ)
#undef READ
done:
    return st;
}

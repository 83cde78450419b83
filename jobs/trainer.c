/* The training loop.
 * Refuses to know where its first weights come from, and to read a clock for any decision that changes the result. */
#include "jobs/trainer.h"
#include "io/base/log.h"
#include "jobs/evaluate.h"
#include "jobs/optim/optimizer.h"
#include "jobs/optim/schedule.h"
#include "jobs/store.h"
#include "jobs/trainer_events.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { TREE_DEPTH_MAX = 40 };

typedef struct {
    const cpl_trainer_spec *spec; /* borrowed */
    const cpl_training *t;        /* borrowed */
    cpl_device *dev;              /* borrowed */
    cpl_comm *comm;               /* borrowed */
    cpl_optimizer *opt;           /* owned */
    cpl_workspace *ws;            /* owned */
    cpl_shard shard;              /* owned: host staging for checkpoints */
    cpl_metrics *metrics;         /* owned */
    int64_t B, T, rows, G;        /* sequences and rows of a micro-batch, micro-batches of a global batch */
    int64_t *owns;                /* owned [ranks+1]: rank r does micro-batches [owns[r], owns[r+1]) */
    int32_t *host_tokens, *host_targets;
    int32_t *tokens, *targets;   /* device [rows] */
    float *soft, *hard;          /* device [rows] */
    double *sums;                /* device [2][G]: soft and hard loss sums of the micro-batches */
    double *host_sums;           /* host [2][G] */
    float *tree[TREE_DEPTH_MAX]; /* device: gradient buffers of reduction: tree, [0] is opt->grad */
    int64_t step;                /* steps done */
    double last_save;
} trainer;

static cpl_status allocate_buffers(trainer *r) {
    cpl_status st = CPL_OK;
    size_t rows = (size_t)r->rows;
    int ranks = cpl_comm_size(r->comm), rank = cpl_comm_rank(r->comm);
    CPL_TRY(cpl_alloc(&r->owns, (size_t)ranks + 1, sizeof *r->owns, "micro-batch table"));
    for (int i = 0; i <= ranks; i++) {
        r->owns[i] = r->G * i / ranks;
    }
    CPL_TRY(cpl_alloc(&r->host_tokens, rows, sizeof(int32_t), "training batch"));
    CPL_TRY(cpl_alloc(&r->host_targets, rows, sizeof(int32_t), "training batch"));
    CPL_TRY(cpl_alloc(&r->host_sums, 2 * (size_t)r->G, sizeof(double), "losses"));
    CPL_TRY(cpl_device_alloc(r->dev, &r->tokens, rows, sizeof(int32_t), "training batch"));
    CPL_TRY(cpl_device_alloc(r->dev, &r->targets, rows, sizeof(int32_t), "training batch"));
    CPL_TRY(cpl_device_alloc(r->dev, &r->soft, rows, sizeof(float), "losses"));
    CPL_TRY(cpl_device_alloc(r->dev, &r->hard, rows, sizeof(float), "losses"));
    CPL_TRY(cpl_device_alloc(r->dev, &r->sums, 2 * (size_t)r->G, sizeof(double), "losses"));
    if (r->t->reduction == CPL_REDUCTION_TREE) {
        r->tree[0] = r->opt->grad;
        int depth = 1;
        for (int64_t n = r->owns[rank + 1] - r->owns[rank]; n > 1 && depth < TREE_DEPTH_MAX; n = (n + 1) / 2, depth++) {
            CPL_TRY(cpl_device_alloc(r->dev, &r->tree[depth], (size_t)r->spec->layout->total, sizeof(float), "gradient tree"));
        }
    }
    CPL_TRY(cpl_workspace_create(&r->ws, r->dev, r->spec->layout, r->opt->dtype, r->B, true, (cpl_recompute)r->t->recompute, 0));
done:
    return st;
}

static cpl_status trainer_create(trainer *r, const cpl_trainer_spec *spec) {
    cpl_status st = CPL_OK;
    int ranks = cpl_comm_size(spec->comm);
    *r = (trainer){.spec = spec,
                   .t = spec->options,
                   .dev = spec->dev,
                   .comm = spec->comm,
                   .B = spec->options->micro_batch,
                   .T = spec->layout->shape.context,
                   .G = spec->options->global_batch / spec->options->micro_batch};
    r->rows = r->B * r->T;
    CPL_TRY(cpl_training_ready(r->t, spec->layout, ranks, spec->train, spec->val, spec->label));
    CPL_TRY(cpl_agree(r->comm, cpl_metrics_create(&r->metrics)));
    CPL_TRY(cpl_optimizer_create(&r->opt, r->comm, r->dev, spec->layout, r->t, spec->initial, spec->mask));
    CPL_TRY(cpl_agree(r->comm, allocate_buffers(r)));
    CPL_TRY(cpl_shard_create(&r->shard, spec->layout, r->comm, true, spec->mask != NULL));
    if (spec->mask != NULL) {
        memcpy(r->shard.mask, spec->mask, (size_t)r->shard.n);
    }
done:
    return st;
}

static void trainer_destroy(trainer *r) {
    for (int i = 1; i < TREE_DEPTH_MAX; i++) {
        cpl_device_free(r->dev, &r->tree[i]);
    }
    cpl_workspace_destroy(&r->ws);
    cpl_optimizer_destroy(&r->opt);
    cpl_shard_free(&r->shard);
    cpl_metrics_destroy(&r->metrics);
    cpl_device_free(r->dev, &r->tokens);
    cpl_device_free(r->dev, &r->targets);
    cpl_device_free(r->dev, &r->soft);
    cpl_device_free(r->dev, &r->hard);
    cpl_device_free(r->dev, &r->sums);
    cpl_free(&r->owns);
    cpl_free(&r->host_tokens);
    cpl_free(&r->host_targets);
    cpl_free(&r->host_sums);
}

cpl_status cpl_training_ready(const cpl_training *t, const cpl_layout *layout, int64_t ranks, const cpl_split *train,
                              const cpl_split *val, const char *label) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_training_ranks_check(t, ranks, label));
    CPL_TRY(cpl_fail_context(cpl_split_check(train, t->global_batch, "training text"), "%s", label));
    CPL_TRY(cpl_fail_context(cpl_split_check(val, 1, "held-out text"), "%s", label));
    if (t->inject_step >= 0 && cpl_layout_find(layout, t->inject_tensor) == NULL) {
        CPL_FAIL(CPL_USAGE, "%s: inject_tensor: the model has no tensor '%s'", label, t->inject_tensor);
    }
    if (t->inject_step >= 0 && t->inject_rank >= ranks) {
        CPL_FAIL(CPL_USAGE, "%s: inject_rank: rank %lld of %lld ranks is not there", label, (long long)t->inject_rank,
                 (long long)ranks);
    }
done:
    return st;
}

/* --- checkpoints --- */

static cpl_status save(trainer *r) {
    cpl_status st = CPL_OK;
    char path[4096];
    cpl_step_state state;
    if (r->spec->folder == NULL) {
        return CPL_OK;
    }
    snprintf(path, sizeof path, "%s/step-%lld.h5", r->spec->folder, (long long)r->step);
    CPL_TRY(cpl_agree(r->comm, cpl_optimizer_download(r->opt, r->shard.param, r->shard.m, r->shard.v, &state)));
    CPL_TRY(cpl_store_save(path, r->comm, r->spec->layout, r->spec->key, r->step, &r->shard, &state, r->metrics));
    if (cpl_comm_rank(r->comm) == 0) {
        int keep = r->step == r->spec->steps ? 1 : (int)r->spec->run->keep_checkpoints;
        st = cpl_checkpoint_prune(r->spec->folder, keep);
    }
    CPL_TRY(cpl_agree(r->comm, st));
    r->last_save = cpl_now();
done:
    return st;
}

/* Continues from the newest good checkpoint, if there is one. */
static cpl_status resume(trainer *r) {
    cpl_status st = CPL_OK;
    struct {
        char path[4096];
        int64_t step;
    } found = {.step = -1};
    if (r->spec->folder == NULL) {
        return CPL_OK;
    }
    cpl_status local = CPL_OK;
    if (cpl_comm_rank(r->comm) == 0) {
        local = cpl_checkpoint_newest(r->spec->folder, found.path, sizeof found.path, &found.step);
    }
    CPL_TRY(cpl_agree(r->comm, local));
    CPL_TRY(cpl_comm_bcast(r->comm, &found, sizeof found, 0));
    if (found.step <= 0) {
        return CPL_OK;
    }
    cpl_store_head head;
    CPL_TRY(cpl_store_head_read(found.path, r->comm, &head));
    if (strcmp(head.key, r->spec->key) != 0 || head.step > r->spec->steps || !head.moments || !head.series) {
        CPL_FAIL(CPL_DAMAGED, "%s: is not a checkpoint of this stage; remove it to start the stage anew", found.path);
    }
    CPL_TRY(cpl_store_load(found.path, r->comm, r->spec->layout, &r->shard));
    CPL_TRY(cpl_agree(r->comm, cpl_metrics_read(r->metrics, found.path)));
    CPL_TRY(cpl_optimizer_restore(r->opt, r->shard.param, r->shard.m, r->shard.v, &head.state));
    r->step = head.step;
    cpl_log_info("%s: resuming from step %lld of %lld", r->spec->label, (long long)r->step, (long long)r->spec->steps);
done:
    return st;
}

/* --- one step --- */

/* Forward and backward of global micro-batch g of this step into grad. */
static cpl_status micro_batch(trainer *r, int64_t g, float *grad) {
    cpl_status st = CPL_OK;
    uint64_t first = ((uint64_t)r->step * (uint64_t)r->G + (uint64_t)g) * (uint64_t)r->B;
    for (int64_t s = 0; s < r->B; s++) {
        CPL_TRY(cpl_split_sample(r->spec->train, r->spec->seed, first + (uint64_t)s, r->host_tokens + s * r->T,
                                 r->host_targets + s * r->T));
    }
    CPL_TRY(CPL_OPS(r->dev, upload, r->tokens, r->host_tokens, (size_t)r->rows * sizeof(int32_t)));
    CPL_TRY(CPL_OPS(r->dev, upload, r->targets, r->host_targets, (size_t)r->rows * sizeof(int32_t)));
    CPL_TRY(cpl_model_step(r->ws, r->opt->work, r->tokens, r->targets, r->spec->loss, r->opt->state, grad, r->soft, r->hard));
    if (r->spec->loss != NULL) {
        CPL_TRY(CPL_OPS(r->dev, sum_f32, r->sums + g, r->soft, r->rows));
    }
    CPL_TRY(CPL_OPS(r->dev, sum_f32, r->sums + r->G + g, r->hard, r->rows));
done:
    return st;
}

/* Micro-batches [first, last) by halves, recursively: with the halves over the ranks one fixed binary tree over the global batch.
 */
static cpl_status tree_sum(trainer *r, int64_t first, int64_t last, int depth) {
    cpl_status st = CPL_OK;
    size_t bytes = (size_t)r->spec->layout->total * sizeof(float);
    if (last - first == 1) {
        CPL_TRY(CPL_OPS(r->dev, zero, r->tree[depth], bytes));
        CPL_TRY(micro_batch(r, first, r->tree[depth]));
        return CPL_OK;
    }
    int64_t middle = first + (last - first) / 2;
    CPL_TRY(tree_sum(r, first, middle, depth));
    CPL_TRY(tree_sum(r, middle, last, depth + 1));
    CPL_TRY(CPL_OPS(r->dev, add_f32, r->tree[depth], r->tree[depth + 1], r->spec->layout->total));
done:
    return st;
}

static cpl_status inject(trainer *r) {
    cpl_status st = CPL_OK;
    const cpl_training *t = r->t;
    if (t->inject_step < 0 || r->step < t->inject_step || r->step >= t->inject_step + t->inject_count ||
        cpl_comm_rank(r->comm) != t->inject_rank) {
        return CPL_OK;
    }
    const cpl_param *p = cpl_layout_find(r->spec->layout, t->inject_tensor);
    float value = t->inject_kind == 0 ? INFINITY : NAN;
    CPL_TRY(CPL_OPS(r->dev, upload, r->opt->grad + p->offset + cpl_param_count(p) / 2, &value, sizeof value));
done:
    return st;
}

static cpl_status accumulate(trainer *r) {
    cpl_status st = CPL_OK;
    int rank = cpl_comm_rank(r->comm);
    CPL_TRY(CPL_OPS(r->dev, zero, r->sums, 2 * (size_t)r->G * sizeof(double)));
    if (r->t->reduction == CPL_REDUCTION_TREE) {
        CPL_TRY(tree_sum(r, r->owns[rank], r->owns[rank + 1], 0));
    } else {
        CPL_TRY(CPL_OPS(r->dev, zero, r->opt->grad, (size_t)r->spec->layout->total * sizeof(float)));
        for (int64_t g = r->owns[rank]; g < r->owns[rank + 1]; g++) {
            CPL_TRY(micro_batch(r, g, r->opt->grad));
        }
    }
    CPL_TRY(inject(r));
    CPL_TRY(cpl_optimizer_scan(r->opt));
done:
    return st;
}

/* Histogram of the summed gradient at evaluations; the summed gradient is whole only shard by shard. */
static cpl_status drain(trainer *r, float lr, float scale, double started, cpl_step_state *state) {
    cpl_status st = CPL_OK;
    double soft = 0, hard = 0, row[CPL_M_STEP_COLUMNS];
    CPL_TRY(cpl_comm_allgather(r->comm, r->dev, r->sums, sizeof(double), r->owns));
    CPL_TRY(cpl_comm_allgather(r->comm, r->dev, r->sums + r->G, sizeof(double), r->owns));
    CPL_TRY(CPL_OPS(r->dev, download, r->host_sums, r->sums, 2 * (size_t)r->G * sizeof(double)));
    CPL_TRY(CPL_OPS(r->dev, download, state, r->opt->state, sizeof *state));
    for (int64_t g = 0; g < r->G; g++) {
        soft += r->host_sums[g];
        hard += r->host_sums[r->G + g];
    }
    double tokens = (double)r->G * (double)r->rows;
    row[CPL_M_HARD_LOSS] = hard / tokens;
    row[CPL_M_LOSS] = r->spec->loss == NULL ? hard / tokens : cpl_model_loss_total(r->spec->loss, soft / tokens, hard / tokens);
    row[CPL_M_LR] = lr;
    row[CPL_M_GRAD_NORM] = state->grad_norm;
    row[CPL_M_LOSS_SCALE] = scale;
    row[CPL_M_OVERFLOW] = state->skip;
    row[CPL_M_STEP_MS] = (cpl_now() - started) * 1e3;
    CPL_TRY(cpl_series_add(&r->metrics->step, row));
done:
    return st;
}

static cpl_status one_step(trainer *r, bool *stop) {
    cpl_status st = CPL_OK;
    cpl_step_state before, after;
    double started = cpl_now();
    cpl_watchdog_beat("training step");
    cpl_status local = accumulate(r);
    if (local == CPL_OK) {
        local = CPL_OPS(r->dev, download, &before, r->opt->state, sizeof before);
    }
    uint32_t word = (local != CPL_OK ? CPL_WORD_ERROR : 0u) | (r->spec->stop != NULL && *r->spec->stop ? CPL_WORD_STOP : 0u);
    CPL_TRY(cpl_comm_agree_word(r->comm, &word));
    if (word & CPL_WORD_ERROR) {
        CPL_TRY(cpl_agree(r->comm, local));
    }
    *stop = (word & CPL_WORD_STOP) != 0;
    float lr = (float)cpl_schedule_lr(r->t, r->step, r->spec->steps);
    CPL_TRY(cpl_optimizer_step(r->opt, lr));
    CPL_TRY(cpl_agree(r->comm, drain(r, lr, before.loss_scale, started, &after)));
    if (after.skip) {
        CPL_TRY(cpl_trainer_overflow(r->comm, r->opt, r->metrics, r->step, r->spec->label, &after, before.loss_scale,
                                     r->t->overflow_limit));
    }
    r->step++;
done:
    return st;
}

/* --- the loop --- */

static cpl_status evaluate(trainer *r, double *loss) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_evaluate(r->comm, r->dev, r->ws, r->opt->work, r->spec->val, r->B, loss));
    const double row[CPL_M_EVAL_COLUMNS] = {[CPL_M_EVAL_STEP] = (double)r->step, [CPL_M_VAL_LOSS] = *loss};
    CPL_TRY(cpl_agree(r->comm, cpl_series_add(&r->metrics->eval, row)));
    CPL_TRY(cpl_trainer_exponents(r->comm, r->opt, r->metrics, r->step));
done:
    return st;
}

static void describe(const trainer *r, double val_loss, char *note, size_t size) {
    const cpl_series *s = &r->metrics->step;
    int64_t last = s->rows - 1;
    char val[32] = "", scale[40] = "";
    if (!isnan(val_loss)) {
        snprintf(val, sizeof val, "  val %.4f", val_loss);
    }
    if (r->opt->rules.dynamic) {
        snprintf(scale, sizeof scale, "  scale 2^%d", (int)log2(cpl_series_at(s, CPL_M_LOSS_SCALE, last)));
    }
    double rate = (double)r->G * (double)r->rows / (cpl_series_at(s, CPL_M_STEP_MS, last) * 1e-3);
    snprintf(note, size, "loss %.4f%s  lr %.2e  %.1fk tok/s%s%s", cpl_series_at(s, CPL_M_LOSS, last), val,
             cpl_series_at(s, CPL_M_LR, last), rate * 1e-3, scale, cpl_series_at(s, CPL_M_OVERFLOW, last) != 0 ? "  skipped" : "");
}

static void log_step(const trainer *r) {
    const cpl_series *s = &r->metrics->step;
    int64_t i = s->rows - 1;
    char label[200];
    cpl_json_quote(label, sizeof label, r->spec->label);
    cpl_log_event(
        "step",
        "\"stage\":%s,\"step\":%lld,\"loss\":%.9g,\"lr\":%.9g,\"grad_norm\":%.9g,\"loss_scale\":%.9g,\"overflow\":%d,\"ms\":%.3f",
        label, (long long)r->step - 1, cpl_series_at(s, CPL_M_LOSS, i), cpl_series_at(s, CPL_M_LR, i),
        cpl_series_at(s, CPL_M_GRAD_NORM, i), cpl_series_at(s, CPL_M_LOSS_SCALE, i), cpl_series_at(s, CPL_M_OVERFLOW, i) != 0,
        cpl_series_at(s, CPL_M_STEP_MS, i));
}

/* Whether a checkpoint is due; rank 0's clock decides for all. */
static cpl_status save_is_due(trainer *r, bool *due) {
    int64_t yes = 0;
    const cpl_run_options *run = r->spec->run;
    if (run->checkpoint_seconds > 0 && cpl_comm_rank(r->comm) == 0) {
        yes = cpl_now() - r->last_save >= run->checkpoint_seconds;
    }
    cpl_status st = run->checkpoint_seconds > 0 ? cpl_comm_bcast(r->comm, &yes, sizeof yes, 0) : CPL_OK;
    *due = yes != 0 || (run->checkpoint_every > 0 && r->step % run->checkpoint_every == 0) || r->step == r->spec->steps;
    return st;
}

static cpl_status loop(trainer *r, double *val_loss) {
    cpl_status st = CPL_OK;
    cpl_progress progress;
    char note[256] = "";
    int64_t evals = r->metrics->eval.rows;
    *val_loss = evals > 0 ? cpl_series_at(&r->metrics->eval, CPL_M_VAL_LOSS, evals - 1) : NAN;
    if (!r->spec->quiet) {
        cpl_progress_begin(&progress, r->spec->label, r->step, r->spec->steps);
    }
    while (r->step < r->spec->steps) {
        bool stop = false, due = false;
        CPL_TRY(one_step(r, &stop));
        bool last = r->step == r->spec->steps;
        if (last || (r->t->eval_every > 0 && r->step % r->t->eval_every == 0)) {
            CPL_TRY(evaluate(r, val_loss));
        }
        if (!r->spec->quiet) {
            describe(r, *val_loss, note, sizeof note);
            cpl_progress_step(&progress, r->step, note);
            log_step(r);
        }
        CPL_TRY(save_is_due(r, &due));
        if (due || stop) {
            CPL_TRY(save(r));
        }
        if (stop && !last) {
            CPL_FAIL(CPL_STOPPED, "%s: stopped at step %lld of %lld by a signal, saved; run the same command again to go on",
                     r->spec->label, (long long)r->step, (long long)r->spec->steps);
        }
        cpl_comm_progress(r->comm);
    }
done:
    if (!r->spec->quiet) {
        cpl_progress_end(&progress, note);
    }
    return st;
}

void cpl_training_result_free(cpl_training_result *result) {
    cpl_metrics_destroy(&result->metrics);
    cpl_free(&result->weights);
}

cpl_status cpl_trainer_run(const cpl_trainer_spec *spec, cpl_training_result *result) {
    cpl_status st = CPL_OK;
    trainer r;
    double started = cpl_now();
    size_t held = 0;
    cpl_step_state state;
    memset(result, 0, sizeof *result);
    CPL_TRY(trainer_create(&r, spec));
    CPL_TRY(resume(&r));
    result->resumed_from = r.step;
    r.last_save = cpl_now();
    CPL_TRY(loop(&r, &result->val_loss));
    CPL_TRY(cpl_agree(r.comm, cpl_optimizer_download(r.opt, r.shard.param, r.shard.m, r.shard.v, &state)));
    result->metrics = r.metrics;
    result->weights = r.shard.param;
    r.metrics = NULL;
    r.shard.param = NULL;
    result->wall_s = cpl_now() - started;
    cpl_device_memory(r.dev, &held, &result->device_bytes);
done:
    trainer_destroy(&r);
    return st;
}

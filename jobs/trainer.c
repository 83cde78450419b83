/* The training loop.
 * Refuses to know where its first weights come from, and to read a clock for any decision that changes the result. */
#include "jobs/trainer.h"
#include "io/base/log.h"
#include "jobs/evaluate.h"
#include "jobs/optim/optimizer.h"
#include "jobs/store.h"
#include "jobs/trainer_events.h"
#include "jobs/trainer_step.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    const cpl_trainer_spec *spec; /* borrowed */
    const cpl_training *t;        /* borrowed */
    cpl_device *dev;              /* borrowed */
    cpl_comm *comm;               /* borrowed */
    cpl_optimizer *opt;           /* owned */
    cpl_workspace *ws;            /* owned */
    cpl_steps *steps;             /* owned */
    cpl_shard shard;              /* owned: host staging for checkpoints */
    cpl_metrics *metrics;         /* owned */
    int64_t step;                 /* steps enqueued */
    int64_t told;                 /* rows of the metrics that were shown */
    double last_save;
} trainer;

static cpl_status allocate_buffers(trainer *r) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_workspace_create(&r->ws, r->dev, r->spec->layout, cpl_precision_dtype(r->t->precision), r->t->micro_batch, true,
                                 (cpl_recompute)r->t->recompute, 0));
    CPL_TRY(cpl_steps_create(&r->steps, r->spec, r->opt, r->ws, r->metrics));
done:
    return st;
}

static cpl_status trainer_create(trainer *r, const cpl_trainer_spec *spec) {
    cpl_status st = CPL_OK;
    int ranks = cpl_comm_size(spec->comm);
    *r = (trainer){.spec = spec, .t = spec->options, .dev = spec->dev, .comm = spec->comm};
    CPL_TRY(cpl_training_ready(r->t, spec->layout, ranks, spec->train, spec->val, spec->label));
    CPL_TRY(cpl_agree(r->comm, cpl_metrics_create(&r->metrics)));
    CPL_TRY(cpl_comm_attach(r->comm, r->dev));
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
    cpl_steps_destroy(&r->steps);
    cpl_workspace_destroy(&r->ws);
    cpl_optimizer_destroy(&r->opt);
    cpl_shard_free(&r->shard);
    cpl_metrics_destroy(&r->metrics);
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
    CPL_TRY(cpl_optimizer_download(r->opt, r->shard.param, r->shard.m, r->shard.v, &state));
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

/* --- the loop --- */

static cpl_status evaluate(trainer *r, double *loss) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_evaluate(r->comm, r->dev, r->ws, r->opt->work, r->spec->val, r->t->micro_batch, loss));
    const double row[CPL_M_EVAL_COLUMNS] = {[CPL_M_EVAL_STEP] = (double)r->step, [CPL_M_VAL_LOSS] = *loss};
    CPL_TRY(cpl_agree(r->comm, cpl_series_add(&r->metrics->eval, row)));
    CPL_TRY(cpl_trainer_exponents(r->comm, r->opt, r->metrics, r->step));
done:
    return st;
}

static void describe(const trainer *r, int64_t row, double val_loss, char *note, size_t size) {
    const cpl_series *s = &r->metrics->step;
    char val[32] = "", scale[40] = "";
    if (!isnan(val_loss)) {
        snprintf(val, sizeof val, "  val %.4f", val_loss);
    }
    if (r->opt->rules.dynamic) {
        snprintf(scale, sizeof scale, "  scale 2^%d", (int)log2(cpl_series_at(s, CPL_M_LOSS_SCALE, row)));
    }
    double tokens = (double)r->t->global_batch * (double)r->spec->layout->shape.context;
    double rate = tokens / (cpl_series_at(s, CPL_M_STEP_MS, row) * 1e-3);
    snprintf(note, size, "loss %.4f%s  lr %.2e  %.1fk tok/s%s%s", cpl_series_at(s, CPL_M_LOSS, row), val,
             cpl_series_at(s, CPL_M_LR, row), rate * 1e-3, scale, cpl_series_at(s, CPL_M_OVERFLOW, row) != 0 ? "  skipped" : "");
}

static void log_step(const trainer *r, int64_t i) {
    const cpl_series *s = &r->metrics->step;
    char label[200];
    cpl_json_quote(label, sizeof label, r->spec->label);
    cpl_log_event(
        "step",
        "\"stage\":%s,\"step\":%lld,\"loss\":%.9g,\"lr\":%.9g,\"grad_norm\":%.9g,\"loss_scale\":%.9g,\"overflow\":%d,\"ms\":%.3f",
        label, (long long)i, cpl_series_at(s, CPL_M_LOSS, i), cpl_series_at(s, CPL_M_LR, i), cpl_series_at(s, CPL_M_GRAD_NORM, i),
        cpl_series_at(s, CPL_M_LOSS_SCALE, i), cpl_series_at(s, CPL_M_OVERFLOW, i) != 0, cpl_series_at(s, CPL_M_STEP_MS, i));
}

/* Steps that are over since the last call. */
static void tell(trainer *r, cpl_progress *progress, double val_loss, char *note, size_t size) {
    for (; r->told < r->metrics->step.rows; r->told++) {
        if (!r->spec->quiet) {
            describe(r, r->told, val_loss, note, size);
            cpl_progress_step(progress, r->told + 1, note);
            log_step(r, r->told);
        }
    }
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
    r->told = r->metrics->step.rows;
    *val_loss = evals > 0 ? cpl_series_at(&r->metrics->eval, CPL_M_VAL_LOSS, evals - 1) : NAN;
    if (!r->spec->quiet) {
        cpl_progress_begin(&progress, r->spec->label, r->step, r->spec->steps);
    }
    while (r->step < r->spec->steps) {
        bool stop = false, due = false;
        CPL_TRY(cpl_steps_enqueue(r->steps, r->step, &stop));
        r->step++;
        bool last = r->step == r->spec->steps;
        bool evaluates = last || (r->t->eval_every > 0 && r->step % r->t->eval_every == 0);
        CPL_TRY(save_is_due(r, &due));
        if (evaluates || due || stop) {
            CPL_TRY(cpl_steps_drain(r->steps));
        }
        if (evaluates) {
            CPL_TRY(evaluate(r, val_loss));
        }
        tell(r, &progress, *val_loss, note, sizeof note);
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
    cpl_step_state state;
    memset(result, 0, sizeof *result);
    CPL_TRY(trainer_create(&r, spec));
    CPL_TRY(resume(&r));
    result->resumed_from = r.step;
    r.last_save = cpl_now();
    CPL_TRY(loop(&r, &result->val_loss));
    CPL_TRY(cpl_optimizer_download(r.opt, r.shard.param, r.shard.m, r.shard.v, &state));
    result->metrics = r.metrics;
    result->weights = r.shard.param;
    r.metrics = NULL;
    r.shard.param = NULL;
    result->wall_s = cpl_now() - started;
done:
    trainer_destroy(&r);
    if (st != CPL_OK) {
        cpl_comm_detach(spec->comm); /* the ranks may have failed between two calls of NCCL */
    }
    return st;
}

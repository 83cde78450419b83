/* Stage sweep: a grid of trials, taken by groups of ranks from a shared counter; every finished trial is a file.
 * Refuses to run a trial twice, and to let one that fails stop the others. */
#include "jobs/study/fit.h"
#include "jobs/study/study.h"
#include "jobs/study/sweep_record.h"
#include "io/base/log.h"
#include "jobs/energy.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static cpl_status bind(cpl_job *job, cpl_stage *stage) {
    cpl_grid *grid = NULL;
    cpl_status st = cpl_grid_bind(job, stage, &grid);
    stage->extra = grid;
    return st;
}

/* The option that asks for energy, or NULL. */
static const char *asks_energy(const cpl_stage *stage) {
    const cpl_sweep_options *o = stage->options;
    const cpl_grid *g = stage->extra;
    for (size_t i = 0; i < o->pareto.count; i++) {
        if (strcmp(o->pareto.value[i], "energy") == 0) {
            return "pareto";
        }
    }
    return g->objective.energy > 0 ? "objective" : NULL;
}

static cpl_status check(const cpl_stage *stage) {
    const cpl_sweep_options *o = stage->options;
    const cpl_grid *g = stage->extra;
    for (size_t i = 0; i < o->pareto.count; i++) {
        const char *axis = o->pareto.value[i];
        if (strcmp(axis, "val_loss") != 0 && strcmp(axis, "bytes") != 0 && strcmp(axis, "latency") != 0 &&
            strcmp(axis, "energy") != 0) {
            return cpl_stage_fail(stage, "pareto", "expected val_loss, bytes, latency or energy, got '%s'", axis);
        }
        if (strcmp(axis, "latency") == 0 && o->latency_runs == 0) {
            return cpl_stage_fail(stage, "pareto", "latency is not measured with latency_runs: 0");
        }
    }
    if (g->objective.latency > 0 && o->latency_runs == 0) {
        return cpl_stage_fail(stage, "objective", "latency is not measured with latency_runs: 0");
    }
    return CPL_OK;
}

static cpl_status inputs(cpl_job *job, cpl_stage *stage) {
    cpl_status st = CPL_OK;
    const cpl_grid *g = stage->extra;
    for (int64_t i = 0; i < g->axis[0].count; i++) {
        CPL_TRY(cpl_stage_add_input(job, stage, g->axis[0].value[i]));
    }
done:
    return st;
}

static cpl_status hash(const cpl_stage *stage, cpl_sha256 *h) {
    cpl_status st = CPL_OK;
    const cpl_grid *g = stage->extra;
    cpl_arena *arena = NULL;
    cpl_trial t;
    char text[64], key[CPL_SHA256_HEX];
    for (int a = 0; a < g->n_axes; a++) {
        snprintf(text, sizeof text, "%lld", (long long)g->axis[a].count);
        cpl_sha256_add_text(h, g->axis[a].name);
        cpl_sha256_add_text(h, text);
    }
    for (int64_t i = 0; i < g->trials; i++) {
        CPL_TRY(cpl_arena_create(&arena));
        CPL_TRY(cpl_grid_trial(g, i, &t, arena));
        CPL_TRY(cpl_grid_key(&t, g->axis[0].value[t.model], "", key));
        cpl_sha256_add_text(h, key);
        cpl_arena_destroy(&arena);
    }
    CPL_TRY(cpl_fields_hash(cpl_objective_table.fields, cpl_objective_table.count, &g->objective, h));
done:
    cpl_arena_destroy(&arena);
    return st;
}

/* What all trials share: how they are measured, on which text. */
static cpl_status common_hash(const cpl_context *ctx, const cpl_stage *stage, char hex[CPL_SHA256_HEX]) {
    cpl_status st = CPL_OK;
    const cpl_sweep_options *o = stage->options;
    cpl_sha256 h;
    char text[200];
    cpl_sha256_init(&h);
    snprintf(text, sizeof text, "precision=%d micro_batch=%lld latency_runs=%lld seed=%lld held_out=%.17g %s", o->precision,
             (long long)o->micro_batch, (long long)o->latency_runs, (long long)ctx->job->seed, ctx->job->corpus.held_out,
             cpl_corpus_tokenizer(ctx->corpus));
    cpl_sha256_add_text(&h, text);
    cpl_sha256_add_text(&h, ctx->corpus_sha256);
    cpl_sha256_end(&h, hex);
    return st;
}

static void trial_path(const cpl_context *ctx, const char *key, char *path, size_t size) {
    snprintf(path, size, "%s/trials/%.32s.h5", ctx->out, key);
}

/* By key; of equal keys the first row comes first. */
static int by_key(const void *a, const void *b) {
    const char *x = *(const char *const *)a, *y = *(const char *const *)b;
    int order = strcmp(x, y);
    return order != 0 ? order : (x > y) - (x < y);
}

/* again [rows]: true where an earlier row has the same key. */
static cpl_status find_repeated(char (*key)[CPL_SHA256_HEX], size_t rows, bool *again) {
    cpl_status st = CPL_OK;
    const char **sorted = NULL;
    CPL_TRY(cpl_alloc(&sorted, rows, sizeof *sorted, "trial keys"));
    for (size_t i = 0; i < rows; i++) {
        sorted[i] = key[i];
    }
    qsort(sorted, rows, sizeof *sorted, by_key);
    for (size_t i = 1; i < rows; i++) {
        again[(sorted[i] - key[0]) / CPL_SHA256_HEX] = strcmp(sorted[i - 1], sorted[i]) == 0;
    }
done:
    cpl_free(&sorted);
    return st;
}

/* Rank 0: whether a file has the trial's outcome. energy: with the joules, unless the trial failed. */
static bool has_outcome(const cpl_context *ctx, const char *key, bool energy) {
    char path[4096], *error = NULL;
    bool failed = false, there = false;
    cpl_trial_figures figures;
    cpl_arena *arena = NULL;
    trial_path(ctx, key, path, sizeof path);
    if (access(path, R_OK) == 0 && cpl_arena_create(&arena) == CPL_OK) {
        there = cpl_trial_read(path, key, &figures, &failed, &error, arena) == CPL_OK &&
                (!energy || failed || !isnan(figures.energy_j));
    }
    cpl_arena_destroy(&arena);
    return there;
}

cpl_status cpl_sweep_plan_trials(const cpl_context *ctx, const cpl_stage *stage, cpl_sweep_plan *p) {
    cpl_status st = CPL_OK;
    const cpl_grid *g = stage->extra;
    cpl_arena *arena = NULL;
    char common[CPL_SHA256_HEX];
    bool *again = NULL, root = cpl_comm_rank(ctx->world) == 0;
    size_t rows = (size_t)g->trials + 1;
    CPL_TRY(common_hash(ctx, stage, common));
    CPL_TRY(cpl_alloc(&p->key, rows, sizeof *p->key, "trial keys"));
    CPL_TRY(cpl_alloc(&p->missing, rows, sizeof *p->missing, "missing trials"));
    CPL_TRY(cpl_alloc(&again, rows, sizeof *again, "trial keys"));
    for (int64_t t = -1; t < g->trials; t++) {
        cpl_trial trial;
        CPL_TRY(cpl_arena_create(&arena));
        CPL_TRY(cpl_grid_trial(g, t, &trial, arena));
        CPL_TRY(cpl_grid_key(&trial, stage->input[trial.model].key, common, p->key[t + 1]));
        cpl_arena_destroy(&arena);
    }
    CPL_TRY(find_repeated(p->key, rows, again));
    for (int64_t t = -1; t < g->trials; t++) {
        if (!again[t + 1] && !(root && has_outcome(ctx, p->key[t + 1], asks_energy(stage) != NULL))) {
            p->missing[p->n_missing++] = t;
        }
    }
done:
    cpl_arena_destroy(&arena);
    cpl_free(&again);
    return st;
}

void cpl_sweep_plan_free(cpl_sweep_plan *p) {
    cpl_free(&p->key);
    cpl_free(&p->missing);
}

/* One trial by this group. *memory: |= it ran out of memory. */
static cpl_status one_trial(cpl_context *ctx, cpl_stage *stage, cpl_comm *group, bool metered, const cpl_sweep_plan *p,
                            int64_t index, char *note, size_t size, bool *memory) {
    cpl_status st = CPL_OK;
    const cpl_grid *g = stage->extra;
    cpl_arena *arena = NULL;
    cpl_trial trial;
    cpl_trial_figures figures;
    cpl_status outcome = CPL_OK;
    char path[4096], text[256], quoted[300], error[CPL_MESSAGE_MAX + 100];
    cpl_status local = cpl_arena_create(&arena);
    local = local == CPL_OK ? cpl_grid_trial(g, index, &trial, arena) : local;
    CPL_TRY(cpl_agree(group, local));
    trial_path(ctx, p->key[index + 1], path, sizeof path);
    CPL_TRY(cpl_trial_run(ctx, group, metered, stage->options, &trial, stage->input[trial.model].path, p->key[index + 1], path,
                          &figures, &outcome));
    const bool failed = outcome != CPL_OK;
    *memory = *memory || outcome == CPL_NO_MEMORY;
    cpl_grid_describe(g, index, text, sizeof text);
    cpl_json_quote(quoted, sizeof quoted, text);
    if (failed) {
        cpl_log_warn("%s: trial '%s' failed: %s", stage->name, text, cpl_status_message());
        cpl_json_quote(error, sizeof error, cpl_status_message());
        cpl_log_event("trial_failed", "\"stage\":\"%s\",\"trial\":%s,\"error\":%s", stage->name, quoted, error);
    } else {
        cpl_log_event("trial", "\"stage\":\"%s\",\"trial\":%s,\"val_loss\":%.9g,\"bytes\":%.0f,\"wall_s\":%.3f", stage->name,
                      quoted, figures.val_loss, figures.bytes, figures.wall_s);
    }
    snprintf(note, size, "%s: %s %.4f", text, failed ? "failed" : "loss", figures.val_loss);
done:
    cpl_arena_destroy(&arena);
    return st;
}

/* Takes trials from the counter until there are none. */
static cpl_status work_through(cpl_context *ctx, cpl_stage *stage, cpl_comm *group, bool metered, cpl_counter *counter,
                               const cpl_sweep_plan *p, bool *memory) {
    cpl_status st = CPL_OK;
    cpl_progress progress;
    char note[400] = "";
    cpl_progress_begin(&progress, stage->name, 0, p->n_missing);
    for (;;) {
        int64_t next = 0;
        cpl_status local = CPL_OK;
        uint32_t word = *ctx->stop ? CPL_WORD_STOP : 0;
        cpl_watchdog_beat("sweep");
        CPL_TRY(cpl_comm_agree_word(group, &word));
        if (word & CPL_WORD_STOP) {
            CPL_FAIL(CPL_STOPPED, "%s: stopped by a signal; finished trials are kept; run the same command again to go on",
                     stage->name);
        }
        if (cpl_comm_rank(group) == 0) {
            local = cpl_counter_next(counter, &next);
        }
        CPL_TRY(cpl_agree(group, local));
        CPL_TRY(cpl_comm_bcast(group, &next, sizeof next, 0));
        if (next >= p->n_missing) {
            break;
        }
        CPL_TRY(one_trial(ctx, stage, group, metered, p, p->missing[next], note, sizeof note, memory));
        cpl_progress_step(&progress, next + 1, note);
    }
done:
    cpl_progress_end(&progress, note);
    return st;
}

/* Collective over the world. *metered: a trial's energy can be told from the others'. */
static cpl_status look_for_meters(cpl_context *ctx, const cpl_stage *stage, cpl_comm *group, bool *metered) {
    cpl_status st = CPL_OK;
    cpl_meters meters = CPL_METERS_MISSING;
    const char *asked = asks_energy(stage);
    CPL_TRY(cpl_energy_meters(ctx->world, group, ctx->dev, &meters));
    *metered = meters == CPL_METERS_OWN;
    if (asked != NULL && meters == CPL_METERS_MISSING) {
        st = cpl_stage_fail(stage, asked, "energy is not measured here (cupel info says why)");
    } else if (asked != NULL && meters == CPL_METERS_SHARED) {
        st =
            cpl_stage_fail(stage, asked,
                           "energy of a trial is not measured where ranks of different groups share a GPU, or a host's processors: "
                           "raise group_ranks so that a group has them to itself");
    }
done:
    return st;
}

/* Collective over the world: what would fit, once for all trials. */
static cpl_status tell_what_fits(cpl_context *ctx, const cpl_stage *stage, bool memory) {
    cpl_status st = CPL_OK;
    int64_t any = memory;
    CPL_TRY(cpl_comm_allreduce_i64(ctx->world, &any, 1, CPL_MAX));
    if (any != 0) {
        cpl_status_set_message("trials ran out of memory");
        (void)cpl_stage_fit(ctx, stage, CPL_NO_MEMORY); /* they have failed, the stage has not */
        cpl_log_warn("%s: %s", stage->name, cpl_status_message());
        cpl_status_clear();
    }
done:
    return st;
}

static cpl_status run_missing(cpl_context *ctx, cpl_stage *stage, const cpl_sweep_plan *p) {
    cpl_status st = CPL_OK;
    const cpl_sweep_options *o = stage->options;
    cpl_comm *group = NULL;
    cpl_counter *counter = NULL;
    bool metered = false, memory = false;
    int size = cpl_comm_size(ctx->world);
    if (o->group_ranks > size) {
        return cpl_stage_fail(stage, "group_ranks", "%lld ranks a group, but only %d ranks in all", (long long)o->group_ranks,
                              size);
    }
    CPL_TRY(cpl_comm_split(ctx->world, (int)(cpl_comm_rank(ctx->world) / o->group_ranks), &group));
    if (p->n_missing > 0) {
        CPL_TRY(look_for_meters(ctx, stage, group, &metered));
    }
    CPL_TRY(cpl_counter_create(&counter, ctx->world, 0));
    st = work_through(ctx, stage, group, metered, counter, p, &memory);
    CPL_TRY(cpl_context_wait(ctx, ctx->world, st));
    CPL_TRY(tell_what_fits(ctx, stage, memory));
done:
    cpl_counter_destroy(&counter);
    cpl_comm_destroy(&group);
    return st;
}

static cpl_status run(cpl_context *ctx, cpl_stage *stage, cpl_record *record) {
    cpl_status st = CPL_OK;
    const cpl_grid *g = stage->extra;
    cpl_sweep_plan plan = {0};
    CPL_TRY(cpl_context_wait(ctx, ctx->world, cpl_sweep_plan_trials(ctx, stage, &plan)));
    CPL_TRY(cpl_comm_bcast(ctx->world, &plan.n_missing, sizeof plan.n_missing, 0));
    CPL_TRY(cpl_comm_bcast(ctx->world, plan.missing, ((size_t)g->trials + 1) * sizeof *plan.missing, 0));
    cpl_log_info("%s: %lld trials and the unchanged model, %lld to run", stage->name, (long long)g->trials,
                 (long long)plan.n_missing);
    CPL_TRY(run_missing(ctx, stage, &plan));
    cpl_status local = cpl_comm_rank(ctx->world) == 0 ? cpl_sweep_record(ctx, stage, &plan, record) : CPL_OK;
    CPL_TRY(cpl_context_wait(ctx, ctx->world, local));
done:
    cpl_sweep_plan_free(&plan);
    return st;
}

static const char *const others[] = {"model", "prune", "quantize", "objective", NULL};
const cpl_stage_kind cpl_stage_sweep = {.name = "sweep",
                                        .help = "a grid over options of prune and quantize",
                                        .table = &cpl_sweep_table,
                                        .size = sizeof(cpl_sweep_options),
                                        .others = others,
                                        .bind = bind,
                                        .check = check,
                                        .inputs = inputs,
                                        .hash = hash,
                                        .run = run};

/* The command plan: what a study would do and take, and what of it is done.
 * Refuses to make or change any file, and to start any work. */
#include "io/base/log.h"
#include "jobs/command_options.h"
#include "jobs/plan_stage.h"
#include "jobs/study/grid.h"
#include "jobs/study/sweep_record.h"
#include "jobs/table.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The back ends that may compute; cpl_run_options.device says which are planned for. */
enum { GPU, CPU, KINDS };
static const char *const kinds[KINDS] = {[GPU] = "cuda", [CPU] = "cpu"};

typedef struct {
    cpl_stage_plan figures;
    cpl_plan_memory memory[KINDS]; /* for each back end planned for */
    bool done;
    double left;           /* operations that are still to be done */
    int64_t resumes;       /* from this step; 0: from the start */
    cpl_sweep_plan trials; /* owned; of a sweep */
} planned;

typedef struct {
    cpl_context *ctx; /* borrowed */
    int64_t ranks;
    bool on[KINDS];
    planned *stage;         /* owned [stages of the job] */
    cpl_model_shape *shape; /* owned: of what they leave */
} plan;

/* Newest checkpoint of a stage that is not done. Rank 0. */
static cpl_status find_resume(const cpl_stage *s, int64_t *step) {
    cpl_status st = CPL_OK;
    char path[4096];
    *step = 0;
    if (s->folder == NULL || access(s->folder, F_OK) != 0) {
        return CPL_OK;
    }
    CPL_TRY(cpl_checkpoint_newest(s->folder, path, sizeof path, step));
    *step = *step < 0 ? 0 : *step;
done:
    return st;
}

static cpl_status plan_stage(const plan *p, size_t index) {
    cpl_status st = CPL_OK;
    cpl_context *ctx = p->ctx;
    const cpl_stage *s = &ctx->job->stage[index];
    planned *out = &p->stage[index];
    cpl_model_shape *inputs = NULL;
    bool root = cpl_comm_rank(ctx->world) == 0;
    CPL_TRY(cpl_agree(ctx->world, cpl_alloc(&inputs, s->n_inputs, sizeof *inputs, "plan")));
    for (size_t i = 0; i < s->n_inputs; i++) {
        CPL_TRY(cpl_stage_plan_input(ctx, s, &s->input[i], p->shape, &inputs[i]));
    }
    CPL_TRY(cpl_study_done(ctx, s, &out->done));
    cpl_status local = s->kind == &cpl_stage_sweep ? cpl_sweep_plan_trials(ctx, s, &out->trials) : CPL_OK;
    for (int k = 0; k < KINDS && local == CPL_OK; k++) {
        if (p->on[k]) {
            local = cpl_stage_plan_make(ctx, s, inputs, p->ranks, kinds[k], &out->trials, &out->figures);
            out->memory[k] = out->figures.memory;
        }
    }
    local = local == CPL_OK && root && !out->done && out->figures.steps > 0 ? find_resume(s, &out->resumes) : local;
    CPL_TRY(cpl_agree(ctx->world, local));
    p->shape[index] = out->figures.shape;
    double share = out->figures.steps > 0 ? (double)out->resumes / (double)out->figures.steps : 0;
    out->left = out->done ? 0 : out->figures.flops * (1 - share);
done:
    cpl_free(&inputs);
    return st;
}

/* --- printing: rank 0 --- */

static void print_head(const plan *p) {
    const cpl_context *ctx = p->ctx;
    const cpl_job *job = ctx->job;
    size_t done = 0;
    cpl_split train, val;
    char tokens[CPL_AMOUNT_TEXT], left[CPL_AMOUNT_TEXT], held[CPL_AMOUNT_TEXT];
    for (size_t i = 0; i < job->n_stages; i++) {
        done += p->stage[i].done;
    }
    cpl_context_splits(ctx, 1, &train, &val);
    cpl_amount_text((double)cpl_corpus_tokens(ctx->corpus) + (ctx->held_out ? (double)cpl_corpus_tokens(ctx->held_out) : 0), "",
                    tokens);
    cpl_amount_text((double)(train.end - train.begin), "", left);
    cpl_amount_text((double)(val.end - val.begin), "", held);
    printf("\n %s: %zu stage%s on %lld rank%s; %zu done already in %s\n", job->name, job->n_stages, job->n_stages == 1 ? "" : "s",
           (long long)p->ranks, p->ranks == 1 ? "" : "s", done, ctx->out);
    printf(" corpus: %s tokens of a vocabulary of %lld: %s to train on, %s held out\n\n", tokens,
           (long long)cpl_corpus_vocab(ctx->corpus), left, held);
}

static const cpl_column work_columns[] = {
    {"stage", "", CPL_COLUMN_WIDE, 0},         {"kind", "", CPL_COLUMN_LEFT, 0},
    {"state", "", CPL_COLUMN_LEFT, 0},         {"model", "layers/heads/width/context", CPL_COLUMN_LEFT, 5},
    {"parameters", "", CPL_COLUMN_RIGHT, 0},   {"steps", "", CPL_COLUMN_RIGHT, 0},
    {"tokens", "a step", CPL_COLUMN_RIGHT, 4}, {"tokens", "in all", CPL_COLUMN_RIGHT, 0},
    {"epochs", "", CPL_COLUMN_RIGHT, 3},       {"operations", "left, FLOP", CPL_COLUMN_RIGHT, 2},
    {"files", "bytes", CPL_COLUMN_RIGHT, 1}};

static void state_text(const planned *s, const cpl_stage *stage, char *out, size_t size) {
    if (s->done) {
        snprintf(out, size, "done");
    } else if (stage->kind == &cpl_stage_sweep) {
        snprintf(out, size, "%lld trial%s to run", (long long)s->trials.n_missing, s->trials.n_missing == 1 ? "" : "s");
    } else if (s->resumes > 0) {
        snprintf(out, size, "resumes at %lld", (long long)s->resumes);
    } else {
        snprintf(out, size, "to run");
    }
}

static cpl_status amount_cell(cpl_table *t, double value, const char *unit) {
    char text[CPL_AMOUNT_TEXT];
    cpl_amount_text(value, unit, text);
    return cpl_table_cell(t, "%s", value > 0 ? text : "");
}

static cpl_status work_row(cpl_table *t, const cpl_stage *stage, const planned *s) {
    cpl_status st = CPL_OK;
    const cpl_stage_plan *f = &s->figures;
    char text[64];
    state_text(s, stage, text, sizeof text);
    CPL_TRY(cpl_table_row(t, false));
    CPL_TRY(cpl_table_cell(t, "%s", stage->name));
    CPL_TRY(cpl_table_cell(t, "%s", stage->kind->name));
    CPL_TRY(cpl_table_cell(t, "%s", text));
    if (stage->n_inputs > 1) {
        CPL_TRY(cpl_table_cell(t, "%zu models", stage->n_inputs));
        CPL_TRY(cpl_table_cell(t, "%s", ""));
    } else {
        CPL_TRY(cpl_table_cell(t, "%lld/%lld/%lld/%lld", (long long)f->shape.layers, (long long)f->shape.heads,
                               (long long)f->shape.width, (long long)f->shape.context));
        CPL_TRY(amount_cell(t, (double)f->parameters, ""));
    }
    CPL_TRY(cpl_table_number(t, "%.0f", f->steps > 0 ? (double)f->steps : (double)NAN));
    CPL_TRY(amount_cell(t, (double)f->step_tokens, ""));
    CPL_TRY(amount_cell(t, f->tokens, ""));
    CPL_TRY(cpl_table_number(t, "%.2f", f->epochs > 0 ? f->epochs : (double)NAN));
    CPL_TRY(amount_cell(t, s->left, "FLOP"));
    CPL_TRY(amount_cell(t, (double)f->stored, "B"));
done:
    return st;
}

static const cpl_column memory_columns[] = {{"stage", "", CPL_COLUMN_WIDE, 0},        {"weights", "", CPL_COLUMN_RIGHT, 0},
                                            {"gradients", "", CPL_COLUMN_RIGHT, 0},   {"moments", "", CPL_COLUMN_RIGHT, 0},
                                            {"activations", "", CPL_COLUMN_RIGHT, 0}, {"teacher", "", CPL_COLUMN_RIGHT, 0},
                                            {"batch", "", CPL_COLUMN_RIGHT, 1},       {"workspaces", "", CPL_COLUMN_RIGHT, 0},
                                            {"in all", "", CPL_COLUMN_RIGHT, 0},      {"exactly", "", CPL_COLUMN_RIGHT, 2}};

static cpl_status memory_row(cpl_table *t, const char *name, const cpl_plan_memory *m) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_table_row(t, false));
    CPL_TRY(cpl_table_cell(t, "%s", name));
    CPL_TRY(amount_cell(t, (double)m->weights, "B"));
    CPL_TRY(amount_cell(t, (double)m->gradients, "B"));
    CPL_TRY(amount_cell(t, (double)m->moments, "B"));
    CPL_TRY(amount_cell(t, (double)m->activations, "B"));
    CPL_TRY(amount_cell(t, (double)m->teacher, "B"));
    CPL_TRY(amount_cell(t, (double)m->other, "B"));
    CPL_TRY(amount_cell(t, (double)m->workspaces, "B"));
    CPL_TRY(amount_cell(t, (double)cpl_plan_memory_sum(m), "B"));
    CPL_TRY(cpl_table_cell(t, "%lld", (long long)cpl_plan_memory_sum(m)));
done:
    return st;
}

/* On one back end. */
static cpl_status print_memory(const plan *p, int kind) {
    static const char *const where[KINDS] = {
        [GPU] = "GPU memory of a rank when it is the most, bytes (what CUDA and its libraries keep outside is not in it)",
        [CPU] = "memory of a rank's device, the CPU, when it is the most, bytes"};
    cpl_status st = CPL_OK;
    cpl_table *memory = NULL;
    CPL_TRY(cpl_table_create(&memory, memory_columns, sizeof memory_columns / sizeof memory_columns[0]));
    for (size_t i = 0; i < p->ctx->job->n_stages; i++) {
        CPL_TRY(memory_row(memory, p->ctx->job->stage[i].name, &p->stage[i].memory[kind]));
    }
    printf(" %s:\n\n", where[kind]);
    CPL_TRY(cpl_table_print(memory, stdout));
    printf("\n");
done:
    cpl_table_destroy(&memory);
    return st;
}

static cpl_status print_tables(const plan *p) {
    cpl_status st = CPL_OK;
    const cpl_job *job = p->ctx->job;
    cpl_table *work = NULL;
    CPL_TRY(cpl_table_create(&work, work_columns, sizeof work_columns / sizeof work_columns[0]));
    double stored = 0, left = 0;
    for (size_t i = 0; i < job->n_stages; i++) {
        const planned *s = &p->stage[i];
        CPL_TRY(work_row(work, &job->stage[i], s));
        stored += s->figures.stored > 0 ? (double)s->figures.stored : 0;
        left += s->left;
    }
    CPL_TRY(cpl_table_print(work, stdout));
    char text[2][CPL_AMOUNT_TEXT];
    cpl_amount_text(left, "FLOP", text[0]);
    cpl_amount_text(stored, "B", text[1]);
    printf("\n left to do: %s over all ranks; models and optimizer state on disk in the end: %s\n", text[0], text[1]);
    for (int k = 0; k < KINDS; k++) {
        if (p->on[k]) {
            CPL_TRY(print_memory(p, k));
        }
    }
done:
    cpl_table_destroy(&work);
    return st;
}

/* "to run", "done", or "shared": it is the same as one that is to run. */
static const char *trial_state(const cpl_sweep_plan *t, int64_t trial) {
    for (int64_t i = 0; i < t->n_missing; i++) {
        if (strcmp(t->key[t->missing[i] + 1], t->key[trial + 1]) == 0) {
            return t->missing[i] == trial ? "to run" : "shared";
        }
    }
    return "done";
}

static void print_trials(const plan *p) {
    for (size_t i = 0; i < p->ctx->job->n_stages; i++) {
        const cpl_stage *s = &p->ctx->job->stage[i];
        if (s->kind != &cpl_stage_sweep) {
            continue;
        }
        for (int64_t trial = -1; trial < ((const cpl_grid *)s->extra)->trials; trial++) {
            char text[512];
            cpl_grid_describe(s->extra, trial, text, sizeof text);
            printf(" %s: %-6s  %s\n", s->name, trial_state(&p->stage[i].trials, trial), text);
        }
        printf("\n");
    }
}

static cpl_status print_plan(const plan *p, bool list) {
    cpl_status st = CPL_OK;
    print_head(p);
    CPL_TRY(print_tables(p));
    if (list) {
        print_trials(p);
    }
done:
    return st;
}

static cpl_status make_plan(cpl_comm *world, const cpl_arguments *a, cpl_job *job) {
    cpl_status st = CPL_OK;
    cpl_context ctx = {
        .world = world, .job = job, .out = a->out != NULL ? a->out : job->name, .stop = &cpl_stop_requested, .lock = -1};
    plan p = {.ctx = &ctx, .ranks = a->ranks > 0 ? a->ranks : cpl_comm_size(world)};
    p.on[CPU] = job->run.device != CPL_DEVICE_CUDA;
    p.on[GPU] = job->run.device == CPL_DEVICE_CUDA || (job->run.device == CPL_DEVICE_AUTO && cpl_plan_has(kinds[GPU]));
    CPL_TRY(cpl_context_look(&ctx));
    CPL_TRY(cpl_study_keys(&ctx));
    CPL_TRY(cpl_agree(world, cpl_alloc(&p.stage, job->n_stages, sizeof *p.stage, "plan")));
    CPL_TRY(cpl_agree(world, cpl_alloc(&p.shape, job->n_stages, sizeof *p.shape, "plan")));
    for (size_t i = 0; i < job->n_stages; i++) {
        CPL_TRY(plan_stage(&p, i));
    }
    CPL_TRY(cpl_agree(world, cpl_comm_rank(world) == 0 ? print_plan(&p, a->list) : CPL_OK));
done:
    for (size_t i = 0; p.stage != NULL && i < job->n_stages; i++) {
        cpl_sweep_plan_free(&p.stage[i].trials);
    }
    cpl_free(&p.stage);
    cpl_free(&p.shape);
    cpl_context_close(&ctx);
    return st;
}

cpl_status cpl_command_plan(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arguments a = {0};
    cpl_job *job = NULL;
    CPL_TRY(cpl_agree(world, cpl_arguments_parse(&a, NULL, true, argc, argv)));
    if (a.help) {
        cpl_command_help(self, world, NULL,
                         "  --ranks N          plan for N ranks instead of those of this run\n"
                         "  --list             name every trial of the sweeps\n"
                         "  --set PATH=VALUE   as of cupel run\n"
                         "  --out DIR          the study's folder; the job's name if not given");
        goto done;
    }
    if (a.file == NULL) {
        CPL_TRY(cpl_agree(world, cpl_fail(CPL_USAGE, __FILE__, __LINE__, "plan: expected a job file, cupel plan study.yaml")));
    }
    CPL_TRY(cpl_agree(world, cpl_job_read(&job, a.file, a.settings, a.n_settings)));
    CPL_TRY(make_plan(world, &a, job));
done:
    cpl_job_destroy(&job);
    cpl_arguments_free(&a);
    return st;
}

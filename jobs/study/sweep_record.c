/* From the files of a sweep's trials to its record.
 * Refuses to fill a gap: what did not run or failed is NaN. */
#include "jobs/study/sweep_record.h"
#include "io/base/log.h"
#include "jobs/study/pareto.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    cpl_context *ctx;                       /* borrowed */
    const cpl_stage *stage;                 /* borrowed */
    const cpl_grid *g;                      /* borrowed */
    const cpl_sweep_plan *plan;             /* borrowed */
    cpl_record *rec;                        /* borrowed */
    cpl_arena *arena;                       /* owned; holds all below */
    double *figure[CPL_TRIAL_FIGURE_COUNT]; /* [trials] each */
    double *compression, *score, *pareto;   /* [trials] */
    char **status, **error;                 /* [trials] */
    cpl_trial_figures reference;
    int64_t n_tensors;
    char **tensor;           /* names over all models, in order of first appearance */
    double *sqnr, *sparsity; /* [trials][n_tensors] */
    const char *dims[CPL_GRID_AXES_MAX + 1];
    int64_t counts[CPL_GRID_AXES_MAX + 1];
} table;

static void path_of(const table *t, int64_t trial, char *path, size_t size) {
    snprintf(path, size, "%s/trials/%.32s.h5", t->ctx->out, t->plan->key[trial + 1]);
}

static cpl_status allocate(table *t) {
    cpl_status st = CPL_OK;
    size_t n = (size_t)t->g->trials;
    CPL_TRY(cpl_arena_create(&t->arena));
    for (int f = 0; f < CPL_TRIAL_FIGURE_COUNT; f++) {
        CPL_TRY(cpl_arena_alloc(t->arena, &t->figure[f], n, sizeof(double)));
    }
    CPL_TRY(cpl_arena_alloc(t->arena, &t->compression, n, sizeof(double)));
    CPL_TRY(cpl_arena_alloc(t->arena, &t->score, n, sizeof(double)));
    CPL_TRY(cpl_arena_alloc(t->arena, &t->pareto, n, sizeof(double)));
    CPL_TRY(cpl_arena_alloc(t->arena, &t->status, n, sizeof(char *)));
    CPL_TRY(cpl_arena_alloc(t->arena, &t->error, n, sizeof(char *)));
    for (int a = 0; a < t->g->n_axes; a++) {
        t->dims[a] = t->g->axis[a].name;
        t->counts[a] = t->g->axis[a].count;
    }
done:
    return st;
}

/* The reference's figures: NAN where it failed, and everything relative to it with them. */
static cpl_status read_reference(table *t) {
    char path[4096], *error = NULL;
    bool failed = false;
    path_of(t, -1, path, sizeof path);
    return cpl_trial_read(path, t->plan->key[0], &t->reference, &failed, &error, t->arena);
}

static cpl_status read_trials(table *t) {
    cpl_status st = CPL_OK;
    const cpl_objective_options *o = &t->g->objective;
    const cpl_trial_figures *reference = &t->reference;
    for (int64_t i = 0; i < t->g->trials; i++) {
        cpl_trial_figures f;
        bool failed = false;
        char path[4096];
        path_of(t, i, path, sizeof path);
        CPL_TRY(cpl_trial_read(path, t->plan->key[i + 1], &f, &failed, &t->error[i], t->arena));
        for (int k = 0; k < CPL_TRIAL_FIGURE_COUNT; k++) {
            t->figure[k][i] = ((const double *)&f)[k];
        }
        CPL_TRY(cpl_arena_strdup(t->arena, &t->status[i], failed ? "failed" : "done"));
        t->compression[i] = t->reference.bytes / f.bytes;
        const cpl_score_term terms[] = {{f.latency_p50_ms, reference->latency_p50_ms, o->latency},
                                        {f.bytes, reference->bytes, o->memory},
                                        {f.energy_j, reference->energy_j, o->energy}};
        t->score[i] = cpl_score(f.val_loss, reference->val_loss, terms, sizeof terms / sizeof terms[0]);
    }
done:
    return st;
}

static const double *figure_named(const table *t, const char *name) {
    int k = 0;
#define FIND(figure_name, units, help)                                                                                             \
    if (strcmp(name, #figure_name) == 0) {                                                                                         \
        return t->figure[k];                                                                                                       \
    }                                                                                                                              \
    k++;
    CPL_TRIAL_FIGURES(FIND)
#undef FIND
    return NULL;
}

static void find_front(table *t) {
    const cpl_sweep_options *o = t->stage->options;
    const double *axes[4];
    int n = 0;
    for (size_t i = 0; i < o->pareto.count && n < 4; i++) {
        const char *said = o->pareto.value[i];
        const char *name = strcmp(said, "latency") == 0 ? "latency_p50_ms" : strcmp(said, "energy") == 0 ? "energy_j" : said;
        axes[n++] = figure_named(t, name);
    }
    cpl_pareto(t->g->trials, n, axes, t->pareto);
}

static int64_t tensor_index(table *t, const char *name) {
    for (int64_t i = 0; i < t->n_tensors; i++) {
        if (strcmp(t->tensor[i], name) == 0) {
            return i;
        }
    }
    return -1;
}

/* Names of the tensors of every trial's model, then their figures. */
static cpl_status read_tensors(table *t) {
    cpl_status st = CPL_OK;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < t->g->trials; i++) {
            char path[4096], **names = NULL;
            double *sqnr = NULL, *sparsity = NULL;
            int64_t n = 0, m = 0;
            if (strcmp(t->status[i], "done") != 0) {
                continue;
            }
            path_of(t, i, path, sizeof path);
            CPL_TRY(cpl_record_read_texts(path, "tensor", &names, &n, t->arena));
            if (pass == 0) {
                char **more = NULL;
                CPL_TRY(cpl_arena_alloc(t->arena, &more, (size_t)(t->n_tensors + n), sizeof *more));
                for (int64_t k = 0; k < t->n_tensors; k++) {
                    more[k] = t->tensor[k];
                }
                t->tensor = more;
                for (int64_t k = 0; k < n; k++) {
                    if (tensor_index(t, names[k]) < 0) {
                        t->tensor[t->n_tensors++] = names[k];
                    }
                }
                continue;
            }
            CPL_TRY(cpl_record_read_array(path, "tensor_sqnr_db", &sqnr, &m, t->arena));
            CPL_TRY(cpl_record_read_array(path, "tensor_sparsity", &sparsity, &m, t->arena));
            for (int64_t k = 0; k < n && k < m; k++) {
                int64_t at = i * t->n_tensors + tensor_index(t, names[k]);
                t->sqnr[at] = sqnr[k];
                t->sparsity[at] = sparsity[k];
            }
        }
        if (pass == 0) {
            size_t cells = 0;
            if (!cpl_mul_size((size_t)t->g->trials, (size_t)t->n_tensors, &cells)) {
                CPL_FAIL(CPL_NO_MEMORY, "%s: too many trials times tensors", t->stage->name);
            }
            CPL_TRY(cpl_arena_alloc(t->arena, &t->sqnr, cells, sizeof(double)));
            CPL_TRY(cpl_arena_alloc(t->arena, &t->sparsity, cells, sizeof(double)));
            for (size_t k = 0; k < cells; k++) {
                t->sqnr[k] = t->sparsity[k] = NAN;
            }
        }
    }
done:
    return st;
}

/* Coordinates: numbers where the option is one, else text. */
static cpl_status write_axis(table *t, int a) {
    cpl_status st = CPL_OK;
    const cpl_axis *axis = &t->g->axis[a];
    cpl_field_type type = axis->field == NULL ? CPL_FIELD_TEXT : axis->field->type;
    if (type != CPL_FIELD_INT && type != CPL_FIELD_REAL && type != CPL_FIELD_DECIMAL) {
        return cpl_record_array(t->rec, axis->name, CPL_T_TEXT, 1, &axis->count, &axis->name, axis->value, "",
                                axis->field == NULL ? "stage or checkpoint the trial starts from" : axis->field->help);
    }
    double *number = NULL;
    CPL_TRY(cpl_arena_alloc(t->arena, &number, (size_t)axis->count, sizeof *number));
    for (int64_t i = 0; i < axis->count; i++) {
        char *options = NULL;
        CPL_TRY(cpl_arena_alloc(t->arena, &options, 1, sizeof(cpl_prune_options) + sizeof(cpl_quantize_options)));
        CPL_TRY(cpl_field_set(axis->field, options, axis->value[i], t->arena));
        const void *at = options + axis->field->offset;
        const cpl_decimal *d = at;
        number[i] = type == CPL_FIELD_INT    ? (double)*(const int64_t *)at
                    : type == CPL_FIELD_REAL ? *(const double *)at
                                             : (double)d->num / (double)d->den;
    }
    const char *unit = type == CPL_FIELD_INT ? axis->field->unit : "";
    CPL_TRY(cpl_record_array(t->rec, axis->name, CPL_T_F64, 1, &axis->count, &axis->name, number, unit, axis->field->help));
done:
    return st;
}

static cpl_status write_arrays(table *t) {
    cpl_status st = CPL_OK;
    int n = t->g->n_axes, k = 0;
    for (int a = 0; a < n; a++) {
        CPL_TRY(write_axis(t, a));
    }
    const char *dim = t->dims[n] = "tensor";
    t->counts[n] = t->n_tensors;
    CPL_TRY(cpl_record_array(t->rec, dim, CPL_T_TEXT, 1, &t->n_tensors, &dim, t->tensor, "", "parameter tensor"));
#define WRITE(name, units, help)                                                                                                   \
    CPL_TRY(                                                                                                                       \
        cpl_record_array(t->rec, cpl_sweep_array_name(t->g, #name), CPL_T_F64, n, t->counts, t->dims, t->figure[k], units, help)); \
    k++;
    CPL_TRIAL_FIGURES(WRITE)
#undef WRITE
    CPL_TRY(cpl_record_array(t->rec, "compression", CPL_T_F64, n, t->counts, t->dims, t->compression, "",
                             "bytes of the first model unchanged, in 16 bits, over bytes"));
    CPL_TRY(cpl_record_array(t->rec, "score", CPL_T_F64, n, t->counts, t->dims, t->score, "",
                             "loss + latency, memory and energy times their weights, each relative to the first model unchanged"));
    CPL_TRY(cpl_record_array(t->rec, "pareto", CPL_T_F64, n, t->counts, t->dims, t->pareto, "",
                             "1: no other trial is better on all chosen axes"));
    CPL_TRY(cpl_record_array(t->rec, "tensor_sqnr_db", CPL_T_F64, n + 1, t->counts, t->dims, t->sqnr, "dB", "SQNR of each tensor"));
    CPL_TRY(cpl_record_array(t->rec, "tensor_sparsity", CPL_T_F64, n + 1, t->counts, t->dims, t->sparsity, "",
                             "share of each tensor removed"));
done:
    return st;
}

static cpl_status write_table(table *t) {
    cpl_status st = CPL_OK;
    const char *name = "trials";
    int64_t n = t->g->trials, *number = NULL;
    char **text = NULL;
    int k = 0;
    CPL_TRY(cpl_arena_alloc(t->arena, &number, (size_t)n, sizeof *number));
    CPL_TRY(cpl_arena_alloc(t->arena, &text, (size_t)n, sizeof *text));
    for (int64_t i = 0; i < n; i++) {
        number[i] = i;
    }
    CPL_TRY(cpl_record_table_column(t->rec, name, "trial", CPL_T_I64, n, number));
    for (int a = 0; a < t->g->n_axes; a++) {
        for (int64_t i = 0; i < n; i++) {
            text[i] = t->g->axis[a].value[cpl_grid_position(t->g, i, a)];
        }
        CPL_TRY(cpl_record_table_column(t->rec, name, t->g->axis[a].name, CPL_T_TEXT, n, text));
    }
    CPL_TRY(cpl_record_table_column(t->rec, name, "status", CPL_T_TEXT, n, t->status));
#define WRITE(figure_name, units, help)                                                                                            \
    CPL_TRY(cpl_record_table_column(t->rec, name, cpl_sweep_array_name(t->g, #figure_name), CPL_T_F64, n, t->figure[k]));          \
    k++;
    CPL_TRIAL_FIGURES(WRITE)
#undef WRITE
    CPL_TRY(cpl_record_table_column(t->rec, name, "compression", CPL_T_F64, n, t->compression));
    CPL_TRY(cpl_record_table_column(t->rec, name, "score", CPL_T_F64, n, t->score));
    CPL_TRY(cpl_record_table_column(t->rec, name, "pareto", CPL_T_F64, n, t->pareto));
    CPL_TRY(cpl_record_table_column(t->rec, name, "error", CPL_T_TEXT, n, t->error));
done:
    return st;
}

static cpl_status write_attributes(table *t) {
    cpl_status st = CPL_OK;
    int64_t failed = 0;
    char name[80], *axes = NULL;
    const cpl_sweep_options *o = t->stage->options;
    for (int64_t i = 0; i < t->g->trials; i++) {
        failed += strcmp(t->status[i], "done") != 0;
    }
#define WRITE(figure_name, units, help)                                                                                            \
    snprintf(name, sizeof name, "reference_%s", #figure_name);                                                                     \
    CPL_TRY(cpl_record_f64(t->rec, name, t->reference.figure_name));
    CPL_TRIAL_FIGURES(WRITE)
#undef WRITE
    CPL_TRY(cpl_record_i64(t->rec, "trials_total", t->g->trials));
    CPL_TRY(cpl_record_i64(t->rec, "trials_failed", failed));
    CPL_TRY(cpl_record_f64(t->rec, "objective_latency", t->g->objective.latency));
    CPL_TRY(cpl_record_f64(t->rec, "objective_memory", t->g->objective.memory));
    CPL_TRY(cpl_record_f64(t->rec, "objective_energy", t->g->objective.energy));
    CPL_TRY(cpl_arena_strdup(t->arena, &axes, ""));
    for (size_t i = 0; i < o->pareto.count; i++) {
        CPL_TRY(cpl_arena_printf(t->arena, &axes, "%s%s%s", axes, i > 0 ? "," : "", o->pareto.value[i]));
    }
    CPL_TRY(cpl_record_text(t->rec, "pareto_axes", axes));
    if (failed > 0) {
        cpl_log_warn("%s: %lld of %lld trials failed; the column 'error' of stages/%s/trials says why", t->stage->name,
                     (long long)failed, (long long)t->g->trials, t->stage->name);
    }
done:
    return st;
}

const char *cpl_sweep_array_name(const cpl_grid *g, const char *figure) {
    for (int a = 0; a < g->n_axes; a++) {
        if (strcmp(g->axis[a].name, figure) == 0) {
            return "sparsity_exact"; /* the only figure that is an option too */
        }
    }
    return figure;
}

cpl_status cpl_sweep_record(cpl_context *ctx, const cpl_stage *stage, const cpl_sweep_plan *plan, cpl_record *record) {
    cpl_status st = CPL_OK;
    table t = {.ctx = ctx, .stage = stage, .g = stage->extra, .plan = plan, .rec = record};
    CPL_TRY(allocate(&t));
    CPL_TRY(read_reference(&t));
    CPL_TRY(read_trials(&t));
    find_front(&t);
    CPL_TRY(read_tensors(&t));
    CPL_TRY(write_arrays(&t));
    CPL_TRY(write_table(&t));
    CPL_TRY(write_attributes(&t));
done:
    cpl_arena_destroy(&t.arena);
    return st;
}

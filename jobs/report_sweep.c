/* A sweep's trials: what the front is first, then what scores best, then what failed.
 * Refuses to compute anything. */
#include "jobs/report_sweep.h"
#include "io/results_read.h"
#include "jobs/table.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    LOSS,
    PERPLEXITY,
    BYTES,
    SPARSITY,
    LATENCY,
    FIGURES,
    COMPRESSION = FIGURES,
    SQNR,
    SCORE,
    PARETO,
    COLUMNS_READ,
    FAILED_ROWS = 10
};
static const char *const figure_names[COLUMNS_READ] = {
    [LOSS] = "val_loss",          [PERPLEXITY] = "perplexity",   [BYTES] = "bytes",  [SPARSITY] = "sparsity",
    [LATENCY] = "latency_p50_ms", [COMPRESSION] = "compression", [SQNR] = "sqnr_db", [SCORE] = "score",
    [PARETO] = "pareto"};

typedef struct {
    const char *name;                   /* borrowed: of the stage */
    cpl_results_table table;            /* in the arena */
    size_t first_axis, status;          /* columns [first_axis, status) are the axes */
    const double *figure[COLUMNS_READ]; /* borrowed [rows] */
    double reference[FIGURES];
    char *reference_name; /* in the arena: first model */
    char *pareto_axes;
    bool scored;    /* by more than the loss */
    int64_t *order; /* in the arena [rows] */
    int64_t done, failed;
} sweep;

static cpl_status bad(const char *path, const char *name, const char *column) {
    return cpl_fail(CPL_DAMAGED, __FILE__, __LINE__, "%s: stages/%s/trials: expected a column %s", path, name, column);
}

/* The sparsity reached stands in sparsity_exact where `sparsity` is the axis. */
static const double *figure_column(const sweep *s, int f) {
    const cpl_results_column *c = NULL;
    if (f == SPARSITY) {
        c = cpl_results_column_find(&s->table, "sparsity_exact");
    }
    c = c == NULL ? cpl_results_column_find(&s->table, figure_names[f]) : c;
    return c == NULL ? NULL : c->number;
}

static cpl_status read_sweep(sweep *s, const char *path, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *group = NULL;
    const cpl_results_column *column = s->table.column;
    while (s->status < s->table.n_columns && strcmp(column[s->status].name, "status") != 0) {
        s->status++;
    }
    s->first_axis = 1;
    if (s->status >= s->table.n_columns || column[s->status].text == NULL || s->status < 2) {
        CPL_TRY(bad(path, s->name, "status"));
    }
    for (size_t c = s->first_axis; c < s->status; c++) {
        if (column[c].text == NULL) {
            CPL_TRY(bad(path, s->name, "of text for each axis"));
        }
    }
    for (int f = 0; f < COLUMNS_READ; f++) {
        s->figure[f] = figure_column(s, f);
        if (s->figure[f] == NULL) {
            CPL_TRY(bad(path, s->name, figure_names[f]));
        }
    }
    static const char *const weights[] = {"objective_latency", "objective_memory", "objective_energy"};
    enum { WEIGHTS = sizeof weights / sizeof weights[0] };
    cpl_ckpt_attr a[FIGURES + 1 + WEIGHTS];
    for (int f = 0; f < FIGURES; f++) {
        char *name = NULL;
        CPL_TRY(cpl_arena_printf(arena, &name, "reference_%s", figure_names[f]));
        a[f] = (cpl_ckpt_attr){.name = name};
    }
    a[FIGURES] = (cpl_ckpt_attr){.name = "pareto_axes"};
    for (int w = 0; w < WEIGHTS; w++) {
        a[FIGURES + 1 + w] = (cpl_ckpt_attr){.name = weights[w]};
    }
    CPL_TRY(cpl_arena_printf(arena, &group, "stages/%s", s->name));
    CPL_TRY(cpl_results_attributes(path, group, a, FIGURES + 1 + WEIGHTS, arena));
    for (int f = 0; f < FIGURES; f++) {
        s->reference[f] = a[f].f;
    }
    s->pareto_axes = a[FIGURES].text == NULL ? "?" : (char *)a[FIGURES].text;
    for (int w = 0; w < WEIGHTS; w++) {
        s->scored = s->scored || a[FIGURES + 1 + w].f > 0;
    }
    s->reference_name = s->table.rows > 0 ? column[s->first_axis].text[0] : "";
done:
    return st;
}

/* 0 Pareto-optimal, 1 done, 2 failed. */
static int class_of(const sweep *s, int64_t i) {
    return strcmp(s->table.column[s->status].text[i], "done") != 0 ? 2 : s->figure[PARETO][i] == 1 ? 0 : 1;
}

static int compare(const void *a, const void *b, void *context) {
    const sweep *s = context;
    int64_t i = *(const int64_t *)a, j = *(const int64_t *)b;
    int p = class_of(s, i), q = class_of(s, j);
    if (p != q) {
        return p - q;
    }
    double x = p == 2 ? 0 : s->figure[p == 0 ? BYTES : SCORE][i], y = p == 2 ? 0 : s->figure[p == 0 ? BYTES : SCORE][j];
    if (isnan(x) || isnan(y)) {
        x = isnan(x);
        y = isnan(y);
    }
    return x < y ? -1 : x > y ? 1 : i < j ? -1 : 1;
}

static cpl_status sort_trials(sweep *s, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_arena_alloc(arena, &s->order, (size_t)s->table.rows, sizeof *s->order));
    for (int64_t i = 0; i < s->table.rows; i++) {
        s->order[i] = i;
        s->failed += class_of(s, i) == 2;
    }
    s->done = s->table.rows - s->failed;
    qsort_r(s->order, (size_t)s->table.rows, sizeof *s->order, compare, s);
done:
    return st;
}

static bool axis_varies(const sweep *s, size_t c) {
    for (int64_t i = 1; i < s->table.rows; i++) {
        if (strcmp(s->table.column[c].text[0], s->table.column[c].text[i]) != 0) {
            return true;
        }
    }
    return false;
}

/* "teacher sparsity=0.5 bits=4": the model and what differs between trials. */
static void variant_text(const sweep *s, int64_t i, char *out, size_t size) {
    size_t at = (size_t)snprintf(out, size, "%s", s->table.column[s->first_axis].text[i]);
    for (size_t c = s->first_axis + 1; c < s->status && at < size; c++) {
        if (axis_varies(s, c)) {
            at += (size_t)snprintf(out + at, size - at, " %s=%s", s->table.column[c].name, s->table.column[c].text[i]);
        }
    }
}

static cpl_status figures_row(cpl_table *t, const double *f) {
    cpl_status st = CPL_OK;
    char size[CPL_AMOUNT_TEXT];
    cpl_amount_text(f[BYTES], "B", size);
    CPL_TRY(cpl_table_number(t, "%.4f", f[LOSS]));
    CPL_TRY(cpl_table_number(t, f[PERPLEXITY] < 1e5 ? "%.3f" : "%.3g", f[PERPLEXITY]));
    CPL_TRY(cpl_table_cell(t, "%s", size));
    CPL_TRY(cpl_table_number(t, "%.2f", f[COMPRESSION]));
    CPL_TRY(cpl_table_number(t, "%.1f", 100 * f[SPARSITY]));
    CPL_TRY(cpl_table_number(t, "%.1f", f[SQNR]));
    CPL_TRY(cpl_table_number(t, "%.2f", f[LATENCY]));
    CPL_TRY(cpl_table_number(t, "%.4f", f[SCORE]));
done:
    return st;
}

static const cpl_column columns[] = {{"", "", CPL_COLUMN_LEFT, 0},
                                     {"variant", "* Pareto-optimal", CPL_COLUMN_WIDE, 0},
                                     {"val loss", "nat/token", CPL_COLUMN_RIGHT, 0},
                                     {"perplexity", "", CPL_COLUMN_RIGHT, 2},
                                     {"size", "bytes", CPL_COLUMN_RIGHT, 0},
                                     {"compression", "x", CPL_COLUMN_RIGHT, 1},
                                     {"removed", "%", CPL_COLUMN_RIGHT, 3},
                                     {"SQNR", "dB", CPL_COLUMN_RIGHT, 6},
                                     {"latency", "ms p50", CPL_COLUMN_RIGHT, 5},
                                     {"score", "", CPL_COLUMN_RIGHT, 4}};

static cpl_status fill(const sweep *s, cpl_table *t, int64_t shown) {
    cpl_status st = CPL_OK;
    char variant[512];
    double f[COLUMNS_READ];
    for (int64_t k = 0; k < shown; k++) {
        int64_t i = s->order[k];
        bool optimal = class_of(s, i) == 0;
        for (int c = 0; c < COLUMNS_READ; c++) {
            f[c] = s->figure[c][i];
        }
        f[SCORE] = s->scored ? f[SCORE] : (double)NAN;
        variant_text(s, i, variant, sizeof variant);
        CPL_TRY(cpl_table_row(t, optimal));
        CPL_TRY(cpl_table_cell(t, "%s", optimal ? "*" : " "));
        CPL_TRY(cpl_table_cell(t, "%s", variant));
        CPL_TRY(figures_row(t, f));
    }
    if (!isnan(s->reference[LOSS])) {
        memcpy(f, s->reference, sizeof s->reference);
        f[COMPRESSION] = 1;
        f[SQNR] = NAN;
        f[SCORE] = NAN;
        CPL_TRY(cpl_table_row(t, false));
        CPL_TRY(cpl_table_cell(t, " "));
        CPL_TRY(cpl_table_cell(t, "%s unchanged, 16 bits", s->reference_name));
        CPL_TRY(figures_row(t, f));
    }
done:
    return st;
}

static void print_failed(const sweep *s, FILE *to) {
    char variant[512];
    const cpl_results_column *error = cpl_results_column_find(&s->table, "error");
    for (int64_t k = 0; k < s->failed && k < FAILED_ROWS; k++) {
        int64_t i = s->order[s->done + k];
        variant_text(s, i, variant, sizeof variant);
        fprintf(to, " failed: %s: %s\n", variant, error == NULL || error->text == NULL ? "no reason is stored" : error->text[i]);
    }
    if (s->failed > FAILED_ROWS) {
        fprintf(to, " failed: %lld more\n", (long long)(s->failed - FAILED_ROWS));
    }
}

cpl_status cpl_report_sweep(const char *path, const char *name, int64_t rows, FILE *to, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    sweep s = {.name = name};
    cpl_table *t = NULL;
    char *trials = NULL;
    CPL_TRY(cpl_arena_printf(arena, &trials, "stages/%s/trials", name));
    CPL_TRY(cpl_results_table_read(path, trials, &s.table, arena));
    if (s.table.n_columns == 0) {
        return CPL_OK;
    }
    CPL_TRY(read_sweep(&s, path, arena));
    CPL_TRY(sort_trials(&s, arena));
    int64_t shown = rows > 0 && s.done > rows ? rows : s.done;
    fprintf(to, "\n %s: %lld trials; Pareto-optimal ones (%s) by size, then the others by %s\n\n", name, (long long)s.table.rows,
            s.pareto_axes, s.scored ? "score" : "loss");
    CPL_TRY(cpl_table_create(&t, columns, sizeof columns / sizeof columns[0]));
    CPL_TRY(fill(&s, t, shown));
    CPL_TRY(cpl_table_print(t, to));
    if (shown < s.done) {
        fprintf(to, " and %lld more: cupel report DIR --rows 0, or the table stages/%s/trials\n", (long long)(s.done - shown),
                name);
    }
    print_failed(&s, to);
done:
    cpl_table_destroy(&t);
    return st;
}

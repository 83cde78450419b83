/* A study's results as tables on the terminal.
 * Refuses to compute anything: it shows what is stored. */
#include "jobs/report.h"
#include "io/results_read.h"
#include "jobs/report_sweep.h"
#include "jobs/table.h"
#include <math.h>
#include <string.h>

enum { NAME, VERSION, RANKS, HOSTS, DEVICE, FINISHED, ROOT_ATTRIBUTES };

static cpl_status print_head(const char *path, const char *folder, FILE *to, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_ckpt_attr a[ROOT_ATTRIBUTES] = {
        [NAME] = {.name = "name"},       [VERSION] = {.name = "cupel_version"}, [RANKS] = {.name = "ranks"},
        [HOSTS] = {.name = "hostnames"}, [DEVICE] = {.name = "device"},         [FINISHED] = {.name = "finished"}};
    CPL_TRY(cpl_results_attributes(path, "/", a, ROOT_ATTRIBUTES, arena));
    if (a[NAME].text == NULL || a[VERSION].text == NULL) {
        CPL_FAIL(CPL_INPUT, "%s: expected the results of a cupel study", path);
    }
    bool styled = cpl_terminal_styled(to);
    fprintf(to, "\n %s%s%s   cupel %s", styled ? "\033[1m" : "", a[NAME].text, styled ? "\033[0m" : "", a[VERSION].text);
    if (!isnan(a[RANKS].f)) {
        fprintf(to, ", %lld rank%s", (long long)a[RANKS].i, a[RANKS].i == 1 ? "" : "s");
    }
    if (a[HOSTS].text != NULL) {
        fprintf(to, " on %s", a[HOSTS].text);
    }
    if (a[DEVICE].text != NULL) {
        fprintf(to, ", %s", a[DEVICE].text);
    }
    if (a[FINISHED].text != NULL) {
        fprintf(to, ", %s", a[FINISHED].text);
    }
    fprintf(to, "\n %s\n\n", folder);
done:
    return st;
}

enum {
    KIND,
    STATUS,
    VAL_LOSS,
    PERPLEXITY,
    BYTES,
    PARAMETERS,
    SPARSITY,
    STEPS,
    FINETUNE,
    OVERFLOWS,
    WALL,
    ENERGY,
    SQNR,
    LATENCY,
    TRIALS,
    FAILED,
    BITS,
    GRANULARITY,
    STAGE_ATTRIBUTES
};
static const char *const stage_names[STAGE_ATTRIBUTES] = {
    [KIND] = "kind",
    [STATUS] = "status",
    [VAL_LOSS] = "val_loss",
    [PERPLEXITY] = "perplexity",
    [BYTES] = "bytes",
    [PARAMETERS] = "parameters",
    [SPARSITY] = "sparsity",
    [STEPS] = "option_steps",
    [FINETUNE] = "option_finetune_steps",
    [OVERFLOWS] = "overflow_steps",
    [WALL] = "wall_s",
    [ENERGY] = "energy_j",
    [SQNR] = "sqnr_db",
    [LATENCY] = "latency_p50_ms",
    [TRIALS] = "trials_total",
    [FAILED] = "trials_failed",
    [BITS] = "option_bits",
    [GRANULARITY] = "option_granularity",
};

static const cpl_column stage_columns[] = {{"stage", "", CPL_COLUMN_WIDE, 0},
                                           {"kind", "", CPL_COLUMN_LEFT, 0},
                                           {"parameters", "", CPL_COLUMN_RIGHT, 5},
                                           {"val loss", "nat/token", CPL_COLUMN_RIGHT, 0},
                                           {"perplexity", "", CPL_COLUMN_RIGHT, 4},
                                           {"size", "bytes", CPL_COLUMN_RIGHT, 0},
                                           {"removed", "%", CPL_COLUMN_RIGHT, 0},
                                           {"SQNR", "dB", CPL_COLUMN_RIGHT, 6},
                                           {"latency", "ms p50", CPL_COLUMN_RIGHT, 3},
                                           {"steps", "", CPL_COLUMN_RIGHT, 0},
                                           {"overflows", "steps", CPL_COLUMN_RIGHT, 1},
                                           {"scale", "at end", CPL_COLUMN_RIGHT, 1},
                                           {"time", "s", CPL_COLUMN_RIGHT, 0},
                                           {"energy", "joule", CPL_COLUMN_RIGHT, 3},
                                           {"", "", CPL_COLUMN_LEFT, 2}};

/* "2^14"; 1 and what is no power of two as it is. */
static void scale_text(double scale, char *out, size_t size) {
    int exponent = 0;
    if (scale != 1 && frexp(scale, &exponent) == 0.5) {
        snprintf(out, size, "2^%d", exponent - 1);
    } else {
        snprintf(out, size, "%g", scale);
    }
}

/* What a kind of stage has to say beside the figures. */
static void remark(const cpl_ckpt_attr *a, char *out, size_t size) {
    out[0] = '\0';
    if (!isnan(a[TRIALS].f)) {
        snprintf(out, size, a[FAILED].f > 0 ? "%lld trials, %lld failed" : "%lld trials", (long long)a[TRIALS].i,
                 (long long)a[FAILED].i);
    } else if (!isnan(a[BITS].f) && a[GRANULARITY].text != NULL) {
        snprintf(out, size, "%lld bits, %s", (long long)a[BITS].i, a[GRANULARITY].text);
    } else if (a[STATUS].text != NULL && strcmp(a[STATUS].text, "done") != 0) {
        snprintf(out, size, "%s", a[STATUS].text);
    }
}

static cpl_status stage_row(cpl_table *t, const char *path, const char *name, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *group = NULL, *series = NULL, text[160] = "", size[CPL_AMOUNT_TEXT], parameters[CPL_AMOUNT_TEXT], energy[CPL_AMOUNT_TEXT];
    double *scale = NULL;
    int64_t n = 0;
    cpl_ckpt_attr a[STAGE_ATTRIBUTES];
    for (int i = 0; i < STAGE_ATTRIBUTES; i++) {
        a[i] = (cpl_ckpt_attr){.name = stage_names[i]};
    }
    CPL_TRY(cpl_arena_printf(arena, &group, "stages/%s", name));
    CPL_TRY(cpl_results_attributes(path, group, a, STAGE_ATTRIBUTES, arena));
    CPL_TRY(cpl_arena_printf(arena, &series, "%s/loss_scale", group));
    CPL_TRY(cpl_results_array(path, series, &scale, &n, arena));
    if (n > 0) {
        scale_text(scale[n - 1], text, sizeof text);
    }
    cpl_amount_text(a[BYTES].f, "B", size);
    cpl_amount_text(a[PARAMETERS].f, "", parameters);
    cpl_amount_text(a[ENERGY].f, "J", energy);
    CPL_TRY(cpl_table_row(t, false));
    CPL_TRY(cpl_table_cell(t, "%s", name));
    CPL_TRY(cpl_table_cell(t, "%s", a[KIND].text == NULL ? "" : a[KIND].text));
    CPL_TRY(cpl_table_cell(t, "%s", parameters));
    CPL_TRY(cpl_table_number(t, "%.4f", a[VAL_LOSS].f));
    CPL_TRY(cpl_table_number(t, a[PERPLEXITY].f < 1e5 ? "%.3f" : "%.3g", a[PERPLEXITY].f));
    CPL_TRY(cpl_table_cell(t, "%s", size));
    CPL_TRY(cpl_table_number(t, "%.1f", 100 * a[SPARSITY].f));
    CPL_TRY(cpl_table_number(t, "%.1f", a[SQNR].f));
    CPL_TRY(cpl_table_number(t, "%.2f", a[LATENCY].f));
    CPL_TRY(cpl_table_number(t, "%.0f", isnan(a[STEPS].f) ? n > 0 ? a[FINETUNE].f : (double)NAN : a[STEPS].f));
    CPL_TRY(cpl_table_number(t, "%.0f", a[OVERFLOWS].f));
    CPL_TRY(cpl_table_cell(t, "%s", text));
    CPL_TRY(cpl_table_number(t, "%.1f", a[WALL].f));
    CPL_TRY(cpl_table_cell(t, "%s", energy));
    remark(a, text, sizeof text);
    CPL_TRY(cpl_table_cell(t, "%s", text[0] == '\0' ? "" : text));
done:
    return st;
}

cpl_status cpl_report_rows(const char *results_path, const char *folder, FILE *to, int64_t rows) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    cpl_table *t = NULL;
    char **names = NULL;
    size_t n = 0;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(print_head(results_path, folder, to, arena));
    CPL_TRY(cpl_results_groups(results_path, "stages", &names, &n, arena));
    if (n == 0) {
        fprintf(to, " no stage is done yet\n");
        goto done;
    }
    CPL_TRY(cpl_table_create(&t, stage_columns, sizeof stage_columns / sizeof stage_columns[0]));
    for (size_t i = 0; i < n; i++) {
        CPL_TRY(stage_row(t, results_path, names[i], arena));
    }
    CPL_TRY(cpl_table_print(t, to));
    for (size_t i = 0; i < n; i++) {
        CPL_TRY(cpl_report_sweep(results_path, names[i], rows, to, arena));
    }
    fputc('\n', to);
    if (fflush(to) != 0 || ferror(to)) {
        CPL_FAIL(CPL_IO, "the report cannot be written: %m");
    }
done:
    cpl_table_destroy(&t);
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_report_terminal(const char *results_path, const char *folder, FILE *to) {
    return cpl_report_rows(results_path, folder, to, CPL_REPORT_ROWS);
}

/* The tables of jobs/options.h, and the checks over several fields.
 * Refuses values that only one field could judge: fields.c does that. */
#include "jobs/options.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TRAINING_ROW(type, name, initial, min, max, unit, help)                                                                    \
    {#name, CPL_FIELD_##type, offsetof(CPL_FIELD_OWNER, training.name), initial, min, max, unit, help},
#define SHAPE_ROW(type, name, initial, min, max, unit, help)                                                                       \
    {#name, CPL_FIELD_##type, offsetof(CPL_FIELD_OWNER, shape.name), initial, min, max, unit, help},
#define TABLE(which, fields) const cpl_options_table which = {fields, sizeof fields / sizeof fields[0]}

#define CPL_FIELD_OWNER cpl_corpus_options
static const cpl_field corpus_fields[] = {CPL_CORPUS_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_run_options
static const cpl_field run_fields[] = {CPL_RUN_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_training
static const cpl_field training_fields[] = {CPL_TRAINING_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_train_options
static const cpl_field train_fields[] = {CPL_TRAIN_FIELDS(CPL_FIELD_ROW) CPL_SHAPE_FIELDS(SHAPE_ROW)
                                             CPL_TRAINING_FIELDS(TRAINING_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_distill_options
static const cpl_field distill_fields[] = {CPL_DISTILL_FIELDS(CPL_FIELD_ROW) CPL_TRAINING_FIELDS(TRAINING_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_prune_options
static const cpl_field prune_fields[] = {CPL_PRUNE_FIELDS(CPL_FIELD_ROW) CPL_TRAINING_FIELDS(TRAINING_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_quantize_options
static const cpl_field quantize_fields[] = {CPL_QUANTIZE_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_eval_options
static const cpl_field eval_fields[] = {CPL_EVAL_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_sweep_options
static const cpl_field sweep_fields[] = {CPL_SWEEP_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
#define CPL_FIELD_OWNER cpl_objective_options
static const cpl_field objective_fields[] = {CPL_OBJECTIVE_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER

TABLE(cpl_corpus_table, corpus_fields);
TABLE(cpl_run_table, run_fields);
TABLE(cpl_training_table, training_fields);
TABLE(cpl_train_table, train_fields);
TABLE(cpl_distill_table, distill_fields);
TABLE(cpl_prune_table, prune_fields);
TABLE(cpl_quantize_table, quantize_fields);
TABLE(cpl_eval_table, eval_fields);
TABLE(cpl_sweep_table, sweep_fields);
TABLE(cpl_objective_table, objective_fields);

static bool power_of_two(double x) {
    int exponent;
    return frexp(x, &exponent) == 0.5;
}

cpl_status cpl_training_check(const cpl_training *t) {
    cpl_status st = CPL_OK;
    const struct {
        const char *name;
        double value;
    } powers[] = {{"loss_scale", t->loss_scale},
                  {"scale_growth", t->scale_growth},
                  {"scale_backoff", t->scale_backoff},
                  {"min_scale", t->min_scale},
                  {"max_scale", t->max_scale}};
    if (t->global_batch % t->micro_batch != 0) {
        CPL_FAIL(CPL_USAGE, "global_batch: %lld is not a multiple of micro_batch %lld", (long long)t->global_batch,
                 (long long)t->micro_batch);
    }
    for (size_t i = 0; i < sizeof powers / sizeof powers[0]; i++) {
        if (!power_of_two(powers[i].value)) {
            CPL_FAIL(CPL_USAGE, "%s: expected a power of two, got %g", powers[i].name, powers[i].value);
        }
    }
    if (t->min_scale > t->max_scale) {
        CPL_FAIL(CPL_USAGE, "min_scale: %g is above max_scale %g", t->min_scale, t->max_scale);
    }
    bool scales =
        t->loss_scaling == CPL_SCALING_DYNAMIC || (t->loss_scaling == CPL_SCALING_AUTO && t->precision == CPL_PRECISION_FP16);
    if (scales && (t->loss_scale < t->min_scale || t->loss_scale > t->max_scale)) {
        CPL_FAIL(CPL_USAGE, "loss_scale: %g is not between min_scale %g and max_scale %g", t->loss_scale, t->min_scale,
                 t->max_scale);
    }
done:
    return st;
}

cpl_status cpl_training_ranks_check(const cpl_training *t, int64_t ranks, const char *label) {
    cpl_status st = CPL_OK;
    int64_t G = t->global_batch / t->micro_batch;
    if (G < ranks) {
        CPL_FAIL(CPL_USAGE, "%s: %lld micro-batches a step are fewer than %lld ranks: raise global_batch or lower micro_batch",
                 label, (long long)G, (long long)ranks);
    }
    if (t->reduction == CPL_REDUCTION_TREE && ((ranks & (ranks - 1)) != 0 || G % ranks != 0)) {
        CPL_FAIL(CPL_USAGE, "%s: reduction: tree needs a power of two of ranks that divides the %lld micro-batches, got %lld ranks",
                 label, (long long)G, (long long)ranks);
    }
done:
    return st;
}

/* "group64" -> 64; 0 if it is no granularity; -1 tensor, -2 channel. */
static int64_t granularity(const char *text) {
    char *end = NULL;
    if (strcmp(text, "tensor") == 0) {
        return -1;
    }
    if (strcmp(text, "channel") == 0) {
        return -2;
    }
    if (strncmp(text, "group", 5) != 0 || text[5] < '1' || text[5] > '9' || strlen(text) > 14) {
        return 0;
    }
    long long n = strtoll(text + 5, &end, 10);
    return *end == 0 ? n : 0;
}

cpl_status cpl_quantize_check(const cpl_quantize_options *q) {
    cpl_status st = CPL_OK;
    if (q->bits > 8 && q->bits != 16) {
        CPL_FAIL(CPL_USAGE, "bits: expected 2 to 8, or 16 for no quantization, got %lld", (long long)q->bits);
    }
    if (granularity(q->granularity) == 0) {
        CPL_FAIL(CPL_USAGE, "granularity: expected tensor, channel or groupN such as group64, got '%s'", q->granularity);
    }
done:
    return st;
}

cpl_status cpl_quantize_spec(const cpl_quantize_options *q, int64_t rows, int64_t cols, cpl_quant_spec *spec) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_quantize_check(q));
    int64_t g = granularity(q->granularity);
    spec->scheme = q->scheme == 0 ? CPL_QUANT_SYMMETRIC : CPL_QUANT_ASYMMETRIC;
    spec->bits = (int)q->bits;
    spec->scale_dtype = q->scale_type == 0 ? CPL_F16 : CPL_F32;
    spec->group = g == -1 ? rows * cols : g == -2 || g > cols ? cols : g;
done:
    return st;
}

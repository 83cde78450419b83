/* Series of a training run.
 * Refuses to hold anything but the run's own past. */
#include "jobs/metrics.h"
#include <math.h>
#include <string.h>

cpl_status cpl_metrics_create(cpl_metrics **out) {
    cpl_status st = CPL_OK;
    cpl_metrics *m = NULL;
    CPL_TRY(cpl_alloc(&m, 1, sizeof *m, "metrics"));
    m->step.columns = CPL_M_STEP_COLUMNS;
    m->eval.columns = CPL_M_EVAL_COLUMNS;
    m->event.columns = CPL_M_EVENT_COLUMNS;
    m->exponents.columns = 3 + CPL_M_GROUPS * CPL_M_EXPONENTS;
    *out = m;
done:
    return st;
}

void cpl_metrics_destroy(cpl_metrics **m) {
    if (*m != NULL) {
        cpl_free(&(*m)->step.value);
        cpl_free(&(*m)->eval.value);
        cpl_free(&(*m)->event.value);
        cpl_free(&(*m)->exponents.value);
        cpl_free(m);
    }
}

static cpl_status make_room(cpl_series *s, int64_t rows) {
    cpl_status st = CPL_OK;
    double *value = NULL;
    size_t cells = 0;
    if (rows <= s->room) {
        return CPL_OK;
    }
    int64_t room = s->room * 2 > rows ? s->room * 2 : rows < 16 ? 16 : rows;
    if (!cpl_mul_size((size_t)room, (size_t)s->columns, &cells)) {
        CPL_FAIL(CPL_NO_MEMORY, "metrics: %lld rows do not fit into memory", (long long)rows);
    }
    CPL_TRY(cpl_alloc(&value, cells, sizeof *value, "metrics"));
    for (int c = 0; c < s->columns && s->rows > 0; c++) {
        memcpy(value + (size_t)c * (size_t)room, s->value + (size_t)c * (size_t)s->room, (size_t)s->rows * sizeof *value);
    }
    cpl_free(&s->value);
    s->value = value;
    s->room = room;
done:
    return st;
}

cpl_status cpl_series_add(cpl_series *s, const double *row) {
    cpl_status st = CPL_OK;
    CPL_TRY(make_room(s, s->rows + 1));
    for (int c = 0; c < s->columns; c++) {
        s->value[(size_t)c * (size_t)s->room + (size_t)s->rows] = row[c];
    }
    s->rows++;
done:
    return st;
}

cpl_status cpl_series_resize(cpl_series *s, int64_t rows) {
    cpl_status st = make_room(s, rows);
    if (st == CPL_OK) {
        s->rows = rows;
    }
    return st;
}

/* Which columns of which series make up array i. */
typedef struct {
    const char *name, *help;
    size_t series; /* offset in cpl_metrics */
    int first, count;
} packing;
static const packing packings[CPL_METRICS_ARRAYS] = {
    {"metrics_step", "loss, hard_loss, hidden_loss, lr, grad_norm, loss_scale, overflow: one row each", offsetof(cpl_metrics, step),
     0, CPL_M_STEP_MS},
    {"metrics_step_ms", "wall time of each step", offsetof(cpl_metrics, step), CPL_M_STEP_MS, 1},
    {"metrics_eval", "eval_step, val_loss: one row each", offsetof(cpl_metrics, eval), 0, CPL_M_EVAL_COLUMNS},
    {"metrics_event", "overflow events: step, rank, tensor index, kind (1 inf, 2 nan, 3 both): one row each",
     offsetof(cpl_metrics, event), 0, CPL_M_EVENT_COLUMNS},
    {"metrics_exponents", "eval_step, loss_scale, max |g|, counts [group][biased exponent]: one row each",
     offsetof(cpl_metrics, exponents), 0, 3 + CPL_M_GROUPS *CPL_M_EXPONENTS},
};

cpl_status cpl_metrics_pack(const cpl_metrics *m, double *flat[CPL_METRICS_ARRAYS], cpl_ckpt_array arrays[CPL_METRICS_ARRAYS],
                            bool root) {
    cpl_status st = CPL_OK;
    for (int i = 0; i < CPL_METRICS_ARRAYS; i++) {
        const packing *p = &packings[i];
        const cpl_series *s = (const cpl_series *)((const char *)m + p->series);
        int64_t total = s->rows * p->count;
        CPL_TRY(cpl_alloc(&flat[i], (size_t)total, sizeof(double), "metrics"));
        for (int c = 0; c < p->count && s->rows > 0; c++) {
            memcpy(flat[i] + (int64_t)c * s->rows, s->value + (size_t)(p->first + c) * (size_t)s->room,
                   (size_t)s->rows * sizeof(double));
        }
        arrays[i] = (cpl_ckpt_array){.name = p->name,
                                     .type = CPL_T_F64,
                                     .total = total,
                                     .begin = root ? 0 : total,
                                     .n = root ? total : 0,
                                     .data = flat[i],
                                     .help = p->help};
    }
done:
    return st;
}

cpl_status cpl_metrics_read(cpl_metrics *m, const char *path) {
    cpl_status st = CPL_OK;
    double *flat = NULL;
    for (int i = 0; i < CPL_METRICS_ARRAYS; i++) {
        const packing *p = &packings[i];
        cpl_series *s = (cpl_series *)((char *)m + p->series);
        cpl_type type;
        int64_t total = 0;
        CPL_TRY(cpl_checkpoint_array_info(path, p->name, &type, &total));
        if (total % p->count != 0 || total < 0) {
            CPL_FAIL(CPL_DAMAGED, "%s: %s has %lld values, expected a multiple of %d", path, p->name, (long long)total, p->count);
        }
        int64_t rows = total / p->count;
        if (i == 1 && rows != s->rows) {
            CPL_FAIL(CPL_DAMAGED, "%s: %s has %lld steps, metrics_step %lld", path, p->name, (long long)rows, (long long)s->rows);
        }
        CPL_TRY(cpl_alloc(&flat, (size_t)total, sizeof *flat, "metrics"));
        cpl_ckpt_array a = {.name = p->name, .type = CPL_T_F64, .total = total, .n = total, .data = flat};
        CPL_TRY(cpl_checkpoint_read(path, NULL, &a, 1, NULL, 0, NULL));
        CPL_TRY(cpl_series_resize(s, rows));
        for (int c = 0; c < p->count && rows > 0; c++) {
            memcpy(s->value + (size_t)(p->first + c) * (size_t)s->room, flat + (int64_t)c * rows, (size_t)rows * sizeof(double));
        }
        cpl_free(&flat);
    }
done:
    cpl_free(&flat);
    return st;
}

static cpl_status column(cpl_record *rec, const cpl_series *s, int c, const char *name, const char *dim, const char *units,
                         const char *help) {
    const double *from = s->rows == 0 ? NULL : s->value + (size_t)c * (size_t)s->room;
    return cpl_record_array(rec, name, CPL_T_F64, 1, &s->rows, &dim, from, units, help);
}

static cpl_status integers(cpl_record *rec, const cpl_series *s, int c, const char *name, const char *dim, cpl_type type,
                           const char *units, const char *help) {
    cpl_status st = CPL_OK;
    int64_t *i64 = NULL;
    uint8_t *u8 = NULL;
    CPL_TRY(cpl_alloc(&i64, (size_t)s->rows, sizeof *i64, "metrics"));
    CPL_TRY(cpl_alloc(&u8, (size_t)s->rows, sizeof *u8, "metrics"));
    for (int64_t r = 0; r < s->rows; r++) {
        i64[r] = (int64_t)cpl_series_at(s, c, r);
        u8[r] = (uint8_t)i64[r];
    }
    CPL_TRY(cpl_record_array(rec, name, type, 1, &s->rows, &dim, type == CPL_T_U8 ? (void *)u8 : (void *)i64, units, help));
done:
    cpl_free(&i64);
    cpl_free(&u8);
    return st;
}

static cpl_status record_steps(const cpl_series *s, cpl_record *rec, int64_t tokens_per_step, bool hidden) {
    cpl_status st = CPL_OK;
    double *rate = NULL;
    int64_t *step = NULL;
    const char *dim = "step";
    CPL_TRY(cpl_alloc(&rate, (size_t)s->rows, sizeof *rate, "metrics"));
    CPL_TRY(cpl_alloc(&step, (size_t)s->rows, sizeof *step, "metrics"));
    for (int64_t r = 0; r < s->rows; r++) {
        step[r] = r;
        rate[r] = (double)tokens_per_step / (cpl_series_at(s, CPL_M_STEP_MS, r) * 1e-3);
    }
    CPL_TRY(cpl_record_array(rec, "step", CPL_T_I64, 1, &s->rows, &dim, step, "", "optimizer step, from 0; skipped steps count"));
    CPL_TRY(column(rec, s, CPL_M_LOSS, "loss", dim, "nat/token", "training loss of the step (with distillation the mixed loss)"));
    CPL_TRY(column(rec, s, CPL_M_HARD_LOSS, "hard_loss", dim, "nat/token",
                   "cross-entropy on the text; equal to loss without distillation"));
    if (hidden) {
        CPL_TRY(column(rec, s, CPL_M_HIDDEN_LOSS, "hidden_loss", dim, "",
                       "mean squared difference of the final hidden states; hidden_weight times it is in loss"));
    }
    CPL_TRY(column(rec, s, CPL_M_LR, "lr", dim, "", "learning rate"));
    CPL_TRY(column(rec, s, CPL_M_GRAD_NORM, "grad_norm", dim, "", "global norm of the unscaled gradient before clipping"));
    CPL_TRY(column(rec, s, CPL_M_LOSS_SCALE, "loss_scale", dim, "", "loss scale the step's backward used"));
    CPL_TRY(integers(rec, s, CPL_M_OVERFLOW, "overflow", dim, CPL_T_U8, "",
                     "1: some rank saw a non-finite gradient and all ranks skipped"));
    CPL_TRY(column(rec, s, CPL_M_STEP_MS, "step_ms", dim, "ms", "wall time of the step"));
    CPL_TRY(cpl_record_array(rec, "tokens_per_s", CPL_T_F64, 1, &s->rows, &dim, rate, "token/s",
                             "tokens of the global batch over step_ms"));
done:
    cpl_free(&rate);
    cpl_free(&step);
    return st;
}

static cpl_status record_events(const cpl_series *s, cpl_record *rec, const cpl_layout *layout) {
    cpl_status st = CPL_OK;
    const char *table = "overflow_events";
    const char **tensor = NULL, **kind = NULL;
    int64_t *step = NULL, *rank = NULL;
    static const char *const kinds[] = {"none", "inf", "nan", "inf and nan"};
    CPL_TRY(cpl_alloc(&tensor, (size_t)s->rows, sizeof *tensor, "events"));
    CPL_TRY(cpl_alloc(&kind, (size_t)s->rows, sizeof *kind, "events"));
    CPL_TRY(cpl_alloc(&step, (size_t)s->rows, sizeof *step, "events"));
    CPL_TRY(cpl_alloc(&rank, (size_t)s->rows, sizeof *rank, "events"));
    for (int64_t r = 0; r < s->rows; r++) {
        int64_t t = (int64_t)cpl_series_at(s, CPL_M_EVENT_TENSOR, r), k = (int64_t)cpl_series_at(s, CPL_M_EVENT_KIND, r);
        tensor[r] = t >= 0 && t < layout->count ? layout->param[t].name : "?";
        kind[r] = kinds[k & 3];
        step[r] = (int64_t)cpl_series_at(s, CPL_M_EVENT_STEP, r);
        rank[r] = (int64_t)cpl_series_at(s, CPL_M_EVENT_RANK, r);
    }
    CPL_TRY(cpl_record_table_column(rec, table, "step", CPL_T_I64, s->rows, step));
    CPL_TRY(cpl_record_table_column(rec, table, "rank", CPL_T_I64, s->rows, rank));
    CPL_TRY(cpl_record_table_column(rec, table, "tensor", CPL_T_TEXT, s->rows, tensor));
    CPL_TRY(cpl_record_table_column(rec, table, "kind", CPL_T_TEXT, s->rows, kind));
done:
    cpl_free(&tensor);
    cpl_free(&kind);
    cpl_free(&step);
    cpl_free(&rank);
    return st;
}

/* numerics, section 1: rates and moments of the scale over all steps. */
static cpl_status record_scale(const cpl_metrics *m, cpl_record *rec) {
    cpl_status st = CPL_OK;
    const cpl_series *s = &m->step;
    double sum = 0, squares = 0, overflows = 0, n = s->rows > 0 ? (double)s->rows : 1, largest = 0;
    for (int64_t r = 0; r < s->rows; r++) {
        sum += cpl_series_at(s, CPL_M_LOSS_SCALE, r);
        overflows += cpl_series_at(s, CPL_M_OVERFLOW, r);
    }
    double mean = sum / n;
    for (int64_t r = 0; r < s->rows; r++) {
        double d = cpl_series_at(s, CPL_M_LOSS_SCALE, r) - mean;
        squares += d * d;
    }
    for (int64_t r = 0; r < m->exponents.rows; r++) {
        largest = fmax(largest, cpl_series_at(&m->exponents, 2, r));
    }
    CPL_TRY(cpl_record_i64(rec, "overflow_steps", (int64_t)overflows));
    CPL_TRY(cpl_record_f64(rec, "overflow_rate", overflows / n));
    CPL_TRY(cpl_record_f64(rec, "average_scale", mean));
    CPL_TRY(cpl_record_f64(rec, "scale_variance", squares / n));
    CPL_TRY(cpl_record_f64(rec, "scale_stability", mean > 0 ? 1 / (1 + squares / n / (mean * mean)) : 0));
    CPL_TRY(cpl_record_f64(rec, "max_abs_grad", largest));
    CPL_TRY(cpl_record_f64(rec, "recommended_scale", largest > 0 ? exp2(floor(log2(65504.0 / 2 / largest))) : NAN));
done:
    return st;
}

/* counts and what fp16 would lose at the scale of that step: |s g| < 2^-24 flushes to zero, < 2^-14 is subnormal. */
static cpl_status record_exponents(const cpl_series *s, cpl_record *rec) {
    cpl_status st = CPL_OK;
    double *flush = NULL, *subnormal = NULL;
    int64_t *counts = NULL;
    int64_t dims[3] = {s->rows, CPL_M_GROUPS, CPL_M_EXPONENTS};
    const char *names[3] = {"histogram_step", "tensor_group", "log2_abs_grad"};
    static const char *const groups[] = {"embedding", "attention", "mlp", "norm"};
    int64_t axis[CPL_M_EXPONENTS];
    size_t cells = (size_t)s->rows * CPL_M_GROUPS;
    CPL_TRY(cpl_alloc(&flush, cells, sizeof *flush, "histogram"));
    CPL_TRY(cpl_alloc(&subnormal, cells, sizeof *subnormal, "histogram"));
    CPL_TRY(cpl_alloc(&counts, cells * CPL_M_EXPONENTS, sizeof *counts, "histogram"));
    for (int64_t r = 0; r < s->rows; r++) {
        double shift = log2(cpl_series_at(s, 1, r));
        for (int g = 0; g < CPL_M_GROUPS; g++) {
            double all = 0, zero = 0, small = 0;
            for (int e = 0; e < CPL_M_EXPONENTS; e++) {
                double c = cpl_series_at(s, 3 + g * CPL_M_EXPONENTS + e, r);
                counts[(r * CPL_M_GROUPS + g) * CPL_M_EXPONENTS + e] = (int64_t)c;
                all += c;
                zero += e - 127 + shift < -24 ? c : 0;
                small += e - 127 + shift >= -24 && e - 127 + shift < -14 ? c : 0;
            }
            flush[r * CPL_M_GROUPS + g] = all > 0 ? zero / all : NAN;
            subnormal[r * CPL_M_GROUPS + g] = all > 0 ? small / all : NAN;
        }
    }
    for (int e = 0; e < CPL_M_EXPONENTS; e++) {
        axis[e] = e - 127;
    }
    CPL_TRY(integers(rec, s, 0, names[0], names[0], CPL_T_I64, "", "step whose gradient was counted"));
    CPL_TRY(cpl_record_array(rec, names[1], CPL_T_TEXT, 1, &dims[1], &names[1], groups, "", "kind of tensor"));
    CPL_TRY(cpl_record_array(rec, names[2], CPL_T_I64, 1, &dims[2], &names[2], axis, "",
                             "floor(log2|g|) of the unscaled gradient; -127: zero and subnormal, 128: not finite"));
    CPL_TRY(cpl_record_array(rec, "grad_exponents", CPL_T_I64, 3, dims, names, counts, "", "gradient elements of that magnitude"));
    CPL_TRY(cpl_record_array(rec, "fp16_flush_fraction", CPL_T_F64, 2, dims, names, flush, "",
                             "share that fp16 would flush to zero at the step's scale"));
    CPL_TRY(cpl_record_array(rec, "fp16_subnormal_fraction", CPL_T_F64, 2, dims, names, subnormal, "",
                             "share that would be subnormal in fp16"));
done:
    cpl_free(&flush);
    cpl_free(&subnormal);
    cpl_free(&counts);
    return st;
}

cpl_status cpl_metrics_record(const cpl_metrics *m, cpl_record *rec, const cpl_layout *layout, int64_t tokens_per_step,
                              bool exponents, bool hidden) {
    cpl_status st = CPL_OK;
    CPL_TRY(record_steps(&m->step, rec, tokens_per_step, hidden));
    CPL_TRY(integers(rec, &m->eval, CPL_M_EVAL_STEP, "eval_step", "eval_step", CPL_T_I64, "",
                     "steps done when the validation loss was taken"));
    CPL_TRY(column(rec, &m->eval, CPL_M_VAL_LOSS, "val_loss", "eval_step", "nat/token",
                   "token-weighted mean over the whole validation split"));
    CPL_TRY(record_events(&m->event, rec, layout));
    CPL_TRY(record_scale(m, rec));
    if (exponents) {
        CPL_TRY(record_exponents(&m->exponents, rec));
    }
done:
    return st;
}

/* Operations over flat buffers of the model's size: the step's end, casts, selection, quantization.
 * Refuses to count bytes that need not move: each operand is read or written once. */
#include "jobs/bench.h"
#include "jobs/optim/optimizer.h"
#include <stdio.h>
#include <string.h>

typedef struct {
    cpl_device *dev;          /* borrowed */
    const cpl_layout *layout; /* borrowed */
    cpl_dtype dt, cast;
    int64_t n;
    float *param, *m, *v, *grad; /* owned, device [n], as all below */
    void *work;                  /* [n] act; NULL for fp32: the parameters themselves */
    void *narrow;                /* [n] two bytes each */
    uint8_t *mask, *codes;       /* [n] */
    float *scales;               /* [rows] */
    double *sums;                /* [chunks + 1] */
    float *list;                 /* [n / 4 + 1] */
    int64_t *counts;             /* [2048] */
    uint32_t *kinds;             /* [tensors + 1] */
    float *largest;              /* [1] */
    cpl_step_state *state;
    cpl_step_rules rules;
} flat;

static cpl_status run_add(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, add_f32, f->param, f->grad, f->n);
}
static cpl_status run_cast_down(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, cast_from_f32, f->cast, f->narrow, f->param, f->n);
}
static cpl_status run_cast_up(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, cast_to_f32, f->cast, f->v, f->narrow, f->n);
}
static cpl_status run_sum(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, sum_f32, f->sums, f->grad, f->n);
}
static cpl_status run_squares(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, sum_squares, f->sums, f->grad, f->n);
}
static cpl_status run_exponents(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, exponents, f->counts, f->largest, f->grad, f->n, 1);
}
static cpl_status run_apply(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, apply_mask, f->param, f->mask, f->n);
}

static cpl_status run_scan(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, grad_scan, f->kinds + 1, f->kinds, NULL, f->grad, f->layout->begin, f->layout->count);
}

static cpl_status run_adamw(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, adamw, f->dt, f->param, f->work == NULL ? f->param : f->work, NULL, f->m, f->v, f->grad, NULL, f->n,
                   0.1f, f->state, &f->rules);
}

static cpl_status run_histogram(void *c) {
    const flat *f = c;
    return CPL_OPS(f->dev, select_histogram, f->counts, f->counts + 2047, f->param, f->n, 1, 0, 0, 10);
}

/* 8 % of the parameters, which are normals; places in the list are handed out from 0 on in each run. */
static cpl_status run_window(void *c) {
    cpl_status st = CPL_OK;
    const flat *f = c;
    const float from = 0.012f, to = 0.0145f;
    uint32_t first, last;
    memcpy(&first, &from, sizeof first);
    memcpy(&last, &to, sizeof last);
    CPL_TRY(CPL_OPS(f->dev, zero, f->counts, sizeof *f->counts));
    CPL_TRY(
        CPL_OPS(f->dev, select_window, f->list, f->n / 4, f->counts, f->counts + 1, f->counts + 2, f->param, f->n, first, last));
done:
    return st;
}

static cpl_status run_mask(void *c) {
    const flat *f = c;
    const float threshold = 0.01f;
    uint32_t key;
    memcpy(&key, &threshold, sizeof key);
    return CPL_OPS(f->dev, select_mask, f->mask, f->param, f->n, key, f->counts);
}

static cpl_status run_quantize(void *c) {
    const flat *f = c;
    int64_t cols = f->layout->shape.width;
    const cpl_quant_spec spec = {.scheme = CPL_QUANT_SYMMETRIC, .bits = 4, .group = cols, .scale_dtype = CPL_F16};
    return CPL_OPS(f->dev, quantize, &spec, f->grad, f->n / cols, cols, f->codes, f->scales, NULL, f->v, NULL, f->counts);
}

static cpl_status allocate(const cpl_bench *b, flat *f) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = b->layout;
    size_t n = (size_t)l->total;
    cpl_training t = {0};
    cpl_arena *arena = NULL;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_fields_default(cpl_training_table.fields, cpl_training_table.count, &t, arena));
    *f = (flat){.dev = b->dev, .layout = l, .dt = b->dt, .n = l->total, .rules = cpl_step_rules_of(&t, 1)};
    CPL_TRY(cpl_bench_normals(b, CPL_F32, f->n, 0.02f, 3, &f->param));
    CPL_TRY(cpl_bench_normals(b, CPL_F32, f->n, 0.02f, 4, &f->grad));
    CPL_TRY(cpl_device_alloc(b->dev, &f->m, n, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->v, n, sizeof(float), "bench"));
    if (b->dt != CPL_F32) {
        CPL_TRY(cpl_device_alloc(b->dev, &f->work, n, cpl_dtype_size(b->dt), "bench"));
    }
    CPL_TRY(cpl_device_alloc(b->dev, &f->narrow, n, 2, "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->mask, n, 1, "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->codes, n, 1, "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->scales, n / (size_t)l->shape.width + 1, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->sums, n / CPL_SUM_CHUNK + 2, sizeof(double), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->list, n / 4 + 1, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->counts, 2048, sizeof(int64_t), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->kinds, (size_t)l->count + 1, sizeof(uint32_t), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->largest, 1, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &f->state, 1, sizeof(cpl_step_state), "bench"));
    cpl_step_state state = {.loss_scale = 1, .adam_step = 1, .lr = 1e-6f, .grad_norm = 1, .grad_factor = 1};
    CPL_TRY(CPL_OPS(b->dev, upload, f->state, &state, sizeof state));
done:
    cpl_arena_destroy(&arena);
    return st;
}

static void release(flat *f) {
    void *owned[] = {&f->param,  &f->m,    &f->v,    &f->grad,   &f->work,  &f->narrow,  &f->mask, &f->codes,
                     &f->scales, &f->sums, &f->list, &f->counts, &f->kinds, &f->largest, &f->state};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) {
        cpl_device_free(f->dev, owned[i]);
    }
}

cpl_status cpl_bench_flat(cpl_bench *b) {
    cpl_status st = CPL_OK;
    flat f = {.dev = b->dev};
    double act = (double)cpl_dtype_size(b->dt);
    /* bytes of an element that must move; cast: element type of the narrow side */
    const struct {
        const char *name;
        cpl_bench_call call;
        double bytes;
        cpl_dtype cast;
    } cases[] = {{"AdamW", run_adamw, b->dt == CPL_F32 ? 28 : 28 + act, CPL_F32},
                 {"add fp32", run_add, 12, CPL_F32},
                 {"sum fp32", run_sum, 4, CPL_F32},
                 {"gradient scan", run_scan, 4, CPL_F32},
                 {"sum of squares", run_squares, 4, CPL_F32},
                 {"gradient exponents", run_exponents, 4, CPL_F32},
                 {"cast fp32 to fp16", run_cast_down, 6, CPL_F16},
                 {"cast fp16 to fp32", run_cast_up, 6, CPL_F16},
                 {"cast fp32 to bf16", run_cast_down, 6, CPL_BF16},
                 {"cast bf16 to fp32", run_cast_up, 6, CPL_BF16},
                 {"select: histogram", run_histogram, 4, CPL_F32},
                 {"select: window", run_window, 4, CPL_F32},
                 {"select: mask", run_mask, 5, CPL_F32},
                 {"apply mask", run_apply, 9, CPL_F32},
                 {"quantize 4 bits, channel", run_quantize, 9, CPL_F32}};
    CPL_TRY(cpl_agree(b->world, allocate(b, &f)));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cpl_bench_row row = {.bytes = cases[i].bytes * (double)f.n};
        snprintf(row.name, sizeof row.name, "%s", cases[i].name);
        snprintf(row.shape, sizeof row.shape, "%lld", (long long)f.n);
        f.cast = cases[i].cast;
        CPL_TRY(cpl_bench_add(b, cases[i].call, &f, row));
    }
done:
    release(&f);
    return st;
}

/* Compression of a flat buffer of weights in some tensors, as a stage does it once the weights are on the device, and its loss.
 * Refuses to leave the host out: a selection is timed with its waits for the histograms. */
#include "jobs/bench.h"
#include "jobs/select.h"
#include <stdio.h>
#include <string.h>

enum { COLS = 1024, GROUP = 128, BITS = 4 };

typedef struct {
    const cpl_bench *b; /* borrowed */
    cpl_device *dev;    /* borrowed */
    int64_t n, rows;    /* weights, [rows, COLS] */
    int64_t tensors;
    cpl_layout layout; /* its arrays are owned: `tensors` of them, all to be pruned */
    cpl_prune_options prune;
    cpl_prune_report report;  /* by_tensor: none */
    cpl_comm *alone;          /* owned: this rank */
    cpl_selection *selection; /* owned */
    float *w, *w_hat;         /* owned, device [n], as all below */
    void *narrow;             /* [n] two bytes each */
    uint8_t *mask;            /* [n] */
    float *scales;            /* [n / GROUP] */
    cpl_quant_error *error;
    int64_t *refused;
    cpl_dtype cast;
} compression;

static cpl_status make_layout(compression *c) {
    cpl_status st = CPL_OK;
    cpl_layout *l = &c->layout;
    CPL_TRY(cpl_alloc(&l->param, (size_t)c->tensors, sizeof *l->param, "bench"));
    CPL_TRY(cpl_alloc(&l->begin, (size_t)c->tensors + 1, sizeof *l->begin, "bench"));
    for (int64_t i = 0; i <= c->tensors; i++) {
        l->begin[i] = i * (c->n / c->tensors);
    }
    for (int64_t i = 0; i < c->tensors; i++) {
        l->param[i] =
            (cpl_param){.rows = c->rows / c->tensors, .cols = COLS, .offset = l->begin[i], .decayed = true, .prunable = true};
        snprintf(l->param[i].name, sizeof l->param[i].name, "tensor %lld", (long long)i);
    }
    l->count = c->tensors;
    l->total = l->parameters = l->decayed_end = c->n;
done:
    return st;
}

static cpl_status allocate(compression *c) {
    cpl_status st = CPL_OK;
    size_t n = (size_t)c->n;
    CPL_TRY(make_layout(c));
    CPL_TRY(cpl_bench_normals(c->b, CPL_F32, c->n, 0.02f, 3, &c->w));
    CPL_TRY(cpl_device_alloc(c->dev, &c->w_hat, n, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(c->dev, &c->narrow, n, 2, "bench"));
    CPL_TRY(cpl_device_alloc(c->dev, &c->mask, n, 1, "bench"));
    CPL_TRY(cpl_device_alloc(c->dev, &c->scales, n / GROUP, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(c->dev, &c->error, 1, sizeof *c->error, "bench"));
    CPL_TRY(cpl_device_alloc(c->dev, &c->refused, 1, sizeof *c->refused, "bench"));
    CPL_TRY(cpl_selection_create(&c->selection, c->alone, c->dev, &c->layout, &c->prune, 0, c->n, c->w, c->mask));
done:
    return st;
}

static void release(compression *c) {
    void *owned[] = {&c->w, &c->w_hat, &c->narrow, &c->mask, &c->scales, &c->error, &c->refused};
    cpl_selection_destroy(&c->selection);
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) {
        cpl_device_free(c->dev, owned[i]);
    }
    cpl_free(&c->layout.param);
    cpl_free(&c->layout.begin);
}

static cpl_status run_select(void *context) {
    compression *c = context;
    return cpl_selection_run(c->selection, &c->report);
}

static cpl_status run_apply(void *context) {
    const compression *c = context;
    return CPL_OPS(c->dev, apply_mask, c->w_hat, c->mask, c->n);
}

static cpl_status quantize(const compression *c, int64_t first, int64_t rows) {
    const cpl_quant_spec spec = {.scheme = CPL_QUANT_ASYMMETRIC, .bits = BITS, .group = GROUP, .scale_dtype = CPL_F16};
    int64_t at = first * COLS;
    return CPL_OPS(c->dev, quantize, &spec, c->w + at, rows, COLS, NULL, c->scales + at / GROUP, NULL, c->w_hat + at, c->error,
                   c->refused);
}

static cpl_status run_quantize(void *context) {
    const compression *c = context;
    return quantize(c, 0, c->rows);
}

static cpl_status run_quantize_tensors(void *context) {
    cpl_status st = CPL_OK;
    const compression *c = context;
    for (int64_t i = 0; i < c->tensors; i++) {
        CPL_TRY(quantize(c, c->rows / c->tensors * i, c->rows / c->tensors));
    }
done:
    return st;
}

static cpl_status run_cast_down(void *context) {
    const compression *c = context;
    return CPL_OPS(c->dev, cast_from_f32, c->cast, c->narrow, c->w, c->n);
}

static cpl_status run_cast_up(void *context) {
    const compression *c = context;
    return CPL_OPS(c->dev, cast_to_f32, c->cast, c->w_hat, c->narrow, c->n);
}

/* --- the distillation loss --- */

typedef struct {
    cpl_device *dev; /* borrowed */
    int64_t rows, V;
    void *student, *teacher; /* owned, device [rows,V] bf16, as all below */
    float *soft, *hard;      /* [rows] */
    int32_t *targets;        /* [rows]; all the same token */
    cpl_step_state *state;
} loss;

static cpl_status run_loss(void *context) {
    const loss *l = context;
    return CPL_OPS(l->dev, distill_loss, CPL_BF16, l->student, l->teacher, l->soft, l->hard, l->targets, l->state,
                   1 / (float)l->rows, 2, 0.5f, CPL_KD_FORWARD_KL, 0.5f, l->rows, l->V, l->V);
}

static cpl_status allocate_loss(const cpl_bench *b, loss *l) {
    cpl_status st = CPL_OK;
    const cpl_step_state state = {.loss_scale = 1};
    CPL_TRY(cpl_bench_normals(b, CPL_BF16, l->rows * l->V, 1, 5, &l->student));
    CPL_TRY(cpl_bench_normals(b, CPL_BF16, l->rows * l->V, 1, 6, &l->teacher));
    CPL_TRY(cpl_device_alloc(l->dev, &l->soft, (size_t)l->rows, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(l->dev, &l->hard, (size_t)l->rows, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(l->dev, &l->targets, (size_t)l->rows, sizeof(int32_t), "bench"));
    CPL_TRY(cpl_device_alloc(l->dev, &l->state, 1, sizeof state, "bench"));
    CPL_TRY(CPL_OPS(l->dev, upload, l->state, &state, sizeof state));
done:
    return st;
}

static cpl_status add_loss(cpl_bench *b) {
    cpl_status st = CPL_OK;
    loss l = {.dev = b->dev, .rows = b->o->loss_rows, .V = b->o->loss_vocab};
    cpl_bench_row row = {.name = "distillation loss and gradient, bf16", .bytes = 3 * 2.0 * (double)(l.rows * l.V)};
    snprintf(row.shape, sizeof row.shape, "%lldx%lld", (long long)l.rows, (long long)l.V);
    CPL_TRY(cpl_agree(b->world, allocate_loss(b, &l)));
    CPL_TRY(cpl_bench_add(b, run_loss, &l, row));
done:
    cpl_device_free(b->dev, &l.student);
    cpl_device_free(b->dev, &l.teacher);
    cpl_device_free(b->dev, &l.soft);
    cpl_device_free(b->dev, &l.hard);
    cpl_device_free(b->dev, &l.targets);
    cpl_device_free(b->dev, &l.state);
    return st;
}

static cpl_status add_weights(cpl_bench *b, compression *c) {
    cpl_status st = CPL_OK;
    /* bytes of an element that must move: the threshold needs all weights once and the mask once more */
    const struct {
        const char *name;
        cpl_bench_call call;
        double bytes;
        cpl_dtype cast;
    } cases[] = {{"exact global threshold and mask", run_select, 9, CPL_F32},
                 {"apply mask", run_apply, 9, CPL_F32},
                 {"fake-quantize int4 g128 + error", run_quantize, 8 + 4.0 / GROUP, CPL_F32},
                 {"the same, tensor by tensor", run_quantize_tensors, 8 + 4.0 / GROUP, CPL_F32},
                 {"cast fp32 to fp16", run_cast_down, 6, CPL_F16},
                 {"cast fp16 to fp32", run_cast_up, 6, CPL_F16},
                 {"cast fp32 to bf16", run_cast_down, 6, CPL_BF16},
                 {"cast bf16 to fp32", run_cast_up, 6, CPL_BF16}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cpl_bench_row row = {.bytes = cases[i].bytes * (double)c->n};
        snprintf(row.name, sizeof row.name, "%s", cases[i].name);
        snprintf(row.shape, sizeof row.shape, "%lld in %lld tensors", (long long)c->n, (long long)c->tensors);
        c->cast = cases[i].cast;
        CPL_TRY(cpl_bench_add(b, cases[i].call, c, row));
    }
done:
    return st;
}

cpl_status cpl_bench_compress(cpl_bench *b) {
    cpl_status st = CPL_OK;
    compression c = {
        .b = b, .dev = b->dev, .tensors = b->o->tensors, .prune = {.sparsity = b->o->sparsity, .scope = CPL_SCOPE_GLOBAL}};
    int64_t each = (int64_t)(b->o->millions * 1e6) / c.tensors / COLS;
    c.rows = (each > 0 ? each : 1) * c.tensors;
    c.n = c.rows * COLS;
    CPL_TRY(cpl_comm_split(b->world, cpl_comm_rank(b->world), &c.alone));
    CPL_TRY(cpl_agree(b->world, allocate(&c)));
    CPL_TRY(add_weights(b, &c));
    release(&c);
    CPL_TRY(add_loss(b));
done:
    release(&c);
    cpl_comm_destroy(&c.alone);
    return st;
}

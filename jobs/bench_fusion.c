/* Fused operations beside the same work as separate ones, at a model's shapes: time, and bytes that are not moved.
 * Refuses to invent a separate operation: where there is none, an addition or a copy moves the bytes that it would. */
#include "jobs/bench.h"
#include "jobs/optim/optimizer.h"
#include <stdio.h>
#include <string.h>

enum { LOGITS_BYTES = 1 << 26 };

typedef struct {
    cpl_device *dev; /* borrowed */
    cpl_dtype dt, product;
    int64_t B, T, C, H, V, R, rows, n; /* rows: of logits at once; n: elements of the flat buffers */
    void *x, *y, *pre, *wide, *other;  /* owned, device, as all below: [R,4C] act; other: [max(R 4C, rows V)] act */
    void *delta, *w, *bias, *logits;   /* [R,C] [4C,C] [4C] [rows,V] act */
    float *lse, *losses;               /* [B,H,T] [rows] */
    int32_t *targets;                  /* [rows] */
    float *param, *m, *v, *grad;       /* [n] */
    void *work;                        /* [n] act; NULL for fp32: the parameters themselves */
    uint8_t *mask;                     /* [n] */
    const cpl_layout *layout;          /* borrowed */
    uint32_t *kinds;                   /* [1 + tensors] */
    double *sums;                      /* [chunks of n] */
    cpl_step_state *state;
    cpl_step_rules rules;
} fusion;

/* Reads two buffers of so many bytes and writes one, as a sum or product of elements does. */
static cpl_status add_bytes(const fusion *f, void *y, const void *x, size_t bytes) {
    return CPL_OPS(f->dev, add_f32, y, x, (int64_t)(bytes / sizeof(float)));
}

static size_t bytes_of(const fusion *f, int64_t elements) {
    return (size_t)elements * cpl_dtype_size(f->dt);
}

static cpl_status residual(void *c) {
    const fusion *f = c;
    return CPL_OPS(f->dev, linear_fwd, f->product, f->y, f->x, f->w, f->bias, f->delta, f->R, f->C, 4 * f->C);
}
static cpl_status residual_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, linear_fwd, f->product, f->y, f->x, f->w, f->bias, NULL, f->R, f->C, 4 * f->C));
    CPL_TRY(add_bytes(f, f->wide, f->y, bytes_of(f, f->R * f->C)));
done:
    return st;
}

static cpl_status linear(void *c) {
    const fusion *f = c;
    return CPL_OPS(f->dev, linear_gelu_fwd, f->product, f->y, f->pre, f->x, f->w, f->bias, f->R, 4 * f->C, f->C);
}
static cpl_status linear_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, linear_fwd, f->product, f->pre, f->x, f->w, f->bias, NULL, f->R, 4 * f->C, f->C));
    CPL_TRY(CPL_OPS(f->dev, gelu_fwd, f->dt, f->y, f->pre, 4 * f->R * f->C));
done:
    return st;
}

static cpl_status input(void *c) {
    const fusion *f = c;
    return CPL_OPS(f->dev, linear_bwd_input, f->product, f->wide, NULL, f->delta, f->w, f->pre, f->R, f->C, 4 * f->C);
}
static cpl_status input_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, linear_bwd_input, f->product, f->wide, NULL, f->delta, f->w, NULL, f->R, f->C, 4 * f->C));
    CPL_TRY(add_bytes(f, f->wide, f->pre, bytes_of(f, 4 * f->R * f->C)));
done:
    return st;
}

static cpl_status attention(void *c) {
    const fusion *f = c;
    return CPL_OPS(f->dev, attention_fwd, f->dt, f->y, f->lse, f->x, f->B, f->T, f->H, f->C / f->H);
}
static cpl_status attention_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, copy, f->other, f->x, bytes_of(f, 3 * f->R * f->C)));
    CPL_TRY(attention(c));
    CPL_TRY(CPL_OPS(f->dev, copy, f->other, f->y, bytes_of(f, f->R * f->C)));
done:
    return st;
}
static cpl_status attention_back(void *c) {
    const fusion *f = c;
    return CPL_OPS(f->dev, attention_bwd, f->dt, f->wide, NULL, f->delta, f->y, f->lse, f->x, f->B, f->T, f->H, f->C / f->H);
}
static cpl_status attention_back_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, copy, f->other, f->delta, bytes_of(f, f->R * f->C)));
    CPL_TRY(attention_back(c));
    CPL_TRY(CPL_OPS(f->dev, copy, f->other, f->wide, bytes_of(f, 3 * f->R * f->C)));
done:
    return st;
}

static cpl_status cross_entropy(void *c) {
    const fusion *f = c;
    return CPL_OPS(f->dev, cross_entropy, f->dt, f->logits, f->losses, f->targets, f->state, 1e-3f, f->rows, f->V, f->V);
}
static cpl_status cross_entropy_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, copy, f->other, f->logits, bytes_of(f, f->rows * f->V)));
    CPL_TRY(cross_entropy(c));
done:
    return st;
}

static cpl_status adamw_of(const fusion *f, void *work, const uint8_t *mask) {
    return CPL_OPS(f->dev, adamw, f->dt, f->param, work, NULL, f->m, f->v, f->grad, mask, f->n, 0.1f, f->state, &f->rules);
}
static cpl_status adamw(void *c) {
    const fusion *f = c;
    return adamw_of(f, f->work == NULL ? f->param : f->work, f->mask);
}
static cpl_status adamw_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(adamw_of(f, NULL, NULL));
    CPL_TRY(CPL_OPS(f->dev, apply_mask, f->param, f->mask, f->n));
    if (f->work != NULL) {
        CPL_TRY(CPL_OPS(f->dev, cast_from_f32, f->dt, f->work, f->param, f->n));
    }
done:
    return st;
}
static cpl_status unscale(void *c) {
    const fusion *f = c;
    return adamw_of(f, f->work == NULL ? f->param : f->work, NULL);
}
static cpl_status unscale_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(CPL_OPS(f->dev, copy, f->m, f->v, (size_t)f->n * sizeof(float)));
    CPL_TRY(unscale(c));
done:
    return st;
}

static cpl_status scan_with(const fusion *f, double *sums) {
    return CPL_OPS(f->dev, grad_scan, f->kinds + 1, f->kinds, sums, f->grad, f->layout->begin, f->layout->count);
}
static cpl_status scan(void *c) {
    const fusion *f = c;
    return scan_with(f, f->sums);
}
static cpl_status scan_apart(void *c) {
    cpl_status st = CPL_OK;
    const fusion *f = c;
    CPL_TRY(scan_with(f, NULL));
    CPL_TRY(CPL_OPS(f->dev, sum_squares, f->sums, f->grad, f->n));
done:
    return st;
}

static cpl_status allocate_layers(const cpl_bench *b, fusion *f) {
    cpl_status st = CPL_OK;
    int64_t wide = 4 * f->R * f->C, logits = f->rows * f->V;
    const struct {
        void *to;
        int64_t n;
        float scale;
    } act[] = {{&f->x, wide, 1},
               {&f->y, wide, 1},
               {&f->pre, wide, 1},
               {&f->wide, wide, 0.1f},
               {&f->other, wide > logits ? wide : logits, 1},
               {&f->delta, f->R * f->C, 0.1f},
               {&f->w, 4 * f->C * f->C, 0.02f},
               {&f->bias, 4 * f->C, 1},
               {&f->logits, logits, 1}};
    for (size_t i = 0; i < sizeof act / sizeof act[0]; i++) {
        CPL_TRY(cpl_bench_normals(b, f->dt, act[i].n, act[i].scale, 30 + (uint32_t)i, act[i].to));
    }
    CPL_TRY(cpl_device_alloc(f->dev, &f->lse, (size_t)(f->R * f->H), sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(f->dev, &f->losses, (size_t)f->rows, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(f->dev, &f->targets, (size_t)f->rows, sizeof(int32_t), "bench"));
done:
    return st;
}

static cpl_status allocate_flat(const cpl_bench *b, fusion *f) {
    cpl_status st = CPL_OK;
    const cpl_step_state state = {.loss_scale = 1, .adam_step = 1, .lr = 1e-6f, .grad_norm = 1, .grad_factor = 1};
    cpl_training t = {0};
    cpl_arena *arena = NULL;
    size_t n = (size_t)f->n;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_fields_default(cpl_training_table.fields, cpl_training_table.count, &t, arena));
    f->rules = cpl_step_rules_of(&t, 1);
    CPL_TRY(cpl_bench_normals(b, CPL_F32, f->n, 0.02f, 40, &f->param));
    CPL_TRY(cpl_bench_normals(b, CPL_F32, f->n, 0.02f, 41, &f->grad));
    CPL_TRY(cpl_device_alloc(f->dev, &f->m, n, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(f->dev, &f->v, n, sizeof(float), "bench"));
    CPL_TRY(cpl_device_alloc(f->dev, &f->mask, n, 1, "bench"));
    CPL_TRY(cpl_device_alloc(f->dev, &f->kinds, (size_t)f->layout->count + 1, sizeof(uint32_t), "bench"));
    CPL_TRY(cpl_device_alloc(f->dev, &f->sums, n / CPL_SUM_CHUNK + 1, sizeof(double), "bench"));
    if (f->dt != CPL_F32) {
        CPL_TRY(cpl_device_alloc(f->dev, &f->work, n, cpl_dtype_size(f->dt), "bench"));
    }
    CPL_TRY(cpl_device_alloc(f->dev, &f->state, 1, sizeof state, "bench"));
    CPL_TRY(CPL_OPS(f->dev, upload, f->state, &state, sizeof state));
done:
    cpl_arena_destroy(&arena);
    return st;
}

static cpl_status allocate(const cpl_bench *b, fusion *f) {
    cpl_status st = allocate_layers(b, f);
    return st == CPL_OK ? allocate_flat(b, f) : st;
}

static void release(fusion *f) {
    void *owned[] = {&f->x,    &f->y,      &f->pre,  &f->wide,   &f->other,   &f->delta, &f->w,
                     &f->bias, &f->logits, &f->lse,  &f->losses, &f->targets, &f->param, &f->m,
                     &f->v,    &f->grad,   &f->work, &f->mask,   &f->state,   &f->kinds, &f->sums};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) {
        cpl_device_free(f->dev, owned[i]);
    }
}

cpl_status cpl_bench_fusion(cpl_bench *b) {
    cpl_status st = CPL_OK;
    const cpl_model_shape *s = &b->layout->shape;
    fusion f = {.dev = b->dev,
                .dt = b->dt,
                .product = b->product,
                .B = b->o->micro_batch,
                .T = s->context,
                .C = s->width,
                .H = s->heads,
                .V = s->vocab};
    f.R = f.B * f.T;
    f.n = b->layout->total;
    f.layout = b->layout;
    f.rows = LOGITS_BYTES / (f.V * (int64_t)cpl_dtype_size(f.dt));
    f.rows = f.rows > f.R ? f.R : f.rows < 1 ? 1 : f.rows;
    double size = (double)cpl_dtype_size(f.dt), rc = size * (double)(f.R * f.C), n = (double)f.n;
    const struct {
        const char *name;
        cpl_bench_call fused, apart;
        int64_t rows, cols;
        double unmoved; /* bytes */
    } cases[CPL_BENCH_FUSION_ROWS] = {
        {"linear + bias + residual", residual, residual_apart, f.R, f.C, 2 * rc},
        {"linear + bias + GELU", linear, linear_apart, f.R, 4 * f.C, 4 * rc},
        {"linear d input x GELU'", input, input_apart, f.R, 4 * f.C, 2 * 4 * rc},
        {"attention from packed q, k, v", attention, attention_apart, f.R, f.C, 2 * 4 * rc},
        {"attention backward into packed", attention_back, attention_back_apart, f.R, f.C, 2 * 4 * rc},
        {"cross-entropy, gradient over logits", cross_entropy, cross_entropy_apart, f.rows, f.V, 2 * size * (double)(f.rows * f.V)},
        {"AdamW, mask and cast", adamw, adamw_apart, f.n, 1, (b->dt == CPL_F32 ? 8 : 12) * n},
        {"AdamW, unscale and clip", unscale, unscale_apart, f.n, 1, 8 * n},
        {"non-finite scan + norm", scan, scan_apart, f.n, 1, 4 * n}};
    CPL_TRY(cpl_agree(b->world, allocate(b, &f)));
    for (int i = 0; i < CPL_BENCH_FUSION_ROWS; i++) {
        cpl_bench_row row = {.unmoved = cases[i].unmoved}, apart = {0};
        snprintf(row.name, sizeof row.name, "%s", cases[i].name);
        snprintf(row.shape, sizeof row.shape, "%lldx%lld", (long long)cases[i].rows, (long long)cases[i].cols);
        CPL_TRY(cpl_bench_time(b, cases[i].fused, &f, &row));
        CPL_TRY(cpl_bench_time(b, cases[i].apart, &f, &apart));
        row.apart = apart.seconds;
        CPL_TRY(cpl_bench_keep(b, row));
    }
done:
    release(&f);
    return st;
}

/* The layers' operations at a model's shapes.
 * Refuses to count what is computed twice: products are 2 R N K, attention its causal half. */
#include "jobs/bench.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { LOGITS_BYTES = 1 << 26 };

typedef struct {
    cpl_device *dev; /* borrowed */
    cpl_dtype dt, product;
    int64_t B, T, C, H, V, R, rows; /* rows: of logits at once */
    void *x, *delta, *y, *pre, *qkv, *dqkv,
        *out; /* owned, device, as all below: [R,4C] [R,C] [R,4C] [R,4C] [R,3C] [R,3C] [R,C] act */
    void *w, *bias, *wte, *wpe, *logits, *teacher;             /* [4C,C] [4C] [V,C] [T,C] [rows,V] [rows,V] act */
    float *lse, *mean, *rstd, *dw, *db, *dwte, *losses, *soft; /* [B,H,T] [R] [R] [4C,C] [4C] [V+T,C] [R] [R] */
    int32_t *tokens;                                           /* [R] */
    cpl_step_state *state;
    bool gelu, residual; /* of the product in hand, and its sizes */
    int64_t N, K;
    const void *weight; /* borrowed */
    float *dweight;     /* borrowed */
} layers;

static cpl_status run_linear(void *c) {
    const layers *l = c;
    const void *bias = l->weight == l->wte ? NULL : l->bias;
    return l->gelu ? CPL_OPS(l->dev, linear_gelu_fwd, l->product, l->y, l->pre, l->x, l->weight, bias, l->R, l->N, l->K)
                   : CPL_OPS(l->dev, linear_fwd, l->product, l->y, l->x, l->weight, bias, l->residual ? l->out : NULL, l->R, l->N,
                             l->K);
}
static cpl_status run_linear_input(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, linear_bwd_input, l->product, l->pre, NULL, l->y, l->weight, NULL, l->R, l->N, l->K);
}
static cpl_status run_linear_weight(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, linear_bwd_weight, l->product, l->dweight, l->y, l->x, l->R, l->N, l->K, false);
}
static cpl_status run_attention(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, attention_fwd, l->dt, l->out, l->lse, l->qkv, l->B, l->T, l->H, l->C / l->H);
}
static cpl_status run_attention_bwd(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, attention_bwd, l->dt, l->dqkv, l->db, l->delta, l->out, l->lse, l->qkv, l->B, l->T, l->H, l->C / l->H);
}
static cpl_status run_norm(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, layernorm_fwd, l->dt, l->out, l->mean, l->rstd, l->x, l->bias, l->bias, l->R, l->C);
}
static cpl_status run_norm_bwd(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, layernorm_bwd, l->dt, l->y, l->dw, l->db, NULL, l->delta, l->delta, l->x, l->mean, l->rstd, l->bias,
                   l->R, l->C);
}
static cpl_status run_gelu(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, gelu_fwd, l->dt, l->y, l->pre, 4 * l->R * l->C);
}
static cpl_status run_embed(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, embed_fwd, l->dt, l->out, l->tokens, l->wte, l->wpe, l->B, l->T, l->C);
}
static cpl_status run_embed_bwd(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, embed_bwd, l->dt, l->dwte, l->dwte + l->V * l->C, l->delta, l->tokens, l->B, l->T, l->C, l->V);
}
static cpl_status run_cross_entropy(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, cross_entropy, l->dt, l->logits, l->losses, l->tokens, l->state, 1e-3f, l->rows, l->V, l->V);
}
static cpl_status run_distill(void *c) {
    const layers *l = c;
    return CPL_OPS(l->dev, distill_loss, l->dt, l->logits, l->teacher, l->soft, l->losses, l->tokens, l->state, 1e-3f, 2, 0.5f,
                   CPL_KD_FORWARD_KL, 0.5f, l->rows, l->V, l->V);
}

static cpl_status upload_tokens(const layers *l) {
    cpl_status st = CPL_OK;
    int32_t *host = NULL;
    cpl_step_state state = {.loss_scale = 1};
    CPL_TRY(cpl_alloc(&host, (size_t)l->R, sizeof *host, "bench"));
    for (int64_t i = 0; i < l->R; i++) {
        host[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)l->V);
    }
    CPL_TRY(CPL_OPS(l->dev, upload, l->tokens, host, (size_t)l->R * sizeof *host));
    CPL_TRY(CPL_OPS(l->dev, upload, l->state, &state, sizeof state));
done:
    cpl_free(&host);
    return st;
}

static cpl_status allocate(const cpl_bench *b, layers *l) {
    cpl_status st = CPL_OK;
    const struct {
        void *to;
        int64_t n;
        float scale;
    } act[] = {{&l->x, 4 * l->R * l->C, 1},     {&l->delta, l->R * l->C, 0.1f},  {&l->y, 4 * l->R * l->C, 1},
               {&l->pre, 4 * l->R * l->C, 1},   {&l->qkv, 3 * l->R * l->C, 1},   {&l->dqkv, 3 * l->R * l->C, 0.1f},
               {&l->out, l->R * l->C, 1},       {&l->w, 4 * l->C * l->C, 0.02f}, {&l->bias, 4 * l->C, 1},
               {&l->wte, l->V * l->C, 0.02f},   {&l->wpe, l->T * l->C, 0.02f},   {&l->logits, l->rows * l->V, 1},
               {&l->teacher, l->rows * l->V, 1}};
    const struct {
        void *to;
        int64_t n;
    } f32[] = {{&l->lse, l->R * l->H},    {&l->mean, l->R},   {&l->rstd, l->R},
               {&l->dw, 4 * l->C * l->C}, {&l->db, 4 * l->C}, {&l->dwte, (l->V + l->T) * l->C},
               {&l->losses, l->R},        {&l->soft, l->R},   {&l->tokens, l->R}};
    for (size_t i = 0; i < sizeof act / sizeof act[0]; i++) {
        CPL_TRY(cpl_bench_normals(b, b->dt, act[i].n, act[i].scale, 10 + (uint32_t)i, act[i].to));
    }
    for (size_t i = 0; i < sizeof f32 / sizeof f32[0]; i++) {
        CPL_TRY(cpl_device_alloc(b->dev, f32[i].to, (size_t)f32[i].n, sizeof(float), "bench"));
    }
    CPL_TRY(cpl_device_alloc(b->dev, &l->state, 1, sizeof *l->state, "bench"));
    CPL_TRY(upload_tokens(l));
done:
    return st;
}

static void release(layers *l) {
    void *owned[] = {&l->x,    &l->delta, &l->y,    &l->pre,    &l->qkv,     &l->dqkv,   &l->out,  &l->w,
                     &l->bias, &l->wte,   &l->wpe,  &l->logits, &l->teacher, &l->lse,    &l->mean, &l->rstd,
                     &l->dw,   &l->db,    &l->dwte, &l->losses, &l->soft,    &l->tokens, &l->state};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) {
        cpl_device_free(l->dev, owned[i]);
    }
}

static cpl_status add(cpl_bench *b, layers *l, const char *name, cpl_bench_call call, double flops, double bytes, const char *shape,
                      ...) __attribute__((format(printf, 7, 8)));
static cpl_status add(cpl_bench *b, layers *l, const char *name, cpl_bench_call call, double flops, double bytes, const char *shape,
                      ...) {
    cpl_bench_row row = {.flops = flops, .bytes = bytes};
    va_list args;
    snprintf(row.name, sizeof row.name, "%s", name);
    va_start(args, shape);
    vsnprintf(row.shape, sizeof row.shape, shape, args);
    va_end(args);
    return cpl_bench_add(b, call, l, row);
}

/* The five products of a model: forward, gradient over the input, gradient over the weight. */
static cpl_status linear(cpl_bench *b, layers *l) {
    cpl_status st = CPL_OK;
    const struct {
        const char *name;
        int64_t N, K;
        bool gelu, residual;
    } products[] = {{"qkv", 3 * l->C, l->C, false, false},
                    {"projection + residual", l->C, l->C, false, true},
                    {"mlp in + GELU", 4 * l->C, l->C, true, false},
                    {"mlp out + residual", l->C, 4 * l->C, false, true},
                    {"head", l->V, l->C, false, false}};
    static const cpl_bench_call calls[] = {run_linear, run_linear_input, run_linear_weight};
    for (size_t i = 0; i < sizeof products / sizeof products[0]; i++) {
        bool head = i + 1 == sizeof products / sizeof products[0];
        l->N = products[i].N;
        l->K = products[i].K;
        l->gelu = products[i].gelu;
        l->residual = products[i].residual;
        l->weight = head ? l->wte : l->w;
        l->dweight = head ? l->dwte : l->dw;
        int64_t R = l->R;
        l->R = head ? l->rows : R;
        for (int pass = 0; pass < 3; pass++) {
            char name[48];
            snprintf(name, sizeof name,
                     pass == 0   ? "linear %s"
                     : pass == 1 ? "linear %s: d input"
                                 : "linear %s: d weight",
                     products[i].name);
            CPL_TRY(add(b, l, name, calls[pass], 2.0 * (double)l->R * (double)l->N * (double)l->K, 0, "%lldx%lldx%lld",
                        (long long)l->R, (long long)l->N, (long long)l->K));
        }
        l->R = R;
    }
done:
    return st;
}

static cpl_status others(cpl_bench *b, layers *l) {
    cpl_status st = CPL_OK;
    double size = (double)cpl_dtype_size(l->dt), rc = (double)l->R * (double)l->C, logits = (double)l->rows * (double)l->V;
    double attention =
        2.0 * (double)l->B * (double)l->T * (double)(l->T + 1) * (double)l->C; /* two products over the causal half */
    long long B = l->B, T = l->T, H = l->H, C = l->C, R = l->R, V = l->V, rows = l->rows;
    CPL_TRY(add(b, l, "attention", run_attention, attention, 0, "%lldx%lld, %lld heads of %lld", B, T, H, C / H));
    CPL_TRY(
        add(b, l, "attention: backward", run_attention_bwd, 2.5 * attention, 0, "%lldx%lld, %lld heads of %lld", B, T, H, C / H));
    CPL_TRY(add(b, l, "LayerNorm", run_norm, 0, 2 * size * rc, "%lldx%lld", R, C));
    CPL_TRY(add(b, l, "LayerNorm: backward + residual", run_norm_bwd, 0, 4 * size * rc, "%lldx%lld", R, C));
    CPL_TRY(add(b, l, "GELU", run_gelu, 0, 8 * size * rc, "%lldx%lld", R, 4 * C));
    CPL_TRY(add(b, l, "embedding", run_embed, 0, 2 * size * rc, "%lldx%lld", R, C));
    CPL_TRY(add(b, l, "embedding: backward", run_embed_bwd, 0, (size + 8) * rc, "%lldx%lld", R, C));
    CPL_TRY(add(b, l, "cross-entropy and gradient", run_cross_entropy, 0, 2 * size * logits, "%lldx%lld", rows, V));
    CPL_TRY(add(b, l, "distillation loss and gradient", run_distill, 0, 3 * size * logits, "%lldx%lld", rows, V));
done:
    return st;
}

cpl_status cpl_bench_layers(cpl_bench *b) {
    cpl_status st = CPL_OK;
    const cpl_model_shape *s = &b->layout->shape;
    layers l = {.dev = b->dev,
                .dt = b->dt,
                .product = b->product,
                .B = b->o->micro_batch,
                .T = s->context,
                .C = s->width,
                .H = s->heads,
                .V = s->vocab};
    l.R = l.B * l.T;
    l.rows = LOGITS_BYTES / (l.V * (int64_t)cpl_dtype_size(b->dt));
    l.rows = l.rows > l.R ? l.R : l.rows < 1 ? 1 : l.rows;
    /* y holds the head's logits too. */
    if (l.rows * l.V > 4 * l.R * l.C) {
        l.rows = 4 * l.R * l.C / l.V > 0 ? 4 * l.R * l.C / l.V : 1;
    }
    CPL_TRY(cpl_agree(b->world, allocate(b, &l)));
    CPL_TRY(linear(b, &l));
    CPL_TRY(others(b, &l));
done:
    release(&l);
    return st;
}

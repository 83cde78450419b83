/* Linear layers: one product each, with bias, GELU, its derivative and bias gradients in the same pass where that is faster.
 * Refuses cuBLASLt's GELU: its tanh has 11 bits, and its argument is not the rounded one; of its derivative in f32 likewise. */
#include "kernels/cuda/product.h"
#include "kernels/cuda/scratch.h"
#include <math.h>

/* An operation that follows a product where it is not fused with it. */
typedef struct {
    cpl_device *dev;
    cpl_dtype dt;
    void *to;
    const void *from;
    int64_t R, N;
} separate;

static cpl_status separate_gelu(void *context) {
    separate *s = context;
    return CPL_CUDA(gelu_fwd)(s->dev, s->dt, s->to, s->from, s->R * s->N);
}

static cpl_status separate_gelu_grad(void *context) {
    separate *s = context;
    return cpl_cuda_gelu_grad(s->dev, s->dt, s->to, s->from, s->R * s->N);
}

static cpl_status separate_column_sums(void *context) {
    separate *s = context;
    return cpl_cuda_column_sums(s->dev, s->dt, s->to, s->from, s->N, s->R, s->N);
}

/* A way to do it: a plan of cuBLASLt, and the time with all that follows. */
typedef struct {
    cpl_product_plan *plan;
    double ms;
} choice;

/* Whether the product with an epilogue is faster than `best` and the separate kernel after it; the faster one becomes the best.
 * Timing runs that kernel on `s`, whose content must be of no value yet. */
static cpl_status take_faster(const char *name, separate *s, cpl_status (*body)(void *), const choice *fused, choice *best,
                              bool *is_fused) {
    cpl_status st = CPL_OK;
    double alone = 0;
    CPL_TRY(cpl_cuda_timed_once(s->dev, name, (int64_t[4]){s->R, s->N, s->dt}, body, s, &alone));
    best->ms += alone;
    *is_fused = fused->ms <= best->ms;
    *best = *is_fused ? *fused : *best;
done:
    return st;
}

static cpl_status find(cpl_device *dev, cpl_product *product, cpl_after after, const cpl_product_data *data, choice *out) {
    product->after = after;
    return cpl_cuda_product_find(dev, product, data, &out->plan, &out->ms);
}

/* --- our own kernel for what surrounds GELU --- */

typedef struct {
    cpl_device *dev;
    cpl_dtype dt;
    void *to, *pre;
    float *dbias;
    const void *from, *w, *bias;
    int64_t R, N, K;
} own_product;

static cpl_status own_forward(void *context) {
    own_product *o = context;
    return cpl_cuda_product_gelu_fwd(o->dev, o->dt, o->to, o->pre, o->from, o->w, o->bias, o->R, o->N, o->K);
}

static cpl_status own_backward(void *context) {
    own_product *o = context;
    return cpl_cuda_product_gelu_bwd(o->dev, o->dt, o->to, o->dbias, o->from, o->w, o->pre, o->R, o->N, o->K);
}

/* Whether it can, and is faster than `best`. dbias is for timing alone and gets a sum that is of no value. */
static cpl_status own_wins(const char *name, own_product *o, const void *other, cpl_status (*body)(void *), const choice *best,
                           bool *wins) {
    cpl_status st = CPL_OK;
    double ms = 0;
    *wins = cpl_cuda_product_gelu_usable(o->dev, o->dt, o->R, o->N, o->K, o->from, o->to, o->w, other);
    if (*wins) {
        CPL_TRY(cpl_cuda_timed_once(o->dev, name, (int64_t[4]){o->R, o->N, o->K, 2 * o->dt + (o->pre != NULL)}, body, o, &ms));
        *wins = ms <= best->ms;
    }
done:
    return st;
}

/* --- the operations --- */

enum { APART_ROWS = 1024 };

/* y = x w^T + bias + residual where cuBLASLt has no such product: the sum in f32, so that it is rounded once. So many rows at a
 * time that it takes little memory beside y. */
static cpl_status add_apart(cpl_device *dev, cpl_product product, cpl_product_data data) {
    cpl_status st = CPL_OK;
    cpl_dtype act = cpl_dtype_storage((cpl_dtype)product.dt);
    const int64_t size = (int64_t)cpl_dtype_size(act), R = product.n, N = product.m, K = product.k;
    const int64_t most = R < APART_ROWS ? R : APART_ROWS;
    float *sum = NULL;
    choice wide;
    CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_LINEAR, (size_t)(most * N) * sizeof *sum, &sum));
    product.wide = 1;
    product.accumulate = 0;
    for (int64_t first = 0; first < R; first += most) {
        const cpl_product_data part = {.a = data.a, .b = (const char *)data.b + first * K * size, .d = sum};
        const char *residual = data.c != NULL ? (const char *)data.c + first * N * size : NULL;
        product.n = R - first < most ? R - first : most;
        CPL_TRY(find(dev, &product, CPL_AFTER_NOTHING, &part, &wide));
        CPL_TRY(cpl_cuda_product_run(dev, wide.plan, &part));
        CPL_TRY(cpl_cuda_add_apart(dev, act, (char *)data.d + first * N * size, sum, data.vector, residual, product.n, product.m));
    }
done:
    return st;
}

static cpl_product forward_product(cpl_dtype dt, int64_t R, int64_t N, int64_t K) {
    return (cpl_product){.dt = dt, .transposed_a = 1, .m = N, .n = R, .k = K};
}

/* *best: y = x w^T + bias [+ c] by cuBLASLt, infinitely slow where it has none. */
static cpl_status find_forward(cpl_device *dev, cpl_product *product, const cpl_product_data *data, choice *best) {
    return find(dev, product, data->vector != NULL ? CPL_AFTER_BIAS : CPL_AFTER_NOTHING, data, best);
}

static cpl_status run_forward(cpl_device *dev, const cpl_product *product, const cpl_product_data *data, const choice *best) {
    bool apart = !isfinite(best->ms) && (data->vector != NULL || data->c != NULL);
    return apart ? add_apart(dev, *product, *data) : cpl_cuda_product_run(dev, best->plan, data);
}

cpl_status CPL_CUDA(linear_fwd)(cpl_device *dev, cpl_dtype dt, void *y, const void *x, const void *w, const void *bias,
                                const void *residual, int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    cpl_product product = forward_product(dt, R, N, K);
    const cpl_product_data data = {.a = w, .b = x, .c = residual, .d = y, .vector = (void *)(uintptr_t)bias};
    choice best;
    if (R == 0 || N == 0) {
        return CPL_OK;
    }
    product.accumulate = residual != NULL;
    CPL_TRY(find_forward(dev, &product, &data, &best));
    CPL_TRY(run_forward(dev, &product, &data, &best));
done:
    return st;
}

cpl_status CPL_CUDA(linear_gelu_fwd)(cpl_device *dev, cpl_dtype dt, void *y, void *pre, const void *x, const void *w,
                                     const void *bias, int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    cpl_dtype act = cpl_dtype_storage(dt);
    bool never = false, own = false;
    cpl_product product = forward_product(dt, R, N, K);
    const cpl_product_data data = {.a = w, .b = x, .d = pre != NULL ? pre : y, .vector = (void *)(uintptr_t)bias};
    choice best, none = {.ms = INFINITY};
    if (R == 0 || N == 0) {
        return CPL_OK;
    }
    CPL_TRY(find_forward(dev, &product, &data, &best));
    if (bias != NULL && isfinite(best.ms) && act != CPL_F32) {
        separate s = {.dev = dev, .dt = act, .to = y, .from = data.d, .R = R, .N = N};
        own_product o = {.dev = dev, .dt = act, .to = y, .pre = pre, .from = x, .w = w, .bias = bias, .R = R, .N = N, .K = K};
        CPL_TRY(take_faster("gelu", &s, separate_gelu, &none, &best, &never));
        CPL_TRY(own_wins("product_gelu_fwd", &o, pre, own_forward, &best, &own));
        if (own) {
            return own_forward(&o);
        }
    }
    CPL_TRY(run_forward(dev, &product, &data, &best));
    CPL_TRY(CPL_CUDA(gelu_fwd)(dev, act, y, data.d, R * N));
done:
    return st;
}

cpl_status CPL_CUDA(linear_bwd_input)(cpl_device *dev, cpl_dtype dt, void *dx, float *dbias, const void *dy, const void *w,
                                      const void *pre, int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    cpl_dtype act = cpl_dtype_storage(dt);
    cpl_product product = {.dt = dt, .m = K, .n = R, .k = N};
    cpl_product_data data = {.a = w, .b = dy, .d = dx, .aux = pre};
    choice best, other = {.ms = INFINITY}, none = {.ms = INFINITY};
    bool gelu_fused = false, never = false, own = false;
    if (R == 0 || K == 0) {
        return CPL_OK;
    }
    CPL_TRY(find(dev, &product, CPL_AFTER_NOTHING, &data, &best));
    if (pre != NULL && act != CPL_F32) {
        separate s = {.dev = dev, .dt = act, .to = dx, .from = pre, .R = R, .N = K};
        own_product o = {
            .dev = dev, .dt = act, .to = dx, .pre = (void *)(uintptr_t)pre, .from = dy, .w = w, .R = R, .N = N, .K = K};
        CPL_TRY(find(dev, &product, CPL_AFTER_GELU_GRAD, &data, &other));
        CPL_TRY(take_faster("gelu_grad", &s, separate_gelu_grad, &other, &best, &gelu_fused));
        if (dbias != NULL) {
            CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_LINEAR, cpl_scratch_linear(K), &o.dbias));
            separate c = {.dev = dev, .dt = act, .to = o.dbias, .from = dx, .R = R, .N = K};
            CPL_TRY(take_faster("column_sums", &c, separate_column_sums, &none, &best, &never));
        }
        CPL_TRY(own_wins("product_gelu_bwd", &o, pre, own_backward, &best, &own));
        if (own) {
            o.dbias = dbias;
            return own_backward(&o);
        }
    }
    CPL_TRY(cpl_cuda_product_run(dev, best.plan, &data));
    if (pre != NULL && !gelu_fused) {
        CPL_TRY(cpl_cuda_gelu_grad(dev, act, dx, pre, R * K));
    }
    if (dbias != NULL) {
        CPL_TRY(cpl_cuda_column_sums(dev, act, dbias, dx, K, R, K));
    }
done:
    return st;
}

cpl_status CPL_CUDA(linear_bwd_weight)(cpl_device *dev, cpl_dtype dt, float *dw, const void *dy, const void *x, int64_t R,
                                       int64_t N, int64_t K, bool overwrites) {
    cpl_status st = CPL_OK;
    cpl_product product = {.dt = dt, .wide = 1, .transposed_b = 1, .accumulate = !overwrites, .m = K, .n = N, .k = R};
    const cpl_product_data data = {.a = x, .b = dy, .c = dw, .d = dw};
    choice best;
    if (R == 0 || N == 0) {
        return overwrites ? CPL_CUDA(zero)(dev, dw, (size_t)(N * K) * sizeof *dw) : CPL_OK;
    }
    CPL_TRY(find(dev, &product, CPL_AFTER_NOTHING, &data, &best));
    CPL_TRY(cpl_cuda_product_run(dev, best.plan, &data));
done:
    return st;
}

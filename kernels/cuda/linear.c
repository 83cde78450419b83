/* Linear layers: one product each, with bias, GELU's derivative and the bias gradient in the same pass where that is faster.
 * Refuses a fused GELU in the forward pass: y is GELU of the rounded value, so that recomputing it gives the same bits. */
#include "kernels/cuda/product.h"
#include <math.h>

cpl_status CPL_CUDA(linear_fwd)(cpl_device *dev, cpl_dtype dt, void *y, void *pre, const void *x, const void *w, const void *bias,
                                cpl_activation activation, int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    bool keeps = activation == CPL_ACT_GELU && pre != NULL;
    cpl_product product = {
        .dt = dt, .transposed_a = 1, .after = bias == NULL ? CPL_AFTER_NOTHING : CPL_AFTER_BIAS, .m = N, .n = R, .k = K};
    cpl_product_data data = {.a = w, .b = x, .d = keeps ? pre : y, .vector = (void *)bias};
    cpl_product_plan *plan = NULL;
    double ms = 0;
    if (R == 0 || N == 0) {
        return CPL_OK;
    }
    CPL_TRY(cpl_cuda_product_find(dev, &product, &data, &plan, &ms));
    bool fused = isfinite(ms);
    if (!fused && bias != NULL) {
        product.after = CPL_AFTER_NOTHING;
        data.vector = NULL;
        CPL_TRY(cpl_cuda_product_find(dev, &product, &data, &plan, &ms));
    }
    CPL_TRY(cpl_cuda_product_run(dev, plan, &data));
    if (!fused && bias != NULL) {
        CPL_TRY(cpl_cuda_add_bias(dev, dt, data.d, bias, R, N));
    }
    if (activation == CPL_ACT_GELU) {
        CPL_TRY(CPL_CUDA(gelu_fwd)(dev, dt, y, data.d, R * N));
    }
done:
    return st;
}

typedef struct {
    cpl_device *dev;
    cpl_dtype dt;
    void *to;
    const void *from;
    int64_t R, N;
} separate;

static cpl_status separate_gelu_grad(void *context) {
    separate *s = context;
    return cpl_cuda_gelu_grad(s->dev, s->dt, s->to, s->from, s->R * s->N);
}

static cpl_status separate_column_sums(void *context) {
    separate *s = context;
    return cpl_cuda_column_sums(s->dev, s->dt, s->to, s->from, s->R, s->N);
}

/* Whether the product with its epilogue (*fused, fused_ms) is faster than without (*plain) and the separate kernel after it; the
 * plan that is, in *plain. Timing runs the separate kernel on `s`, whose content must be of no value yet. */
static cpl_status take_faster(cpl_device *dev, const char *name, separate *s, cpl_status (*body)(void *), cpl_product_plan *fused,
                              double fused_ms, cpl_product_plan **plain, double plain_ms, bool *is_fused) {
    cpl_status st = CPL_OK;
    double alone = 0;
    *is_fused = false;
    if (!isfinite(fused_ms)) {
        return CPL_OK;
    }
    CPL_TRY(cpl_cuda_timed_once(dev, name, (int64_t[3]){s->R, s->N, s->dt}, body, s, &alone));
    *is_fused = fused_ms <= plain_ms + alone;
    *plain = *is_fused ? fused : *plain;
done:
    return st;
}

cpl_status CPL_CUDA(linear_bwd_input)(cpl_device *dev, cpl_dtype dt, void *dx, const void *dy, const void *w, const void *pre,
                                      int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    cpl_product product = {.dt = dt, .m = K, .n = R, .k = N};
    cpl_product_data data = {.a = w, .b = dy, .d = dx, .aux = pre};
    cpl_product_plan *plan = NULL, *fused = NULL;
    double ms = 0, fused_ms = 0;
    bool is_fused = pre == NULL;
    if (R == 0 || K == 0) {
        return CPL_OK;
    }
    CPL_TRY(cpl_cuda_product_find(dev, &product, &data, &plan, &ms));
    if (pre != NULL && cpl_dtype_storage(dt) != CPL_F32) { /* its tanh has 11 bits */
        separate s = {.dev = dev, .dt = dt, .to = dx, .from = pre, .R = R, .N = K};
        product.after = CPL_AFTER_GELU_GRAD;
        CPL_TRY(cpl_cuda_product_find(dev, &product, &data, &fused, &fused_ms));
        CPL_TRY(take_faster(dev, "gelu_grad", &s, separate_gelu_grad, fused, fused_ms, &plan, ms, &is_fused));
    }
    CPL_TRY(cpl_cuda_product_run(dev, plan, &data));
    if (!is_fused) {
        CPL_TRY(cpl_cuda_gelu_grad(dev, dt, dx, pre, R * K));
    }
done:
    return st;
}

cpl_status CPL_CUDA(linear_bwd_weight)(cpl_device *dev, cpl_dtype dt, float *dw, float *db, const void *dy, const void *x,
                                       int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    cpl_product product = {.dt = dt, .wide = 1, .transposed_b = 1, .accumulate = 1, .m = K, .n = N, .k = R};
    cpl_product_data data = {.a = x, .b = dy, .d = dw};
    cpl_product_plan *plan = NULL, *fused = NULL;
    double ms = 0, fused_ms = 0;
    bool is_fused = false;
    if (R == 0 || N == 0) {
        return CPL_OK;
    }
    CPL_TRY(cpl_cuda_product_find(dev, &product, &data, &plan, &ms));
    if (db != NULL) {
        float *sums = NULL;
        CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_LINEAR, 2 * (size_t)N * sizeof *sums, &sums));
        separate s = {.dev = dev, .dt = dt, .to = sums + N, .from = dy, .R = R, .N = N};
        product.after = CPL_AFTER_BIAS_GRAD;
        data.vector = sums;
        CPL_TRY(cpl_cuda_product_find(dev, &product, &data, &fused, &fused_ms));
        CPL_TRY(take_faster(dev, "column_sums", &s, separate_column_sums, fused, fused_ms, &plan, ms, &is_fused));
    }
    CPL_TRY(cpl_cuda_product_run(dev, plan, &data));
    if (db != NULL) {
        CPL_TRY(is_fused ? CPL_CUDA(add_f32)(dev, db, data.vector, N) : cpl_cuda_column_sums(dev, dt, db, dy, R, N));
    }
done:
    return st;
}

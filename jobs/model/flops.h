/* Floating-point operations of a model, counted as multiplications and additions of its matrix products and attention.
 * Refuses to count what is computed twice: recomputed activations make no more of it. */
#ifndef CPL_JOBS_MODEL_FLOPS_H
#define CPL_JOBS_MODEL_FLOPS_H

#include "jobs/model/model.h"

/* Matrix products of a forward pass per token: 2 (12 C^2 L + V C), embedding look-ups not counted. */
static inline double cpl_flops_products(const cpl_model_shape *s) {
    double C = (double)s->width;
    return 2 * (12 * C * C * (double)s->layers + (double)s->vocab * C);
}
/* Causal attention of a forward pass per token, mean over the T positions: q k^T and p v over (T+1)/2 keys, 4 C (T+1)/2 L. */
static inline double cpl_flops_attention(const cpl_model_shape *s) {
    return 2 * (double)s->width * (double)(s->context + 1) * (double)s->layers;
}
static inline double cpl_flops_forward(const cpl_model_shape *s) {
    return cpl_flops_products(s) + cpl_flops_attention(s);
}
/* Forward and backward: each product has two in its backward pass. Kaplan et al. 2020, arXiv:2001.08361, section 2.1. */
static inline double cpl_flops_training(const cpl_model_shape *s) {
    return 3 * cpl_flops_forward(s);
}
/* Training of distill.projection per token; 0 where the layout has none. */
static inline double cpl_flops_projection(const cpl_layout *l) {
    const cpl_param *p = cpl_layout_projection(l);
    return p == NULL ? 0 : 3 * 2 * (double)cpl_param_count(p);
}

#endif

/* The backward pass and the step of one micro-batch.
 * Refuses a workspace that did not keep what a gradient needs. */
#include "jobs/model/internal.h"

/* The block at hand. */
typedef struct {
    cpl_workspace *ws; /* borrowed, as all below */
    const void *weights;
    float *grad;
    int64_t layer;
    bool overwrites;
} block_backward;

static float *bias_grad(const cpl_workspace *ws, float *grad, int64_t layer, cpl_block_param bias) {
    return layer < 0 ? NULL : grad + cpl_layout_block(ws->layout, layer, bias)->offset;
}

/* dw of dy^T x, then dx = dy w (times GELU'(pre)), of a linear layer, and dbias += column sums of dx. dx may be x's own buffer: x
 * is dead by then. */
static cpl_status linear_backward(const block_backward *k, cpl_block_param weight, void *dx, float *dbias, const void *dy,
                                  const void *x, const void *pre) {
    cpl_status st = CPL_OK;
    cpl_workspace *ws = k->ws;
    const cpl_param *w = cpl_layout_block(ws->layout, k->layer, weight);
    CPL_TRY(CPL_OPS(ws->dev, linear_bwd_weight, ws->product, k->grad + w->offset, dy, x, ws->R, w->rows, w->cols, k->overwrites));
    CPL_TRY(CPL_OPS(ws->dev, linear_bwd_input, ws->product, dx, dbias, dy, cpl_weight(ws, k->weights, w), pre, ws->R, w->rows,
                    w->cols));
done:
    return st;
}

/* ws->dsum += LayerNorm'(ws->dbranch), for the LayerNorm of the residual stream x; dbias: gradient of the bias of the linear layer
 * whose output went into that stream last, or NULL. */
static cpl_status norm_backward(const block_backward *k, cpl_block_param gain, cpl_block_param bias, float *dbias, const void *x,
                                const float *mean, const float *rstd) {
    cpl_workspace *ws = k->ws;
    const cpl_param *g = cpl_layout_block(ws->layout, k->layer, gain), *b = cpl_layout_block(ws->layout, k->layer, bias);
    return CPL_OPS(ws->dev, layernorm_bwd, ws->dt, ws->dsum, k->grad + g->offset, k->grad + b->offset, dbias, ws->dbranch, ws->dsum,
                   x, mean, rstd, cpl_weight(ws, k->weights, g), ws->R, ws->layout->shape.width);
}

/* Brings back what the forward pass did not keep. The last block's shared buffers still hold its own activations. */
static cpl_status recompute(const block_backward *k) {
    cpl_workspace *ws = k->ws;
    const cpl_block_activations *b = &ws->block[k->layer];
    if (ws->recompute == CPL_RECOMPUTE_NONE || k->layer == ws->layout->shape.layers - 1) {
        return CPL_OK;
    }
    if (ws->recompute == CPL_RECOMPUTE_GELU) {
        return CPL_OPS(ws->dev, gelu_fwd, ws->dt, b->act, b->pre, ws->R * 4 * ws->layout->shape.width);
    }
    return cpl_block_forward(ws, k->weights, k->layer, true);
}

/* ws->dsum holds the gradient over the block's output and becomes that over its input; ws->dbranch is scratch. `act` is dead once
 * the gradient of its own weights is made, and serves for the two wide gradients. Gradients of biases are column sums of a gradient
 * and made with it where that is in hand; that of this block's last bias is there already. */
static cpl_status backward_of_block(cpl_workspace *ws, const void *weights, float *grad, bool overwrites, int64_t layer) {
    cpl_status st = CPL_OK;
    const block_backward k = {.ws = ws, .weights = weights, .grad = grad, .layer = layer, .overwrites = overwrites};
    const cpl_block_activations *b = &ws->block[layer];
    const cpl_model_shape *s = &ws->layout->shape;
    void *wide = b->act;
    CPL_TRY(recompute(&k));
    CPL_TRY(linear_backward(&k, CPL_P_OUT_W, wide, bias_grad(ws, grad, layer, CPL_P_FC_B), ws->dsum, b->act, b->pre));
    CPL_TRY(linear_backward(&k, CPL_P_FC_W, ws->dbranch, NULL, wide, b->norm2, NULL));
    CPL_TRY(norm_backward(&k, CPL_P_LN2_G, CPL_P_LN2_B, bias_grad(ws, grad, layer, CPL_P_PROJ_B), b->sum2, b->mean2, b->rstd2));
    CPL_TRY(linear_backward(&k, CPL_P_PROJ_W, ws->dbranch, NULL, ws->dsum, b->context, NULL));
    CPL_TRY(CPL_OPS(ws->dev, attention_bwd, ws->dt, wide, bias_grad(ws, grad, layer, CPL_P_QKV_B), ws->dbranch, b->context, b->lse,
                    b->qkv, ws->B, ws->T, s->heads, s->width / s->heads));
    CPL_TRY(linear_backward(&k, CPL_P_QKV_W, ws->dbranch, NULL, wide, b->norm1, NULL));
    CPL_TRY(norm_backward(&k, CPL_P_LN1_G, CPL_P_LN1_B, bias_grad(ws, grad, layer - 1, CPL_P_OUT_B), b->sum1, b->mean1, b->rstd1));
done:
    return st;
}

cpl_status cpl_final_norm_backward(cpl_workspace *ws, const void *weights, const void *dres, float *grad, bool whole) {
    float *dbias = whole ? bias_grad(ws, grad, ws->layout->shape.layers - 1, CPL_P_OUT_B) : NULL;
    const cpl_param *gain = cpl_layout_final_gain(ws->layout), *bias = cpl_layout_final_bias(ws->layout);
    return CPL_OPS(ws->dev, layernorm_bwd, ws->dt, ws->dsum, grad + gain->offset, grad + bias->offset, dbias, ws->dbranch, dres,
                   ws->sum, ws->mean, ws->rstd, cpl_weight(ws, weights, gain), ws->R, ws->layout->shape.width);
}

/* Range k of cpl_layout_range has its gradients. */
static cpl_status tell(const cpl_layout *l, int64_t k, const cpl_grad_ready *ready) {
    int64_t first = 0, last = 0;
    if (ready == NULL) {
        return CPL_OK;
    }
    cpl_layout_range(l, k, &first, &last);
    return ready->ready(ready->to, first, last);
}

/* From the gradient over the residual stream at the end, in ws->dsum. */
static cpl_status backward_of_blocks(cpl_workspace *ws, const void *weights, const int32_t *tokens, float *grad, bool overwrites,
                                     const cpl_grad_ready *ready) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = ws->layout;
    for (int64_t layer = l->shape.layers - 1; layer >= 0; layer--) {
        CPL_TRY(backward_of_block(ws, weights, grad, overwrites, layer));
        CPL_TRY(tell(l, l->shape.layers - 1 - layer, ready));
    }
    CPL_TRY(tell(l, l->shape.layers, ready));
    CPL_TRY(CPL_OPS(ws->dev, embed_bwd, ws->dt, grad + cpl_layout_wte(l)->offset, grad + cpl_layout_wpe(l)->offset, ws->dsum,
                    tokens, ws->B, ws->T, l->shape.width, l->shape.vocab));
    CPL_TRY(tell(l, l->shape.layers + 1, ready));
done:
    return st;
}

/* What only ever gets sums: positions, and the vectors behind all matrices. Each matrix is overwritten by its first product. */
static cpl_status clear_added(cpl_workspace *ws, float *grad) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = ws->layout;
    const cpl_param *wpe = cpl_layout_wpe(l);
    CPL_TRY(CPL_OPS(ws->dev, zero, grad + wpe->offset, (size_t)cpl_param_count(wpe) * sizeof *grad));
    CPL_TRY(CPL_OPS(ws->dev, zero, grad + l->decayed_end, (size_t)(l->total - l->decayed_end) * sizeof *grad));
done:
    return st;
}

cpl_status cpl_model_step(cpl_workspace *ws, const void *weights, const int32_t *tokens, const int32_t *targets,
                          const cpl_model_loss *loss, const cpl_step_state *state, float *grad, bool overwrites, float *soft,
                          float *hard, const cpl_grad_ready *ready) {
    cpl_status st = CPL_OK;
    cpl_workspace *teacher = loss == NULL ? NULL : loss->teacher_workspace;
    bool hidden = teacher != NULL && loss->hidden_weight != 0.0f;
    if (!ws->training || state == NULL) {
        CPL_FAIL(CPL_INTERNAL, "a training step: expected a workspace made for training and the state of the loss scaler");
    }
    if (teacher != NULL) {
        if (soft == NULL || loss->teacher_weights == NULL) {
            CPL_FAIL(CPL_INTERNAL, "distillation: expected the teacher's weights and room for the soft loss of each row");
        }
        CPL_TRY(cpl_model_forward(teacher, loss->teacher_weights, tokens));
    }
    CPL_TRY(cpl_model_forward(ws, weights, tokens));
    if (overwrites) {
        CPL_TRY(clear_added(ws, grad));
    }
    CPL_TRY(cpl_head_step(ws, weights, targets, loss, state, grad, overwrites, soft, hard));
    CPL_TRY(cpl_final_norm_backward(ws, weights, NULL, grad, !hidden));
    if (hidden) {
        CPL_TRY(cpl_hidden_step(ws, weights, loss, state, grad));
    }
    CPL_TRY(backward_of_blocks(ws, weights, tokens, grad, overwrites, ready));
done:
    return st;
}

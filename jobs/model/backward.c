/* The backward pass and the step of one micro-batch.
 * Refuses a workspace that did not keep what a gradient needs. */
#include "jobs/model/internal.h"

/* The block at hand. */
typedef struct {
    cpl_workspace *ws; /* borrowed, as all below */
    const void *weights;
    float *grad;
    int64_t layer;
} block_backward;

/* dw += dy^T x, db += column sums of dy, then dx = dy w (times GELU'(pre)), of a linear layer. dx may be x's own buffer: x is dead
 * by then. */
static cpl_status linear_backward(const block_backward *k, cpl_block_param weight, cpl_block_param bias, void *dx, const void *dy,
                                  const void *x, const void *pre) {
    cpl_status st = CPL_OK;
    cpl_workspace *ws = k->ws;
    const cpl_param *w = cpl_layout_block(ws->layout, k->layer, weight), *b = cpl_layout_block(ws->layout, k->layer, bias);
    CPL_TRY(
        CPL_OPS(ws->dev, linear_bwd_weight, ws->product, k->grad + w->offset, k->grad + b->offset, dy, x, ws->R, w->rows, w->cols));
    CPL_TRY(CPL_OPS(ws->dev, linear_bwd_input, ws->product, dx, dy, cpl_weight(ws, k->weights, w), pre, ws->R, w->rows, w->cols));
done:
    return st;
}

/* ws->dsum += LayerNorm'(ws->delta), for the LayerNorm of the residual stream x. */
static cpl_status norm_backward(const block_backward *k, cpl_block_param gain, cpl_block_param bias, const void *x,
                                const float *mean, const float *rstd) {
    cpl_workspace *ws = k->ws;
    const cpl_param *g = cpl_layout_block(ws->layout, k->layer, gain), *b = cpl_layout_block(ws->layout, k->layer, bias);
    return CPL_OPS(ws->dev, layernorm_bwd, ws->dt, ws->dsum, k->grad + g->offset, k->grad + b->offset, ws->delta, ws->dsum, x, mean,
                   rstd, cpl_weight(ws, k->weights, g), ws->R, ws->layout->shape.width);
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
    return cpl_block_forward(ws, k->weights, k->layer, b->sum1, NULL, true);
}

/* ws->dsum holds the gradient over the block's output and becomes that over its input; ws->delta is scratch. `act` is dead once the
 * gradient of its own weights is made, and serves for the two wide gradients. */
static cpl_status backward_of_block(cpl_workspace *ws, const void *weights, float *grad, int64_t layer) {
    cpl_status st = CPL_OK;
    const block_backward k = {.ws = ws, .weights = weights, .grad = grad, .layer = layer};
    const cpl_block_activations *b = &ws->block[layer];
    const cpl_model_shape *s = &ws->layout->shape;
    void *wide = b->act;
    CPL_TRY(recompute(&k));
    CPL_TRY(linear_backward(&k, CPL_P_OUT_W, CPL_P_OUT_B, wide, ws->dsum, b->act, b->pre));
    CPL_TRY(linear_backward(&k, CPL_P_FC_W, CPL_P_FC_B, ws->delta, wide, b->norm2, NULL));
    CPL_TRY(norm_backward(&k, CPL_P_LN2_G, CPL_P_LN2_B, b->sum2, b->mean2, b->rstd2));
    CPL_TRY(linear_backward(&k, CPL_P_PROJ_W, CPL_P_PROJ_B, ws->delta, ws->dsum, b->context, NULL));
    CPL_TRY(CPL_OPS(ws->dev, attention_bwd, ws->dt, wide, ws->delta, b->context, b->lse, b->qkv, ws->B, ws->T, s->heads,
                    s->width / s->heads));
    CPL_TRY(linear_backward(&k, CPL_P_QKV_W, CPL_P_QKV_B, ws->delta, wide, b->norm1, NULL));
    CPL_TRY(norm_backward(&k, CPL_P_LN1_G, CPL_P_LN1_B, b->sum1, b->mean1, b->rstd1));
done:
    return st;
}

cpl_status cpl_final_norm_backward(cpl_workspace *ws, const void *weights, const void *dres, float *grad) {
    const cpl_param *gain = cpl_layout_final_gain(ws->layout), *bias = cpl_layout_final_bias(ws->layout);
    return CPL_OPS(ws->dev, layernorm_bwd, ws->dt, ws->dsum, grad + gain->offset, grad + bias->offset, ws->delta, dres, ws->sum,
                   ws->mean, ws->rstd, cpl_weight(ws, weights, gain), ws->R, ws->layout->shape.width);
}

/* From the gradient over the residual stream at the end, in ws->dsum. */
static cpl_status backward_of_blocks(cpl_workspace *ws, const void *weights, const int32_t *tokens, float *grad) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = ws->layout;
    for (int64_t layer = l->shape.layers - 1; layer >= 0; layer--) {
        CPL_TRY(backward_of_block(ws, weights, grad, layer));
    }
    CPL_TRY(CPL_OPS(ws->dev, embed_bwd, ws->dt, grad + cpl_layout_wte(l)->offset, grad + cpl_layout_wpe(l)->offset, ws->dsum,
                    tokens, ws->B, ws->T, l->shape.width, l->shape.vocab));
done:
    return st;
}

cpl_status cpl_model_step(cpl_workspace *ws, const void *weights, const int32_t *tokens, const int32_t *targets,
                          const cpl_model_loss *loss, const cpl_step_state *state, float *grad, float *soft, float *hard) {
    cpl_status st = CPL_OK;
    cpl_workspace *teacher = loss == NULL ? NULL : loss->teacher_workspace;
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
    CPL_TRY(cpl_head_step(ws, weights, targets, loss, state, grad, soft, hard));
    CPL_TRY(cpl_final_norm_backward(ws, weights, NULL, grad));
    if (teacher != NULL && loss->hidden_weight != 0.0f) {
        CPL_TRY(cpl_hidden_step(ws, weights, loss, state, grad));
    }
    CPL_TRY(backward_of_blocks(ws, weights, tokens, grad));
done:
    return st;
}

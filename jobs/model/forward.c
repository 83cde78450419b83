/* The forward pass: embedding, blocks, last LayerNorm. Radford et al. 2019 (GPT-2); pre-LayerNorm: Xiong et al. 2020,
 * arXiv:2002.04745. Refuses to look at a value: it only enqueues operations. */
#include "jobs/model/internal.h"

/* Every half of a block adds its output to the residual stream inside the product that makes it (linear_fwd's residual), so that it
 * is never stored by itself. */
cpl_status cpl_block_forward(cpl_workspace *ws, const void *weights, int64_t layer, bool rerun) {
    cpl_status st = CPL_OK;
    cpl_device *dev = ws->dev;
    const cpl_block_activations *b = &ws->block[layer];
    const void *w[CPL_P_BLOCK_COUNT];
    int64_t R = ws->R, C = ws->layout->shape.width, H = ws->layout->shape.heads;
    void *next = layer + 1 < ws->layout->shape.layers ? ws->block[layer + 1].sum1 : ws->sum;
    for (int role = 0; role < CPL_P_BLOCK_COUNT; role++) {
        w[role] = cpl_block_weight(ws, weights, layer, role);
    }
    CPL_TRY(CPL_OPS(dev, layernorm_fwd, ws->dt, b->norm1, b->mean1, b->rstd1, b->sum1, w[CPL_P_LN1_G], w[CPL_P_LN1_B], R, C));
    CPL_TRY(CPL_OPS(dev, linear_fwd, ws->product, b->qkv, b->norm1, w[CPL_P_QKV_W], w[CPL_P_QKV_B], NULL, R, 3 * C, C));
    CPL_TRY(CPL_OPS(dev, attention_fwd, ws->dt, b->context, b->lse, b->qkv, ws->B, ws->T, H, C / H));
    CPL_TRY(CPL_OPS(dev, linear_fwd, ws->product, b->sum2, b->context, w[CPL_P_PROJ_W], w[CPL_P_PROJ_B], b->sum1, R, C, C));
    CPL_TRY(CPL_OPS(dev, layernorm_fwd, ws->dt, b->norm2, b->mean2, b->rstd2, b->sum2, w[CPL_P_LN2_G], w[CPL_P_LN2_B], R, C));
    CPL_TRY(CPL_OPS(dev, linear_gelu_fwd, ws->product, b->act, b->pre, b->norm2, w[CPL_P_FC_W], w[CPL_P_FC_B], R, 4 * C, C));
    if (!rerun) {
        CPL_TRY(CPL_OPS(dev, linear_fwd, ws->product, next, b->act, w[CPL_P_OUT_W], w[CPL_P_OUT_B], b->sum2, R, C, 4 * C));
    }
done:
    return st;
}

cpl_status cpl_model_forward(cpl_workspace *ws, const void *weights, const int32_t *tokens) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = ws->layout;
    CPL_TRY(CPL_OPS(ws->dev, embed_fwd, ws->dt, ws->block[0].sum1, tokens, cpl_weight(ws, weights, cpl_layout_wte(l)),
                    cpl_weight(ws, weights, cpl_layout_wpe(l)), ws->B, ws->T, l->shape.width));
    for (int64_t layer = 0; layer < l->shape.layers; layer++) {
        CPL_TRY(cpl_block_forward(ws, weights, layer, false));
    }
    CPL_TRY(CPL_OPS(ws->dev, layernorm_fwd, ws->dt, ws->hidden, ws->mean, ws->rstd, ws->sum,
                    cpl_weight(ws, weights, cpl_layout_final_gain(l)), cpl_weight(ws, weights, cpl_layout_final_bias(l)), ws->R,
                    l->shape.width));
done:
    return st;
}

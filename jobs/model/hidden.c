/* The hidden-state loss of distillation, with a learned projection where the widths differ. Jiao et al. 2020 (TinyBERT),
 * arXiv:1909.10351, eq. 8, on the final normalised states. Refuses memory of its own: the teacher's dead activations hold the
 * gradients. */
#include "jobs/model/internal.h"

/* The gradient of the last LayerNorm's input is linear in the gradient over its output: a second backward through it adds this
 * loss's part to ws->dsum, and no buffer for the sum of the two gradients is needed. */
cpl_status cpl_hidden_step(cpl_workspace *ws, const void *weights, const cpl_model_loss *loss, const cpl_step_state *state,
                           float *grad) {
    cpl_status st = CPL_OK;
    cpl_device *dev = ws->dev;
    cpl_workspace *teacher = loss->teacher_workspace;
    const cpl_param *p = cpl_layout_projection(ws->layout);
    int64_t R = ws->R, C = ws->layout->shape.width, teacher_C = teacher->layout->shape.width;
    void *projected = p == NULL ? ws->hidden : teacher->sum, *d_projected = p == NULL ? ws->dbranch : teacher->block[0].act;
    float coefficient = (float)((double)loss->hidden_weight / ((double)R * (double)teacher_C));
    if ((p == NULL ? C : p->rows) != teacher_C) {
        CPL_FAIL(CPL_USAGE, "hidden-state loss between widths %lld and %lld: expected a projection to the teacher's width",
                 (long long)C, (long long)teacher_C);
    }
    if (loss->hidden == NULL) {
        CPL_FAIL(CPL_INTERNAL, "hidden-state loss: expected room for its value");
    }
    if (p != NULL) {
        CPL_TRY(
            CPL_OPS(dev, linear_fwd, ws->product, projected, ws->hidden, cpl_weight(ws, weights, p), NULL, NULL, R, teacher_C, C));
    }
    CPL_TRY(CPL_OPS(dev, zero, d_projected, (size_t)(R * teacher_C) * cpl_dtype_size(ws->dt)));
    CPL_TRY(CPL_OPS(dev, mse, ws->dt, loss->hidden, d_projected, projected, teacher->hidden, state, coefficient, R * teacher_C));
    if (p != NULL) {
        CPL_TRY(CPL_OPS(dev, linear_bwd_weight, ws->product, grad + p->offset, d_projected, ws->hidden, R, teacher_C, C, false));
        CPL_TRY(CPL_OPS(dev, linear_bwd_input, ws->product, ws->dbranch, NULL, d_projected, cpl_weight(ws, weights, p), NULL, R,
                        teacher_C, C));
    }
    CPL_TRY(cpl_final_norm_backward(ws, weights, ws->dsum, grad, true));
done:
    return st;
}

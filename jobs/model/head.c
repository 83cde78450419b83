/* The head (tied to the token embedding) and the losses on it, in chunks of rows so that no [B*T, V] buffer exists.
 * Refuses a teacher whose micro-batch or vocabulary differs from the student's. */
#include "jobs/model/internal.h"

cpl_status cpl_model_logits_rows(cpl_workspace *ws, const void *weights, int64_t first_row, int64_t rows, void **logits) {
    cpl_status st = CPL_OK;
    int64_t C = ws->layout->shape.width;
    *logits = NULL;
    if (first_row < 0 || rows < 1 || rows > ws->loss_rows || first_row > ws->R - rows) {
        CPL_FAIL(CPL_INTERNAL, "logits of rows %lld to %lld: expected at most %lld rows inside [0, %lld)", (long long)first_row,
                 (long long)(first_row + rows), (long long)ws->loss_rows, (long long)ws->R);
    }
    CPL_TRY(CPL_OPS(ws->dev, linear_fwd, ws->product, ws->logits, cpl_act_at(ws, ws->hidden, first_row * C),
                    cpl_weight(ws, weights, cpl_layout_wte(ws->layout)), NULL, NULL, rows, ws->layout->shape.vocab, C));
    *logits = ws->logits;
done:
    return st;
}

cpl_status cpl_model_losses(cpl_workspace *ws, const void *weights, const int32_t *targets, float *losses) {
    cpl_status st = CPL_OK;
    int64_t V = ws->layout->shape.vocab, rows;
    void *logits = NULL;
    for (int64_t first = 0; first < ws->R; first += rows) {
        rows = ws->R - first < ws->loss_rows ? ws->R - first : ws->loss_rows;
        CPL_TRY(cpl_model_logits_rows(ws, weights, first, rows, &logits));
        CPL_TRY(CPL_OPS(ws->dev, cross_entropy, ws->dt, logits, losses + first, targets + first, NULL, 0.0f, rows, V, V));
    }
done:
    return st;
}

double cpl_model_loss_total(const cpl_model_loss *loss, double soft, double hard) {
    if (loss == NULL || loss->teacher_workspace == NULL) {
        return hard;
    }
    double t = loss->temperature, alpha = loss->alpha;
    return alpha * t * t * soft + (1.0 - alpha) * hard;
}

static cpl_status check_teacher(const cpl_workspace *ws, const cpl_workspace *teacher) {
    cpl_status st = CPL_OK;
    if (teacher->layout->shape.vocab != ws->layout->shape.vocab || teacher->T != ws->T) {
        CPL_FAIL(CPL_USAGE, "teacher with vocab %lld and context %lld: expected those of the student, %lld and %lld",
                 (long long)teacher->layout->shape.vocab, (long long)teacher->T, (long long)ws->layout->shape.vocab,
                 (long long)ws->T);
    }
    if (teacher->B != ws->B || teacher->product != ws->product || teacher->dev != ws->dev) {
        CPL_FAIL(CPL_INTERNAL, "teacher workspace of %lld sequences in %s: expected %lld in %s on the same device",
                 (long long)teacher->B, cpl_dtype_name(teacher->product), (long long)ws->B, cpl_dtype_name(ws->product));
    }
done:
    return st;
}

/* Loss of `rows` rows whose logits are in ws->logits; the gradient over them replaces them. soft may be NULL without a teacher. */
static cpl_status loss_of_rows(cpl_workspace *ws, int64_t first, int64_t rows, const int32_t *targets, const cpl_model_loss *loss,
                               float row_weight, const cpl_step_state *state, float *soft, float *hard) {
    cpl_status st = CPL_OK;
    int64_t V = ws->layout->shape.vocab;
    void *teacher_logits = NULL;
    if (loss == NULL || loss->teacher_workspace == NULL) {
        CPL_TRY(CPL_OPS(ws->dev, cross_entropy, ws->dt, ws->logits, hard + first, targets + first, state, row_weight, rows, V, V));
    } else {
        CPL_TRY(cpl_model_logits_rows(loss->teacher_workspace, loss->teacher_weights, first, rows, &teacher_logits));
        CPL_TRY(CPL_OPS(ws->dev, distill_loss, ws->dt, ws->logits, teacher_logits, soft + first, hard + first, targets + first,
                        state, row_weight, loss->temperature, loss->alpha, loss->kind, loss->beta, rows, V, V));
    }
done:
    return st;
}

cpl_status cpl_head_step(cpl_workspace *ws, const void *weights, const int32_t *targets, const cpl_model_loss *loss,
                         const cpl_step_state *state, float *grad, bool overwrites, float *soft, float *hard) {
    cpl_status st = CPL_OK;
    cpl_workspace *teacher = loss == NULL ? NULL : loss->teacher_workspace;
    const cpl_param *wte = cpl_layout_wte(ws->layout);
    float row_weight = loss != NULL && loss->row_weight > 0.0f ? loss->row_weight : (float)(1.0 / (double)ws->R);
    int64_t V = wte->rows, C = wte->cols, rows, most = ws->loss_rows;
    void *logits = NULL;
    if (teacher != NULL) {
        CPL_TRY(check_teacher(ws, teacher));
        most = teacher->loss_rows < most ? teacher->loss_rows : most;
    }
    for (int64_t first = 0; first < ws->R; first += rows) {
        const void *hidden = cpl_act_at(ws, ws->hidden, first * C);
        rows = ws->R - first < most ? ws->R - first : most;
        CPL_TRY(cpl_model_logits_rows(ws, weights, first, rows, &logits));
        CPL_TRY(loss_of_rows(ws, first, rows, targets, loss, row_weight, state, soft, hard));
        CPL_TRY(CPL_OPS(ws->dev, linear_bwd_weight, ws->product, grad + wte->offset, logits, hidden, rows, V, C,
                        overwrites && first == 0));
        CPL_TRY(CPL_OPS(ws->dev, linear_bwd_input, ws->product, cpl_act_at(ws, ws->dbranch, first * C), NULL, logits,
                        cpl_weight(ws, weights, wte), NULL, rows, V, C));
    }
done:
    return st;
}

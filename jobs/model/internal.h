/* What the files of this folder share about a workspace: where each activation lies.
 * Refuses to be included outside jobs/model and its tests. */
#ifndef CPL_JOBS_MODEL_INTERNAL_H
#define CPL_JOBS_MODEL_INTERNAL_H

#include "jobs/model/model.h"

/* Activations of one block, R = B*T. All borrowed from the workspace's memory. Blocks share buffers as the kind of recomputation
 * allows; without training all blocks share all of them, sum1 and sum2 are one buffer, so are norm1, context and norm2, and qkv and
 * act. */
typedef struct {
    void *sum1;           /* [R,C] act: the residual stream that enters the block */
    void *norm1;          /* [R,C] act: its LayerNorm */
    float *mean1, *rstd1; /* [R] */
    void *qkv;            /* [R,3C] act */
    void *context;        /* [R,C] act: output of attention before its projection */
    float *lse;           /* [B,H,T] */
    void *sum2;           /* [R,C] act: the residual stream between attention and MLP */
    void *norm2;          /* [R,C] act */
    float *mean2, *rstd2; /* [R] */
    void *pre;            /* [R,4C] act: before GELU; NULL without training */
    void *act;            /* [R,4C] act: after GELU; the backward pass reuses it for gradients once it is dead */
} cpl_block_activations;

struct cpl_workspace {
    cpl_device *dev;          /* borrowed */
    const cpl_layout *layout; /* borrowed */
    cpl_dtype dt, product;    /* storage; what linear layers multiply in, stored the same way */
    bool training;
    cpl_recompute recompute;
    int64_t B, T, R, loss_rows;
    void *memory; /* owned, device: everything below but `block` */
    size_t bytes;
    cpl_block_activations *block; /* owned, host [layers] */
    void *sum, *hidden;           /* [R,C] act: the residual stream at the end, and its LayerNorm */
    float *mean, *rstd;           /* [R] of the last LayerNorm */
    void *logits;                 /* [loss_rows,V] act */
    void *dsum, *dbranch;         /* [R,C] act: gradients over the residual stream and beside it; NULL without training */
};

/* Where element i of an activation or weight buffer lies. */
static inline void *cpl_act_at(const cpl_workspace *ws, const void *buffer, int64_t i) {
    return (char *)buffer + (size_t)i * cpl_dtype_size(ws->dt);
}
static inline const void *cpl_weight(const cpl_workspace *ws, const void *weights, const cpl_param *p) {
    return cpl_act_at(ws, weights, p->offset);
}
static inline const void *cpl_block_weight(const cpl_workspace *ws, const void *weights, int64_t layer, cpl_block_param role) {
    return cpl_weight(ws, weights, cpl_layout_block(ws->layout, layer, role));
}

/* Block `layer` on the residual stream in its sum1: its activations, and the stream behind it in the next block's sum1 or ws->sum.
 * rerun: computes the same activations again, without that last product. */
cpl_status cpl_block_forward(cpl_workspace *ws, const void *weights, int64_t layer, bool rerun);

/* Head, loss, and their backward after cpl_model_forward: ws->dbranch = gradient over `hidden`, gradient of wte += or =. */
cpl_status cpl_head_step(cpl_workspace *ws, const void *weights, const int32_t *targets, const cpl_model_loss *loss,
                         const cpl_step_state *state, float *grad, bool overwrites, float *soft, float *hard);

/* Hidden-state loss after cpl_model_forward of student and teacher and the backward pass of the last LayerNorm: ws->dsum, the
 * gradients of the last LayerNorm and of the projection +=, loss->hidden +=. Overwrites ws->dbranch and the teacher's activations
 * but its `hidden`. */
cpl_status cpl_hidden_step(cpl_workspace *ws, const void *weights, const cpl_model_loss *loss, const cpl_step_state *state,
                           float *grad);
/* Backward of the last LayerNorm: ws->dsum = LayerNorm'(ws->dbranch) + dres (NULL: none; may be ws->dsum). whole: that is all of
 * the gradient there, so that the last block's bias can be told. */
cpl_status cpl_final_norm_backward(cpl_workspace *ws, const void *weights, const void *dres, float *grad, bool whole);

#endif

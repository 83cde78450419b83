/* A GPT-2 style model: one table of parameters over flat buffers, and its forward and backward pass.
 * Refuses to know how it is trained, on how many ranks, or on what device. */
#ifndef CPL_JOBS_MODEL_H
#define CPL_JOBS_MODEL_H

#include "kernels/kernels.h"
#include <stdint.h>

/* Shape of a model: learned positions, pre-LayerNorm, GELU (tanh), tied embedding, no dropout. Radford et al. 2019 (GPT-2). */
typedef struct {
    int64_t layers, heads, width, context, vocab;
} cpl_model_shape;
/* Errors: CPL_USAGE naming the option (width not a multiple of heads, products that overflow). */
cpl_status cpl_model_shape_check(const cpl_model_shape *s);

typedef enum { CPL_COUPLE_NONE, CPL_COUPLE_MLP, CPL_COUPLE_HEADS } cpl_coupling; /* removed together when structures are pruned */

/* One parameter tensor: [rows, cols] (cols 1 and one_d for vectors) at `offset` of every flat buffer. Weights are [output, input].
 */
typedef struct {
    char name[40]; /* wte, wpe, h.3.attn.qkv.weight, h.3.attn.qkv.bias, h.3.mlp.fc.weight, h.3.ln1.gain, ln_f.gain ... */
    int64_t rows, cols, offset;
    bool one_d, decayed, prunable;
    int layer; /* -1: outside the blocks */
    cpl_coupling coupling;
} cpl_param;

/* Roles of the tensors of a block, the argument of cpl_layout_block. */
typedef enum {
    CPL_P_QKV_W, /* the 2-D weights: [3C, C] [C, C] [4C, C] [C, 4C] */
    CPL_P_PROJ_W,
    CPL_P_FC_W,
    CPL_P_OUT_W,
    CPL_P_LN1_G, /* the vectors */
    CPL_P_LN1_B,
    CPL_P_QKV_B,
    CPL_P_PROJ_B,
    CPL_P_LN2_G,
    CPL_P_LN2_B,
    CPL_P_FC_B,
    CPL_P_OUT_B,
    CPL_P_BLOCK_COUNT
} cpl_block_param;

/* Flat order: wte, wpe, the 2-D weights of block 0, 1, ..., then all vectors; every tensor starts at a multiple of 64 elements (the
 * gaps are zero for ever). So the decayed tensors are [0, decayed_end) and the default prunable ones one range inside it. */
typedef struct {
    cpl_model_shape shape;
    int64_t count;
    cpl_param *param;   /* owned, in order of offset */
    int64_t *begin;     /* owned, count+1: begin[i] = param[i].offset, begin[count] = total */
    int64_t total;      /* elements of a flat buffer, gaps included; a multiple of 64 */
    int64_t parameters; /* of the model: without gaps and distill.projection */
    int64_t decayed_end;
} cpl_layout;
/* Errors: those of cpl_model_shape_check, CPL_NO_MEMORY. */
cpl_status cpl_layout_create(cpl_layout **out, const cpl_model_shape *shape);
/* The same with one more tensor at the end, distill.projection [teacher_width, width], which compares hidden states of different
 * widths; not decayed. The plain layout's flat buffer is the first part of this one's, so a student leaves it behind by a shorter
 * copy. */
cpl_status cpl_layout_create_projected(cpl_layout **out, const cpl_model_shape *shape, int64_t teacher_width);
void cpl_layout_destroy(cpl_layout **layout);
const cpl_param *cpl_layout_find(const cpl_layout *l, const char *name); /* NULL if there is none */
/* Tensors by role, without a search. layer in [0, layers). */
const cpl_param *cpl_layout_wte(const cpl_layout *l);
const cpl_param *cpl_layout_wpe(const cpl_layout *l);
const cpl_param *cpl_layout_block(const cpl_layout *l, int64_t layer, cpl_block_param role);
const cpl_param *cpl_layout_final_gain(const cpl_layout *l);
const cpl_param *cpl_layout_final_bias(const cpl_layout *l);
const cpl_param *cpl_layout_projection(const cpl_layout *l); /* NULL in a plain layout */
static inline int64_t cpl_param_count(const cpl_param *p) {
    return p->rows * p->cols;
}
/* Where a rank's part of elements [first, last) begins: whole chunks of CPL_SUM_CHUNK from first on, as many for each rank until
 * there are no more; `last` for rank == ranks. first: a multiple of CPL_SUM_CHUNK. */
int64_t cpl_part_begin(int64_t first, int64_t last, int ranks, int rank);
/* Parts of a flat buffer for `ranks` ranks: begin [ranks+1], multiples of CPL_SUM_CHUNK (but for begin[ranks] = total and the empty
 * parts that start there), equal but for the tail (which may be empty). */
void cpl_layout_shards(const cpl_layout *l, int ranks, int64_t *begin);
/* The order in which a backward pass finishes the gradients, in ranges of whole tensors: range k, 0 <= k < cpl_layout_ranges, is
 * that of tensors [*first, *last): the 2-D weights of the last block ... the first block, all vectors, the embeddings (tied to the
 * head, so wte is the first to get a gradient and among the last to have it whole). Each tensor is in one range. */
int64_t cpl_layout_ranges(const cpl_layout *l);
void cpl_layout_range(const cpl_layout *l, int64_t k, int64_t *first, int64_t *last);
/* GPT-2 initialisation of elements [begin, end) of the flat buffer, values: host [end - begin]: N(0, 0.02), residual outputs N(0,
 * 0.02/sqrt(2 layers)), wpe N(0, 0.01), gains 1, biases 0, distill.projection N(0, 1/sqrt(width)); each element a function of
 * (seed, its tensor and index) alone, and of the number of layers where it says so. threads: as many as compute them, at least 1.
 */
void cpl_layout_initialize(const cpl_layout *l, uint64_t seed, int threads, int64_t begin, int64_t end, float *values);

typedef enum { CPL_RECOMPUTE_NONE, CPL_RECOMPUTE_GELU, CPL_RECOMPUTE_BLOCK } cpl_recompute;

/* Activations of one micro-batch [B,T], T = context; training = false keeps only what a forward pass needs. Memory is the device's,
 * in one piece. dev and l are borrowed for the life of the workspace. loss_rows: rows of logits computed at once (0: as many as fit
 * in 64 MiB, at least 1; never more than B*T). */
typedef struct cpl_workspace cpl_workspace;
cpl_status cpl_workspace_create(cpl_workspace **out, cpl_device *dev, const cpl_layout *l, cpl_dtype dt, int64_t B, bool training,
                                cpl_recompute recompute, int64_t loss_rows);
void cpl_workspace_destroy(cpl_workspace **ws);
/* Device memory that cpl_workspace_create takes, to the byte; SIZE_MAX where the count overflows. */
size_t cpl_workspace_bytes(const cpl_layout *l, cpl_dtype dt, int64_t B, bool training, cpl_recompute recompute, int64_t loss_rows);
int64_t cpl_workspace_loss_rows(const cpl_workspace *ws);
/* The final normalised hidden state [B*T, C] act after cpl_model_forward, device memory of the workspace. */
const void *cpl_workspace_hidden(const cpl_workspace *ws);

/* The loss of a training step; all zero, or a NULL pointer to it: cross-entropy with every target valid. */
typedef struct {
    const void *teacher_weights;      /* borrowed [teacher total] act: working copy */
    cpl_workspace *teacher_workspace; /* borrowed, of the teacher's layout; same B, T, V and dt; training may be false. NULL: no
                                         distillation */
    float temperature, alpha, beta;
    cpl_kd_kind kind;
    /* Hidden-state loss: hidden_weight * mean over all rows and channels of (P h - h_teacher)^2, of the final normalised states,
     * ignored targets included; P: distill.projection, or the identity where the layout has none and the widths are equal. */
    float hidden_weight; /* 0: none */
    double *hidden;      /* borrowed, device f64: += that loss; may be NULL where hidden_weight is 0; the trainer sets it */
    float row_weight;    /* 1 / valid targets of the micro-batch, counted by who made them; 0: 1 / (B*T) */
} cpl_model_loss;
/* What is minimised but for the hidden-state loss, from the means (or sums, or one row) of the two outputs of cpl_model_step. */
double cpl_model_loss_total(const cpl_model_loss *loss, double soft, double hard);

/* Who is told during a backward pass that the gradients of tensors [first, last) are final on the device from here on, in the order
 * of cpl_layout_range. */
typedef struct {
    cpl_status (*ready)(void *to, int64_t first, int64_t last);
    void *to; /* borrowed */
} cpl_grad_ready;

/* Runs the blocks on tokens [B,T] (device, i32) and leaves the final normalised hidden state in the workspace. weights [total] act.
 */
cpl_status cpl_model_forward(cpl_workspace *ws, const void *weights, const int32_t *tokens);
/* Head and loss after cpl_model_forward, without gradients: losses [B*T] f32 on the device (mean not taken). */
cpl_status cpl_model_losses(cpl_workspace *ws, const void *weights, const int32_t *targets, float *losses);
/* Forward, loss and backward of one micro-batch: grad [total] f32 += d(state->loss_scale * mean loss), or = where `overwrites`
 * (gaps between tensors stay as they are). hard [B*T] f32: cross-entropy of each row; soft [B*T] f32: distillation loss of each row
 * (numerics: loss, distillation), not written and may be NULL without a teacher. ready: told of finished gradients, or NULL.
 * Enqueues only: the host waits for nothing. Deterministic; the same bits for every `recompute`. Errors: CPL_USAGE where teacher
 * and student do not fit; CPL_INTERNAL for a workspace made without training. */
cpl_status cpl_model_step(cpl_workspace *ws, const void *weights, const int32_t *tokens, const int32_t *targets,
                          const cpl_model_loss *loss, const cpl_step_state *state, float *grad, bool overwrites, float *soft,
                          float *hard, const cpl_grad_ready *ready);
/* Logits of rows [first_row, first_row + rows) after cpl_model_forward, rows <= cpl_workspace_loss_rows: *logits [rows, V] act,
 * device memory of the workspace, valid until its next use. Row b*T + t is position t of sequence b. */
cpl_status cpl_model_logits_rows(cpl_workspace *ws, const void *weights, int64_t first_row, int64_t rows, void **logits);

#endif

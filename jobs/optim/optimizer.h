/* The optimizer's flat buffers on one rank and the end of a step: reduce (beside the backward pass where the group can), decide,
 * update, hand the new weights round.
 * Refuses to touch a parameter before all ranks have agreed on overflow. */
#ifndef CPL_JOBS_OPTIM_OPTIMIZER_H
#define CPL_JOBS_OPTIM_OPTIMIZER_H

#include "comm/comm.h"
#include "jobs/model/model.h"
#include "jobs/options.h"

/* Elements [first, last) of the flat buffers; in m, v and mask from `at` on. */
typedef struct {
    int64_t first, last, at;
} cpl_stretch;

/* The shard [begin, begin+n) of the flat buffers is this rank's to store and check-point; `own` is what of the sum over ranks it
 * makes, and updates with optimizer: sharded (ZeRO-1; Rajbhandari et al. 2020, arXiv:1910.02054), or everything with optimizer:
 * replicated. own is the shard but where the ranks' devices reach each other: then it is a part of the embeddings and a part of the
 * rest, which is final earlier. */
typedef struct {
    cpl_comm *comm;           /* borrowed */
    cpl_device *dev;          /* borrowed */
    const cpl_layout *layout; /* borrowed */
    cpl_dtype dtype;
    int64_t *shard;     /* owned [ranks+1], host */
    int64_t *chunk;     /* owned [ranks+1], host: shard in units of CPL_SUM_CHUNK */
    int64_t begin, n;   /* this rank's shard */
    cpl_stretch own[2]; /* [1] empty but where devices reach each other */
    bool sharded;       /* ZeRO-1 */
    int64_t count;      /* updated here */
    bool sent;          /* the backward pass sends its gradients round: cpl_optimizer_overlap */
    float weight_decay;
    cpl_step_rules rules;
    cpl_reduction reduction; /* of grad over the ranks */
    cpl_grad_ready ready;    /* of cpl_optimizer_overlap */
    int64_t *relative;       /* owned [tensors+1], host: offsets within the range being scanned */
    /* device */
    char *block;        /* owned: what all ranks' devices reach where cpl_comm_reaches */
    cpl_reach shared;   /* block of all ranks; count 0: not shared */
    void *work;         /* [total] act, in block: what forward and backward read */
    float *grad;        /* [total], in block: sum over this rank's micro-batches, still scaled */
    double *chunk_sums; /* [chunks of total], in block */
    uint32_t *kinds;    /* [tensors], in block: 1 inf, 2 nan, of this rank's own gradient */
    uint32_t *overflow; /* [1], in block, right behind kinds */
    float *received;    /* [ranks-1][longest part behind the embeddings], in block: the others' gradients of own[1] */
    /* owned */
    float *param;  /* [count] master weights; work itself for fp32 */
    float *m, *v;  /* [count] */
    uint8_t *mask; /* [count] or NULL */
    cpl_step_state *state;
} cpl_optimizer;

/* Constants of the step from the options; micro_batches: of the whole global batch. */
cpl_step_rules cpl_step_rules_of(const cpl_training *t, int64_t micro_batches);

/* initial: host [n], this rank's shard of the weights; mask: host [n] or NULL. Collective (the working copy is gathered).
 * Errors: CPL_NO_MEMORY, CPL_DEVICE, CPL_COMM, agreed by all ranks. */
cpl_status cpl_optimizer_create(cpl_optimizer **out, cpl_comm *comm, cpl_device *dev, const cpl_layout *layout,
                                const cpl_training *t, const float *initial, const uint8_t *mask);
void cpl_optimizer_destroy(cpl_optimizer **opt);
/* Device bytes per rank, for the plan. nccl: the ranks exchange device memory by it; up to CPL_REACH_MOST of them as where their
 * devices reach each other's memory. */
int64_t cpl_optimizer_bytes(const cpl_layout *layout, const cpl_training *t, int ranks, int rank, bool masked, bool nccl);

/* Which tensors of this rank's gradient are not finite (into kinds, overflow). Where the ranks' devices reach each other's memory
 * that is found in cpl_optimizer_step, as the gradients are summed. */
cpl_status cpl_optimizer_scan(cpl_optimizer *opt);
/* In place of cpl_optimizer_scan, before the step's last backward pass: *ready (borrowed) is for cpl_model_step, which tells it of
 * each range; then that is scanned, and summed over the ranks beside the rest of the backward pass, or, where their devices reach
 * each other's memory, copied to the ranks that sum it. The bits are those of the other way. Only while a graph is recorded that
 * cpl_optimizer_step is part of, and on all ranks: one that fails on the way would leave the others' GPUs waiting. */
cpl_status cpl_optimizer_overlap(cpl_optimizer *opt, const cpl_grad_ready **ready);
/* Whether that is of use: cpl_comm_reaches, or cpl_comm_sums_early and reduction: linear. */
bool cpl_optimizer_overlaps(const cpl_optimizer *opt);
/* The learning rate of the steps that follow; lr: of cpl_device_host_alloc, as for feed. */
cpl_status cpl_optimizer_feed_lr(cpl_optimizer *opt, const float *lr);
/* Collective, after cpl_optimizer_scan or the backward pass of cpl_optimizer_overlap: combines the overflow, sums the gradient over
 * ranks, decides, updates, gathers the working copy. */
cpl_status cpl_optimizer_step(cpl_optimizer *opt);

/* Collective, the part of cpl_optimizer_step that decides: overflow combined, norm of the summed gradient (without its sums of
 * squares where they are made as the gradients are summed), clipping, skip, scale. */
cpl_status cpl_optimizer_decide(cpl_optimizer *opt);

/* This rank's shard of param, m, v to (download) or from (restore) host buffers [n] each. Collective, between steps: the shard may
 * be on other ranks' devices, the working copy is gathered. The gradient is lost. Errors: CPL_DEVICE, CPL_COMM, agreed by all. */
cpl_status cpl_optimizer_download(cpl_optimizer *opt, float *param, float *m, float *v, cpl_step_state *state);
cpl_status cpl_optimizer_restore(cpl_optimizer *opt, const float *param, const float *m, const float *v,
                                 const cpl_step_state *state);

#endif

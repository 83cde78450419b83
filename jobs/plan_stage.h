/* What a stage would do and take: model, tokens, operations, memory, files; from its options alone.
 * Refuses to allocate what it counts. */
#ifndef CPL_JOBS_PLAN_STAGE_H
#define CPL_JOBS_PLAN_STAGE_H

#include "jobs/study/study.h"
#include "jobs/study/sweep_record.h"

/* Device memory of rank 0, which has the largest shard, in bytes, at the moment when it is the most. */
typedef struct {
    int64_t weights;     /* working copy and master weights */
    int64_t gradients;   /* with those of reduction: tree */
    int64_t moments;     /* AdamW's two, and the mask */
    int64_t activations; /* of a micro-batch, with the logits */
    int64_t teacher;     /* its weights and activations */
    int64_t other;       /* batch, losses, partial sums */
    int64_t workspaces;  /* what operations take for themselves; 0 on the CPU, which does not count it as the device's */
} cpl_plan_memory;
int64_t cpl_plan_memory_sum(const cpl_plan_memory *m);
/* Whether this build has such a back end. */
bool cpl_plan_has(const char *kind);

typedef struct {
    const char *kind; /* borrowed: of the back end */
    bool leaves_model;
    cpl_model_shape shape; /* of the model it leaves, or works on */
    int64_t parameters;
    int64_t steps;         /* of the optimizer; 0: trains nothing */
    int64_t step_tokens;   /* of one step over all ranks */
    double tokens, epochs; /* trained on; of the training text */
    double flops;          /* training and evaluation, over all ranks; of a sweep: of its missing trials */
    int64_t stored;        /* bytes of the files it leaves in the study's folder; -1: depends on the figures */
    cpl_plan_memory memory;
} cpl_stage_plan;

/* Shape of an input of stage `before`: an earlier stage's of this job (shapes: of what those leave), or what stands in its file.
 * Collective. */
cpl_status cpl_stage_plan_input(const cpl_context *ctx, const cpl_stage *before, const cpl_input *in, const cpl_model_shape *shapes,
                                cpl_model_shape *shape);
/* kind: of the back end planned for, "cpu" or "cuda"; CPL_UNSUPPORTED where this build lacks it. trials: of a sweep, else not used.
 * inputs: shapes of the models it reads, in the order of stage->input. ranks: of the run
 * planned. Errors: CPL_USAGE, CPL_INPUT: what would end the run when this stage begins. */
cpl_status cpl_stage_plan_make(const cpl_context *ctx, const cpl_stage *stage, const cpl_model_shape *inputs, int64_t ranks,
                               const char *kind, const cpl_sweep_plan *trials, cpl_stage_plan *out);

#endif

/* Each kind of stage, counted.
 * Refuses to allocate what it counts: layouts are tables without weights. */
#include "jobs/plan_stage.h"
#include "jobs/metrics.h"
#include "jobs/model/flops.h"
#include "kernels/pack.h"
#include "jobs/optim/optimizer.h"
#include "jobs/quantize_model.h"
#include "jobs/select.h"
#include "jobs/study/grid.h"
#include "jobs/trainer_step.h"
#include "jobs/training_stage.h"
#include <string.h>

int64_t cpl_plan_memory_sum(const cpl_plan_memory *m) {
    return m->weights + m->gradients + m->moments + m->activations + m->teacher + m->other + m->workspaces;
}

bool cpl_plan_has(const char *kind) {
    const cpl_pass nothing = {0};
    int64_t bytes = -1;
    cpl_device_pass_bytes(kind, &nothing, &bytes);
    return bytes >= 0;
}

static void keep_larger(cpl_plan_memory *most, const cpl_plan_memory *m) {
    if (cpl_plan_memory_sum(m) > cpl_plan_memory_sum(most)) {
        *most = *m;
    }
}

static cpl_status workspace(const cpl_layout *l, cpl_dtype dt, int64_t B, bool training, int recompute, int64_t *bytes) {
    cpl_status st = CPL_OK;
    size_t n = cpl_workspace_bytes(l, dt, B, training, (cpl_recompute)recompute, 0);
    if (n > INT64_MAX / 4) {
        CPL_FAIL(CPL_USAGE, "a micro-batch of %lld sequences of %lld tokens: expected one that fits in memory", (long long)B,
                 (long long)l->shape.context);
    }
    *bytes += (int64_t)n;
done:
    return st;
}

/* What operations take for themselves in passes over B sequences (0: none) and over flat buffers of the layout. */
static int64_t workspaces(const char *kind, const cpl_layout *l, cpl_dtype dt, int64_t B, bool training) {
    const cpl_pass pass = {.dt = cpl_dtype_storage(dt),
                           .B = B,
                           .T = l->shape.context,
                           .C = l->shape.width,
                           .H = l->shape.heads,
                           .flat = l->total,
                           .training = training};
    int64_t bytes = 0;
    cpl_device_pass_bytes(kind, &pass, &bytes);
    return bytes;
}

/* The device is known when a run begins; a plan is made without one. */
static cpl_status precision_check(const cpl_context *ctx, int precision, const char *label) {
    cpl_dtype dt = cpl_precision_dtype(precision);
    if (ctx->dev != NULL && !cpl_device_has(ctx->dev, dt)) {
        return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "%s: precision: %s needs a GPU, and the ranks compute on %s", label,
                        cpl_dtype_name(dt), ctx->dev->name);
    }
    return CPL_OK;
}

/* cpl_evaluate: tokens, targets, losses of a batch, one sum. */
static int64_t evaluation_buffers(const cpl_layout *l, int64_t B) {
    return 12 * B * l->shape.context + 8;
}

static double evaluation_flops(const cpl_context *ctx, const cpl_model_shape *s) {
    cpl_split train, val;
    cpl_context_splits(ctx, s->context, &train, &val);
    return (double)val.windows * (double)s->context * cpl_flops_forward(s);
}

/* cpl_prune_weights: a shard's weights, its mask, and the selection. */
static cpl_plan_memory pruning_memory(const char *kind, const cpl_layout *l, const cpl_prune_options *o, int64_t ranks) {
    int64_t n = cpl_part_begin(0, l->total, (int)ranks, 1);
    return (cpl_plan_memory){.weights = 4 * n,
                             .moments = n,
                             .other = cpl_selection_bytes(l, o, n),
                             .workspaces = workspaces(kind, l, CPL_F32, 0, false)};
}

/* The trainer's memory: cpl_optimizer_create, cpl_steps_create, and what trainer.c allocates. */
static cpl_status training_memory(const char *kind, const cpl_layout *l, const cpl_training *t, int64_t ranks, bool masked,
                                  cpl_plan_memory *m) {
    cpl_status st = CPL_OK;
    cpl_dtype dt = cpl_precision_dtype(t->precision);
    int64_t G = t->global_batch / t->micro_batch, mine = (G + ranks - 1) / ranks;
    int64_t begin[2] = {0, l->total};
    if (t->optimizer == CPL_OPTIMIZER_SHARDED) {
        begin[1] = cpl_part_begin(0, l->total, (int)ranks, 1);
    }
    m->weights = l->total * (int64_t)cpl_dtype_size(dt) + (cpl_dtype_storage(dt) == CPL_F32 ? 0 : 4 * begin[1]);
    m->gradients = 4 * l->total;
    m->moments = begin[1] * (8 + masked);
    m->other = cpl_optimizer_bytes(l, t, (int)ranks, 0, masked, strcmp(kind, "cuda") == 0) - m->weights - m->gradients - m->moments;
    int64_t evaluation = evaluation_buffers(l, t->micro_batch), histogram = 8 * CPL_M_GROUPS * CPL_M_EXPONENTS + 4;
    m->other += cpl_steps_bytes(l, t, (int)ranks) + (evaluation > histogram ? evaluation : histogram); /* one after the other */
    for (int64_t n = mine; t->reduction == CPL_REDUCTION_TREE && n > 1; n = (n + 1) / 2) {
        m->gradients += 4 * l->total;
    }
    CPL_TRY(workspace(l, dt, t->micro_batch, true, t->recompute, &m->activations));
    m->workspaces = workspaces(kind, l, dt, t->micro_batch, true);
done:
    return st;
}

/* Weights uploaded (f32 ones pass through a buffer), a workspace for evaluation, another for latency. */
static cpl_status evaluation_memory(const char *kind, const cpl_layout *l, cpl_dtype dt, int64_t B, int64_t latency_runs,
                                    cpl_plan_memory *m) {
    cpl_status st = CPL_OK;
    cpl_plan_memory upload = {.weights = l->total * (int64_t)cpl_dtype_size(dt),
                              .other = cpl_dtype_storage(dt) == CPL_F32 ? 0 : 4 * l->total,
                              .workspaces = workspaces(kind, l, dt, 0, false)};
    *m = (cpl_plan_memory){.weights = upload.weights, .workspaces = workspaces(kind, l, dt, B, false)};
    CPL_TRY(workspace(l, dt, B, false, CPL_RECOMPUTE_NONE, &m->activations));
    int64_t buffers[2] = {evaluation_buffers(l, B), 0}, activations = m->activations;
    if (latency_runs > 0) {
        CPL_TRY(workspace(l, dt, 1, false, CPL_RECOMPUTE_NONE, &activations));
        buffers[1] = evaluation_buffers(l, 1);
    }
    /* The buffers of the evaluation are gone when the latency is measured. */
    if (activations + buffers[1] > m->activations + buffers[0]) {
        m->activations = activations;
        m->other = buffers[1];
    } else {
        m->other = buffers[0];
    }
    keep_larger(m, &upload);
done:
    return st;
}

/* Everything that trains has in common. label: the stage's name. */
static cpl_status training(const cpl_context *ctx, const cpl_layout *l, const cpl_training *t, int64_t steps, int64_t ranks,
                           bool masked, const char *label, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    cpl_split train, val;
    cpl_context_splits(ctx, l->shape.context, &train, &val);
    CPL_TRY(precision_check(ctx, t->precision, label));
    CPL_TRY(cpl_training_ready(t, l, ranks, &train, &val, label));
    int64_t evaluations = t->eval_every > 0 ? steps / t->eval_every + (steps % t->eval_every != 0) : 1;
    out->steps = steps;
    out->step_tokens = t->global_batch * l->shape.context;
    out->tokens = (double)steps * (double)out->step_tokens;
    out->epochs = (double)steps * (double)t->global_batch / (double)train.windows;
    out->flops += out->tokens * cpl_flops_training(&l->shape) + (double)evaluations * evaluation_flops(ctx, &l->shape);
    CPL_TRY(training_memory(out->kind, l, t, ranks, masked, &out->memory));
done:
    return st;
}

static cpl_status plan_train(const cpl_context *ctx, const cpl_stage *stage, const cpl_layout *l, int64_t ranks,
                             cpl_stage_plan *out) {
    const cpl_train_options *o = stage->options;
    out->stored = 12 * l->total;
    return training(ctx, l, &o->training, o->steps, ranks, false, stage->name, out);
}

static cpl_status plan_distill(const cpl_context *ctx, const cpl_stage *stage, const cpl_layout *l, const cpl_model_shape *teacher,
                               int64_t ranks, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    const cpl_distill_options *o = stage->options;
    cpl_dtype dt = cpl_precision_dtype(o->training.precision);
    cpl_layout *large = NULL, *trained = NULL;
    CPL_TRY(cpl_distill_layout(stage, teacher, &l->shape, &trained));
    CPL_TRY(training(ctx, trained, &o->training, o->steps, ranks, false, stage->name, out));
    CPL_TRY(cpl_layout_create(&large, teacher));
    out->stored = 12 * trained->total;
    out->flops += out->tokens * (cpl_flops_forward(teacher) + cpl_flops_projection(trained));
    CPL_TRY(workspace(large, dt, o->training.micro_batch, false, CPL_RECOMPUTE_NONE, &out->memory.teacher));
    out->memory.teacher += large->total * (int64_t)cpl_dtype_size(dt);
    cpl_plan_memory upload = {.teacher = large->total *
                                         (int64_t)(cpl_dtype_size(dt) + (cpl_dtype_storage(dt) == CPL_F32 ? 0 : sizeof(float))),
                              .workspaces = workspaces(out->kind, large, dt, 0, false)};
    int64_t forward = workspaces(out->kind, large, dt, o->training.micro_batch, false);
    out->memory.workspaces = forward > out->memory.workspaces ? forward : out->memory.workspaces;
    keep_larger(&out->memory, &upload); /* f32 weights pass through a buffer */
done:
    cpl_layout_destroy(&large);
    cpl_layout_destroy(&trained);
    return st;
}

static cpl_status plan_prune(const cpl_context *ctx, const cpl_stage *stage, const cpl_layout *l, int64_t ranks,
                             cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    const cpl_prune_options *o = stage->options;
    if (o->finetune_steps > 0) {
        CPL_TRY(training(ctx, l, &o->training, o->finetune_steps, ranks, true, stage->name, out));
        out->stored = 13 * l->total;
    } else {
        CPL_TRY(precision_check(ctx, o->training.precision, stage->name));
        CPL_TRY(
            evaluation_memory(out->kind, l, cpl_precision_dtype(o->training.precision), o->training.micro_batch, 0, &out->memory));
        out->flops = evaluation_flops(ctx, &l->shape);
        out->stored = 5 * l->total;
    }
    cpl_plan_memory selecting = pruning_memory(out->kind, l, o, ranks);
    keep_larger(&out->memory, &selecting);
done:
    return st;
}

/* Quantized weights are put together on the device before they are evaluated in f32. Files: the model, and packed.h5 with an f32
 * scale and a zero point a group. */
static cpl_status plan_quantize(const cpl_context *ctx, const cpl_stage *stage, const cpl_layout *l, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    const cpl_quantize_options *o = stage->options;
    cpl_plan_memory together = {.weights = 4 * l->total, .workspaces = workspaces(out->kind, l, CPL_F32, 0, false)};
    out->stored = 4 * l->total;
    for (int64_t i = 0; i < l->count; i++) {
        const cpl_param *p = &l->param[i];
        cpl_quant_spec spec;
        int64_t n = cpl_param_count(p), groups = 0;
        if (!cpl_quantize_includes(o, p)) {
            continue;
        }
        CPL_TRY(cpl_quantize_spec(o, p->rows, p->cols, &spec));
        CPL_TRY(cpl_quant_groups(&spec, p->rows, p->cols, &groups));
        out->stored += cpl_pack_row_bytes(spec.bits, p->cols) * p->rows + 5 * groups;
        together.other = 5 * (n + groups) > together.other ? 5 * (n + groups) : together.other;
    }
    CPL_TRY(evaluation_memory(out->kind, l, CPL_F32, 8, 0, &out->memory));
    keep_larger(&out->memory, &together);
    out->flops = evaluation_flops(ctx, &l->shape);
done:
    return st;
}

static cpl_status plan_eval(const cpl_context *ctx, const cpl_stage *stage, const cpl_layout *l, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    const cpl_eval_options *o = stage->options;
    double forward = (double)l->shape.context * cpl_flops_forward(&l->shape);
    out->flops = evaluation_flops(ctx, &l->shape) + (double)(o->latency_runs > 0 ? o->latency_runs + 2 : 0) * forward;
    CPL_TRY(precision_check(ctx, o->precision, stage->name));
    CPL_TRY(evaluation_memory(out->kind, l, cpl_precision_dtype(o->precision), o->micro_batch, o->latency_runs, &out->memory));
done:
    return st;
}

static cpl_status plan_trial(const cpl_context *ctx, const cpl_stage *stage, const cpl_trial *trial, const cpl_layout *l,
                             int64_t ranks, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    const cpl_sweep_options *o = stage->options;
    cpl_plan_memory m = {0};
    cpl_stage_plan tuning = {.kind = out->kind};
    if (trial->prunes && trial->prune.finetune_steps > 0) {
        CPL_TRY(training(ctx, l, &trial->prune.training, trial->prune.finetune_steps, ranks, true, stage->name, &tuning));
        keep_larger(&out->memory, &tuning.memory);
        out->tokens += tuning.tokens;
        out->flops += tuning.flops;
    }
    if (trial->prunes) {
        cpl_plan_memory gathered = {
            .weights = 4 * l->total, .moments = l->total, .workspaces = workspaces(out->kind, l, CPL_F32, 0, false)};
        cpl_plan_memory selecting = pruning_memory(out->kind, l, &trial->prune, ranks);
        keep_larger(&out->memory, &gathered);
        keep_larger(&out->memory, &selecting);
    }
    CPL_TRY(precision_check(ctx, o->precision, stage->name));
    CPL_TRY(evaluation_memory(out->kind, l, cpl_precision_dtype(o->precision), o->micro_batch, o->latency_runs, &m));
    keep_larger(&out->memory, &m);
    out->flops += evaluation_flops(ctx, &l->shape) +
                  (double)(o->latency_runs > 0 ? o->latency_runs + 2 : 0) * (double)l->shape.context * cpl_flops_forward(&l->shape);
done:
    return st;
}

static cpl_status plan_sweep(const cpl_context *ctx, const cpl_stage *stage, const cpl_model_shape *inputs, int64_t ranks,
                             const cpl_sweep_plan *trials, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    const cpl_sweep_options *o = stage->options;
    const cpl_grid *g = stage->extra;
    cpl_layout *l = NULL;
    cpl_arena *arena = NULL;
    cpl_trial trial;
    int64_t next = 0;
    if (o->group_ranks > ranks) {
        st = cpl_stage_fail(stage, "group_ranks", "%lld ranks a group, but only %lld ranks in all", (long long)o->group_ranks,
                            (long long)ranks);
        goto done;
    }
    for (int64_t i = -1; i < g->trials; i++) {
        CPL_TRY(cpl_arena_create(&arena));
        CPL_TRY(cpl_grid_trial(g, i, &trial, arena));
        CPL_TRY(cpl_layout_create(&l, &inputs[trial.model]));
        cpl_stage_plan one = {.kind = out->kind};
        CPL_TRY(plan_trial(ctx, stage, &trial, l, o->group_ranks, &one));
        keep_larger(&out->memory, &one.memory);
        if (next < trials->n_missing && trials->missing[next] == i) {
            out->flops += one.flops;
            out->tokens += one.tokens;
            next++;
        }
        cpl_layout_destroy(&l);
        cpl_arena_destroy(&arena);
    }
    out->stored = -1;
done:
    cpl_layout_destroy(&l);
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_stage_plan_input(const cpl_context *ctx, const cpl_stage *before, const cpl_input *in, const cpl_model_shape *shapes,
                                cpl_model_shape *shape) {
    cpl_status st = CPL_OK;
    cpl_store_head head;
    for (const cpl_stage *s = ctx->job->stage; s < before; s++) {
        if (strcmp(s->name, in->name) == 0) {
            *shape = shapes[s - ctx->job->stage];
            return CPL_OK;
        }
    }
    CPL_TRY(cpl_store_head_read(in->path, ctx->world, &head));
    *shape = head.shape;
done:
    return st;
}

static cpl_status shape_of(const cpl_context *ctx, const cpl_stage *stage, const cpl_model_shape *inputs, cpl_model_shape *shape) {
    int64_t vocab = cpl_corpus_vocab(ctx->corpus);
    for (size_t i = 0; i < stage->n_inputs; i++) {
        if (inputs[i].vocab != vocab) {
            return cpl_stage_fail(stage, NULL, "the vocabulary of '%s' is %lld, the corpus has %lld", stage->input[i].name,
                                  (long long)inputs[i].vocab, (long long)vocab);
        }
    }
    if (stage->kind == &cpl_stage_train) {
        const cpl_shape_options *o = &((const cpl_train_options *)stage->options)->shape;
        *shape = (cpl_model_shape){o->layers, o->heads, o->width, o->context, vocab};
        return CPL_OK;
    }
    if (stage->kind == &cpl_stage_distill) {
        return cpl_distill_shape(stage, &inputs[0], shape);
    }
    *shape = inputs[0];
    return CPL_OK;
}

cpl_status cpl_stage_plan_make(const cpl_context *ctx, const cpl_stage *stage, const cpl_model_shape *inputs, int64_t ranks,
                               const char *kind, const cpl_sweep_plan *trials, cpl_stage_plan *out) {
    cpl_status st = CPL_OK;
    cpl_layout *l = NULL;
    cpl_split train, val;
    *out = (cpl_stage_plan){.kind = kind, .leaves_model = stage->model != NULL};
    if (!cpl_plan_has(kind)) {
        CPL_FAIL(CPL_UNSUPPORTED, "%s: back end '%s' is not in this build", stage->name, kind);
    }
    CPL_TRY(shape_of(ctx, stage, inputs, &out->shape));
    cpl_context_splits(ctx, out->shape.context, &train, &val);
    CPL_TRY(cpl_fail_context(cpl_split_check(&val, 1, "held-out text"), "%s", stage->name));
    CPL_TRY(cpl_layout_create(&l, &out->shape));
    out->parameters = l->parameters;
    if (stage->kind == &cpl_stage_train) {
        CPL_TRY(plan_train(ctx, stage, l, ranks, out));
    } else if (stage->kind == &cpl_stage_distill) {
        CPL_TRY(plan_distill(ctx, stage, l, &inputs[0], ranks, out));
    } else if (stage->kind == &cpl_stage_prune) {
        CPL_TRY(plan_prune(ctx, stage, l, ranks, out));
    } else if (stage->kind == &cpl_stage_quantize) {
        CPL_TRY(plan_quantize(ctx, stage, l, out));
    } else if (stage->kind == &cpl_stage_eval) {
        CPL_TRY(plan_eval(ctx, stage, l, out));
    } else if (stage->kind == &cpl_stage_sweep) {
        CPL_TRY(plan_sweep(ctx, stage, inputs, ranks, trials, out));
    } else {
        CPL_FAIL(CPL_INTERNAL, "a stage of kind %s has no plan", stage->kind->name);
    }
done:
    cpl_layout_destroy(&l);
    return st;
}

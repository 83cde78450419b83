/* Stage distill: a smaller model trained on a larger one's predictions (Hinton et al. 2015, arXiv:1503.02531) and hidden states.
 * Refuses a teacher of another vocabulary, and students that cannot be made of it. */
#include "jobs/training_stage.h"
#include <stdio.h>
#include <string.h>

static const double least_hidden_weight = 1e-9; /* divided by any count of states it stays a number of f32 */

static cpl_status check(const cpl_stage *stage) {
    const cpl_distill_options *o = stage->options;
    cpl_status st = cpl_training_check(&o->training);
    if (st != CPL_OK) {
        return cpl_stage_fail(stage, NULL, "%s", cpl_status_message());
    }
    if (o->start == CPL_START_TEACHER && (o->heads != 0 || o->width != 0)) {
        return cpl_stage_fail(stage, o->heads != 0 ? "heads" : "width",
                              "copied teacher layers keep their size; use start: scratch");
    }
    if (o->start == CPL_START_SCRATCH && o->teacher_layers.count > 0) {
        return cpl_stage_fail(stage, "teacher_layers", "start: scratch copies none");
    }
    if (o->teacher_layers.count > 0 && o->layers != 0 && o->layers != (int64_t)o->teacher_layers.count) {
        return cpl_stage_fail(stage, "layers", "%lld, but teacher_layers names %zu", (long long)o->layers, o->teacher_layers.count);
    }
    if (o->hidden_weight > 0 && o->hidden_weight < least_hidden_weight) {
        return cpl_stage_fail(stage, "hidden_weight", "expected 0 or at least %g, got %g", least_hidden_weight, o->hidden_weight);
    }
    if (o->divergence == CPL_KD_JSD && (o->beta <= 0 || o->beta >= 1)) {
        return cpl_stage_fail(stage, "beta", "expected a number strictly between 0 and 1 for jsd, got %g", o->beta);
    }
    return CPL_OK;
}

static cpl_status inputs(cpl_job *job, cpl_stage *stage) {
    return cpl_stage_add_input(job, stage, ((const cpl_distill_options *)stage->options)->teacher);
}

static int64_t final_step(const cpl_stage *stage) {
    return ((const cpl_distill_options *)stage->options)->steps;
}

cpl_status cpl_distill_shape(const cpl_stage *stage, const cpl_model_shape *teacher, cpl_model_shape *shape) {
    const cpl_distill_options *o = stage->options;
    int64_t half = teacher->layers > 1 ? teacher->layers / 2 : 1;
    *shape = *teacher;
    shape->layers = o->teacher_layers.count > 0 ? (int64_t)o->teacher_layers.count : o->layers > 0 ? o->layers : half;
    shape->heads = o->heads > 0 ? o->heads : teacher->heads;
    shape->width = o->width > 0 ? o->width : teacher->width;
    if (o->start == CPL_START_TEACHER && shape->layers > teacher->layers) {
        return cpl_stage_fail(stage, "layers", "%lld blocks cannot be copied from a teacher of %lld", (long long)shape->layers,
                              (long long)teacher->layers);
    }
    cpl_status st = cpl_model_shape_check(shape);
    return st == CPL_OK ? st : cpl_stage_fail(stage, NULL, "%s", cpl_status_message());
}

cpl_status cpl_distill_layout(const cpl_stage *stage, const cpl_model_shape *teacher, const cpl_model_shape *student,
                              cpl_layout **layout) {
    bool projects = ((const cpl_distill_options *)stage->options)->hidden_weight > 0 && student->width != teacher->width;
    return projects ? cpl_layout_create_projected(layout, student, teacher->width) : cpl_layout_create(layout, student);
}

/* Teacher block that becomes student block i: as chosen, or evenly spaced with the first and the last kept. */
static cpl_status source_block(const cpl_stage *stage, int64_t i, int64_t layers, int64_t teacher_layers, int64_t *source) {
    const cpl_distill_options *o = stage->options;
    *source = layers == 1 ? 0 : (i * (teacher_layers - 1) + (layers - 1) / 2) / (layers - 1);
    if (o->teacher_layers.count > 0) {
        *source = o->teacher_layers.value[i];
    }
    if (*source >= teacher_layers) {
        return cpl_stage_fail(stage, "teacher_layers", "block %lld is not in a teacher of %lld blocks", (long long)*source,
                              (long long)teacher_layers);
    }
    return CPL_OK;
}

/* First weights of the student, host [total]. */
static cpl_status first_weights(cpl_context *ctx, const cpl_stage *stage, const cpl_layout *layout, const cpl_model *teacher,
                                float *weights) {
    cpl_status st = CPL_OK;
    cpl_layout_initialize(layout, (uint64_t)ctx->job->seed, cpl_device_threads(ctx->dev), 0, layout->total, weights);
    if (((const cpl_distill_options *)stage->options)->start == CPL_START_SCRATCH) {
        return CPL_OK;
    }
    for (int64_t i = 0; i < layout->count; i++) {
        const cpl_param *to = &layout->param[i], *from = NULL;
        char name[sizeof to->name + 24];
        if (to->layer < 0) {
            from = cpl_layout_find(teacher->layout, to->name);
        } else {
            int64_t source = 0;
            CPL_TRY(source_block(stage, to->layer, layout->shape.layers, teacher->layout->shape.layers, &source));
            const char *rest = strchr(to->name + 2, '.');
            snprintf(name, sizeof name, "h.%lld%s", (long long)source, rest);
            from = cpl_layout_find(teacher->layout, name);
        }
        if (from == NULL) {
            CPL_FAIL(CPL_INTERNAL, "the teacher has no tensor for %s", to->name);
        }
        memcpy(weights + to->offset, teacher->weights + from->offset, (size_t)cpl_param_count(to) * sizeof *weights);
    }
done:
    return st;
}

static cpl_status prepare_student(cpl_context *ctx, const cpl_stage *stage, const cpl_model *teacher, cpl_layout **layout,
                                  float **whole) {
    cpl_status st = CPL_OK;
    cpl_model_shape shape;
    if (teacher->layout->shape.vocab != cpl_corpus_vocab(ctx->corpus)) {
        st = cpl_stage_fail(stage, "teacher", "the teacher's vocabulary is %lld, the corpus has %lld",
                            (long long)teacher->layout->shape.vocab, (long long)cpl_corpus_vocab(ctx->corpus));
        goto done;
    }
    CPL_TRY(cpl_distill_shape(stage, &teacher->layout->shape, &shape));
    CPL_TRY(cpl_distill_layout(stage, &teacher->layout->shape, &shape, layout));
    CPL_TRY(cpl_alloc(whole, (size_t)(*layout)->total, sizeof **whole, "first weights"));
    CPL_TRY(first_weights(ctx, stage, *layout, teacher, *whole));
done:
    return st;
}

static cpl_status run(cpl_context *ctx, cpl_stage *stage, cpl_record *record) {
    cpl_status st = CPL_OK;
    const cpl_distill_options *o = stage->options;
    cpl_model teacher = {0};
    cpl_layout *layout = NULL;
    float *whole = NULL;
    void *teacher_weights = NULL;
    cpl_workspace *teacher_ws = NULL;
    cpl_shard shard = {0};
    cpl_dtype dt = cpl_precision_dtype(o->training.precision);
    CPL_TRY(cpl_model_load(&teacher, stage->input[0].path, ctx->world));
    cpl_status local = prepare_student(ctx, stage, &teacher, &layout, &whole);
    if (local == CPL_OK) {
        local = cpl_model_upload(ctx->dev, teacher.layout, dt, teacher.weights, &teacher_weights);
    }
    if (local == CPL_OK) {
        local =
            cpl_workspace_create(&teacher_ws, ctx->dev, teacher.layout, dt, o->training.micro_batch, false, CPL_RECOMPUTE_NONE, 0);
    }
    CPL_TRY(cpl_agree(ctx->world, local));
    CPL_TRY(cpl_shard_create(&shard, layout, ctx->world, false, false));
    cpl_shard_take(&shard, whole);
    cpl_free(&whole);
    cpl_model_loss loss = {.teacher_weights = teacher_weights,
                           .teacher_workspace = teacher_ws,
                           .temperature = (float)o->temperature,
                           .alpha = (float)o->alpha,
                           .beta = (float)o->beta,
                           .kind = (cpl_kd_kind)o->divergence,
                           .hidden_weight = (float)o->hidden_weight};
    CPL_TRY(cpl_training_stage_run(ctx, stage, record, layout, &o->training, o->steps, &shard, &loss));
    CPL_TRY(cpl_agree(ctx->world, cpl_record_text(record, "teacher_key", stage->input[0].key)));
done:
    cpl_shard_free(&shard);
    cpl_workspace_destroy(&teacher_ws);
    cpl_device_free(ctx->dev, &teacher_weights);
    cpl_free(&whole);
    cpl_layout_destroy(&layout);
    cpl_model_free(&teacher);
    return st;
}

const cpl_stage_kind cpl_stage_distill = {.name = "distill",
                                          .help = "train a smaller model on a larger one's predictions",
                                          .table = &cpl_distill_table,
                                          .size = sizeof(cpl_distill_options),
                                          .check = check,
                                          .inputs = inputs,
                                          .final_step = final_step,
                                          .run = run};

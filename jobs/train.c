/* Stage train: a model from random weights.
 * Refuses nothing of its own: options are checked by their table and cpl_training_check. */
#include "jobs/training_stage.h"

static cpl_model_shape shape_of(const cpl_train_options *o, int64_t vocab) {
    return (cpl_model_shape){o->shape.layers, o->shape.heads, o->shape.width, o->shape.context, vocab};
}

static cpl_status check(const cpl_stage *stage) {
    const cpl_train_options *o = stage->options;
    cpl_model_shape shape = shape_of(o, 256);
    cpl_status st = cpl_training_check(&o->training);
    if (st == CPL_OK) {
        st = cpl_model_shape_check(&shape);
    }
    return st == CPL_OK ? st : cpl_stage_fail(stage, NULL, "%s", cpl_status_message());
}

static int64_t final_step(const cpl_stage *stage) {
    return ((const cpl_train_options *)stage->options)->steps;
}

static cpl_status run(cpl_context *ctx, cpl_stage *stage, cpl_record *record) {
    cpl_status st = CPL_OK;
    const cpl_train_options *o = stage->options;
    cpl_model_shape shape = shape_of(o, cpl_corpus_vocab(ctx->corpus));
    cpl_layout *layout = NULL;
    cpl_shard shard = {0};
    CPL_TRY(cpl_agree(ctx->world, cpl_layout_create(&layout, &shape)));
    CPL_TRY(cpl_shard_create(&shard, layout, ctx->world, false, false));
    cpl_layout_initialize(layout, (uint64_t)ctx->job->seed, cpl_device_threads(ctx->dev), shard.begin, shard.begin + shard.n,
                          shard.param);
    CPL_TRY(cpl_training_stage_run(ctx, stage, record, layout, &o->training, o->steps, &shard, NULL));
done:
    cpl_shard_free(&shard);
    cpl_layout_destroy(&layout);
    return st;
}

const cpl_stage_kind cpl_stage_train = {.name = "train",
                                        .help = "train a model from random weights",
                                        .table = &cpl_train_table,
                                        .size = sizeof(cpl_train_options),
                                        .check = check,
                                        .final_step = final_step,
                                        .run = run};

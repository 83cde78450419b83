/* What can be known of a job before it begins.
 * Refuses to make or change a file, and to let a stage find out after hours what was clear at the start. */
#include "jobs/plan_stage.h"

/* shapes: of the models that the stages leave, in their order. */
static cpl_status check_stage(cpl_context *ctx, const cpl_stage *s, cpl_model_shape *shapes) {
    cpl_status st = CPL_OK;
    cpl_model_shape *inputs = NULL;
    cpl_stage_plan plan;
    const cpl_sweep_plan no_trials = {0};
    CPL_TRY(cpl_agree(ctx->world, cpl_alloc(&inputs, s->n_inputs, sizeof *inputs, "check")));
    for (size_t i = 0; i < s->n_inputs; i++) {
        CPL_TRY(cpl_stage_plan_input(ctx, s, &s->input[i], shapes, &inputs[i]));
    }
    CPL_TRY(cpl_agree(ctx->world, cpl_stage_plan_make(ctx, s, inputs, cpl_comm_size(ctx->world),
                                                      ctx->dev == NULL ? "cpu" : ctx->dev->kind, &no_trials, &plan)));
    shapes[s - ctx->job->stage] = plan.shape;
done:
    cpl_free(&inputs);
    return st;
}

cpl_status cpl_study_check(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    cpl_model_shape *shapes = NULL;
    CPL_TRY(cpl_agree(ctx->world, cpl_alloc(&shapes, ctx->job->n_stages, sizeof *shapes, "check")));
    CPL_TRY(cpl_study_keys(ctx));
    for (size_t i = 0; i < ctx->job->n_stages; i++) {
        CPL_TRY(check_stage(ctx, &ctx->job->stage[i], shapes));
    }
done:
    cpl_free(&shapes);
    return st;
}

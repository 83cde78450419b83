/* See fit.h.
 * Refuses to allocate: every candidate is counted as cupel plan counts it. */
#include "jobs/study/fit.h"
#include "jobs/plan_stage.h"
#include "jobs/store.h"
#include <stdio.h>
#include <string.h>

/* A stage with some options changed, and what it may take. */
typedef struct {
    const cpl_context *ctx;        /* borrowed */
    cpl_stage stage;               /* its options are our own */
    const cpl_model_shape *inputs; /* borrowed */
    int64_t room;                  /* bytes a rank may hold */
    int64_t *micro_batch;          /* borrowed: inside the options; NULL: it has none */
    int *recompute;
    int64_t global_batch; /* 0: it trains nothing */
} candidate;

static void *option(const cpl_stage *stage, const char *name) {
    for (size_t i = 0; i < stage->kind->table->count; i++) {
        const cpl_field *f = &stage->kind->table->fields[i];
        if (strcmp(f->name, name) == 0) {
            return (char *)stage->options + f->offset;
        }
    }
    return NULL;
}

static bool fits(const candidate *c) {
    const cpl_sweep_plan no_trials = {0};
    cpl_stage_plan plan;
    cpl_status st =
        cpl_stage_plan_make(c->ctx, &c->stage, c->inputs, cpl_comm_size(c->ctx->world), c->ctx->dev->kind, &no_trials, &plan);
    if (st != CPL_OK) {
        cpl_status_clear();
        return false;
    }
    return cpl_plan_memory_sum(&plan.memory) <= c->room;
}

/* The largest up to `most` that fits, 0 for none; it takes more the larger it is. */
static int64_t largest(const candidate *c, int64_t most) {
    int64_t low = 0, high = most;
    if (c->global_batch > 0) { /* one that divides it */
        for (*c->micro_batch = most; *c->micro_batch > 0; --*c->micro_batch) {
            if (c->global_batch % *c->micro_batch == 0 && fits(c)) {
                break;
            }
        }
        return *c->micro_batch;
    }
    while (low < high) {
        *c->micro_batch = low + (high - low + 1) / 2;
        low = fits(c) ? *c->micro_batch : low;
        high = low == *c->micro_batch ? high : *c->micro_batch - 1;
    }
    return low;
}

static void describe(candidate *c, char *text, size_t size) {
    static const char *const names[] = {"none", "gelu", "block"};
    int64_t asked = *c->micro_batch, best = 0;
    size_t used = 0;
    int first = c->recompute == NULL ? CPL_RECOMPUTE_BLOCK : *c->recompute;
    for (int r = first; r <= CPL_RECOMPUTE_BLOCK; r++) {
        if (c->recompute != NULL) {
            *c->recompute = r;
        }
        int64_t m = largest(c, r > first ? asked : asked - 1);
        if (m > best && used < size) {
            used += (size_t)snprintf(text + used, size - used, "%smicro_batch %lld",
                                     best > 0 ? ", or " : "; what would fit: ", (long long)m);
            used += c->recompute == NULL || used >= size
                        ? 0
                        : (size_t)snprintf(text + used, size - used, " with recompute %s", names[r]);
            best = m;
        }
    }
    if (best == 0 && c->stage.kind != &cpl_stage_sweep) { /* a trial's fine-tuning has options of its own */
        snprintf(text, size, "; no micro_batch would fit: a smaller model or context%s is needed",
                 c->recompute == NULL ? "" : ", or more ranks with optimizer: sharded,");
    }
}

/* The smallest of all ranks; INT64_MAX: not known. */
static cpl_status room_of(cpl_context *ctx, int64_t *room) {
    size_t own = cpl_device_memory_room(ctx->dev);
    *room = own > INT64_MAX ? INT64_MAX : (int64_t)own;
    return cpl_comm_allreduce_i64(ctx->world, room, 1, CPL_MIN);
}

static cpl_status advise(cpl_context *ctx, const cpl_stage *stage, char *text, size_t size) {
    cpl_status st = CPL_OK;
    cpl_model_shape *inputs = NULL;
    candidate c = {.ctx = ctx, .stage = *stage};
    CPL_TRY(room_of(ctx, &c.room));
    cpl_status local = cpl_alloc(&inputs, stage->n_inputs, sizeof *inputs, "plan");
    local = local == CPL_OK ? cpl_arena_alloc(ctx->job->arena, &c.stage.options, 1, stage->kind->size) : local;
    CPL_TRY(cpl_agree(ctx->world, local));
    for (size_t i = 0; i < stage->n_inputs; i++) { /* they are there: the stage has begun */
        cpl_store_head head;
        CPL_TRY(cpl_store_head_read(stage->input[i].path, ctx->world, &head));
        inputs[i] = head.shape;
    }
    memcpy(c.stage.options, stage->options, stage->kind->size);
    c.inputs = inputs;
    c.micro_batch = option(&c.stage, "micro_batch");
    c.recompute = option(&c.stage, "recompute");
    const int64_t *global_batch = option(&c.stage, "global_batch");
    c.global_batch = global_batch == NULL ? 0 : *global_batch;
    if (c.room < INT64_MAX && c.micro_batch != NULL) {
        describe(&c, text, size);
    }
done:
    cpl_free(&inputs);
    return st;
}

cpl_status cpl_stage_fit(cpl_context *ctx, const cpl_stage *stage, cpl_status failure) {
    char message[CPL_MESSAGE_MAX], advice[200] = "", text[CPL_MESSAGE_MAX + sizeof advice];
    snprintf(message, sizeof message, "%s", cpl_status_message());
    if (advise(ctx, stage, advice, sizeof advice) != CPL_OK) {
        advice[0] = '\0';
    }
    snprintf(text, sizeof text, "%s%s", message, advice);
    cpl_status_set_message(text);
    return failure;
}

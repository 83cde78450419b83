/* A forward pass and a whole training step, as trainer.c makes one: micro-batch, scan, reduction, decision, update.
 * Refuses to leave the reduction out: with several ranks it is in the time. */
#include "io/base/log.h"
#include "jobs/bench.h"
#include "jobs/model/flops.h"
#include "jobs/optim/optimizer.h"
#include <stdio.h>
#include <stdlib.h>

enum { STEPS_LEAST = 5, STEPS_MOST = 10000 };

typedef struct {
    const cpl_bench *b;  /* borrowed */
    cpl_workspace *ws;   /* owned */
    cpl_optimizer *opt;  /* owned */
    float *initial;      /* owned, host */
    int32_t *tokens;     /* owned, device [R]; targets as well */
    float *losses;       /* owned, device [R] */
    cpl_graph *graph[2]; /* owned, of both parts of a step where the device records them */
    double *seconds[2];  /* owned [steps]: forward and backward; the whole step */
} training;

static cpl_status prepare(training *t, cpl_training *options, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    const cpl_bench *b = t->b;
    int32_t *host = NULL;
    int64_t R = b->o->micro_batch * b->layout->shape.context;
    CPL_TRY(cpl_fields_default(cpl_training_table.fields, cpl_training_table.count, options, arena));
    options->precision = b->o->precision;
    options->micro_batch = b->o->micro_batch;
    options->global_batch = b->o->micro_batch * cpl_comm_size(b->world);
    options->loss_scaling = CPL_SCALING_FIXED;
    options->loss_scale = 128; /* fp16 neither overflows nor loses the gradients of random weights */
    CPL_TRY(cpl_alloc(&t->initial, (size_t)b->layout->total, sizeof(float), "bench"));
    cpl_layout_initialize(b->layout, 1, t->initial);
    CPL_TRY(cpl_alloc(&host, (size_t)R, sizeof *host, "bench"));
    for (int64_t i = 0; i < R; i++) {
        host[i] = (int32_t)((uint64_t)i * 2654435761u % (uint64_t)b->layout->shape.vocab);
    }
    CPL_TRY(cpl_device_alloc(b->dev, &t->tokens, (size_t)R, sizeof *t->tokens, "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &t->losses, (size_t)R, sizeof *t->losses, "bench"));
    CPL_TRY(CPL_OPS(b->dev, upload, t->tokens, host, (size_t)R * sizeof *host));
    CPL_TRY(cpl_workspace_create(&t->ws, b->dev, b->layout, b->product, b->o->micro_batch, true, CPL_RECOMPUTE_NONE, 0));
done:
    cpl_free(&host);
    return st;
}

static cpl_status micro_batch(void *context) {
    cpl_status st = CPL_OK;
    training *t = context;
    cpl_device *dev = t->b->dev;
    CPL_TRY(CPL_OPS(dev, zero, t->opt->grad, (size_t)t->b->layout->total * sizeof(float)));
    CPL_TRY(cpl_model_step(t->ws, t->opt->work, t->tokens, t->tokens, NULL, t->opt->state, t->opt->grad, NULL, t->losses));
done:
    return st;
}

static cpl_status rest_of_step(void *context) {
    cpl_status st = CPL_OK;
    training *t = context;
    CPL_TRY(cpl_agree(t->b->world, cpl_optimizer_scan(t->opt)));
    CPL_TRY(cpl_optimizer_step(t->opt));
done:
    return st;
}

/* Runs it, or replays its graph, and waits; by the device's clock where it has one. */
static cpl_status timed(training *t, cpl_status (*body)(void *context), int part, double *seconds) {
    cpl_status st = CPL_OK;
    cpl_device *dev = t->b->dev;
    double start = cpl_now(), ms = 0;
    CPL_TRY(cpl_device_mark(dev, 0));
    CPL_TRY(t->graph[part] != NULL ? cpl_device_replay(dev, t->graph[part]) : body(t));
    CPL_TRY(cpl_device_mark(dev, 1));
    CPL_TRY(dev->ops->synchronize(dev));
    CPL_TRY(cpl_device_mark_ms(dev, 0, 1, &ms));
    *seconds = ms > 0 ? ms * 1e-3 : cpl_now() - start;
    if (t->graph[part] == NULL && cpl_comm_enqueues(t->b->world)) {
        CPL_TRY(cpl_device_record(dev, body, t, &t->graph[part]));
    }
done:
    return st;
}

/* Collective; seconds[2]: of forward and backward, and of everything. */
static cpl_status step(training *t, double seconds[2]) {
    cpl_status st = CPL_OK;
    double rest = 0;
    CPL_TRY(cpl_agree(t->b->world, timed(t, micro_batch, 0, &seconds[0])));
    CPL_TRY(cpl_agree(t->b->world, timed(t, rest_of_step, 1, &rest)));
    seconds[1] = seconds[0] + rest;
done:
    return st;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Two steps to warm up, of which the second says how many fit; rank 0's clock decides for all. */
static cpl_status run_steps(training *t, int64_t *steps) {
    cpl_status st = CPL_OK;
    double seconds[2];
    for (int i = 0; i < 2; i++) {
        CPL_TRY(step(t, seconds));
    }
    double fit = 3 * t->b->o->seconds / seconds[1];
    *steps = fit < STEPS_LEAST ? STEPS_LEAST : fit > STEPS_MOST ? STEPS_MOST : (int64_t)fit;
    CPL_TRY(cpl_comm_bcast(t->b->world, steps, sizeof *steps, 0));
    cpl_status local = CPL_OK;
    for (int k = 0; k < 2 && local == CPL_OK; k++) {
        local = cpl_alloc(&t->seconds[k], (size_t)*steps, sizeof(double), "bench");
    }
    CPL_TRY(cpl_agree(t->b->world, local));
    for (int64_t i = 0; i < *steps; i++) {
        CPL_TRY(step(t, seconds));
        t->seconds[0][i] = seconds[0];
        t->seconds[1][i] = seconds[1];
    }
    for (int k = 0; k < 2; k++) {
        qsort(t->seconds[k], (size_t)*steps, sizeof(double), by_value);
    }
done:
    return st;
}

static cpl_status forward(void *context) {
    cpl_status st = CPL_OK;
    training *t = context;
    CPL_TRY(cpl_model_forward(t->ws, t->opt->work, t->tokens));
    CPL_TRY(cpl_model_losses(t->ws, t->opt->work, t->tokens, t->losses));
done:
    return st;
}

cpl_status cpl_bench_training(cpl_bench *b) {
    cpl_status st = CPL_OK;
    training t = {.b = b};
    cpl_training options = {0};
    cpl_arena *arena = NULL;
    int64_t steps = 0, *shard = NULL;
    const cpl_model_shape *s = &b->layout->shape;
    double tokens = (double)b->o->micro_batch * (double)s->context;
    cpl_bench_row row = {.tokens = tokens, .flops = tokens * cpl_flops_forward(s), .name = "forward pass and loss"};
    cpl_status local = cpl_arena_create(&arena);
    local = local == CPL_OK ? prepare(&t, &options, arena) : local;
    local = local == CPL_OK ? cpl_alloc(&shard, (size_t)cpl_comm_size(b->world) + 1, sizeof *shard, "bench") : local;
    CPL_TRY(cpl_agree(b->world, local));
    cpl_layout_shards(b->layout, cpl_comm_size(b->world), shard);
    CPL_TRY(cpl_optimizer_create(&t.opt, b->world, b->dev, b->layout, &options, t.initial + shard[cpl_comm_rank(b->world)], NULL));
    static const float lr = 1e-5f;
    CPL_TRY(cpl_optimizer_feed_lr(t.opt, &lr));
    snprintf(row.shape, sizeof row.shape, "%lld/%lld/%lld, %lldx%lld tokens", (long long)s->layers, (long long)s->heads,
             (long long)s->width, (long long)b->o->micro_batch, (long long)s->context);
    CPL_TRY(cpl_bench_add(b, forward, &t, row));
    CPL_TRY(run_steps(&t, &steps));
    row.flops = tokens * cpl_flops_training(s);
    row.repetitions = steps;
    for (int k = 0; k < 2; k++) {
        snprintf(row.name, sizeof row.name, k == 0 ? "forward and backward pass" : "training step");
        row.seconds = steps % 2 ? t.seconds[k][steps / 2] : 0.5 * (t.seconds[k][steps / 2 - 1] + t.seconds[k][steps / 2]);
        row.best = t.seconds[k][0];
        CPL_TRY(cpl_bench_keep(b, row));
    }
done:
    for (int part = 0; part < 2; part++) {
        cpl_graph_destroy(b->dev, &t.graph[part]);
    }
    cpl_optimizer_destroy(&t.opt);
    cpl_workspace_destroy(&t.ws);
    cpl_device_free(b->dev, &t.tokens);
    cpl_device_free(b->dev, &t.losses);
    cpl_free(&t.initial);
    cpl_free(&t.seconds[0]);
    cpl_free(&t.seconds[1]);
    cpl_free(&shard);
    cpl_arena_destroy(&arena);
    return st;
}

/* A forward pass and whole training steps: those of trainer_step.c themselves, with batches fed and metrics drained.
 * Refuses to add up times of parts: a step is timed from one mark between steps to the next. */
#include "jobs/bench_training.h"
#include "jobs/model/flops.h"
#include "jobs/store.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    ALONE_MOST = 50,             /* steps timed one by one */
    AHEAD = CPL_STEPS_AHEAD - 1, /* steps enqueued in a row without a wait for one of them */
    MARK = CPL_STEPS_AHEAD + 1,  /* the first mark that the steps leave free */
    BATCH = CPL_MARKS - MARK - 1 /* steps between whose marks none is used twice */
};

/* Tokens as llm data has them, in a file that is gone again as soon as it is mapped: the trainer reads no others. */
static cpl_status make_text(cpl_bench_trainer *t) {
    cpl_status st = CPL_OK;
    const cpl_bench_options *o = t->b->o;
    int64_t windows = 4 * o->micro_batch * o->accumulate, n = windows * o->context + 1;
    const char *folder = getenv("TMPDIR");
    char path[4096];
    uint16_t *tokens = NULL;
    int file = -1;
    const char *const paths[] = {path};
    CPL_TRY(cpl_alloc(&tokens, (size_t)n, sizeof *tokens, "bench"));
    for (int64_t i = 0; i < n; i++) {
        int64_t allowed = o->vocab < 65536 ? o->vocab : 65536;
        tokens[i] = (uint16_t)(((uint64_t)i * 2654435761u >> 7) % (uint64_t)allowed);
    }
    snprintf(path, sizeof path, "%.4000s/cupel-bench-XXXXXX.bin", folder != NULL && folder[0] != '\0' ? folder : "/tmp");
    file = mkstemps(path, 4);
    if (file < 0) {
        CPL_FAIL(CPL_IO, "bench: no file can be made in the folder of %s", path);
    }
    ssize_t written = write(file, tokens, (size_t)n * sizeof *tokens);
    close(file);
    if (written != (ssize_t)((size_t)n * sizeof *tokens)) {
        st = cpl_fail(CPL_IO, __FILE__, __LINE__, "bench: %s could not be written", path);
    } else {
        st = cpl_corpus_open(&t->corpus, paths, 1, o->vocab);
    }
    unlink(path);
    CPL_TRY(st);
    cpl_split none;
    cpl_corpus_split(t->corpus, 0, o->context, &t->text, &none);
done:
    cpl_free(&tokens);
    return st;
}

static cpl_status prepare(cpl_bench_trainer *t) {
    cpl_status st = CPL_OK;
    const cpl_bench *b = t->b;
    int ranks = cpl_comm_size(b->world);
    CPL_TRY(cpl_arena_create(&t->arena));
    CPL_TRY(cpl_fields_default(cpl_training_table.fields, cpl_training_table.count, &t->options, t->arena));
    t->options.precision = b->o->precision;
    t->options.micro_batch = b->o->micro_batch;
    t->options.global_batch = b->o->micro_batch * b->o->accumulate * ranks;
    t->options.lr = 1e-5;
    t->options.schedule = CPL_SCHEDULE_CONSTANT;
    t->options.warmup = 0;
    t->options.loss_scale = 128; /* fp16 neither overflows nor loses the gradients of random weights */
    CPL_TRY(make_text(t));
    CPL_TRY(cpl_metrics_create(&t->metrics));
    t->spec = (cpl_trainer_spec){.comm = b->world,
                                 .dev = b->dev,
                                 .layout = b->layout,
                                 .options = &t->options,
                                 .steps = 1 << 30,
                                 .train = &t->text,
                                 .seed = 1,
                                 .label = "bench",
                                 .quiet = true};
done:
    return st;
}

static cpl_status allocate(cpl_bench_trainer *t) {
    cpl_status st = CPL_OK;
    const cpl_bench *b = t->b;
    int64_t R = b->o->micro_batch * b->o->context;
    int32_t *host = NULL;
    CPL_TRY(cpl_workspace_create(&t->ws, b->dev, b->layout, b->product, b->o->micro_batch, true, CPL_RECOMPUTE_NONE, 0));
    CPL_TRY(cpl_steps_create(&t->steps, &t->spec, t->opt, t->ws, t->metrics));
    CPL_TRY(cpl_alloc(&host, (size_t)R, sizeof *host, "bench"));
    CPL_TRY(cpl_corpus_read(t->corpus, 0, R, host));
    CPL_TRY(cpl_device_alloc(b->dev, &t->tokens, (size_t)R, sizeof *t->tokens, "bench"));
    CPL_TRY(cpl_device_alloc(b->dev, &t->losses, (size_t)R, sizeof *t->losses, "bench"));
    CPL_TRY(CPL_OPS(b->dev, upload, t->tokens, host, (size_t)R * sizeof *host));
done:
    cpl_free(&host);
    return st;
}

static void release(cpl_bench_trainer *t) {
    cpl_graph_destroy(t->b->dev, &t->decision);
    cpl_steps_destroy(&t->steps);
    cpl_workspace_destroy(&t->ws);
    cpl_optimizer_destroy(&t->opt);
    cpl_metrics_destroy(&t->metrics);
    cpl_corpus_close(&t->corpus);
    cpl_device_free(t->b->dev, &t->tokens);
    cpl_device_free(t->b->dev, &t->losses);
    cpl_free(&t->seconds);
    cpl_arena_destroy(&t->arena);
}

/* --- steps --- */

static cpl_status enqueue(cpl_bench_trainer *t) {
    bool stop = false;
    return cpl_steps_enqueue(t->steps, t->step++, &stop);
}

/* n steps, each waited for: the first runs as it is, the next are a graph where the device records one. */
static cpl_status warm_up(cpl_bench_trainer *t, int64_t n) {
    cpl_status st = CPL_OK;
    for (int64_t i = 0; i < n; i++) {
        CPL_TRY(enqueue(t));
        CPL_TRY(cpl_steps_drain(t->steps));
    }
done:
    return st;
}

/* Seconds between two marks, or, where the device has no clock of its own, between the host's `begin` and `end`. */
static cpl_status elapsed(const cpl_bench_trainer *t, int from, int to, double begin, double end, double *seconds) {
    double ms = 0;
    cpl_status st = cpl_device_mark_ms(t->b->dev, from, to, &ms);
    *seconds = ms > 0 ? ms * 1e-3 : end - begin;
    return st;
}

/* Steps back to back, as in training: each from the mark after the one before to the mark after it. */
static cpl_status time_together(cpl_bench_trainer *t, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    cpl_device *dev = t->b->dev;
    double ends[BATCH + 1];
    for (int64_t done = 0, n; done < t->b->o->steps; done += n) {
        n = t->b->o->steps - done < BATCH ? t->b->o->steps - done : BATCH;
        CPL_TRY(enqueue(t)); /* the device is at work when the first mark comes */
        CPL_TRY(cpl_device_mark(dev, MARK));
        ends[0] = cpl_now();
        for (int64_t i = 1; i <= n; i++) {
            CPL_TRY(enqueue(t));
            CPL_TRY(cpl_device_mark(dev, MARK + (int)i));
            ends[i] = cpl_now();
        }
        CPL_TRY(cpl_steps_drain(t->steps));
        CPL_TRY(dev->ops->synchronize(dev));
        for (int64_t i = 0; i < n; i++) {
            CPL_TRY(elapsed(t, MARK + (int)i, MARK + (int)i + 1, ends[i], ends[i + 1], &t->seconds[done + i]));
        }
    }
    cpl_bench_summarize(t->seconds, t->b->o->steps, row);
done:
    return st;
}

/* Steps with nothing before or after them. */
static cpl_status time_alone(cpl_bench_trainer *t, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    cpl_device *dev = t->b->dev;
    int64_t n = t->b->o->steps < ALONE_MOST ? t->b->o->steps : ALONE_MOST;
    for (int64_t i = 0; i < n; i++) {
        CPL_TRY(dev->ops->synchronize(dev));
        double begin = cpl_now();
        CPL_TRY(cpl_device_mark(dev, MARK));
        CPL_TRY(enqueue(t));
        CPL_TRY(cpl_device_mark(dev, MARK + 1));
        CPL_TRY(dev->ops->synchronize(dev));
        double end = cpl_now();
        CPL_TRY(cpl_steps_drain(t->steps));
        CPL_TRY(elapsed(t, MARK, MARK + 1, begin, end, &t->seconds[i]));
    }
    cpl_bench_summarize(t->seconds, n, row);
done:
    return st;
}

/* What the host does for a step that it only enqueues. */
static cpl_status time_host(cpl_bench_trainer *t, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    int64_t n = 0;
    while (n < t->b->o->steps) {
        CPL_TRY(cpl_steps_drain(t->steps));
        for (int i = 0; i < AHEAD && n < t->b->o->steps; i++, n++) {
            double begin = cpl_now();
            CPL_TRY(enqueue(t));
            t->seconds[n] = cpl_now() - begin;
        }
    }
    CPL_TRY(cpl_steps_drain(t->steps));
    cpl_bench_summarize(t->seconds, n, row);
done:
    return st;
}

/* --- parts --- */

static cpl_status forward(void *context) {
    cpl_status st = CPL_OK;
    cpl_bench_trainer *t = context;
    CPL_TRY(cpl_model_forward(t->ws, t->opt->work, t->tokens));
    CPL_TRY(cpl_model_losses(t->ws, t->opt->work, t->tokens, t->losses));
done:
    return st;
}

/* What a step does for overflow consensus, clipping and the loss scale, over the gradient that the last step left. */
static cpl_status decide(void *context) {
    cpl_status st = CPL_OK;
    cpl_optimizer *o = ((cpl_bench_trainer *)context)->opt;
    CPL_TRY(cpl_optimizer_scan(o));
    CPL_TRY(cpl_optimizer_decide(o));
done:
    return st;
}

static cpl_status run_decision(void *context) {
    cpl_bench_trainer *t = context;
    return t->decision != NULL ? cpl_device_replay(t->b->dev, t->decision) : decide(t);
}

/* --- rows --- */

static cpl_bench_row named(const cpl_bench_trainer *t, const char *name) {
    cpl_bench_row row = {0};
    const cpl_model_shape *s = &t->b->layout->shape;
    const cpl_bench_options *o = t->b->o;
    snprintf(row.name, sizeof row.name, "%s", name);
    snprintf(row.shape, sizeof row.shape, "%lld/%lld/%lld, %lldx%lldx%lld tokens", (long long)s->layers, (long long)s->heads,
             (long long)s->width, (long long)o->accumulate, (long long)o->micro_batch, (long long)s->context);
    return row;
}

static cpl_status add_decision(cpl_bench_trainer *t, double step) {
    cpl_status st = CPL_OK;
    cpl_bench_row row = named(t, "overflow consensus, clip and scaler");
    CPL_TRY(decide(t));
    if (cpl_comm_enqueues(t->b->world)) {
        CPL_TRY(cpl_agree(t->b->world, cpl_device_record(t->b->dev, decide, t, &t->decision)));
    }
    row.whole = step;
    CPL_TRY(cpl_bench_time_together(t->b, run_decision, t, &row));
    CPL_TRY(cpl_bench_keep(t->b, row));
done:
    return st;
}

static cpl_status add_steps(cpl_bench_trainer *t) {
    cpl_status st = CPL_OK;
    cpl_bench *b = t->b;
    double tokens = (double)(b->o->micro_batch * b->o->accumulate * b->o->context);
    cpl_bench_row row = named(t, "training step"), alone = named(t, "a step with no other before or after"),
                  host = named(t, "host, to enqueue a step"), idle = named(t, "device idle between steps"),
                  held = named(t, "device memory");
    row.tokens = tokens;
    row.flops = tokens * cpl_flops_training(&b->layout->shape);
    CPL_TRY(warm_up(t, b->o->warm_up));
    CPL_TRY(time_together(t, &row));
    CPL_TRY(time_alone(t, &alone));
    t->step_seconds = row.seconds;
    CPL_TRY(cpl_bench_keep(b, row));
    CPL_TRY(cpl_bench_keep(b, alone));
    CPL_TRY(add_decision(t, row.seconds));
    if (t->decision != NULL) { /* else the host waits in each step */
        CPL_TRY(time_host(t, &host));
        host.whole = idle.whole = row.seconds;
        idle.seconds = row.seconds > alone.seconds ? row.seconds - alone.seconds : 0;
        idle.repetitions = row.repetitions;
        b->progress.total += 2;
        CPL_TRY(cpl_bench_keep(b, host));
        CPL_TRY(cpl_bench_keep(b, idle));
    }
    size_t now = 0, peak = 0;
    cpl_device_memory(b->dev, &now, &peak);
    held.held = (double)peak;
    CPL_TRY(cpl_bench_keep(b, held));
done:
    return st;
}

int64_t cpl_bench_training_rows(const cpl_bench *b) {
    (void)b;
    return 5;
}

cpl_status cpl_bench_training(cpl_bench *b) {
    cpl_status st = CPL_OK;
    cpl_bench_trainer t = {.b = b};
    cpl_shard first = {0};
    cpl_device_trim(b->dev); /* of what was measured before */
    cpl_device_peak_restart(b->dev);
    cpl_status local = prepare(&t);
    local = local == CPL_OK ? cpl_alloc(&t.seconds, (size_t)b->o->steps + ALONE_MOST, sizeof(double), "bench") : local;
    CPL_TRY(cpl_agree(b->world, local));
    CPL_TRY(cpl_shard_create(&first, b->layout, b->world, false, false));
    cpl_layout_initialize(b->layout, 1, cpl_device_threads(b->dev), first.begin, first.begin + first.n, first.param);
    CPL_TRY(cpl_optimizer_create(&t.opt, b->world, b->dev, b->layout, &t.options, first.param, NULL));
    CPL_TRY(cpl_agree(b->world, allocate(&t)));
    cpl_bench_row row = named(&t, "forward pass and loss");
    row.tokens = (double)(b->o->micro_batch * b->o->context);
    row.flops = row.tokens * cpl_flops_forward(&b->layout->shape);
    snprintf(row.shape, sizeof row.shape, "%lldx%lld tokens", (long long)b->o->micro_batch, (long long)b->o->context);
    CPL_TRY(cpl_bench_add(b, forward, &t, row));
    CPL_TRY(add_steps(&t));
    if (b->o->profile) {
        CPL_TRY(cpl_bench_profile(&t));
    }
done:
    cpl_shard_free(&first);
    release(&t);
    return st;
}

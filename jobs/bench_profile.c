/* A training step by operation: what each took in all its calls, and what part of the step that is.
 * Refuses to profile what a graph replays: the step runs one operation after another, as in the first step of a run. */
#include "jobs/bench_training.h"
#include "jobs/model/flops.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PASSES = 5, KINDS_MOST = 64 };

/* All calls of one operation in a step. */
typedef struct {
    const char *op; /* borrowed */
    int64_t calls;
    double seconds[PASSES], median; /* median: rank 0's */
} kind;

typedef struct {
    kind kind[KINDS_MOST];
    int kinds;
    double whole[PASSES];
} profile;

/* The step itself: behind the last feed of the batch and before the first fetch of the metrics, where it is recorded too. */
static void find_step(const cpl_trace *trace, int64_t *first, int64_t *end) {
    *first = 0;
    *end = trace->count;
    for (int64_t i = 0; i < trace->count; i++) {
        *first = strcmp(trace->op[i].op, "feed") == 0 ? i + 1 : *first;
    }
    for (int64_t i = trace->count; i-- > *first;) {
        *end = strcmp(trace->op[i].op, "fetch") == 0 ? i : *end;
    }
}

static kind *kind_of(profile *p, const char *op) {
    for (int i = 0; i < p->kinds; i++) {
        if (strcmp(p->kind[i].op, op) == 0) {
            return &p->kind[i];
        }
    }
    if (p->kinds == KINDS_MOST - 1) { /* one is left for the rest */
        return NULL;
    }
    p->kind[p->kinds] = (kind){.op = op};
    return &p->kind[p->kinds++];
}

static cpl_status add_up(profile *p, const cpl_trace *trace, int pass) {
    cpl_status st = CPL_OK;
    int64_t first, last;
    double end = 0;
    find_step(trace, &first, &last);
    for (int64_t i = first; i < last; i++) {
        const cpl_traced_op *o = &trace->op[i];
        kind *k = kind_of(p, o->op);
        if (k == NULL) {
            CPL_FAIL(CPL_INTERNAL, "profile: more than %d kinds of operations", KINDS_MOST - 1);
        }
        k->calls += pass == 0;
        k->seconds[pass] += o->ms * 1e-3;
        end = o->at + o->ms > end ? o->at + o->ms : end;
    }
    p->whole[pass] = first < last ? (end - trace->op[first].at) * 1e-3 : 0;
done:
    return st;
}

/* A first step of a run. */
static cpl_status run_pass(cpl_bench_trainer *t, profile *p, int pass) {
    cpl_status st = CPL_OK;
    cpl_steps *steps = NULL;
    cpl_trace trace = {0};
    cpl_device *dev = t->b->dev;
    bool stop = false;
    CPL_TRY(cpl_agree(t->b->world, cpl_steps_create(&steps, &t->spec, t->opt, t->ws, t->metrics)));
    dev->trace = &trace;
    st = cpl_steps_enqueue(steps, 0, &stop);
    dev->trace = NULL;
    CPL_TRY(st);
    CPL_TRY(cpl_steps_drain(steps));
    cpl_status local = cpl_trace_read(dev, &trace);
    CPL_TRY(cpl_agree(t->b->world, local == CPL_OK ? add_up(p, &trace, pass) : local));
done:
    cpl_steps_destroy(&steps);
    cpl_trace_free(&trace);
    return st;
}

/* What all calls of an operation in a step must compute or move: as in bench_layers.c and bench_flat.c. */
static void work_of(const cpl_bench_trainer *t, const char *op, cpl_bench_row *row) {
    const cpl_model_shape *s = &t->b->layout->shape;
    double R = (double)(t->b->o->micro_batch * t->b->o->accumulate * s->context), size = (double)cpl_dtype_size(t->b->dt);
    double act = size * R * (double)s->width, norms = 2.0 * (double)s->layers + 1, total = (double)t->b->layout->total;
    const cpl_stretch *own = t->opt->own; /* the others' gradients of the first are read over links, of the second here */
    double summed =
        8.0 * (double)(own[0].last - own[0].first) + 4.0 * (cpl_comm_size(t->b->world) + 1) * (double)(own[1].last - own[1].first);
    double work = t->b->dt == CPL_F32 ? 0 : size, products = cpl_flops_products(s);
    double gelu = 2 * 4 * (double)s->width * (double)s->width * (double)s->layers; /* of the products, those before GELU */
    const struct {
        const char *op;
        double flops, bytes;
    } works[] = {{"linear_fwd", R * (products - gelu), 0},
                 {"linear_gelu_fwd", R * gelu, 0},
                 {"linear_bwd_input", R * products, 0},
                 {"linear_bwd_weight", R * products, 0},
                 {"attention_fwd", R * cpl_flops_attention(s), 0},
                 {"attention_bwd", 2.5 * R * cpl_flops_attention(s), 0},
                 {"layernorm_fwd", 0, act * 2 * norms},
                 {"layernorm_bwd", 0, act * (4 * norms - 1)}, /* the last has no second gradient */
                 {"embed_fwd", 0, 2 * act},
                 {"embed_bwd", 0, act / size * (size + 8)},
                 {"cross_entropy", 0, 2 * size * R * (double)s->vocab},
                 {"grad_scan", 0, 4 * total},
                 {"grad_sum", 0, summed},
                 {"sum_squares", 0, 4 * (double)t->opt->n},
                 {"adamw", 0, (28 + work) * (double)t->opt->count}};
    for (size_t i = 0; i < sizeof works / sizeof works[0]; i++) {
        if (strcmp(works[i].op, op) == 0) {
            row->flops = works[i].flops;
            row->bytes = works[i].bytes;
        }
    }
}

static int by_time(const void *a, const void *b) {
    double x = ((const kind *)a)->median, y = ((const kind *)b)->median;
    return (x < y) - (x > y);
}

static cpl_status keep(cpl_bench_trainer *t, kind *k, double whole) {
    cpl_bench_row row = {.whole = whole};
    snprintf(row.name, sizeof row.name, "step: %s", k->op);
    snprintf(row.shape, sizeof row.shape, "%lld calls", (long long)k->calls);
    cpl_bench_summarize(k->seconds, PASSES, &row);
    work_of(t, k->op, &row);
    return cpl_bench_keep(t->b, row);
}

/* What took most first, on rank 0; then the time in which no operation ran, and the whole. */
static cpl_status add_rows(cpl_bench_trainer *t, profile *p) {
    cpl_status st = CPL_OK;
    double median[KINDS_MOST];
    kind between = {.op = "between operations"};
    cpl_bench_row whole = {.name = "step: all of it"};
    for (int pass = 0; pass < PASSES; pass++) {
        between.seconds[pass] = p->whole[pass];
        for (int i = 0; i < p->kinds; i++) {
            between.seconds[pass] -= p->kind[i].seconds[pass];
        }
        between.seconds[pass] = between.seconds[pass] > 0 ? between.seconds[pass] : 0;
    }
    for (int i = 0; i < p->kinds; i++) {
        cpl_bench_row row;
        double copy[PASSES];
        memcpy(copy, p->kind[i].seconds, sizeof copy);
        cpl_bench_summarize(copy, PASSES, &row);
        median[i] = row.seconds;
        between.calls += p->kind[i].calls;
    }
    CPL_TRY(cpl_comm_bcast(t->b->world, median, sizeof median, 0));
    for (int i = 0; i < p->kinds; i++) {
        p->kind[i].median = median[i];
    }
    qsort(p->kind, (size_t)p->kinds, sizeof p->kind[0], by_time);
    cpl_bench_summarize(p->whole, PASSES, &whole);
    whole.whole = whole.seconds;
    for (int i = 0; i < p->kinds; i++) {
        CPL_TRY(keep(t, &p->kind[i], whole.seconds));
    }
    CPL_TRY(keep(t, &between, whole.seconds));
    CPL_TRY(cpl_bench_keep(t->b, whole));
done:
    return st;
}

cpl_status cpl_bench_profile(cpl_bench_trainer *t) {
    cpl_status st = CPL_OK;
    profile p = {0};
    for (int pass = 0; pass < PASSES; pass++) {
        CPL_TRY(run_pass(t, &p, pass));
    }
    t->b->progress.total += p.kinds + 2;
    CPL_TRY(add_rows(t, &p));
done:
    return st;
}

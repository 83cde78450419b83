/* See trainer_step.h.
 * Refuses to let the host decide anything about a step but its batch and learning rate. */
#include "jobs/trainer_step.h"
#include "io/base/log.h"
#include "jobs/optim/schedule.h"
#include "jobs/trainer_events.h"
#include <math.h>
#include <string.h>

enum { TREE_DEPTH_MAX = 40 };
static const char doing_step[] = "training step";

/* One step's traffic with the device. All owned, of cpl_device_host_alloc. */
typedef struct {
    int32_t *tokens;       /* [2][own micro-batches][rows]: tokens, then targets */
    float *lr;             /* [1] */
    double *sums;          /* [G][3]: soft and hard loss sum and hidden loss of each micro-batch of all ranks */
    uint32_t *kinds;       /* [tensors] */
    cpl_step_state *state; /* after the step */
    int64_t step;
    double started;
} slot;

struct cpl_steps {
    const cpl_trainer_spec *spec; /* borrowed */
    const cpl_training *t;        /* borrowed */
    cpl_device *dev;              /* borrowed */
    cpl_comm *comm;               /* borrowed */
    cpl_optimizer *opt;           /* borrowed */
    cpl_workspace *ws;            /* borrowed */
    cpl_metrics *metrics;         /* borrowed */
    int64_t B, T, rows, G, own;   /* sequences and rows of a micro-batch; micro-batches of a global batch, and of this rank */
    int64_t *owns;                /* owned [ranks+1]: rank r does micro-batches [owns[r], owns[r+1]) */
    int32_t *tokens;              /* owned, device [2][own][rows] */
    float *soft, *hard;           /* owned, device [rows] */
    double *sums;                 /* owned, device [G][3] */
    float *tree[TREE_DEPTH_MAX];  /* device: gradient buffers of reduction: tree; [0] is opt->grad, the others owned */
    slot slot[CPL_STEPS_AHEAD];
    int64_t first, last; /* steps [first, last) are enqueued and not drained; step i is in slot i % CPL_STEPS_AHEAD */
    int64_t step;        /* being enqueued */
    bool begun;
    float scale;      /* loss scale of step `first` */
    double drained;   /* when the last one was */
    cpl_graph *graph; /* owned: a whole step, where the device records it */
    bool recording;
};

static cpl_status allocate_slot(cpl_steps *s, slot *to) {
    cpl_status st = CPL_OK;
    cpl_device *dev = s->dev;
    CPL_TRY(cpl_device_host_alloc(dev, &to->tokens, 2 * (size_t)(s->own * s->rows), sizeof *to->tokens, "training batch"));
    CPL_TRY(cpl_device_host_alloc(dev, &to->lr, 1, sizeof *to->lr, "learning rate"));
    CPL_TRY(cpl_device_host_alloc(dev, &to->sums, 3 * (size_t)s->G, sizeof *to->sums, "losses"));
    CPL_TRY(cpl_device_host_alloc(dev, &to->kinds, (size_t)s->spec->layout->count, sizeof *to->kinds, "overflow kinds"));
    CPL_TRY(cpl_device_host_alloc(dev, &to->state, 1, sizeof *to->state, "state of a step"));
done:
    return st;
}

static cpl_status allocate(cpl_steps *s) {
    cpl_status st = CPL_OK;
    int ranks = cpl_comm_size(s->comm), rank = cpl_comm_rank(s->comm);
    CPL_TRY(cpl_alloc(&s->owns, (size_t)ranks + 1, sizeof *s->owns, "micro-batch table"));
    for (int i = 0; i <= ranks; i++) {
        s->owns[i] = s->G * i / ranks;
    }
    s->own = s->owns[rank + 1] - s->owns[rank];
    for (int i = 0; i < CPL_STEPS_AHEAD; i++) {
        CPL_TRY(allocate_slot(s, &s->slot[i]));
    }
    CPL_TRY(cpl_device_alloc(s->dev, &s->tokens, 2 * (size_t)(s->own * s->rows), sizeof *s->tokens, "training batch"));
    CPL_TRY(cpl_device_alloc(s->dev, &s->soft, (size_t)s->rows, sizeof *s->soft, "losses"));
    CPL_TRY(cpl_device_alloc(s->dev, &s->hard, (size_t)s->rows, sizeof *s->hard, "losses"));
    CPL_TRY(cpl_device_alloc(s->dev, &s->sums, 3 * (size_t)s->G, sizeof *s->sums, "losses"));
    s->tree[0] = s->opt->grad;
    int depth = 1;
    for (int64_t n = s->own; s->t->reduction == CPL_REDUCTION_TREE && n > 1 && depth < TREE_DEPTH_MAX; n = (n + 1) / 2, depth++) {
        CPL_TRY(cpl_device_alloc(s->dev, &s->tree[depth], (size_t)s->spec->layout->total, sizeof(float), "gradient tree"));
    }
done:
    return st;
}

cpl_status cpl_steps_create(cpl_steps **out, const cpl_trainer_spec *spec, cpl_optimizer *opt, cpl_workspace *ws,
                            cpl_metrics *metrics) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_alloc(out, 1, sizeof **out, "training steps"));
    cpl_steps *s = *out;
    *s = (cpl_steps){.spec = spec,
                     .t = spec->options,
                     .dev = spec->dev,
                     .comm = spec->comm,
                     .opt = opt,
                     .ws = ws,
                     .metrics = metrics,
                     .B = spec->options->micro_batch,
                     .T = spec->layout->shape.context,
                     .G = spec->options->global_batch / spec->options->micro_batch};
    s->rows = s->B * s->T;
    CPL_TRY(allocate(s));
done:
    return st;
}

void cpl_steps_destroy(cpl_steps **steps) {
    cpl_steps *s = *steps;
    if (s == NULL) {
        return;
    }
    cpl_graph_destroy(s->dev, &s->graph);
    for (int i = 0; i < CPL_STEPS_AHEAD; i++) {
        cpl_device_host_free(s->dev, &s->slot[i].tokens);
        cpl_device_host_free(s->dev, &s->slot[i].lr);
        cpl_device_host_free(s->dev, &s->slot[i].sums);
        cpl_device_host_free(s->dev, &s->slot[i].kinds);
        cpl_device_host_free(s->dev, &s->slot[i].state);
    }
    for (int i = 1; i < TREE_DEPTH_MAX; i++) {
        cpl_device_free(s->dev, &s->tree[i]);
    }
    cpl_device_free(s->dev, &s->tokens);
    cpl_device_free(s->dev, &s->soft);
    cpl_device_free(s->dev, &s->hard);
    cpl_device_free(s->dev, &s->sums);
    cpl_free(&s->owns);
    cpl_free(steps);
}

int64_t cpl_steps_bytes(const cpl_layout *layout, const cpl_training *t, int ranks) {
    int64_t rows = t->micro_batch * layout->shape.context, G = t->global_batch / t->micro_batch, own = (G + ranks - 1) / ranks;
    return 8 * own * rows + 8 * rows + 24 * G;
}

/* --- what a step enqueues --- */

/* Forward and backward of this rank's micro-batch i of the step into grad, += or =. ready: told of finished gradients, or NULL. */
static cpl_status micro_batch(cpl_steps *s, int64_t i, float *grad, bool overwrites, const cpl_grad_ready *ready) {
    cpl_status st = CPL_OK;
    int64_t g = s->owns[cpl_comm_rank(s->comm)] + i;
    const int32_t *tokens = s->tokens + i * s->rows, *targets = tokens + s->own * s->rows;
    cpl_model_loss loss = s->spec->loss == NULL ? (cpl_model_loss){0} : *s->spec->loss;
    double *sums = s->sums + 3 * g;
    loss.hidden = sums + 2;
    CPL_TRY(cpl_model_step(s->ws, s->opt->work, tokens, targets, &loss, s->opt->state, grad, overwrites, s->soft, s->hard, ready));
    if (s->spec->loss != NULL) {
        CPL_TRY(CPL_OPS(s->dev, sum_f32, sums, s->soft, s->rows));
    }
    CPL_TRY(CPL_OPS(s->dev, sum_f32, sums + 1, s->hard, s->rows));
done:
    return st;
}

/* Micro-batches [first, last) by halves, recursively: with the halves over the ranks one fixed binary tree over the global batch.
 */
static cpl_status tree_sum(cpl_steps *s, int64_t first, int64_t last, int depth) {
    cpl_status st = CPL_OK;
    if (last - first == 1) {
        return micro_batch(s, first, s->tree[depth], true, NULL);
    }
    int64_t middle = first + (last - first) / 2;
    CPL_TRY(tree_sum(s, first, middle, depth));
    CPL_TRY(tree_sum(s, middle, last, depth + 1));
    CPL_TRY(CPL_OPS(s->dev, add_f32, s->tree[depth], s->tree[depth + 1], s->spec->layout->total));
done:
    return st;
}

/* Whether a fault is injected on some rank at this step. */
static bool faulty(const cpl_steps *s) {
    const cpl_training *t = s->t;
    return t->inject_step >= 0 && s->step >= t->inject_step && s->step < t->inject_step + t->inject_count;
}

static cpl_status inject(cpl_steps *s) {
    const cpl_param *p = cpl_layout_find(s->spec->layout, s->t->inject_tensor);
    float value = s->t->inject_kind == 0 ? INFINITY : NAN;
    return CPL_OPS(s->dev, upload, s->opt->grad + p->offset + cpl_param_count(p) / 2, &value, sizeof value);
}

/* In a graph the gradients are summed over the ranks beside the backward pass; *scanned: then. */
static cpl_status last_micro_batch(cpl_steps *s, bool *scanned) {
    cpl_status st = CPL_OK;
    const cpl_grad_ready *ready = NULL;
    *scanned = s->recording && cpl_optimizer_overlaps(s->opt);
    if (*scanned) {
        CPL_TRY(cpl_optimizer_overlap(s->opt, &ready));
    }
    CPL_TRY(micro_batch(s, s->own - 1, s->opt->grad, s->own == 1, ready));
done:
    return st;
}

static cpl_status accumulate(cpl_steps *s) {
    cpl_status st = CPL_OK;
    bool scanned = false;
    CPL_TRY(CPL_OPS(s->dev, zero, s->sums, 3 * (size_t)s->G * sizeof(double)));
    if (s->t->reduction == CPL_REDUCTION_TREE) {
        CPL_TRY(tree_sum(s, 0, s->own, 0));
    } else {
        for (int64_t i = 0; i < s->own - 1; i++) {
            CPL_TRY(micro_batch(s, i, s->opt->grad, i == 0, NULL));
        }
        CPL_TRY(last_micro_batch(s, &scanned));
    }
    if (faulty(s) && cpl_comm_rank(s->comm) == s->t->inject_rank) {
        CPL_TRY(inject(s));
    }
    if (!scanned) {
        CPL_TRY(cpl_optimizer_scan(s->opt));
    }
done:
    return st;
}

static double hidden_weight(const cpl_steps *s) {
    return s->spec->loss == NULL ? 0 : (double)s->spec->loss->hidden_weight;
}

/* A whole step; collective. */
static cpl_status body(void *context) {
    cpl_status st = CPL_OK;
    cpl_steps *s = context;
    CPL_TRY(cpl_agree(s->comm, accumulate(s)));
    CPL_TRY(cpl_optimizer_step(s->opt));
    CPL_TRY(cpl_comm_allgather(s->comm, s->dev, s->sums, 3 * sizeof(double), s->owns));
done:
    return st;
}

/* --- what the host does --- */

static cpl_status feed(cpl_steps *s, slot *from) {
    cpl_status st = CPL_OK;
    int64_t count = s->own * s->rows;
    uint64_t first = ((uint64_t)s->step * (uint64_t)s->G + (uint64_t)s->owns[cpl_comm_rank(s->comm)]) * (uint64_t)s->B;
    for (int64_t i = 0; i < s->own * s->B; i++) {
        int32_t *tokens = from->tokens + i * s->T;
        CPL_TRY(cpl_split_sample(s->spec->train, s->spec->seed, first + (uint64_t)i, tokens, tokens + count));
    }
    *from->lr = (float)cpl_schedule_lr(s->t, s->step, s->spec->steps);
    CPL_TRY(CPL_OPS(s->dev, feed, s->tokens, from->tokens, 2 * (size_t)count * sizeof *from->tokens));
    CPL_TRY(cpl_optimizer_feed_lr(s->opt, from->lr));
done:
    return st;
}

static cpl_status fetch(cpl_steps *s, slot *to, int mark) {
    cpl_status st = CPL_OK;
    CPL_TRY(CPL_OPS(s->dev, fetch, to->sums, s->sums, 3 * (size_t)s->G * sizeof *to->sums));
    CPL_TRY(CPL_OPS(s->dev, fetch, to->kinds, s->opt->kinds, (size_t)s->spec->layout->count * sizeof *to->kinds));
    CPL_TRY(CPL_OPS(s->dev, fetch, to->state, s->opt->state, sizeof *to->state));
    CPL_TRY(cpl_device_mark(s->dev, mark));
done:
    return st;
}

static cpl_status add_row(cpl_steps *s, const slot *from) {
    double soft = 0, hard = 0, hidden = 0, row[CPL_M_STEP_COLUMNS], now = cpl_now();
    for (int64_t g = 0; g < s->G; g++) {
        soft += from->sums[3 * g];
        hard += from->sums[3 * g + 1];
        hidden += from->sums[3 * g + 2];
    }
    double tokens = (double)s->G * (double)s->rows, began = from->started > s->drained ? from->started : s->drained;
    row[CPL_M_HARD_LOSS] = hard / tokens;
    row[CPL_M_LOSS] = s->spec->loss == NULL ? hard / tokens : cpl_model_loss_total(s->spec->loss, soft / tokens, hard / tokens);
    row[CPL_M_LOSS] += hidden / (double)s->G;
    row[CPL_M_HIDDEN_LOSS] = hidden_weight(s) == 0 ? NAN : hidden / (double)s->G / hidden_weight(s);
    row[CPL_M_LR] = *from->lr;
    row[CPL_M_GRAD_NORM] = from->state->grad_norm;
    row[CPL_M_LOSS_SCALE] = s->scale;
    row[CPL_M_OVERFLOW] = from->state->skip;
    row[CPL_M_STEP_MS] = (now - began) * 1e3;
    s->drained = now;
    return cpl_series_add(&s->metrics->step, row);
}

/* The oldest step: waited for, its row written, its overflow looked at. */
static cpl_status drain_one(cpl_steps *s) {
    cpl_status st = CPL_OK;
    int at = (int)(s->first % CPL_STEPS_AHEAD);
    const slot *from = &s->slot[at];
    cpl_status local = cpl_comm_wait(s->comm, s->dev, at, doing_step);
    if (local == CPL_OK) {
        local = add_row(s, from);
    }
    CPL_TRY(cpl_comm_enqueued(s->comm, local, doing_step));
    s->first++;
    float used = s->scale;
    s->scale = from->state->loss_scale;
    if (from->state->skip) {
        CPL_TRY(cpl_trainer_overflow(s->comm, s->spec->layout, from->kinds, s->metrics, from->step, s->spec->label, from->state,
                                     used, s->t->overflow_limit));
    }
    cpl_watchdog_beat(doing_step);
done:
    return st;
}

cpl_status cpl_steps_drain(cpl_steps *s) {
    cpl_status st = CPL_OK;
    while (s->first < s->last) {
        CPL_TRY(drain_one(s));
    }
done:
    return st;
}

/* The first step of a run: what the device holds now says with which scale. */
static cpl_status begin(cpl_steps *s, int64_t step) {
    cpl_step_state now = {0};
    cpl_status st = CPL_OPS(s->dev, download, &now, s->opt->state, sizeof now);
    s->scale = now.loss_scale;
    s->first = s->last = step;
    s->begun = true;
    return st;
}

static cpl_status record(cpl_steps *s) {
    s->recording = true;
    cpl_status st = cpl_device_record(s->dev, body, s, &s->graph);
    s->recording = false;
    return cpl_agree(s->comm, st);
}

/* Whatever runs for the first time takes memory and chooses algorithms; the same again is recorded. A step with an injected fault
 * is not, on any rank: whether an operation of NCCL is in a graph must be the same on all. */
static cpl_status enqueue(cpl_steps *s) {
    cpl_status st = CPL_OK;
    if (s->graph != NULL && !faulty(s)) {
        return cpl_comm_enqueued(s->comm, cpl_device_replay(s->dev, s->graph), doing_step);
    }
    CPL_TRY(body(s));
    if (s->graph == NULL && cpl_comm_enqueues(s->comm) && !faulty(s)) {
        CPL_TRY(record(s));
    }
done:
    return st;
}

cpl_status cpl_steps_enqueue(cpl_steps *s, int64_t step, bool *stop) {
    cpl_status st = CPL_OK, local = CPL_OK;
    if (!s->begun) {
        local = begin(s, step);
    }
    int ahead = s->graph != NULL ? CPL_STEPS_AHEAD : 1;
    while (local == CPL_OK && s->last - s->first >= ahead) {
        CPL_TRY(drain_one(s));
    }
    int at = (int)(step % CPL_STEPS_AHEAD);
    slot *to = &s->slot[at];
    to->step = s->step = step;
    to->started = cpl_now();
    local = local == CPL_OK ? feed(s, to) : local;
    uint32_t word = (local != CPL_OK ? CPL_WORD_ERROR : 0u) | (s->spec->stop != NULL && *s->spec->stop ? CPL_WORD_STOP : 0u);
    CPL_TRY(cpl_comm_agree_word(s->comm, &word));
    if (word & CPL_WORD_ERROR) {
        CPL_TRY(cpl_agree(s->comm, local));
    }
    *stop = (word & CPL_WORD_STOP) != 0;
    CPL_TRY(enqueue(s));
    CPL_TRY(cpl_comm_enqueued(s->comm, fetch(s, to, at), doing_step));
    s->last = step + 1;
    if (s->graph == NULL) {
        CPL_TRY(cpl_steps_drain(s));
    }
done:
    return st;
}

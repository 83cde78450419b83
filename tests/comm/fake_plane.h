/* A plane over MPI for host memory: the calls that NCCL gets, done at once or as late as may be.
 * Refuses to sum as the tree does: backwards over the ranks, as NCCL may. */
#ifndef CPL_TESTS_COMM_FAKE_PLANE_H
#define CPL_TESTS_COMM_FAKE_PLANE_H

#include "comm/internal.h"
#include <stdio.h>
#include <stdlib.h>

enum { FAKE_RANKS = 8, FAKE_CALLS = 256 };

typedef struct {
    int what; /* 0 max, 1 reduce, 2 gather, 3 exchange */
    void *x;
    int64_t first[FAKE_RANKS], count[FAKE_RANKS];
    cpl_piece to[FAKE_RANKS], from[FAKE_RANKS];
} fake_call;

typedef struct {
    cpl_plane base; /* first */
    bool late;      /* nothing is done before join; else all at once */
    bool forked;
    fake_call call[FAKE_CALLS];
    int calls;
    int reduces, gathers, exchanges; /* so many were asked for */
} fake_plane;

static cpl_status fake_reduce_now(cpl_comm *c, const fake_call *call) {
    cpl_status st = CPL_OK;
    for (int r = 0; r < c->size && st == CPL_OK; r++) {
        int64_t n = call->count[r], offset[FAKE_RANKS + 1];
        float *all = calloc((size_t)(n * c->size) + 1, sizeof *all), *part = (float *)call->x + call->first[r];
        for (int q = 0; q <= c->size; q++) {
            offset[q] = q * n * (int64_t)sizeof *all;
        }
        if (n > 0) {
            memcpy(all + c->rank * n, part, (size_t)n * sizeof *all);
            st = c->ops->allgather(c, all, offset);
        }
        for (int64_t i = 0; r == c->rank && i < n; i++) {
            float sum = all[(c->size - 1) * n + i];
            for (int q = c->size - 2; q >= 0; q--) {
                sum += all[q * n + i];
            }
            part[i] = sum;
        }
        free(all);
    }
    return st;
}

static cpl_status fake_do(fake_plane *f, const fake_call *call) {
    cpl_status st = CPL_OK;
    cpl_comm *c = f->base.comm;
    if (call->what == 0) {
        int64_t word = *(uint32_t *)call->x;
        CPL_TRY(c->ops->allreduce_i64(c, &word, 1, CPL_MAX));
        *(uint32_t *)call->x = (uint32_t)word;
    } else if (call->what == 1) {
        CPL_TRY(fake_reduce_now(c, call));
    } else if (call->what == 2) {
        for (int r = 0; r < c->size; r++) {
            CPL_TRY(c->ops->bcast(c, (char *)call->x + call->first[r], (size_t)call->count[r], r));
        }
    } else {
        CPL_TRY(c->ops->exchange(c, call->to, call->from));
    }
done:
    return st;
}

static cpl_status fake_take(cpl_plane *p, fake_call call) {
    fake_plane *f = (fake_plane *)p;
    if (!f->forked) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "a call of the plane before its fork");
    }
    if (!f->late) {
        return fake_do(f, &call);
    }
    if (f->calls == FAKE_CALLS) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "more than %d calls before a join", FAKE_CALLS);
    }
    f->call[f->calls++] = call;
    return CPL_OK;
}

static fake_call fake_parts(const cpl_plane *p, int what, void *x, const int64_t *first, const int64_t *count) {
    fake_call call = {.what = what, .x = x};
    memcpy(call.first, first, (size_t)p->comm->size * sizeof *first);
    memcpy(call.count, count, (size_t)p->comm->size * sizeof *count);
    return call;
}

static cpl_status fake_fork(cpl_plane *p) {
    ((fake_plane *)p)->forked = true;
    return CPL_OK;
}
static cpl_status fake_join(cpl_plane *p) {
    cpl_status st = CPL_OK;
    fake_plane *f = (fake_plane *)p;
    for (int i = 0; i < f->calls && st == CPL_OK; i++) {
        st = fake_do(f, &f->call[i]);
    }
    f->calls = 0;
    f->forked = false;
    return st;
}
static cpl_status fake_max_u32(cpl_plane *p, uint32_t *word) {
    return fake_take(p, (fake_call){.what = 0, .x = word});
}
static cpl_status fake_reduce(cpl_plane *p, float *x, const int64_t *first, const int64_t *count) {
    ((fake_plane *)p)->reduces++;
    return fake_take(p, fake_parts(p, 1, x, first, count));
}
static cpl_status fake_gather(cpl_plane *p, char *x, const int64_t *first, const int64_t *count) {
    ((fake_plane *)p)->gathers++;
    return fake_take(p, fake_parts(p, 2, x, first, count));
}
static cpl_status fake_exchange(cpl_plane *p, const cpl_piece *to, const cpl_piece *from) {
    fake_call call = {.what = 3};
    ((fake_plane *)p)->exchanges++;
    memcpy(call.to, to, (size_t)p->comm->size * sizeof *to);
    memcpy(call.from, from, (size_t)p->comm->size * sizeof *from);
    return fake_take(p, call);
}
static cpl_status fake_check(cpl_plane *p) {
    return CPL_OK;
}
static void fake_close(cpl_plane *p) {
    free(p);
}

/* c exchanges memory of dev, a CPU device, through it from now on, until cpl_comm_detach. */
static fake_plane *fake_attach(cpl_comm *c, cpl_device *dev, bool late) {
    static const cpl_plane_ops ops = {.fork = fake_fork,
                                      .join = fake_join,
                                      .max_u32 = fake_max_u32,
                                      .reduce = fake_reduce,
                                      .gather = fake_gather,
                                      .exchange = fake_exchange,
                                      .check = fake_check,
                                      .close = fake_close};
    fake_plane *f = calloc(1, sizeof *f);
    if (f == NULL || c->size > FAKE_RANKS) {
        abort();
    }
    f->base = (cpl_plane){.ops = &ops, .comm = c, .dev = dev, .early = true};
    f->late = late;
    c->plane = &f->base;
    return f;
}

#endif

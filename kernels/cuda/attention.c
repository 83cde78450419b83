/* Causal self-attention on CUDA: which implementation a call gets.
 * Refuses a backward whose bits depend on scheduling.
 *
 * CUPEL_ATTENTION=own: our kernels. CUPEL_ATTENTION=cudnn: cuDNN, CPL_UNSUPPORTED where it has no plan for the shape and type or
 * a buffer is not at a multiple of 16 bytes. Else, for each direction, type and shape: our kernels in f32, for such buffers,
 * without cuDNN, where cuDNN has no (for the backward: no deterministic) plan, and in a backward that our kernel for sm_90 can do:
 * cuDNN's keeps all scores in memory and took about 1.4 times as long wherever both were timed (1024 tokens, 12 and 16 heads, H100
 * and H200); otherwise cuDNN where its time is below 0.97 of ours. Both are timed at the first call and kept in the file of timed
 * choices (tuning.h), so that later runs and other ranks choose alike. */
#include "kernels/cuda/attention.h"
#include "kernels/cuda/product.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double CUDNN_WINS_BELOW = 0.97; /* nearer than that the timing tells nothing */

typedef enum { AUTO, OWN, CUDNN } attention_choice;

struct cpl_cuda_attention {
    attention_choice choice;
    cpl_cudnn *cudnn; /* owned, or NULL */
};

#ifndef CPL_CUDNN
cpl_status cpl_attention_cudnn_plan(cpl_device *dev, cpl_cudnn **cudnn, cpl_attention_direction direction,
                                    const cpl_attention_shape *s, bool *usable) {
    *usable = false;
    return CPL_OK;
}
cpl_status cpl_attention_cudnn_run(cpl_device *dev, cpl_cudnn *cudnn, cpl_attention_direction direction,
                                   const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "attention: cuDNN is not in this build");
}
void cpl_attention_cudnn_close(cpl_cudnn **cudnn) {}
size_t cpl_attention_cudnn_version(void) {
    return 0;
}
int64_t cpl_attention_cudnn_workspace(const cpl_attention_shape *s) {
    return 0;
}
#endif

static cpl_status find_choice(attention_choice *choice) {
    cpl_status st = CPL_OK;
    const char *said = getenv("CUPEL_ATTENTION");
    *choice = AUTO;
    if (said != NULL && strcmp(said, "own") == 0) {
        *choice = OWN;
    } else if (said != NULL && strcmp(said, "cudnn") == 0) {
        *choice = CUDNN;
    } else if (said != NULL && said[0] != '\0') {
        CPL_FAIL(CPL_UNSUPPORTED, "CUPEL_ATTENTION=%s: expected own or cudnn", said);
    }
done:
    return st;
}

static cpl_status attention_of(cpl_device *dev, cpl_cuda_attention **out) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (cuda->attention == NULL) {
        attention_choice choice = AUTO;
        CPL_TRY(find_choice(&choice));
        CPL_TRY(cpl_alloc(&cuda->attention, 1, sizeof *cuda->attention, "attention"));
        cuda->attention->choice = choice;
    }
    *out = cuda->attention;
done:
    return st;
}

void cpl_cuda_attention_close(cpl_device *dev) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (cuda->attention != NULL) {
        cpl_attention_cudnn_close(&cuda->attention->cudnn);
        cpl_free(&cuda->attention);
    }
}

/* Sequences of a slice: as many as keep to CPL_ATTENTION_SCORES_MAX in even slices, at least one. */
static int64_t slice_of(cpl_attention_direction direction, const cpl_attention_shape *s) {
    int64_t scores = 2 * s->H * s->T * s->T, most = scores < CPL_ATTENTION_SCORES_MAX ? CPL_ATTENTION_SCORES_MAX / scores : 1;
    int64_t slices = direction == CPL_ATTENTION_FWD ? 1 : (s->B + most - 1) / most;
    return (s->B + slices - 1) / slices;
}

size_t cpl_attention_sm90_scratch(const cpl_attention_shape *s) {
    bool fits = s->D == 64 && s->T % CPL_ATTENTION_SM90_BLOCK == 0 && cpl_dtype_size(s->dt) == 2 && s->B * s->T <= INT32_MAX / 2 &&
                s->B * s->T * s->H <= INT32_MAX / 2;
    return fits ? (size_t)(s->B * s->H * s->T / CPL_ATTENTION_SM90_BLOCK) * CPL_ATTENTION_SM90_FLOATS * sizeof(float) : 0;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

size_t cpl_attention_scratch(const cpl_attention_shape *s, bool training, int capability) {
    attention_choice choice = AUTO;
    cpl_attention_shape part = *s;
    part.B = slice_of(CPL_ATTENTION_BWD, s);
    if (find_choice(&choice) != CPL_OK) {
        cpl_status_clear(); /* the first call tells */
    }
    size_t own = cpl_attention_delta(s), sm90 = capability == 90 ? cpl_attention_sm90_scratch(s) : 0;
    size_t cudnn = cpl_attention_delta(&part) + (size_t)cpl_attention_cudnn_workspace(&part);
    bool timed = choice == AUTO && sm90 == 0;
    return !training ? own : larger(sm90 > 0 ? sm90 : own, choice == CUDNN || timed ? cudnn : 0);
}

static const void *later(const void *p, int64_t bytes) {
    return p == NULL ? NULL : (const char *)p + bytes;
}

/* The buffers from sequence `first` on. */
static cpl_attention_buffers part_of(const cpl_attention_shape *s, const cpl_attention_buffers *x, int64_t first) {
    int64_t rows = first * s->T, act = rows * s->H * s->D * (int64_t)cpl_dtype_size(s->dt);
    return (cpl_attention_buffers){.qkv = later(x->qkv, 3 * act),
                                   .out = (void *)(uintptr_t)later(x->out, act),
                                   .lse = (float *)(uintptr_t)later(x->lse, rows * s->H * (int64_t)sizeof(float)),
                                   .dout = later(x->dout, act),
                                   .dqkv = (void *)(uintptr_t)later(x->dqkv, 3 * act)};
}

/* Whether cuDNN can: a plan for a slice, and for the last one. */
static cpl_status plan_slices(cpl_device *dev, cpl_cuda_attention *a, cpl_attention_direction direction,
                              const cpl_attention_shape *s, bool *usable) {
    cpl_status st = CPL_OK;
    cpl_attention_shape part = *s;
    part.B = slice_of(direction, s);
    int64_t rest = s->B % part.B;
    CPL_TRY(cpl_attention_cudnn_plan(dev, &a->cudnn, direction, &part, usable));
    if (*usable && rest > 0) {
        part.B = rest;
        CPL_TRY(cpl_attention_cudnn_plan(dev, &a->cudnn, direction, &part, usable));
    }
done:
    return st;
}

static cpl_status run_slices(cpl_device *dev, cpl_cuda_attention *a, cpl_attention_direction direction,
                             const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    cpl_status st = CPL_OK;
    int64_t slice = slice_of(direction, s);
    for (int64_t first = 0; first < s->B; first += slice) {
        cpl_attention_shape part = *s;
        cpl_attention_buffers own = part_of(s, x, first);
        part.B = s->B - first < slice ? s->B - first : slice;
        CPL_TRY(cpl_attention_cudnn_run(dev, a->cudnn, direction, &part, &own));
    }
done:
    return st;
}

/* x->dbias += what ops.def says, of dq in x->dqkv and of x->dout. */
static cpl_status add_column_sums(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    cpl_status st = CPL_OK;
    int64_t C = s->H * s->D, R = s->B * s->T;
    CPL_TRY(cpl_cuda_column_sums(dev, s->dt, x->dbias, x->dqkv, 3 * C, R, C));
    CPL_TRY(cpl_cuda_column_sums(dev, s->dt, x->dbias + 2 * C, x->dout, C, R, C));
done:
    return st;
}

static cpl_status run(cpl_device *dev, cpl_cuda_attention *a, bool cudnn, cpl_attention_direction direction,
                      const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    cpl_status st = CPL_OK;
    if (cudnn) {
        CPL_TRY(run_slices(dev, a, direction, s, x));
    } else {
        CPL_TRY(direction == CPL_ATTENTION_FWD ? cpl_attention_own_fwd(dev, s, x) : cpl_attention_own_bwd(dev, s, x));
    }
    if (x->dbias != NULL && (cudnn || !cpl_attention_sm90_usable(dev, s, x))) {
        CPL_TRY(add_column_sums(dev, s, x));
    }
done:
    return st;
}

/* A call to be timed. */
typedef struct {
    cpl_device *dev;
    cpl_cuda_attention *attention;
    bool cudnn;
    cpl_attention_direction direction;
    const cpl_attention_shape *shape;
    const cpl_attention_buffers *buffers;
} timed_call;

static cpl_status run_timed(void *context) {
    const timed_call *t = context;
    return run(t->dev, t->attention, t->cudnn, t->direction, t->shape, t->buffers);
}

/* *ms = its time, from the file of earlier ones where it is there. */
static cpl_status time_of(timed_call *t, double *ms) {
    char name[32];
    const cpl_attention_shape *s = t->shape;
    const char *direction = t->direction == CPL_ATTENTION_FWD ? "fwd" : "bwd";
    if (t->cudnn) {
        snprintf(name, sizeof name, "attention_cudnn%zu_%s", cpl_attention_cudnn_version(), direction);
    } else {
        bool sm90 = cpl_attention_sm90_usable(t->dev, s, t->buffers);
        snprintf(name, sizeof name, "attention_%s_%s", sm90 ? "sm90" : "own", direction);
    }
    return cpl_cuda_timed_once(t->dev, name, (int64_t[4]){s->B, s->T, s->H, 8 * s->D + s->dt}, run_timed, t, ms);
}

/* cuDNN's plans take buffers at multiples of 16 bytes. */
static bool aligned(const cpl_attention_buffers *x) {
    const void *const all[] = {x->qkv, x->out, x->lse, x->dout, x->dqkv};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if ((uintptr_t)all[i] % 16 != 0) {
            return false;
        }
    }
    return true;
}

/* *cudnn = what this call uses; plans and times where that is not known yet. */
static cpl_status choose(cpl_device *dev, cpl_cuda_attention *a, cpl_attention_direction direction, const cpl_attention_shape *s,
                         const cpl_attention_buffers *x, bool *cudnn) {
    cpl_status st = CPL_OK;
    bool usable = false;
    double own_ms = 0, cudnn_ms = 0;
    *cudnn = false;
    bool ours = s->dt == CPL_F32 || !aligned(x) || (direction == CPL_ATTENTION_BWD && cpl_attention_sm90_usable(dev, s, x));
    if (a->choice == OWN || (a->choice == AUTO && ours)) {
        return CPL_OK;
    }
    if (a->choice == CUDNN) {
        if (aligned(x)) {
            CPL_TRY(plan_slices(dev, a, direction, s, &usable));
        }
        if (!usable) {
            CPL_FAIL(CPL_UNSUPPORTED, "attention: cuDNN has no %s for %s [B=%lld, T=%lld, H=%lld, D=%lld] here",
                     direction == CPL_ATTENTION_FWD ? "forward" : "deterministic backward", cpl_dtype_name(s->dt), (long long)s->B,
                     (long long)s->T, (long long)s->H, (long long)s->D);
        }
        *cudnn = true;
        return CPL_OK;
    }
    CPL_TRY(plan_slices(dev, a, direction, s, &usable));
    if (usable) {
        cpl_attention_buffers timed = *x;
        timed.dbias = NULL; /* to which a run would add */
        timed_call own = {dev, a, false, direction, s, &timed}, other = {dev, a, true, direction, s, &timed};
        CPL_TRY(time_of(&own, &own_ms));
        if (time_of(&other, &cudnn_ms) != CPL_OK) { /* it has a plan and fails all the same, or its workspace does not fit */
            cpl_status_clear();
            a->choice = OWN;
        } else {
            *cudnn = cudnn_ms < CUDNN_WINS_BELOW * own_ms;
        }
    }
done:
    return st;
}

static cpl_status attend(cpl_device *dev, cpl_attention_direction direction, const cpl_attention_shape *s,
                         const cpl_attention_buffers *x) {
    cpl_status st = CPL_OK;
    cpl_cuda_attention *a = NULL;
    bool cudnn = false;
    if (s->B * s->T * s->H * s->D == 0) {
        return CPL_OK;
    }
    CPL_TRY(attention_of(dev, &a));
    CPL_TRY(choose(dev, a, direction, s, x, &cudnn));
    CPL_TRY(run(dev, a, cudnn, direction, s, x));
done:
    return st;
}

cpl_status CPL_CUDA(attention_fwd)(cpl_device *dev, cpl_dtype dt, void *out, float *lse, const void *qkv, int64_t B, int64_t T,
                                   int64_t H, int64_t D) {
    const cpl_attention_shape s = {.dt = dt, .B = B, .T = T, .H = H, .D = D};
    const cpl_attention_buffers x = {.qkv = qkv, .out = out, .lse = lse};
    return attend(dev, CPL_ATTENTION_FWD, &s, &x);
}

cpl_status CPL_CUDA(attention_bwd)(cpl_device *dev, cpl_dtype dt, void *dqkv, float *dbias, const void *dout, const void *out,
                                   const float *lse, const void *qkv, int64_t B, int64_t T, int64_t H, int64_t D) {
    const cpl_attention_shape s = {.dt = dt, .B = B, .T = T, .H = H, .D = D};
    const cpl_attention_buffers x = {
        .qkv = qkv, .out = (void *)(uintptr_t)out, .lse = (float *)(uintptr_t)lse, .dout = dout, .dqkv = dqkv, .dbias = dbias};
    return attend(dev, CPL_ATTENTION_BWD, &s, &x);
}

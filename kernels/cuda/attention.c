/* Causal self-attention on CUDA: which implementation a call gets.
 * Refuses a backward whose bits depend on scheduling.
 *
 * CUPEL_ATTENTION=own: our kernels. CUPEL_ATTENTION=cudnn: cuDNN, CPL_UNSUPPORTED where it has no plan for the shape and type or
 * a buffer is not at a multiple of 16 bytes. Else, for each direction, type and shape at its first call: our kernels in f32, for
 * such buffers, without cuDNN, or where cuDNN has no (for the backward: no deterministic) plan; otherwise both run a few times on
 * the buffers of that call, and cuDNN is taken where its median is below 0.9 of ours. What was taken stays until the device closes.
 * The two differ in roundoff, so a run that must repeat another's bits on shapes where they are about equally fast fixes the choice
 * by the environment. A shape first met while a graph is recorded gets our kernels, since nothing can be timed then. */
#include "kernels/cuda/attention.h"
#include <stdlib.h>
#include <string.h>

enum { TIMED_RUNS = 5 };
static const double CUDNN_WINS_BELOW = 0.9;

typedef enum { AUTO, OWN, CUDNN } attention_choice;

typedef struct {
    cpl_attention_direction direction;
    cpl_attention_shape shape;
    bool cudnn;
} remembered;

struct cpl_cuda_attention {
    attention_choice choice;
    cpl_cudnn *cudnn;       /* owned, or NULL */
    remembered *remembered; /* owned [capacity] */
    size_t count, capacity;
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
        cpl_free(&cuda->attention->remembered);
        cpl_free(&cuda->attention);
    }
}

static bool same_shape(const cpl_attention_shape *a, const cpl_attention_shape *b) {
    return a->dt == b->dt && a->B == b->B && a->T == b->T && a->H == b->H && a->D == b->D;
}

static const remembered *find(const cpl_cuda_attention *a, cpl_attention_direction direction, const cpl_attention_shape *s) {
    for (size_t i = 0; i < a->count; i++) {
        if (a->remembered[i].direction == direction && same_shape(&a->remembered[i].shape, s)) {
            return &a->remembered[i];
        }
    }
    return NULL;
}

static cpl_status keep(cpl_cuda_attention *a, cpl_attention_direction direction, const cpl_attention_shape *s, bool cudnn) {
    cpl_status st = CPL_OK;
    remembered *grown = NULL;
    if (a->count == a->capacity) {
        size_t capacity = a->capacity == 0 ? 16 : 2 * a->capacity;
        CPL_TRY(cpl_alloc(&grown, capacity, sizeof *grown, "attention shapes"));
        if (a->count > 0) {
            memcpy(grown, a->remembered, a->count * sizeof *grown);
        }
        cpl_free(&a->remembered);
        a->remembered = grown;
        a->capacity = capacity;
    }
    a->remembered[a->count++] = (remembered){.direction = direction, .shape = *s, .cudnn = cudnn};
done:
    return st;
}

/* Sequences of a slice: as many as keep to CPL_ATTENTION_SCORES_MAX in even slices, at least one. */
static int64_t slice_of(cpl_attention_direction direction, const cpl_attention_shape *s) {
    int64_t scores = 2 * s->H * s->T * s->T, most = scores < CPL_ATTENTION_SCORES_MAX ? CPL_ATTENTION_SCORES_MAX / scores : 1;
    int64_t slices = direction == CPL_ATTENTION_FWD ? 1 : (s->B + most - 1) / most;
    return (s->B + slices - 1) / slices;
}

size_t cpl_attention_scratch(const cpl_attention_shape *s, bool training) {
    attention_choice choice = AUTO;
    cpl_attention_shape part = *s;
    part.B = slice_of(CPL_ATTENTION_BWD, s);
    if (find_choice(&choice) != CPL_OK) {
        cpl_status_clear(); /* the first call tells */
    }
    size_t whole = cpl_attention_delta(s), slice = cpl_attention_delta(&part) + (size_t)cpl_attention_cudnn_workspace(&part);
    return training && choice != OWN && slice > whole ? slice : whole;
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

static cpl_status run(cpl_device *dev, cpl_cuda_attention *a, bool cudnn, cpl_attention_direction direction,
                      const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    if (cudnn) {
        return run_slices(dev, a, direction, s, x);
    }
    return direction == CPL_ATTENTION_FWD ? cpl_attention_own_fwd(dev, s, x) : cpl_attention_own_bwd(dev, s, x);
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* *ms = median of TIMED_RUNS runs after one that is not counted. */
static cpl_status timed(cpl_device *dev, cpl_cuda_attention *a, bool cudnn, cpl_attention_direction direction,
                        const cpl_attention_shape *s, const cpl_attention_buffers *x, double *ms) {
    cpl_status st = CPL_OK;
    cudaStream_t stream = cpl_cuda_stream(dev);
    cudaEvent_t from = NULL, to = NULL;
    float each[TIMED_RUNS];
    CPL_CUDA_TRY("time attention", cudaEventCreate(&from));
    CPL_CUDA_TRY("time attention", cudaEventCreate(&to));
    CPL_TRY(run(dev, a, cudnn, direction, s, x));
    for (int i = 0; i < TIMED_RUNS; i++) {
        CPL_CUDA_TRY("time attention", cudaEventRecord(from, stream));
        CPL_TRY(run(dev, a, cudnn, direction, s, x));
        CPL_CUDA_TRY("time attention", cudaEventRecord(to, stream));
        CPL_CUDA_TRY("time attention", cudaEventSynchronize(to));
        CPL_CUDA_TRY("time attention", cudaEventElapsedTime(&each[i], from, to));
    }
    qsort(each, TIMED_RUNS, sizeof each[0], ascending);
    *ms = each[TIMED_RUNS / 2];
done:
    if (from != NULL) {
        cudaEventDestroy(from);
    }
    if (to != NULL) {
        cudaEventDestroy(to);
    }
    return st;
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
    if (a->choice == OWN || (a->choice == AUTO && (s->dt == CPL_F32 || !aligned(x)))) {
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
    const remembered *known = find(a, direction, s);
    if (known != NULL || cpl_cuda_of(dev)->recording) {
        *cudnn = known != NULL && known->cudnn;
        return CPL_OK;
    }
    CPL_TRY(plan_slices(dev, a, direction, s, &usable));
    if (usable) {
        CPL_TRY(timed(dev, a, false, direction, s, x, &own_ms));
        usable = timed(dev, a, true, direction, s, x, &cudnn_ms) == CPL_OK;
        if (!usable) { /* it has a plan and fails all the same, or its workspace does not fit */
            cpl_status_clear();
        }
    }
    *cudnn = usable && cudnn_ms < CUDNN_WINS_BELOW * own_ms;
    CPL_TRY(keep(a, direction, s, *cudnn));
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

cpl_status CPL_CUDA(attention_bwd)(cpl_device *dev, cpl_dtype dt, void *dqkv, const void *dout, const void *out, const float *lse,
                                   const void *qkv, int64_t B, int64_t T, int64_t H, int64_t D) {
    const cpl_attention_shape s = {.dt = dt, .B = B, .T = T, .H = H, .D = D};
    const cpl_attention_buffers x = {
        .qkv = qkv, .out = (void *)(uintptr_t)out, .lse = (float *)(uintptr_t)lse, .dout = dout, .dqkv = dqkv};
    return attend(dev, CPL_ATTENTION_BWD, &s, &x);
}

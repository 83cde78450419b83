/* cuDNN's attention: plans for the graphs of attention_graph.h, one per direction, type and shape, and their execution.
 * Refuses f32, D % 8 != 0, D > 256, T = 1, workspaces over WORKSPACE_MAX, and cuDNN before 9.10.2. */
#include "kernels/cuda/attention_graph.h"
#include <math.h>
#include <string.h>

enum { ENGINES_MAX = 8 };
/* The backward keeps ds, 2 B H T^2 bytes (805 MB at B = 32, H = 12, T = 1024), and little besides. */
static const int64_t WORKSPACE_MAX = CPL_ATTENTION_SCORES_MAX + ((int64_t)64 << 20);

typedef struct {
    cpl_attention_direction direction;
    cpl_attention_shape shape;
    descriptor plan;   /* owned, or NULL: not possible */
    int64_t workspace; /* bytes */
} planned;

struct cpl_cudnn {
    cudnnHandle_t handle; /* owned, or NULL: cuDNN does not work here */
    planned *plans;       /* owned [capacity] */
    size_t count, capacity;
};

/* Whether the engine of a configuration is marked nondeterministic, or cannot be asked. */
static bool nondeterministic(builder *g, descriptor config) {
    cudnnBackendNumericalNote_t note[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
    int64_t count = 0;
    descriptor engine = make(g, CUDNN_BACKEND_ENGINE_DESCRIPTOR);
    if (g->status != CUDNN_STATUS_SUCCESS ||
        cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count, &engine) !=
            CUDNN_STATUS_SUCCESS ||
        cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE,
                                 CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &count, note) != CUDNN_STATUS_SUCCESS) {
        return true;
    }
    for (int64_t i = 0; i < count; i++) {
        if (note[i] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) {
            return true;
        }
    }
    return false;
}

/* A plan by the first deterministic engine that takes the graph, in the order the heuristic offers; NULL: none. */
static descriptor first_plan(builder *g, descriptor graph, int64_t *workspace) {
    const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
    descriptor heuristic = make(g, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), config[ENGINES_MAX];
    int64_t offered = 0, count = 0;
    set_descriptor(g, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph);
    set(g, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    finish(g, heuristic);
    for (int i = 0; i < ENGINES_MAX; i++) {
        config[i] = make(g, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    }
    if (g->status != CUDNN_STATUS_SUCCESS ||
        cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, ENGINES_MAX, &offered,
                                 config) != CUDNN_STATUS_SUCCESS) {
        return NULL;
    }
    for (int64_t i = 0; i < offered && i < ENGINES_MAX; i++) {
        descriptor plan = NULL;
        if (nondeterministic(g, config[i]) ||
            cudnnBackendCreateDescriptor(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, &plan) != CUDNN_STATUS_SUCCESS) {
            continue;
        }
        if (cudnnBackendSetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &config[i]) ==
                CUDNN_STATUS_SUCCESS &&
            cudnnBackendFinalize(plan) == CUDNN_STATUS_SUCCESS &&
            cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count, workspace) ==
                CUDNN_STATUS_SUCCESS &&
            *workspace <= WORKSPACE_MAX) {
            return plan;
        }
        cudnnBackendDestroyDescriptor(plan);
    }
    return NULL;
}

/* NULL: cuDNN has no plan for it. */
static descriptor plan_of(cudnnHandle_t handle, cpl_attention_direction direction, const cpl_attention_shape *s,
                          int64_t *workspace) {
    builder g = {.s = *s, .act = s->dt == CPL_BF16 ? CUDNN_DATA_BFLOAT16 : CUDNN_DATA_HALF, .next_virtual = VIRTUAL};
    descriptor plan = NULL;
    if (direction == CPL_ATTENTION_FWD) {
        forward_graph(&g);
    } else {
        backward_graph(&g);
    }
    descriptor graph = make(&g, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    set(&g, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, g.operation_count, g.operation);
    set(&g, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    finish(&g, graph);
    if (g.status == CUDNN_STATUS_SUCCESS) {
        plan = first_plan(&g, graph, workspace);
    }
    destroy_all(&g);
    return plan;
}

/* Up to 9.15 cudnn-frontend hides a fault of the backward at other lengths behind a padding mask. */
static bool supported(cpl_attention_direction direction, const cpl_attention_shape *s) {
    size_t version = cudnnGetVersion();
    return version >= 91002 && s->dt != CPL_F32 && s->D % 8 == 0 && s->D <= 256 && s->T > 1 &&
           (direction == CPL_ATTENTION_FWD || version > 91500 || s->T % 128 == 0);
}

/* The backward keeps ds [B,H,T,T] act: 805 MB at B = 32, H = 12, T = 1024. */
int64_t cpl_attention_cudnn_workspace(const cpl_attention_shape *s) {
    int64_t bytes = 2 * s->B * s->H * s->T * s->T;
    return supported(CPL_ATTENTION_BWD, s) && bytes <= WORKSPACE_MAX ? bytes : 0;
}

static planned *find(cpl_cudnn *c, cpl_attention_direction direction, const cpl_attention_shape *s) {
    for (size_t i = 0; i < c->count; i++) {
        const cpl_attention_shape *o = &c->plans[i].shape;
        if (c->plans[i].direction == direction && o->dt == s->dt && o->B == s->B && o->T == s->T && o->H == s->H && o->D == s->D) {
            return &c->plans[i];
        }
    }
    return NULL;
}

static cpl_status open_cudnn(cpl_device *dev, cpl_cudnn **out) {
    cpl_status st = CPL_OK;
    cpl_cudnn *c = NULL;
    CPL_TRY(cpl_alloc(&c, 1, sizeof *c, "cuDNN"));
    if (cudnnCreate(&c->handle) != CUDNN_STATUS_SUCCESS) {
        c->handle = NULL;
    } else if (cudnnSetStream(c->handle, cpl_cuda_stream(dev)) != CUDNN_STATUS_SUCCESS) {
        cudnnDestroy(c->handle);
        c->handle = NULL;
    }
    *out = c;
done:
    return st;
}

static cpl_status room_for_one(cpl_cudnn *c) {
    cpl_status st = CPL_OK;
    planned *grown = NULL;
    if (c->count == c->capacity) {
        size_t capacity = c->capacity == 0 ? 16 : 2 * c->capacity;
        CPL_TRY(cpl_alloc(&grown, capacity, sizeof *grown, "cuDNN plans"));
        if (c->count > 0) {
            memcpy(grown, c->plans, c->count * sizeof *grown);
        }
        cpl_free(&c->plans);
        c->plans = grown;
        c->capacity = capacity;
    }
done:
    return st;
}

cpl_status cpl_attention_cudnn_plan(cpl_device *dev, cpl_cudnn **cudnn, cpl_attention_direction direction,
                                    const cpl_attention_shape *s, bool *usable) {
    cpl_status st = CPL_OK;
    *usable = false;
    if (!supported(direction, s)) {
        return CPL_OK;
    }
    planned *p = *cudnn != NULL ? find(*cudnn, direction, s) : NULL;
    if (p == NULL) {
        if (cpl_cuda_of(dev)->recording) {
            CPL_FAIL(CPL_INTERNAL, "attention: expected the same shape to have run once before a graph is recorded");
        }
        if (*cudnn == NULL) {
            CPL_TRY(open_cudnn(dev, cudnn));
        }
        CPL_TRY(room_for_one(*cudnn));
        p = &(*cudnn)->plans[(*cudnn)->count++];
        *p = (planned){.direction = direction, .shape = *s};
        p->plan = (*cudnn)->handle != NULL ? plan_of((*cudnn)->handle, direction, s, &p->workspace) : NULL;
        (void)cudaGetLastError(); /* what cuDNN tried in vain is not the next launch's error */
    }
    *usable = p->plan != NULL;
done:
    return st;
}

/* Data pointers and unique ids of a call, in the same order; returns how many. by_value: SCALE, MINUS_INF, ONE. */
static int64_t bind(cpl_attention_direction direction, const cpl_attention_shape *s, const cpl_attention_buffers *x, void *delta,
                    float by_value[3], void *pointer[VIRTUAL], int64_t id[VIRTUAL]) {
    int64_t count = 0, part = s->H * s->D * 2; /* bytes between q, k and v */
    char *qkv = (char *)(uintptr_t)x->qkv, *dqkv = x->dqkv;
    by_value[0] = 1.0f / sqrtf((float)s->D);
    by_value[1] = -INFINITY;
    by_value[2] = 1.0f;
    const struct {
        int64_t id;
        void *pointer;
        bool backward_only;
    } all[] = {{Q, qkv, false},
               {K, qkv + part, false},
               {V, qkv + 2 * part, false},
               {O, x->out, false},
               {STATS, x->lse, false},
               {SCALE, &by_value[0], false},
               {MINUS_INF, &by_value[1], false},
               {ONE, &by_value[2], true},
               {DO, (void *)(uintptr_t)x->dout, true},
               {DELTA, delta, true},
               {DQ, dqkv, true},
               {DK, dqkv != NULL ? dqkv + part : NULL, true},
               {DV, dqkv != NULL ? dqkv + 2 * part : NULL, true}};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (direction == CPL_ATTENTION_BWD || !all[i].backward_only) {
            id[count] = all[i].id;
            pointer[count++] = all[i].pointer;
        }
    }
    return count;
}

cpl_status cpl_attention_cudnn_run(cpl_device *dev, cpl_cudnn *cudnn, cpl_attention_direction direction,
                                   const cpl_attention_shape *s, const cpl_attention_buffers *x) {
    cpl_status st = CPL_OK;
    char *scratch = NULL;
    float by_value[3];
    void *pointer[VIRTUAL];
    int64_t id[VIRTUAL];
    builder g = {.s = *s};
    const planned *p = cudnn != NULL ? find(cudnn, direction, s) : NULL;
    if (p == NULL || p->plan == NULL) {
        CPL_FAIL(CPL_INTERNAL, "attention: cuDNN has no plan for this shape");
    }
    /* delta, then the plan's workspace */
    CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ATTENTION, cpl_attention_delta(s) + (size_t)p->workspace, &scratch));
    void *workspace = scratch + cpl_attention_delta(s);
    int64_t count = bind(direction, s, x, scratch, by_value, pointer, id);
    descriptor pack = make(&g, CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
    set(&g, pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, pointer);
    set(&g, pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, id);
    set(&g, pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    finish(&g, pack);
    if (g.status == CUDNN_STATUS_SUCCESS) {
        g.status = cudnnBackendExecute(cudnn->handle, p->plan, pack);
    }
    if (g.status != CUDNN_STATUS_SUCCESS) {
        CPL_FAIL(CPL_DEVICE, "attention: cuDNN: %s", cudnnGetErrorString(g.status));
    }
    st = cpl_cuda_launched(dev, "attention");
done:
    destroy_all(&g);
    return st;
}

void cpl_attention_cudnn_close(cpl_cudnn **cudnn) {
    cpl_cudnn *c = *cudnn;
    if (c == NULL) {
        return;
    }
    for (size_t i = 0; i < c->count; i++) {
        if (c->plans[i].plan != NULL) {
            cudnnBackendDestroyDescriptor(c->plans[i].plan);
        }
    }
    if (c->handle != NULL) {
        cudnnDestroy(c->handle);
    }
    cpl_free(&c->plans);
    cpl_free(cudnn);
}

size_t cpl_attention_cudnn_version(void) {
    return cudnnGetVersion();
}

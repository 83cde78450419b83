/* The graphs of operations that cuDNN's fused attention engines recognise, made through its back-end API; for attention_cudnn.c
 * alone. Refuses the backward that adds dq up in whatever order its blocks come. */
#ifndef CPL_KERNELS_CUDA_ATTENTION_GRAPH_H
#define CPL_KERNELS_CUDA_ATTENTION_GRAPH_H

#include "kernels/cuda/attention.h"
#include <cudnn_backend.h>

/* The pattern is that of NVIDIA's cudnn-frontend 1.23 (scaled_dot_product_flash_attention.h, attn_score_modifiers.h): causal mask
 * by comparison of indices, statistics kept. Its backward has two forms: dq added up in an f32 tensor, or written by the last
 * product itself, from ds kept in the workspace, 2 B H T^2 bytes. The second is what cudnn-frontend makes of a wish for a
 * deterministic algorithm, and the only one here; no engine of cuDNN 9.19 marks the first as nondeterministic, so marks would not
 * tell them apart. */

typedef cudnnBackendDescriptor_t descriptor;

enum { MADE_MAX = 128, OPERATIONS_MAX = 32 };
enum { Q = 1, K, V, O, STATS, DO, DQ, DK, DV, DELTA, SCALE, MINUS_INF, ONE, VIRTUAL }; /* unique ids of tensors */

/* A graph under construction. After the first failure nothing more is made. */
typedef struct {
    cpl_attention_shape s;
    cudnnDataType_t act;
    descriptor made[MADE_MAX]; /* owned [made_count] */
    descriptor operation[OPERATIONS_MAX];
    int made_count, operation_count;
    int64_t next_virtual;
    cudnnStatus_t status;
} builder;

/* --- descriptors --- */

static descriptor make(builder *g, cudnnBackendDescriptorType_t type) {
    descriptor d = NULL;
    if (g->status == CUDNN_STATUS_SUCCESS && g->made_count == MADE_MAX) {
        g->status = CUDNN_STATUS_ALLOC_FAILED;
    }
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->status = cudnnBackendCreateDescriptor(type, &d);
    }
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->made[g->made_count++] = d;
    }
    return d;
}

static void set(builder *g, descriptor d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t count,
                const void *value) {
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->status = cudnnBackendSetAttribute(d, name, type, count, value);
    }
}

static void set_descriptor(builder *g, descriptor d, cudnnBackendAttributeName_t name, descriptor value) {
    if (value != NULL) {
        set(g, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
    }
}

static void finish(builder *g, descriptor d) {
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->status = cudnnBackendFinalize(d);
    }
}

static void destroy_all(builder *g) {
    while (g->made_count > 0) {
        cudnnBackendDestroyDescriptor(g->made[--g->made_count]);
    }
}

/* --- tensors: [B,H,T,D] and the like, four dimensions and strides --- */

typedef struct {
    int64_t at[4];
} four;

static descriptor tensor(builder *g, int64_t id, cudnnDataType_t type, four dims, four strides) {
    descriptor d = make(g, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    const int64_t alignment = 16;
    const bool yes = true;
    set(g, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type);
    set(g, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims.at);
    set(g, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides.at);
    set(g, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &id);
    set(g, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment);
    if (id >= VIRTUAL) {
        set(g, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes);
    } else if (id == SCALE || id == MINUS_INF || id == ONE) {
        set(g, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes);
    }
    finish(g, d);
    return d;
}

/* A head tensor inside rows of `row` elements. transposed: [B,H,D,T]. */
static descriptor heads(builder *g, int64_t id, int64_t row, bool transposed) {
    const cpl_attention_shape *s = &g->s;
    return transposed ? tensor(g, id, g->act, (four){{s->B, s->H, s->D, s->T}}, (four){{s->T * row, s->D, 1, row}})
                      : tensor(g, id, g->act, (four){{s->B, s->H, s->T, s->D}}, (four){{s->T * row, s->D, row, 1}});
}

/* [B,H,T,1]; virtual with id 0. */
static descriptor column(builder *g, int64_t id) {
    const cpl_attention_shape *s = &g->s;
    return tensor(g, id > 0 ? id : g->next_virtual++, CUDNN_DATA_FLOAT, (four){{s->B, s->H, s->T, 1}},
                  (four){{s->H * s->T, s->T, 1, 1}});
}

static descriptor scalar(builder *g, int64_t id) {
    return tensor(g, id, CUDNN_DATA_FLOAT, (four){{1, 1, 1, 1}}, (four){{1, 1, 1, 1}});
}

/* [B,H,T,T], virtual; transposed: the last two dimensions exchanged. */
static descriptor scores(builder *g, cudnnDataType_t type, bool transposed) {
    const cpl_attention_shape *s = &g->s;
    int64_t TT = s->T * s->T;
    return tensor(g, g->next_virtual++, type, (four){{s->B, s->H, s->T, s->T}},
                  (four){{s->H * TT, TT, transposed ? 1 : s->T, transposed ? s->T : 1}});
}

/* --- operations; the results are tensors made before --- */

static void add_operation(builder *g, descriptor d) {
    finish(g, d);
    if (g->status == CUDNN_STATUS_SUCCESS) {
        g->operation[g->operation_count++] = d;
    }
}

/* y = mode(x, b); with t: mode(x, b) where t. axis: of an index, or -1. */
static void pointwise(builder *g, cudnnPointwiseMode_t mode, cudnnDataType_t compute, descriptor x, descriptor b, descriptor t,
                      descriptor y, int64_t axis) {
    const float one = 1.0f;
    descriptor how = make(g, CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    set(g, how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    set(g, how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    if (axis >= 0) {
        set(g, how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis);
    }
    finish(g, how);
    descriptor d = make(g, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, how);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
    set(g, d, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA1, CUDNN_TYPE_FLOAT, 1, &one);
    set(g, d, CUDNN_ATTR_OPERATION_POINTWISE_ALPHA2, CUDNN_TYPE_FLOAT, 1, &one);
    add_operation(g, d);
}

/* A new f32 score tensor = mode(x, b). */
static descriptor score_of(builder *g, cudnnPointwiseMode_t mode, descriptor x, descriptor b) {
    descriptor y = scores(g, CUDNN_DATA_FLOAT, false);
    pointwise(g, mode, CUDNN_DATA_FLOAT, x, b, NULL, y, -1);
    return y;
}

static descriptor matmul(builder *g, descriptor a, descriptor b, descriptor c) {
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    descriptor how = make(g, CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    set(g, how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    finish(g, how);
    descriptor d = make(g, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_MATMUL_DESC, how);
    add_operation(g, d);
    return c;
}

/* A new column = reduction of x over its last dimension. */
static descriptor reduce(builder *g, cudnnReduceTensorOp_t by, descriptor x) {
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    descriptor y = column(g, 0), how = make(g, CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    set(g, how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute);
    set(g, how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &by);
    finish(g, how);
    descriptor d = make(g, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_DESC, how);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
    add_operation(g, d);
    return y;
}

static descriptor reshape(builder *g, descriptor x, descriptor y) {
    descriptor d = make(g, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
    set_descriptor(g, d, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
    add_operation(g, d);
    return y;
}

/* x where key <= query, else -inf. */
static descriptor causal(builder *g, descriptor x) {
    descriptor row = scores(g, CUDNN_DATA_INT32, false), key = scores(g, CUDNN_DATA_INT32, false);
    descriptor seen = scores(g, CUDNN_DATA_BOOLEAN, false), y = scores(g, CUDNN_DATA_FLOAT, false);
    pointwise(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, x, NULL, NULL, row, 2);
    pointwise(g, CUDNN_POINTWISE_GEN_INDEX, CUDNN_DATA_FLOAT, x, NULL, NULL, key, 3);
    pointwise(g, CUDNN_POINTWISE_CMP_GE, CUDNN_DATA_BOOLEAN, row, key, NULL, seen, -1);
    pointwise(g, CUDNN_POINTWISE_BINARY_SELECT, CUDNN_DATA_FLOAT, x, scalar(g, MINUS_INF), seen, y, -1);
    return y;
}

/* --- the two graphs --- */

static void forward_graph(builder *g) {
    int64_t C = g->s.H * g->s.D;
    descriptor s = matmul(g, heads(g, Q, 3 * C, false), heads(g, K, 3 * C, true), scores(g, CUDNN_DATA_FLOAT, false));
    s = causal(g, score_of(g, CUDNN_POINTWISE_MUL, s, scalar(g, SCALE)));
    descriptor top = reduce(g, CUDNN_REDUCE_TENSOR_MAX, s);
    s = score_of(g, CUDNN_POINTWISE_EXP, score_of(g, CUDNN_POINTWISE_SUB, s, top), NULL);
    descriptor sum = reduce(g, CUDNN_REDUCE_TENSOR_ADD, s), log = column(g, 0), p = scores(g, g->act, false);
    pointwise(g, CUDNN_POINTWISE_LOG, CUDNN_DATA_FLOAT, sum, NULL, NULL, log, -1);
    pointwise(g, CUDNN_POINTWISE_ADD, CUDNN_DATA_FLOAT, top, log, NULL, column(g, STATS), -1);
    pointwise(g, CUDNN_POINTWISE_DIV, CUDNN_DATA_FLOAT, s, sum, NULL, p, -1);
    matmul(g, p, heads(g, V, 3 * C, false), heads(g, O, C, false));
}

static void backward_graph(builder *g) {
    const cpl_attention_shape *s = &g->s;
    int64_t C = s->H * s->D, TD = s->T * s->D;
    descriptor q = heads(g, Q, 3 * C, false), kt = heads(g, K, 3 * C, true), vt = heads(g, V, 3 * C, true);
    descriptor dy = heads(g, DO, C, false), scale = scalar(g, SCALE), delta = column(g, DELTA);
    descriptor product =
        tensor(g, g->next_virtual++, CUDNN_DATA_FLOAT, (four){{s->B, s->H, s->T, s->D}}, (four){{s->H * TD, TD, C, 1}});
    pointwise(g, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, dy, heads(g, O, C, false), NULL, product, -1);
    pointwise(g, CUDNN_POINTWISE_MUL, CUDNN_DATA_FLOAT, reduce(g, CUDNN_REDUCE_TENSOR_ADD, product), scalar(g, ONE), NULL, delta,
              -1);

    descriptor p = matmul(g, q, kt, scores(g, CUDNN_DATA_FLOAT, false));
    p = score_of(g, CUDNN_POINTWISE_SUB, score_of(g, CUDNN_POINTWISE_MUL, p, scale), column(g, STATS));
    p = score_of(g, CUDNN_POINTWISE_EXP, causal(g, p), NULL);
    matmul(g, reshape(g, p, scores(g, g->act, true)), dy, heads(g, DV, 3 * C, false));

    descriptor ds = matmul(g, dy, vt, scores(g, CUDNN_DATA_FLOAT, false));
    ds = score_of(g, CUDNN_POINTWISE_MUL, score_of(g, CUDNN_POINTWISE_SUB, ds, delta), p);
    ds = score_of(g, CUDNN_POINTWISE_MUL, ds, scale);
    matmul(g, reshape(g, ds, scores(g, g->act, true)), q, heads(g, DK, 3 * C, false));
    descriptor k = reshape(
        g, kt,
        tensor(g, g->next_virtual++, CUDNN_DATA_FLOAT, (four){{s->B, s->H, s->T, s->D}}, (four){{s->T * 3 * C, s->D, 3 * C, 1}}));
    matmul(g, ds, k, heads(g, DQ, 3 * C, false));
}

#endif

/* What the tests of the model share: a device, a model with weights, a micro-batch and its losses, and the deterministic values of
 * tests/golden/make_golden.py. Refuses to touch device memory but by upload and download, so that it serves any back end. */
#ifndef CPL_TESTS_JOBS_MODEL_RIG_H
#define CPL_TESTS_JOBS_MODEL_RIG_H

#include "jobs/model/model.h"
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

typedef struct {
    const char *name;
    double norm, dot; /* Euclidean norm; product with rig_uniform(500 + number of the tensor) */
    double sample[16];
} golden_tensor;

/* Streams of numbers: weights of the student from 0, of the teacher from 100, signs of `dot` from 500, batches from 800. */
enum { RIG_STUDENT = 0, RIG_TEACHER = 100, RIG_DOT = 500, RIG_IGNORED = 800, RIG_TOKENS = 900 };

static inline uint32_t rig_mix(uint32_t stream, uint32_t i) {
    uint32_t x = i * 2654435761u + stream * 2246822519u + 374761393u;
    x = (x ^ x >> 15) * 2246822519u;
    x = (x ^ x >> 13) * 3266489917u;
    return x ^ x >> 16;
}
/* In [-1/2, 1/2), a multiple of 2^-24. */
static inline double rig_uniform(uint32_t stream, uint32_t i) {
    return (double)(rig_mix(stream, i) >> 8) / 16777216.0 - 0.5;
}

typedef struct {
    cpl_device *dev; /* borrowed */
    cpl_layout *l;   /* owned, as all below */
    cpl_workspace *ws;
    cpl_dtype dt;
    int64_t B, R;
    float *values;             /* host [total] */
    void *weights;             /* device [total] act */
    float *staging;            /* device [total] */
    float *grad;               /* device [total] */
    int32_t *tokens, *targets; /* device [R] */
    float *soft, *hard;        /* device [R] */
    cpl_step_state *state;     /* device */
    int64_t valid;             /* targets that are not ignored */
} rig;

static inline cpl_device *rig_device(int threads) {
    cpl_device *dev = NULL;
    assert_ok(cpl_device_create(&dev, test_on_gpu() ? "cuda" : "cpu", 0, threads));
    return dev;
}

/* r->values become the weights. */
static inline void rig_put_values(rig *r) {
    assert_ok(CPL_OPS(r->dev, upload, r->staging, r->values, (size_t)r->l->total * sizeof(float)));
    assert_ok(CPL_OPS(r->dev, cast_from_f32, r->dt, r->weights, r->staging, r->l->total));
}

static inline void rig_put_scale(rig *r, float loss_scale) {
    cpl_step_state state = {.loss_scale = loss_scale};
    assert_ok(CPL_OPS(r->dev, upload, r->state, &state, sizeof state));
}

/* Weights of make_golden.py: wte +-1/2, wpe +-1/4, matrices +-1/4, gains 1 +- 1/4, biases +-1/8. */
static inline void rig_fill(rig *r, uint32_t stream) {
    for (int64_t t = 0; t < r->l->count; t++) {
        const cpl_param *p = &r->l->param[t];
        bool gain = strstr(p->name, ".gain") != NULL;
        double amplitude = t == 0 ? 1.0 : p->one_d && !gain ? 0.25 : 0.5;
        for (int64_t i = 0; i < cpl_param_count(p); i++) {
            r->values[p->offset + i] = (float)((gain ? 1.0 : 0.0) + amplitude * rig_uniform(stream + (uint32_t)t, (uint32_t)i));
        }
    }
    rig_put_values(r);
}

/* Batch `number` of make_golden.py; with ignored, one target in about seven is -100. */
static inline void rig_put_batch(rig *r, uint32_t number, bool ignored) {
    int64_t T = r->l->shape.context, V = r->l->shape.vocab;
    int32_t *tokens = test_array(r->R, sizeof *tokens), *targets = test_array(r->R, sizeof *targets);
    r->valid = 0;
    for (int64_t i = 0; i < r->R; i++) {
        uint32_t at = (uint32_t)(i / T * (T + 1) + i % T);
        tokens[i] = (int32_t)(rig_mix(RIG_TOKENS + number, at) % (uint32_t)V);
        bool skip = ignored && rig_mix(RIG_IGNORED + number, (uint32_t)i) % 7 == 0;
        targets[i] = skip ? -100 : (int32_t)(rig_mix(RIG_TOKENS + number, at + 1) % (uint32_t)V);
        r->valid += !skip;
    }
    assert_ok(CPL_OPS(r->dev, upload, r->tokens, tokens, (size_t)r->R * sizeof *tokens));
    assert_ok(CPL_OPS(r->dev, upload, r->targets, targets, (size_t)r->R * sizeof *targets));
    test_release(&tokens);
    test_release(&targets);
}

/* l: becomes the rig's own. */
static inline void rig_create_of(rig *r, cpl_device *dev, cpl_layout *l, cpl_dtype dt, int64_t B, bool training,
                                 cpl_recompute recompute, int64_t loss_rows) {
    *r = (rig){.dev = dev, .l = l, .dt = dt, .B = B, .R = B * l->shape.context};
    assert_ok(cpl_workspace_create(&r->ws, dev, r->l, dt, B, training, recompute, loss_rows));
    size_t total = (size_t)r->l->total, R = (size_t)r->R;
    r->values = test_array(r->l->total, sizeof(float));
    assert_ok(cpl_device_alloc(dev, &r->weights, total, cpl_dtype_size(dt), "weights"));
    assert_ok(cpl_device_alloc(dev, &r->staging, total, sizeof(float), "staging"));
    assert_ok(cpl_device_alloc(dev, &r->grad, total, sizeof(float), "gradient"));
    assert_ok(cpl_device_alloc(dev, &r->tokens, R, sizeof(int32_t), "tokens"));
    assert_ok(cpl_device_alloc(dev, &r->targets, R, sizeof(int32_t), "targets"));
    assert_ok(cpl_device_alloc(dev, &r->soft, R, sizeof(float), "soft losses"));
    assert_ok(cpl_device_alloc(dev, &r->hard, R, sizeof(float), "hard losses"));
    assert_ok(cpl_device_alloc(dev, &r->state, 1, sizeof(cpl_step_state), "state"));
    rig_fill(r, RIG_STUDENT);
    rig_put_batch(r, 0, true);
    rig_put_scale(r, 1.0f);
}

static inline void rig_create(rig *r, cpl_device *dev, cpl_model_shape shape, cpl_dtype dt, int64_t B, bool training,
                              cpl_recompute recompute, int64_t loss_rows) {
    cpl_layout *l = NULL;
    assert_ok(cpl_layout_create(&l, &shape));
    rig_create_of(r, dev, l, dt, B, training, recompute, loss_rows);
}

static inline void rig_destroy(rig *r) {
    cpl_workspace_destroy(&r->ws);
    cpl_layout_destroy(&r->l);
    test_release(&r->values);
    cpl_device_free(r->dev, &r->weights);
    cpl_device_free(r->dev, &r->staging);
    cpl_device_free(r->dev, &r->grad);
    cpl_device_free(r->dev, &r->tokens);
    cpl_device_free(r->dev, &r->targets);
    cpl_device_free(r->dev, &r->soft);
    cpl_device_free(r->dev, &r->hard);
    cpl_device_free(r->dev, &r->state);
}

/* grad += that of one step. loss NULL: cross-entropy; row_weight is set to 1 / valid targets. */
static inline void rig_accumulate(rig *r, const cpl_model_loss *loss) {
    cpl_model_loss used = loss != NULL ? *loss : (cpl_model_loss){0};
    used.row_weight = r->valid > 0 ? (float)(1.0 / (double)r->valid) : 1.0f;
    assert_ok(cpl_model_step(r->ws, r->weights, r->tokens, r->targets, &used, r->state, r->grad, false, r->soft, r->hard, NULL));
}

/* The gradient of one step alone, a new host array [total]. */
static inline float *rig_gradient(rig *r, const cpl_model_loss *loss) {
    float *grad = test_array(r->l->total, sizeof *grad);
    assert_ok(CPL_OPS(r->dev, zero, r->grad, (size_t)r->l->total * sizeof *grad));
    rig_accumulate(r, loss);
    assert_ok(CPL_OPS(r->dev, download, grad, r->grad, (size_t)r->l->total * sizeof *grad));
    return grad;
}

/* Mean over valid targets of the rows' losses on the device. */
static inline double rig_mean(rig *r, const float *losses) {
    float *rows = test_array(r->R, sizeof *rows);
    double sum = 0.0;
    assert_ok(CPL_OPS(r->dev, download, rows, losses, (size_t)r->R * sizeof *rows));
    for (int64_t i = 0; i < r->R; i++) {
        sum += rows[i];
    }
    test_release(&rows);
    return sum / (double)r->valid;
}

/* Fails unless a flat host buffer agrees with the reference, tensor by tensor: samples and norm to `tolerance` of the largest
 * reference sample and of the norm, and the gaps between tensors are zero. Returns the worst deviation relative to those. */
static inline double rig_compare(const cpl_layout *l, const float *flat, const golden_tensor *golden, double tolerance) {
    double worst = 0.0;
    for (int64_t t = 0; t < l->count; t++) {
        const cpl_param *p = &l->param[t];
        const float *v = flat + p->offset;
        int64_t n = cpl_param_count(p);
        double square = 0.0, dot = 0.0, error = 0.0, rms = golden[t].norm / sqrt((double)n);
        assert_string_equal(p->name, golden[t].name);
        for (int64_t i = 0; i < n; i++) {
            square += (double)v[i] * v[i];
            dot += v[i] * rig_uniform(RIG_DOT + (uint32_t)t, (uint32_t)i);
        }
        for (int64_t i = n; p->offset + i < l->begin[t + 1]; i++) {
            assert_true(v[i] == 0.0f);
        }
        for (int j = 0; j < 16; j++) {
            error = fmax(error, fabs(v[j * n / 16] - golden[t].sample[j]) / (8.0 * rms));
        }
        error = fmax(error, fabs(sqrt(square) - golden[t].norm) / golden[t].norm);
        error = fmax(error, fabs(dot - golden[t].dot) / golden[t].norm);
        if (!(error <= tolerance)) {
            fail_msg("%s: relative deviation %.3g, expected at most %.3g", p->name, error, tolerance);
        }
        worst = fmax(worst, error);
    }
    return worst;
}

#endif

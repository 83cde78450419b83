/* Causal attention: values against a dense f64 softmax, gradients against its numerical derivatives, causality, bits over threads.
 * Refuses a reference that shares code with the kernels. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

typedef struct {
    int64_t B, T, H, D;
} shape;
/* single token; odd everything; one past a group of rows; past a block of queries; past two blocks of keys; widest head; two blocks
 * of the kernels for sm_90 */
static const shape shapes[] = {{1, 1, 1, 1},    {2, 7, 3, 5},    {1, 49, 2, 17},  {2, 67, 1, 64},
                               {1, 395, 2, 32}, {1, 193, 1, 40}, {1, 30, 1, 256}, {1, 256, 2, 64}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

/* One head of one sequence in f64; loss = sum of weight * out. */
typedef struct {
    shape s;
    double *qkv;    /* borrowed [B,T,3,H,D] */
    double *weight; /* borrowed [B,T,H,D], or NULL */
    int64_t b, h;
    double *out;    /* borrowed [B,T,H,D], written unless NULL */
    double *lse;    /* borrowed [B,H,T], written unless NULL */
    int64_t column; /* of qkv, with a bias */
    double bias;
} reference;

static double head(void *context) {
    const reference *r = context;
    const shape *s = &r->s;
    double sum = 0;
    double score[512];
    for (int64_t i = 0; i < s->T; i++) {
        const double *q = r->qkv + (((r->b * s->T + i) * 3 + 0) * s->H + r->h) * s->D;
        double top = -INFINITY;
        double total = 0;
        for (int64_t j = 0; j <= i; j++) {
            const double *k = r->qkv + (((r->b * s->T + j) * 3 + 1) * s->H + r->h) * s->D;
            score[j] = 0;
            for (int64_t d = 0; d < s->D; d++) {
                score[j] += q[d] * k[d];
            }
            score[j] /= sqrt((double)s->D);
            top = fmax(top, score[j]);
        }
        for (int64_t j = 0; j <= i; j++) {
            score[j] = exp(score[j] - top);
            total += score[j];
        }
        if (r->lse != NULL) {
            r->lse[(r->b * s->H + r->h) * s->T + i] = top + log(total);
        }
        for (int64_t d = 0; d < s->D; d++) {
            double o = 0;
            for (int64_t j = 0; j <= i; j++) {
                o += score[j] * r->qkv[(((r->b * s->T + j) * 3 + 2) * s->H + r->h) * s->D + d];
            }
            int64_t at = ((r->b * s->T + i) * s->H + r->h) * s->D + d;
            if (r->out != NULL) {
                r->out[at] = o / total;
            }
            sum += r->weight != NULL ? r->weight[at] * o / total : 0;
        }
    }
    return sum;
}

static void all_heads(reference *r) {
    for (r->b = 0; r->b < r->s.B; r->b++) {
        for (r->h = 0; r->h < r->s.H; r->h++) {
            head(r);
        }
    }
}

/* The loss with `bias` in every token's `column`. */
static double biased_column(void *context) {
    reference *r = context;
    const shape *s = &r->s;
    int64_t width = 3 * s->H * s->D, n = s->B * s->T * width;
    double sum = 0;
    r->h = r->column / s->D % s->H;
    for (int64_t at = r->column; at < n; at += width) {
        r->qkv[at] += r->bias;
    }
    for (r->b = 0; r->b < s->B; r->b++) {
        sum += head(r);
    }
    for (int64_t at = r->column; at < n; at += width) {
        r->qkv[at] -= r->bias;
    }
    return sum;
}

/* Every device: forward against the reference. */
static void check_forward(cpl_dtype dt, shape s) {
    int64_t n = s.B * s.T * s.H * s.D;
    reference r = {.s = s, .out = test_array(n, sizeof(double)), .lse = test_array(s.B * s.H * s.T, sizeof(double))};
    void *qkv = test_act(dt, 1, 3 * n, 1.0f, &r.qkv);
    void *out = test_array(n, cpl_dtype_size(dt));
    float *lse = test_array(s.B * s.H * s.T, sizeof *lse);
    all_heads(&r);
    /* on a GPU the probabilities are rounded to 16 bits before their product with v */
    double absolute = 4e-6 + (test_on_gpu() && dt != CPL_F32 ? 4 * test_roundoff(dt) : 0);
    for (int i = 0; test_isas[i] != NULL; i++) {
        for (int threads = 1; threads <= 2; threads++) {
            cpl_device *dev = test_device(test_isas[i], threads);
            if (dev != NULL) {
                assert_ok(dev->ops->attention_fwd(dev, dt, out, lse, qkv, s.B, s.T, s.H, s.D));
                test_close("attention", dt, out, r.out, n, absolute, 1.01 * test_roundoff(dt) + 2e-6);
                test_close("log-sum-exp", CPL_F32, lse, r.lse, s.B * s.H * s.T, 4e-6, 2e-6);
            }
            cpl_device_destroy(&dev);
        }
    }
    test_release(&qkv);
    test_release(&out);
    test_release(&lse);
    test_release(&r.qkv);
    test_release(&r.out);
    test_release(&r.lse);
}

static void test_attention_is_the_dense_causal_softmax(void **state) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (int i = 0; i < SHAPES; i++) {
            check_forward(dt, shapes[i]);
        }
    }
}

/* What a backward takes, with the output and log-sum-exp of the reference; r.weight: dout. */
typedef struct {
    reference r;
    void *qkv, *dout, *out;
    float *lse;
} backward_inputs;

static backward_inputs inputs_of(cpl_dtype dt, shape s) {
    int64_t n = s.B * s.T * s.H * s.D, rows = s.B * s.H * s.T;
    backward_inputs x = {.r = {.s = s, .out = test_array(n, sizeof(double)), .lse = test_array(rows, sizeof(double))}};
    x.qkv = test_act(dt, 11, 3 * n, 1.0f, &x.r.qkv);
    x.dout = test_act(dt, 12, n, 1.0f, &x.r.weight);
    x.out = test_array(n, cpl_dtype_size(dt));
    x.lse = test_array(rows, sizeof *x.lse);
    all_heads(&x.r);
    for (int64_t i = 0; i < n; i++) {
        cpl_act_set(dt, x.out, i, (float)x.r.out[i]);
    }
    for (int64_t i = 0; i < rows; i++) {
        x.lse[i] = (float)x.r.lse[i];
    }
    test_release(&x.r.out);
    test_release(&x.r.lse);
    return x;
}

static void inputs_free(backward_inputs *x) {
    test_release(&x->qkv);
    test_release(&x->dout);
    test_release(&x->out);
    test_release(&x->lse);
    test_release(&x->r.qkv);
    test_release(&x->r.weight);
}

/* delta comes from the rounded output: an error of sum |dout| |out| roundoff, times the row of probabilities */
static double error_of_element(cpl_dtype dt) {
    return 2e-5 + 4 * test_roundoff(dt);
}

/* Numerical derivatives of at most 90 elements of qkv, spread over the buffer. */
static void check_backward(cpl_dtype dt, shape s) {
    int64_t n = s.B * s.T * s.H * s.D;
    int64_t samples = 3 * n < 90 ? 3 * n : 90;
    backward_inputs x = inputs_of(dt, s);
    float *dqkv_at = test_array(samples, sizeof *dqkv_at);
    double *want = test_array(samples, sizeof *want);
    void *dqkv = test_array(3 * n, cpl_dtype_size(dt));
    for (int64_t i = 0; i < samples; i++) {
        int64_t at = i * 3 * n / samples;
        x.r.h = at / s.D % s.H;
        x.r.b = at / (3 * s.T * s.H * s.D);
        want[i] = test_derivative(head, &x.r, &x.r.qkv[at], 1e-5);
    }
    for (int i = 0; test_isas[i] != NULL; i++) {
        for (int threads = 1; threads <= 2; threads++) {
            cpl_device *dev = test_device(test_isas[i], threads);
            if (dev != NULL) {
                assert_ok(dev->ops->attention_bwd(dev, dt, dqkv, NULL, x.dout, x.out, x.lse, x.qkv, s.B, s.T, s.H, s.D));
                for (int64_t k = 0; k < samples; k++) {
                    dqkv_at[k] = cpl_act_get(dt, dqkv, k * 3 * n / samples);
                }
                test_close("attention gradient", CPL_F32, dqkv_at, want, samples, error_of_element(dt),
                           1.01 * test_roundoff(dt) + 1e-5);
            }
            cpl_device_destroy(&dev);
        }
    }
    test_release(&dqkv_at);
    test_release(&want);
    test_release(&dqkv);
    inputs_free(&x);
}

static void test_attention_gradient_is_the_numerical_derivative(void **state) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (int i = 0; i < SHAPES; i++) {
            check_backward(dt, shapes[i]);
        }
    }
}

/* Of a bias of at most 30 columns, added to what was there, which is all that k gets; dqkv is what it is without. */
static void check_bias(cpl_dtype dt, shape s) {
    int64_t C = s.H * s.D, n = s.B * s.T * C, columns = 3 * C < 30 ? 3 * C : 30;
    size_t bytes = (size_t)(3 * n) * cpl_dtype_size(dt);
    backward_inputs x = inputs_of(dt, s);
    float *before = test_normals(13, 3 * C, 1.0f), *dbias = test_array(3 * C, sizeof *dbias);
    float *dbias_at = test_array(columns, sizeof *dbias_at);
    double *want = test_array(columns, sizeof *want);
    void *dqkv = test_array(3 * n, cpl_dtype_size(dt)), *alone = test_array(3 * n, cpl_dtype_size(dt));
    for (int64_t i = 0; i < columns; i++) {
        x.r.column = i * 3 * C / columns;
        want[i] = before[x.r.column] + test_derivative(biased_column, &x.r, &x.r.bias, 1e-5);
    }
    for (int i = 0; test_isas[i] != NULL; i++) {
        for (int threads = 1; threads <= 2; threads++) {
            cpl_device *dev = test_device(test_isas[i], threads);
            if (dev != NULL) {
                memcpy(dbias, before, (size_t)(3 * C) * sizeof *dbias);
                assert_ok(dev->ops->attention_bwd(dev, dt, dqkv, dbias, x.dout, x.out, x.lse, x.qkv, s.B, s.T, s.H, s.D));
                assert_ok(dev->ops->attention_bwd(dev, dt, alone, NULL, x.dout, x.out, x.lse, x.qkv, s.B, s.T, s.H, s.D));
                for (int64_t k = 0; k < columns; k++) {
                    dbias_at[k] = dbias[k * 3 * C / columns];
                }
                test_close("gradient of the bias", CPL_F32, dbias_at, want, columns,
                           sqrt((double)(s.B * s.T)) * error_of_element(dt), 1e-5);
                test_same_bits("gradient of the bias of k", dbias + C, before + C, (size_t)C * sizeof *dbias);
                test_same_bits("attention gradient without that of the bias", dqkv, alone, bytes);
            }
            cpl_device_destroy(&dev);
        }
    }
    void *const all[] = {before, dbias, dbias_at, want, dqkv, alone};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        void *one = all[i];
        test_release(&one);
    }
    inputs_free(&x);
}

static void test_gradient_of_the_bias_is_the_numerical_derivative(void **state) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (int i = 0; i < SHAPES; i++) {
            check_bias(dt, shapes[i]);
        }
    }
}

static void future_tokens_change_nothing(cpl_device *dev) {
    const shape s = {1, 250, 1, 24};
    const int64_t cut = 101;
    const int64_t C = s.H * s.D;
    float *qkv = test_normals(21, 3 * s.T * C, 1.0f);
    float *lse = test_array(s.T, sizeof *lse);
    float *before = test_array(s.T * C, sizeof *before);
    float *after = test_array(s.T * C, sizeof *after);
    assert_ok(dev->ops->attention_fwd(dev, CPL_F32, before, lse, qkv, s.B, s.T, s.H, s.D));
    for (int64_t i = cut * 3 * C; i < s.T * 3 * C; i++) {
        qkv[i] = -50 * qkv[i];
    }
    assert_ok(dev->ops->attention_fwd(dev, CPL_F32, after, lse, qkv, s.B, s.T, s.H, s.D));
    test_same_bits("output of the past", before, after, (size_t)(cut * C) * sizeof *before);
    assert_memory_not_equal(before + cut * C, after + cut * C, (size_t)C * sizeof *before);
    test_release(&qkv);
    test_release(&lse);
    test_release(&before);
    test_release(&after);
}

static void test_attention_of_the_past_does_not_see_the_future(void **state) {
    test_on_devices(future_tokens_change_nothing);
}

/* Scores of +-hundreds: the running maximum must be subtracted before any exponential. */
static void large_scores_stay_finite(cpl_device *dev) {
    const shape s = {1, 400, 1, 8};
    const int64_t n = s.T * s.D;
    float *qkv = test_normals(31, 3 * n, 12.0f);
    reference r = {.s = s, .qkv = test_widen(CPL_F32, qkv, 3 * n), .out = test_array(n, sizeof(double))};
    float *out = test_array(n, sizeof *out);
    float *lse = test_array(s.T, sizeof *lse);
    head(&r);
    assert_ok(dev->ops->attention_fwd(dev, CPL_F32, out, lse, qkv, 1, s.T, 1, s.D));
    test_close("attention with large scores", CPL_F32, out, r.out, n, 2e-2, 1e-3);
    test_release(&qkv);
    test_release(&out);
    test_release(&lse);
    test_release(&r.qkv);
    test_release(&r.out);
}

static void test_attention_of_large_scores_stays_finite(void **state) {
    test_on_devices(large_scores_stay_finite);
}

static void inf_and_nan_reach_the_output(cpl_device *dev) {
    const float poison[] = {INFINITY, NAN};
    for (int p = 0; p < 2; p++) {
        float *qkv = test_normals(41, 3 * 9 * 4, 1.0f);
        float out[9 * 4];
        float lse[9];
        qkv[5 * 12 + 4] = poison[p]; /* a key of token 5 */
        assert_ok(dev->ops->attention_fwd(dev, CPL_F32, out, lse, qkv, 1, 9, 1, 4));
        bool seen = false;
        for (int64_t i = 5 * 4; i < 9 * 4; i++) {
            seen = seen || !isfinite(out[i]);
        }
        assert_true(seen);
        for (int64_t i = 0; i < 5 * 4; i++) {
            assert_true(isfinite(out[i]));
        }
        test_release(&qkv);
    }
}

static void test_inf_and_nan_reach_the_output(void **state) {
    test_on_devices(inf_and_nan_reach_the_output);
}

/* 8 threads for 2 heads: the queries of a head are cut as well. */
static void test_attention_bits_do_not_depend_on_threads(void **state) {
    const shape s = {1, 260, 2, 20};
    const int64_t n = s.B * s.T * s.H * s.D, C = s.H * s.D, total = 4 * n + 3 * C + s.B * s.H * s.T;
    const int counts[3] = {1, 2, 8};
    for (int i = 0; test_isas[i] != NULL; i++) {
        float *results[3];
        for (int k = 0; k < 3; k++) {
            cpl_device *dev = test_device(test_isas[i], counts[k]);
            float *qkv = test_normals(51, 3 * n, 1.0f);
            float *all = test_array(total, sizeof *all);
            float *dbias = all + 4 * n;
            float *lse = dbias + 3 * C;
            if (dev != NULL) {
                assert_ok(dev->ops->attention_fwd(dev, CPL_F32, all, lse, qkv, s.B, s.T, s.H, s.D));
                assert_ok(dev->ops->attention_bwd(dev, CPL_F32, all + n, dbias, qkv, all, lse, qkv, s.B, s.T, s.H, s.D));
            }
            results[k] = all;
            test_release(&qkv);
            cpl_device_destroy(&dev);
        }
        size_t bytes = (size_t)total * sizeof(float);
        test_same_bits("1 and 2 threads", results[0], results[1], bytes);
        test_same_bits("1 and 8 threads", results[0], results[2], bytes);
        for (int k = 0; k < 3; k++) {
            test_release(&results[k]);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention_is_the_dense_causal_softmax),
        cmocka_unit_test(test_attention_gradient_is_the_numerical_derivative),
        cmocka_unit_test(test_gradient_of_the_bias_is_the_numerical_derivative),
        cmocka_unit_test(test_attention_of_the_past_does_not_see_the_future),
        cmocka_unit_test(test_attention_of_large_scores_stays_finite),
        cmocka_unit_test(test_inf_and_nan_reach_the_output),
        cmocka_unit_test(test_attention_bits_do_not_depend_on_threads),
    };
    return test_main(tests, NULL, NULL);
}

/* Linear layers: values and gradients against an f64 reference, in every storage format and on ragged tiles; bits over threads.
 * Refuses a reference that shares code with the kernels. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

typedef struct {
    int64_t R, N, K;
} shape;
/* 1x1x1, odd everything, past one tile in each direction */
static const shape shapes[] = {{1, 1, 1}, {5, 7, 3}, {33, 65, 17}, {19, 1, 300}, {530, 37, 20}, {9, 1050, 13}, {7, 15, 1100}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

static double gelu(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static void release(void *const *all, size_t n) {
    for (size_t i = 0; i < n; i++) {
        void *one = all[i];
        test_release(&one);
    }
}

/* want[i,j] = sum over k of a[i*ai + k*ak] * b[j*bj + k*bk], and the sum of the magnitudes, which bounds the rounding of any order.
 */
static void multiply(double *want, double *size, int64_t m, int64_t n, int64_t k, const double *a, int64_t ai, int64_t ak,
                     const double *b, int64_t bj, int64_t bk) {
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            double magnitude = 0;
            for (int64_t l = 0; l < k; l++) {
                double term = a[i * ai + l * ak] * b[j * bj + l * bk];
                sum += term;
                magnitude += fabs(term);
            }
            want[i * n + j] = sum;
            *size = fmax(*size, magnitude);
        }
    }
}

static void check_forward(cpl_device *dev, cpl_dtype dt, shape s) {
    int64_t n = s.R * s.N;
    double *x64;
    double *w64;
    double *bias64;
    double *residual64;
    void *x = test_act(dt, 1, s.R * s.K, 1.0f, &x64);
    void *w = test_act(dt, 2, s.N * s.K, 0.3f, &w64);
    void *bias = test_act(dt, 3, s.N, 1.0f, &bias64);
    void *residual = test_act(dt, 4, n, 2.0f, &residual64);
    void *y = test_array(n, cpl_dtype_size(dt));
    void *pre = test_array(n, cpl_dtype_size(dt));
    double *product = test_array(n, sizeof *product);
    double *want = test_array(n, sizeof *want);
    double size = 0;
    double largest = 0;
    multiply(product, &size, s.R, s.N, s.K, x64, s.K, 1, w64, s.K, 1);
    double absolute = 2e-6 * (size + 3);
    double relative = 1.01 * test_roundoff(dt);
    assert_ok(dev->ops->linear_fwd(dev, dt, y, x, w, NULL, NULL, s.R, s.N, s.K));
    test_close("product", dt, y, product, n, absolute, relative);
    for (int64_t i = 0; i < n; i++) {
        want[i] = product[i] + residual64[i];
        largest = fmax(largest, fabs(product[i]));
    }
    /* a GPU's library may round the product before it adds the bias, and their sum before it adds the residual */
    double again = test_on_gpu() ? 1.01 * test_roundoff(dt) : 0;
    double sum = absolute + again * largest, onto = 2e-6 * (size + 12) + again * (2 * largest + 4);
    assert_ok(dev->ops->linear_fwd(dev, dt, y, x, w, NULL, residual, s.R, s.N, s.K));
    test_close("product onto a residual", dt, y, want, n, onto, relative);
    for (int64_t i = 0; i < n; i++) {
        product[i] += bias64[i % s.N];
        want[i] += bias64[i % s.N];
    }
    assert_ok(dev->ops->linear_fwd(dev, dt, y, x, w, bias, NULL, s.R, s.N, s.K));
    test_close("product and bias", dt, y, product, n, sum, relative);
    assert_ok(dev->ops->linear_fwd(dev, dt, y, x, w, bias, residual, s.R, s.N, s.K));
    test_close("product and bias onto a residual", dt, y, want, n, onto, relative);
    assert_ok(dev->ops->linear_fwd(dev, dt, residual, x, w, bias, residual, s.R, s.N, s.K));
    test_same_bits("into the residual", residual, y, (size_t)n * cpl_dtype_size(dt));
    assert_ok(dev->ops->linear_gelu_fwd(dev, dt, y, pre, x, w, bias, s.R, s.N, s.K));
    test_close("before GELU", dt, pre, product, n, sum, relative);
    for (int64_t i = 0; i < n; i++) {
        want[i] = gelu(cpl_act_get(dt, pre, i));
    }
    test_close("GELU of the rounded value", dt, y, want, n, 1e-7, relative + 4e-6);
    void *const all[] = {x, w, bias, residual, y, pre, product, want, x64, w64, bias64, residual64};
    release(all, sizeof all / sizeof all[0]);
}

static void forward_on(cpl_device *dev) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (int i = 0; i < SHAPES; i++) {
            check_forward(dev, dt, shapes[i]);
        }
    }
}

static void test_linear_forward_is_the_product_rounded_once(void **state) {
    test_on_devices(forward_on);
}

/* A layer in f64 for numerical derivatives: loss = sum of weight * (h w^T), h = GELU(pre) or pre itself. */
typedef struct {
    shape s;
    bool gelu;
    double *pre, *w, *weight; /* borrowed [R,K], [N,K], [R,N] */
    int64_t row, column;      /* the loss over one row (input gradients), one column (weight gradients), or -1: all */
} reference;

static double loss(void *context) {
    const reference *r = context;
    double sum = 0;
    for (int64_t i = r->row < 0 ? 0 : r->row; i < (r->row < 0 ? r->s.R : r->row + 1); i++) {
        for (int64_t j = r->column < 0 ? 0 : r->column; j < (r->column < 0 ? r->s.N : r->column + 1); j++) {
            double y = 0;
            for (int64_t k = 0; k < r->s.K; k++) {
                double h = r->pre[i * r->s.K + k];
                y += (r->gelu ? gelu(h) : h) * r->w[j * r->s.K + k];
            }
            sum += r->weight[i * r->s.N + j] * y;
        }
    }
    return sum;
}

static void check_input_gradient(cpl_device *dev, cpl_dtype dt, shape s) {
    int64_t n = s.R * s.K;
    reference r = {.s = s, .column = -1};
    void *pre = test_act(dt, 21, n, 1.5f, &r.pre);
    void *w = test_act(dt, 22, s.N * s.K, 0.3f, &r.w);
    void *dy = test_act(dt, 23, s.R * s.N, 1.0f, &r.weight);
    void *dx = test_array(n, cpl_dtype_size(dt));
    double *want = test_array(n, sizeof *want);
    for (int with_gelu = 0; with_gelu < 2; with_gelu++) {
        r.gelu = with_gelu != 0;
        for (int64_t i = 0; i < n; i++) {
            r.row = i / s.K;
            want[i] = test_derivative(loss, &r, &r.pre[i], 1e-5);
        }
        float *dbias = test_normals(24, s.K, 3.0f); /* gradients accumulate */
        double *want_dbias = test_widen(CPL_F32, dbias, s.K);
        for (int64_t i = 0; i < n; i++) {
            want_dbias[i % s.K] += want[i];
        }
        /* on a GPU the derivative of GELU in 16 bits may come from a tanh of 11 bits: 2^-11, of sums of N
         * products */
        double coarse = r.gelu && dt != CPL_F32 && test_on_gpu() ? 0x1p-9 * sqrt((double)s.N) : 0;
        assert_ok(dev->ops->linear_bwd_input(dev, dt, dx, dbias, dy, w, r.gelu ? pre : NULL, s.R, s.N, s.K));
        test_close("column sums of the input gradient", CPL_F32, dbias, want_dbias, s.K,
                   (2e-6 * (double)(s.N + 10) + 2 * test_roundoff(dt) + coarse) * (double)s.R, 1e-6);
        test_release(&dbias);
        test_release(&want_dbias);
        assert_ok(dev->ops->linear_bwd_input(dev, dt, dx, NULL, dy, w, r.gelu ? pre : NULL, s.R, s.N, s.K));
        test_close(r.gelu ? "input gradient through GELU" : "input gradient", dt, dx, want, n, 2e-6 * (double)(s.N + 10) + coarse,
                   1.01 * test_roundoff(dt) + 2e-6);
    }
    void *const all[] = {pre, w, dy, dx, want, r.pre, r.w, r.weight};
    release(all, sizeof all / sizeof all[0]);
}

static void check_weight_gradient(cpl_device *dev, cpl_dtype dt, shape s) {
    reference r = {.s = s, .row = -1};
    void *x = test_act(dt, 31, s.R * s.K, 1.0f, &r.pre);
    void *dy = test_act(dt, 32, s.R * s.N, 1.0f, &r.weight);
    float *dw = test_normals(33, s.N * s.K, 3.0f); /* gradients accumulate */
    float *from_zero = test_array(s.N * s.K, sizeof *dw);
    double *want_dw = test_widen(CPL_F32, dw, s.N * s.K);
    r.w = test_array(s.N * s.K, sizeof *r.w);
    for (int64_t i = 0; i < s.N * s.K; i++) {
        r.column = i / s.K;
        want_dw[i] += test_derivative(loss, &r, &r.w[i], 1e-4);
    }
    assert_ok(dev->ops->linear_bwd_weight(dev, dt, dw, dy, x, s.R, s.N, s.K, false));
    test_close("weight gradient", CPL_F32, dw, want_dw, s.N * s.K, 1e-6 * (double)(s.R + 10), 1e-6);
    /* what was there, nan even, is gone; from zero the sum is the same */
    memset(dw, 0xff, (size_t)(s.N * s.K) * sizeof *dw);
    memset(from_zero, 0, (size_t)(s.N * s.K) * sizeof *dw);
    assert_ok(dev->ops->linear_bwd_weight(dev, dt, dw, dy, x, s.R, s.N, s.K, true));
    assert_ok(dev->ops->linear_bwd_weight(dev, dt, from_zero, dy, x, s.R, s.N, s.K, false));
    double *wanted = test_widen(CPL_F32, from_zero, s.N * s.K);
    test_close("weight gradient that overwrites", CPL_F32, dw, wanted, s.N * s.K, 1e-6 * (double)(s.R + 10), 1e-6);
    test_release(&wanted);
    void *const all[] = {x, dy, dw, from_zero, want_dw, r.pre, r.weight, r.w};
    release(all, sizeof all / sizeof all[0]);
}

static void gradients_on(cpl_device *dev) {
    const shape small[] = {{1, 1, 1}, {5, 7, 3}, {17, 13, 29}, {70, 3, 5}, {4, 40, 11}};
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (size_t i = 0; i < sizeof small / sizeof small[0]; i++) {
            check_input_gradient(dev, dt, small[i]);
            check_weight_gradient(dev, dt, small[i]);
        }
    }
}

static void test_linear_gradients_are_the_numerical_derivatives(void **state) {
    test_on_devices(gradients_on);
}

/* All three products over several tiles, and the transposed ones over a long sum, where libraries like to split it among threads.
 */
static void test_linear_bits_do_not_depend_on_threads(void **state) {
    const shape large[] = {{1300, 576, 192}, {2048, 33, 64}, {600, 1030, 70}, {1024, 256, 1024}};
    for (int i = 0; test_isas[i] != NULL; i++) {
        for (int dt = CPL_F32; dt <= CPL_BF16; dt++) {
            for (size_t k = 0; k < sizeof large / sizeof large[0]; k++) {
                shape s = large[k];
                size_t size = cpl_dtype_size(dt);
                size_t parts[4] = {(size_t)(s.R * s.N) * size, (size_t)(s.R * s.K) * size, (size_t)(s.N * s.K) * 4,
                                   (size_t)s.K * 4};
                void *x = test_act(dt, 41, s.R * s.K, 1.0f, NULL);
                void *w = test_act(dt, 42, s.N * s.K, 0.1f, NULL);
                void *bias = test_act(dt, 43, s.N, 1.0f, NULL);
                void *results[3][4];
                for (int threads = 1; threads <= 3; threads++) {
                    void **out = results[threads - 1];
                    for (int p = 0; p < 4; p++) {
                        out[p] = test_array((int64_t)parts[p], 1);
                    }
                    cpl_device *dev = test_device(test_isas[i], threads);
                    if (dev != NULL) {
                        assert_ok(dev->ops->linear_gelu_fwd(dev, dt, out[0], NULL, x, w, bias, s.R, s.N, s.K));
                        assert_ok(dev->ops->linear_bwd_input(dev, dt, out[1], out[3], out[0], w, x, s.R, s.N, s.K));
                        assert_ok(dev->ops->linear_bwd_weight(dev, dt, out[2], out[0], x, s.R, s.N, s.K, i % 2 == 0));
                    }
                    cpl_device_destroy(&dev);
                }
                for (int p = 0; p < 4; p++) {
                    test_same_bits("1 and 2 threads", results[0][p], results[1][p], parts[p]);
                    test_same_bits("1 and 3 threads", results[0][p], results[2][p], parts[p]);
                    for (int t = 0; t < 3; t++) {
                        test_release(&results[t][p]);
                    }
                }
                test_release(&x);
                test_release(&w);
                test_release(&bias);
            }
        }
    }
}

static void overflow_reaches_the_output(cpl_device *dev) {
    uint16_t x[2] = {cpl_f16_from_f32(60000.0f), cpl_f16_from_f32(NAN)};
    uint16_t w[1] = {cpl_f16_from_f32(2.0f)};
    uint16_t y[2];
    assert_ok(dev->ops->linear_fwd(dev, CPL_F16, y, x, w, NULL, NULL, 2, 1, 1));
    assert_int_equal(y[0], 0x7c00);
    assert_true(isnan(cpl_f16_to_f32(y[1])));
}

static void test_fp16_overflow_and_nan_reach_the_output(void **state) {
    test_on_devices(overflow_reaches_the_output);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_linear_forward_is_the_product_rounded_once),
        cmocka_unit_test(test_linear_gradients_are_the_numerical_derivatives),
        cmocka_unit_test(test_linear_bits_do_not_depend_on_threads),
        cmocka_unit_test(test_fp16_overflow_and_nan_reach_the_output),
    };
    return test_main(tests, NULL, NULL);
}

/* LayerNorm with fused residuals: values, gradients against numerical derivatives of an f64 reference, bits over threads.
 * Refuses a reference that shares code with the kernels. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

typedef struct {
    int64_t R, C;
} shape;
static const shape shapes[] = {{1, 1}, {3, 5}, {7, 64}, {70, 33}, {130, 192}, {2, 1000}};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

typedef struct {
    int64_t R, C;
    double *x, *g, *b; /* owned by the test */
    double *weight;    /* loss = sum of weight * y */
    int64_t only;      /* row over which the loss runs, -1: all */
} reference;

static void row_reference(const reference *r, int64_t row, double *y, double *mean, double *rstd) {
    const double *x = r->x + row * r->C;
    double m = 0;
    double v = 0;
    for (int64_t j = 0; j < r->C; j++) {
        m += x[j] / (double)r->C;
    }
    for (int64_t j = 0; j < r->C; j++) {
        v += (x[j] - m) * (x[j] - m) / (double)r->C;
    }
    *mean = m;
    *rstd = 1 / sqrt(v + 1e-5);
    for (int64_t j = 0; j < r->C; j++) {
        y[j] = r->g[j] * (x[j] - m) * *rstd + r->b[j];
    }
}

static double loss(void *context) {
    const reference *r = context;
    double y[1024];
    double mean;
    double rstd;
    double sum = 0;
    for (int64_t row = r->only < 0 ? 0 : r->only; row < (r->only < 0 ? r->R : r->only + 1); row++) {
        row_reference(r, row, y, &mean, &rstd);
        for (int64_t j = 0; j < r->C; j++) {
            sum += r->weight[row * r->C + j] * y[j];
        }
    }
    return sum;
}

static void check_forward(cpl_device *dev, cpl_dtype dt, shape s) {
    int64_t n = s.R * s.C;
    size_t size = cpl_dtype_size(dt);
    reference r = {.R = s.R, .C = s.C};
    void *x = test_act(dt, 1, n, 2.0f, &r.x);
    void *g = test_act(dt, 3, s.C, 1.0f, &r.g);
    void *b = test_act(dt, 4, s.C, 1.0f, &r.b);
    void *y = test_array(n, size);
    float *mean = test_array(s.R, sizeof *mean);
    float *rstd = test_array(s.R, sizeof *rstd);
    double *want = test_array(n, sizeof *want);
    double *stats = test_array(2 * s.R, sizeof *stats);
    assert_ok(dev->ops->layernorm_fwd(dev, dt, y, mean, rstd, x, g, b, s.R, s.C));
    for (int64_t row = 0; row < s.R; row++) {
        row_reference(&r, row, want + row * s.C, &stats[row], &stats[s.R + row]);
    }
    test_close("mean", CPL_F32, mean, stats, s.R, 1e-6, 1e-6);
    test_close("rstd", CPL_F32, rstd, stats + s.R, s.R, 0, 3e-6);
    test_close("layernorm", dt, y, want, n, 1e-5, 1.01 * test_roundoff(dt) + 3e-6);
    void *const all[] = {x, g, b, y, mean, rstd, want, stats, r.x, r.g, r.b};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        void *one = all[i];
        test_release(&one);
    }
}

static void forward_on(cpl_device *dev) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (int i = 0; i < SHAPES; i++) {
            check_forward(dev, dt, shapes[i]);
        }
    }
}

static void test_layernorm_normalises_each_row(void **state) {
    test_on_devices(forward_on);
}

static void check_backward(cpl_device *dev, cpl_dtype dt, shape s) {
    int64_t n = s.R * s.C;
    size_t size = cpl_dtype_size(dt);
    reference r = {.R = s.R, .C = s.C, .only = -1};
    double *dres64;
    void *x = test_act(dt, 11, n, 2.0f, &r.x);
    void *g = test_act(dt, 12, s.C, 1.0f, &r.g);
    void *dy = test_act(dt, 13, n, 1.0f, &r.weight);
    void *dres = test_act(dt, 14, n, 1.0f, &dres64);
    void *dx = test_array(n, size);
    r.b = test_array(s.C, sizeof *r.b);
    float *mean = test_array(s.R, sizeof *mean);
    float *rstd = test_array(s.R, sizeof *rstd);
    float *dg = test_normals(15, s.C, 1.0f); /* gradients accumulate */
    float *db = test_normals(16, s.C, 1.0f);
    double *want_dg = test_widen(CPL_F32, dg, s.C);
    double *want_db = test_widen(CPL_F32, db, s.C);
    float *dbias = test_normals(17, s.C, 1.0f);
    double *want_dbias = test_widen(CPL_F32, dbias, s.C);
    double *want = test_array(n, sizeof *want);
    double y[1024];
    for (int64_t row = 0; row < s.R; row++) {
        double m;
        double v;
        row_reference(&r, row, y, &m, &v);
        mean[row] = (float)m;
        rstd[row] = (float)v;
        r.only = row;
        for (int64_t j = 0; j < s.C; j++) {
            want[row * s.C + j] = test_derivative(loss, &r, &r.x[row * s.C + j], 2e-5) + dres64[row * s.C + j];
            want_dbias[j] += want[row * s.C + j];
        }
    }
    r.only = -1;
    for (int64_t j = 0; j < s.C; j++) {
        want_dg[j] += test_derivative(loss, &r, &r.g[j], 1e-5);
        want_db[j] += test_derivative(loss, &r, &r.b[j], 1e-5);
    }
    assert_ok(dev->ops->layernorm_bwd(dev, dt, dx, dg, db, dbias, dy, dres, x, mean, rstd, g, s.R, s.C));
    double tolerance = s.C == 1 ? 2e-3 : 2e-5; /* one channel: dx is the small rest of a cancellation times rstd = 316 */
    test_close("dx", dt, dx, want, n, tolerance, 1.01 * test_roundoff(dt) + 1e-5);
    test_close("dg", CPL_F32, dg, want_dg, s.C, 1e-5 * sqrt((double)s.R), 1e-5);
    test_close("db", CPL_F32, db, want_db, s.C, 1e-5 * sqrt((double)s.R), 1e-5);
    test_close("dbias", CPL_F32, dbias, want_dbias, s.C, (tolerance + (test_on_gpu() ? 8 * test_roundoff(dt) : 0)) * (double)s.R,
               1e-5); /* there of the rounded dx, perhaps */
    /* dx may be dres or dy */
    memset(dg, 0, (size_t)s.C * sizeof *dg);
    assert_ok(dev->ops->layernorm_bwd(dev, dt, dres, dg, db, NULL, dy, dres, x, mean, rstd, g, s.R, s.C));
    test_same_bits("dx in dres", dres, dx, (size_t)n * size);
    void *const all[] = {x,    g,    dy, dres, dx,    r.x,     r.g,     r.b,        r.weight, dres64,
                         mean, rstd, dg, db,   dbias, want_dg, want_db, want_dbias, want};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        void *one = all[i];
        test_release(&one);
    }
}

static void backward_on(cpl_device *dev) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        for (int i = 0; i < 4; i++) {
            check_backward(dev, dt, shapes[i]);
        }
    }
}

static void test_layernorm_gradient_is_the_numerical_derivative(void **state) {
    test_on_devices(backward_on);
}

static void test_layernorm_bits_do_not_depend_on_threads(void **state) {
    enum { R = 517, C = 129, N = R * C };
    for (int i = 0; test_isas[i] != NULL; i++) {
        float *results[3];
        for (int threads = 1; threads <= 3; threads++) {
            cpl_device *dev = test_device(test_isas[i], threads);
            float *x = test_normals(1, N, 1.0f);
            float *gb = test_normals(2, 2 * C, 1.0f);
            float *all = test_array(2 * N + 2 * R + 3 * C, sizeof *all);
            float *mean = all + 2 * N;
            float *grads = mean + 2 * R;
            if (dev != NULL) {
                assert_ok(dev->ops->layernorm_fwd(dev, CPL_F32, all, mean, mean + R, x, gb, gb + C, R, C));
                assert_ok(dev->ops->layernorm_bwd(dev, CPL_F32, all + N, grads, grads + C, grads + 2 * C, all, x, x, mean, mean + R,
                                                  gb, R, C));
            }
            results[threads - 1] = all;
            test_release(&x);
            test_release(&gb);
            cpl_device_destroy(&dev);
        }
        size_t bytes = (2 * N + 2 * R + 3 * C) * sizeof(float);
        test_same_bits("1 and 2 threads", results[0], results[1], bytes);
        test_same_bits("1 and 3 threads", results[0], results[2], bytes);
        for (int k = 0; k < 3; k++) {
            test_release(&results[k]);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layernorm_normalises_each_row),
        cmocka_unit_test(test_layernorm_gradient_is_the_numerical_derivative),
        cmocka_unit_test(test_layernorm_bits_do_not_depend_on_threads),
    };
    return test_main(tests, NULL, NULL);
}

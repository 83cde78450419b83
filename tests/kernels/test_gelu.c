/* GELU, tanh form: values, agreement with linear_gelu_fwd bit for bit, independence of position and threads.
 * Refuses tolerances wider than the storage format plus a few ulps. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

static double gelu(double x) {
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

static void gelu_is_the_tanh_form(cpl_device *dev) {
    enum { N = 5003 };
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        double *exact;
        void *x = test_act(dt, 1, N, 2.5f, &exact);
        void *y = test_array(N, cpl_dtype_size(dt));
        assert_ok(dev->ops->gelu_fwd(dev, dt, y, x, N));
        for (int64_t i = 0; i < N; i++) {
            exact[i] = gelu(exact[i]);
        }
        /* far left, 1 + tanh cancels in f32 forms; the gate form keeps its relative accuracy there but for the error of its
         * exponent */
        test_close("gelu", dt, y, exact, N, dt == CPL_F16 ? 0x1p-24 : 1e-9, 1.01 * test_roundoff(dt) + 4e-6);
        test_release(&x);
        test_release(&y);
        test_release(&exact);
    }
}

static void test_gelu_is_the_tanh_form(void **state) {
    test_on_devices(gelu_is_the_tanh_form);
}

static void gelu_at_the_ends(cpl_device *dev) {
    const float x[] = {0.0f, 1e30f, -1e30f, 3e38f, INFINITY, NAN, 40.0f, -40.0f, 1e-38f};
    float y[9];
    assert_ok(dev->ops->gelu_fwd(dev, CPL_F32, y, x, 9));
    assert_true(y[0] == 0.0f && y[1] == 1e30f && y[2] == 0.0f && y[3] == 3e38f && y[4] == INFINITY && isnan(y[5]));
    assert_true(y[6] == 40.0f && y[7] == 0.0f && y[8] == 0.5e-38f);
}

static void test_gelu_at_the_ends(void **state) {
    test_on_devices(gelu_at_the_ends);
}

static void gelu_is_what_linear_makes(cpl_device *dev) {
    const int64_t R = 37;
    const int64_t N = 45;
    const int64_t K = 19;
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        size_t size = cpl_dtype_size(dt);
        void *x = test_act(dt, 2, R * K, 1.0f, NULL);
        void *w = test_act(dt, 3, N * K, 0.5f, NULL);
        void *bias = test_act(dt, 4, N, 1.0f, NULL);
        char *y = test_array(R * N, size);
        char *pre = test_array(R * N, size);
        char *again = test_array(R * N, size);
        assert_ok(dev->ops->linear_gelu_fwd(dev, dt, y, pre, x, w, bias, R, N, K));
        assert_ok(dev->ops->gelu_fwd(dev, dt, again, pre, R * N));
        test_same_bits("gelu of linear's pre", y, again, (size_t)(R * N) * size);
        memset(y, 0, (size_t)(R * N) * size);
        assert_ok(dev->ops->linear_gelu_fwd(dev, dt, y, NULL, x, w, bias, R, N, K));
        if (test_on_gpu()) { /* by another product, perhaps */
            double *want = test_widen(dt, again, R * N);
            test_close("linear without pre", dt, y, want, R * N, 4 * test_roundoff(dt), 2 * test_roundoff(dt));
            test_release(&want);
        } else {
            test_same_bits("linear without pre", y, again, (size_t)(R * N) * size);
        }
        test_release(&x);
        test_release(&w);
        test_release(&bias);
        test_release(&y);
        test_release(&pre);
        test_release(&again);
    }
}

static void test_gelu_is_what_linear_makes_of_the_same_value(void **state) {
    test_on_devices(gelu_is_what_linear_makes);
}

/* An element's bits must not depend on whether it falls into a vector body or a tail. */
static void gelu_is_the_same_anywhere(cpl_device *dev) {
    enum { N = 20011 };
    float *x = test_normals(5, N, 3.0f);
    float *whole = test_array(N, sizeof *whole);
    float *part = test_array(N, sizeof *part);
    assert_ok(dev->ops->gelu_fwd(dev, CPL_F32, whole, x, N));
    for (int64_t shift = 1; shift < 40; shift++) {
        int64_t n = 3 * shift + 100;
        assert_ok(dev->ops->gelu_fwd(dev, CPL_F32, part, x + shift, n));
        test_same_bits("gelu of a part", part, whole + shift, (size_t)n * sizeof *part);
    }
    test_release(&x);
    test_release(&whole);
    test_release(&part);
}

static void test_gelu_has_the_same_bits_at_any_position(void **state) {
    test_on_devices(gelu_is_the_same_anywhere);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gelu_is_the_tanh_form),
        cmocka_unit_test(test_gelu_at_the_ends),
        cmocka_unit_test(test_gelu_is_what_linear_makes_of_the_same_value),
        cmocka_unit_test(test_gelu_has_the_same_bits_at_any_position),
    };
    return test_main(tests, NULL, NULL);
}

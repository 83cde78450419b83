/* Proves the hidden-state loss against f64 and its gradient against finite differences.
 * Refuses to forget that the gradient is added to what is there. */
#include "tests/support/support.h"
#include <math.h>

enum { N = 20483 };
static const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};
static const double coefficient = 0x1.8p-11;

static double exact(const double *a, const double *b) {
    double sum = 0;
    for (int i = 0; i < N; i++) {
        sum += (a[i] - b[i]) * (a[i] - b[i]);
    }
    return coefficient * sum;
}

static void loss_and_gradient(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 64};
    for (int k = 0; k < 3; k++) {
        cpl_dtype dt = types[k];
        double *a64, *b64, *grad64, sum = 3;
        void *a = test_act(dt, 1, N, 1.0f, &a64), *b = test_act(dt, 2, N, 1.0f, &b64), *grad = test_act(dt, 3, N, 0.1f, &grad64);
        assert_ok(CPL_OPS(dev, mse, dt, &sum, grad, a, b, &state, (float)coefficient, N));
        double want = exact(a64, b64);
        assert_true(fabs(sum - 3 - want) < 1e-7 * want);
        for (int i = 0; i < N; i++) {
            grad64[i] += 64 * 2 * coefficient * (a64[i] - b64[i]);
        }
        test_close("grad", dt, grad, grad64, N, 1e-7, 1.01 * test_roundoff(dt) + 2e-7);
        double twice = 0;
        assert_ok(CPL_OPS(dev, mse, dt, &twice, NULL, a, b, NULL, (float)coefficient, N)); /* the loss alone */
        assert_true(fabs(twice - (sum - 3)) < 1e-12);
        assert_ok(CPL_OPS(dev, mse, dt, &twice, NULL, a, a, NULL, (float)coefficient, N));
        assert_true(fabs(twice - (sum - 3)) < 1e-12); /* a against itself: nothing added */
        test_release(&a64);
        test_release(&b64);
        test_release(&grad64);
        test_release(&a);
        test_release(&b);
        test_release(&grad);
    }
}
static void test_loss_and_gradient_agree_with_f64(void **unused) {
    (void)unused;
    test_on_devices(loss_and_gradient);
}

static double *point_a, *point_b; /* borrowed by loss_at */
static double loss_at(void *unused) {
    (void)unused;
    return exact(point_a, point_b);
}
static void differences(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    double sum = 0;
    float *a = test_normals(1, N, 1.0f), *b = test_normals(2, N, 1.0f), *grad = test_array(N, 4);
    point_a = test_widen(CPL_F32, a, N);
    point_b = test_widen(CPL_F32, b, N);
    assert_ok(CPL_OPS(dev, mse, CPL_F32, &sum, grad, a, b, &state, (float)coefficient, N));
    for (int i = 0; i < N; i += 997) {
        double want = test_derivative(loss_at, NULL, &point_a[i], 1e-4);
        test_close("grad", CPL_F32, &grad[i], &want, 1, 1e-7, 1e-6);
    }
    test_release(&a);
    test_release(&b);
    test_release(&grad);
    test_release(&point_a);
    test_release(&point_b);
}
static void test_gradient_agrees_with_finite_differences(void **unused) {
    (void)unused;
    test_on_devices(differences);
}

static void test_sum_has_the_same_bits_on_every_thread_count_and_instruction_set(void **unused) {
    (void)unused;
    float *a = test_normals(1, N, 1.0f), *b = test_normals(2, N, 1.0f);
    double first = 0;
    for (int k = 0; test_isas[k] != NULL; k++) {
        for (int threads = 1; threads <= 3; threads++) {
            cpl_device *dev = test_device(test_isas[k], threads);
            double sum = 0;
            if (dev != NULL) {
                assert_ok(CPL_OPS(dev, mse, CPL_F32, &sum, NULL, a, b, NULL, 1.0f, N));
                first = first == 0 ? sum : first;
                test_same_bits("mse", &sum, &first, sizeof sum);
                cpl_device_destroy(&dev);
            }
        }
    }
    test_release(&a);
    test_release(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_loss_and_gradient_agree_with_f64),
        cmocka_unit_test(test_gradient_agrees_with_finite_differences),
        cmocka_unit_test(test_sum_has_the_same_bits_on_every_thread_count_and_instruction_set),
    };
    return test_main(tests, NULL, NULL);
}

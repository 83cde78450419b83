/* Proves the cross-entropy and its gradient over odd vocabularies, ignored rows, padding, huge and bad logits.
 * Refuses tolerances wider than the storage type asks for. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

enum { R = 7, V = 2501, LD = 2504 };
static const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};
static const int32_t known[R] = {0, V - 1, -100, 17, 1024, 1023, 2400};

static double row_loss(const double *x, int32_t target, int v) {
    double top = x[0], sum = 0;
    for (int i = 1; i < v; i++) {
        top = x[i] > top ? x[i] : top;
    }
    for (int i = 0; i < v; i++) {
        sum += exp(x[i] - top);
    }
    return log(sum) + top - x[target];
}
static double probability(const double *x, int i, int v) {
    return exp(-row_loss(x, i, v));
}

static void loss_and_gradient(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1024};
    const double factor = 1024 * 0.125;
    int32_t targets[R];
    memcpy(targets, known, sizeof targets);
    for (int k = 0; k < 3; k++) {
        cpl_dtype dt = types[k];
        double *x64, *want = test_array(R * LD, 8), want_loss[R] = {0};
        void *x = test_act(dt, 1, R * LD, 3.0f, &x64);
        float losses[R], again[R];
        for (int r = 0; r < R; r++) {
            double *row = x64 + r * LD;
            for (int i = V; i < LD; i++) {
                row[i] = 1e4; /* padding decides nothing, whatever it holds */
                cpl_act_set(dt, x, r * LD + i, 1e4f);
            }
            if (targets[r] >= 0) {
                double lse = row_loss(row, 0, V) + row[0];
                want_loss[r] = lse - row[targets[r]];
                for (int i = 0; i < V; i++) {
                    want[r * LD + i] = factor * (exp(row[i] - lse) - (i == targets[r]));
                }
            }
        }
        void *kept = test_array(R * LD, cpl_dtype_size(dt));
        memcpy(kept, x, R * LD * cpl_dtype_size(dt));
        assert_ok(CPL_OPS(dev, cross_entropy, dt, x, again, targets, NULL, 0.125f, R, V, LD));
        test_same_bits("logits without a gradient", x, kept, R * LD * cpl_dtype_size(dt));
        assert_ok(CPL_OPS(dev, cross_entropy, dt, x, losses, targets, &state, 0.125f, R, V, LD));
        test_same_bits("losses", losses, again, sizeof losses);
        test_close("losses", CPL_F32, losses, want_loss, R, 1e-6, 2e-7);
        double smallest = dt == CPL_F16 ? 0x1p-25 : 1e-38;
        test_close("dlogits", dt, x, want, R * LD, smallest + factor * 1e-9, 1.01 * test_roundoff(dt) + 3e-6);
        test_release(&x64);
        test_release(&want);
        test_release(&x);
        test_release(&kept);
    }
}
static void test_loss_and_gradient_agree_with_f64(void **unused) {
    (void)unused;
    test_on_devices(loss_and_gradient);
}

static double *point; /* borrowed by loss_at */
static double loss_at(void *unused) {
    (void)unused;
    return row_loss(point, 5, 37);
}
static void differences(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    const int32_t target = 5;
    float *x = test_normals(2, 37, 2.0f), loss;
    point = test_widen(CPL_F32, x, 37);
    assert_ok(CPL_OPS(dev, cross_entropy, CPL_F32, x, &loss, &target, &state, 1.0f, 1, 37, 37));
    for (int i = 0; i < 37; i++) {
        double want = test_derivative(loss_at, NULL, &point[i], 1e-5);
        test_close("dlogits", CPL_F32, &x[i], &want, 1, 1e-7, 1e-6);
    }
    test_release(&x);
    test_release(&point);
}
static void test_gradient_agrees_with_finite_differences(void **unused) {
    (void)unused;
    test_on_devices(differences);
}

static void large_vocabulary(cpl_device *dev) {
    enum { GPT2 = 50257 };
    const cpl_step_state state = {.loss_scale = 1};
    const int32_t target = 50256;
    float *x = test_normals(3, GPT2, 1.0f), loss;
    double *x64 = test_widen(CPL_F32, x, GPT2), want = row_loss(x64, target, GPT2), sum = 0;
    assert_ok(CPL_OPS(dev, cross_entropy, CPL_F32, x, &loss, &target, &state, 1.0f, 1, GPT2, GPT2));
    test_close("loss", CPL_F32, &loss, &want, 1, 0, 2e-7);
    for (int i = 0; i < GPT2; i++) {
        sum += x[i];
    }
    assert_true(fabs(sum) < 1e-6); /* probabilities sum to 1 */
    test_release(&x);
    test_release(&x64);
}
static void test_fifty_thousand_terms_cost_no_digits(void **unused) {
    (void)unused;
    test_on_devices(large_vocabulary);
}

static void huge(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    const float tops[] = {1e4f, 1e30f, 1.7e38f, 3.4e38f};
    for (int k = 0; k < 4; k++) {
        float x[5] = {-tops[k], tops[k], 0, tops[k], -1}, losses[1];
        int32_t target = 3;
        assert_ok(CPL_OPS(dev, cross_entropy, CPL_F32, x, losses, &target, &state, 1.0f, 1, 5, 5));
        assert_true(fabsf(losses[0] - 0.6931472f) < 1e-6f);
        const double want[5] = {0, 0.5, 0, -0.5, 0};
        test_close("dlogits", CPL_F32, x, want, 5, 1e-7, 0);
    }
    uint16_t h[3] = {0x7bff, 0xfbff, 0x7bff}; /* 65504 -65504 65504 */
    int32_t target = 1;
    float loss;
    assert_ok(CPL_OPS(dev, cross_entropy, CPL_F16, h, &loss, &target, &state, 1.0f, 1, 3, 3));
    assert_true(fabsf(loss - 131008.69f) < 0.02f);
    const double want[3] = {0.5, -1, 0.5};
    test_close("f16 dlogits", CPL_F16, h, want, 3, 1e-7, 0);
}
static void test_huge_finite_logits_never_give_nan(void **unused) {
    (void)unused;
    test_on_devices(huge);
}

static void bad_logits(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    const float bad[] = {INFINITY, NAN, -NAN};
    for (int k = 0; k < 3; k++) {
        for (int place = 0; place < V; place += 625) {
            float *x = test_normals(4, V, 1.0f), loss = 0;
            int32_t target = 1;
            x[place] = bad[k];
            assert_ok(CPL_OPS(dev, cross_entropy, CPL_F32, x, &loss, &target, &state, 1.0f, 1, V, V));
            assert_false(isfinite(loss));
            for (int i = 0; i < V; i++) {
                assert_false(isfinite(x[i]));
            }
            test_release(&x);
        }
    }
    float x[3] = {-INFINITY, 1, 1}, loss; /* a probability of 0 is no error */
    int32_t target = 1;
    assert_ok(CPL_OPS(dev, cross_entropy, CPL_F32, x, &loss, &target, &state, 1.0f, 1, 3, 3));
    assert_true(fabsf(loss - 0.6931472f) < 1e-6f && x[0] == 0);
}
static void test_inf_and_nan_reach_the_loss_and_every_gradient(void **unused) {
    (void)unused;
    test_on_devices(bad_logits);
}

static void gradient_overflows(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 16777216};
    uint16_t x[4] = {0, 0, 0, 0};
    float loss;
    int32_t target = 2;
    assert_ok(CPL_OPS(dev, cross_entropy, CPL_F16, x, &loss, &target, &state, 0.5f, 1, 4, 4));
    assert_int_equal(x[0], 0x7c00);
    assert_int_equal(x[2], 0xfc00);
    assert_true(fabsf(loss - 1.3862944f) < 1e-6f);
}
static void test_gradient_beyond_f16_becomes_inf(void **unused) {
    (void)unused;
    test_on_devices(gradient_overflows);
}

static void refuses(cpl_device *dev) {
    float x[4] = {0}, loss[2];
    const int32_t over[2] = {0, 2}, under[2] = {0, -1};
    assert_int_equal(CPL_OPS(dev, cross_entropy, CPL_F32, x, loss, over, NULL, 1.0f, 2, 2, 2), CPL_INPUT);
    assert_non_null(strstr(cpl_status_message(), "target 1 of the micro-batch is 2, expected 0 to 1"));
    assert_int_equal(CPL_OPS(dev, cross_entropy, CPL_F32, x, loss, under, NULL, 1.0f, 2, 2, 2), CPL_INPUT);
    assert_int_equal(CPL_OPS(dev, cross_entropy, CPL_F32, x, loss, over, NULL, 1.0f, 1, 3, 2), CPL_INTERNAL);
}
static void test_targets_outside_the_vocabulary_are_refused(void **unused) {
    (void)unused;
    test_cpu_only(); /* a GPU makes the loss nan */
    test_on_devices(refuses);
}

static void test_threads_do_not_show_in_the_bits(void **unused) {
    (void)unused;
    const cpl_step_state state = {.loss_scale = 1024};
    int32_t targets[R];
    memcpy(targets, known, sizeof targets);
    for (int k = 0; test_isas[k] != NULL; k++) {
        void *x[2];
        float losses[2][R] = {{0}};
        for (int i = 0; i < 2; i++) {
            cpl_device *dev = test_device(test_isas[k], 1 + i);
            x[i] = test_act(CPL_BF16, 1, R * LD, 3.0f, NULL);
            if (dev != NULL) {
                assert_ok(CPL_OPS(dev, cross_entropy, CPL_BF16, x[i], losses[i], targets, &state, 0.125f, R, V, LD));
            }
            cpl_device_destroy(&dev);
        }
        test_same_bits("losses", losses[0], losses[1], sizeof losses[0]);
        test_same_bits("dlogits", x[0], x[1], R * LD * 2);
        test_release(&x[0]);
        test_release(&x[1]);
    }
}

static void test_oracle_knows_two_equal_logits(void **unused) {
    (void)unused;
    const double x[2] = {3, 3};
    assert_true(fabs(row_loss(x, 0, 2) - log(2)) < 1e-15 && fabs(probability(x, 1, 2) - 0.5) < 1e-15);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_oracle_knows_two_equal_logits),
        cmocka_unit_test(test_loss_and_gradient_agree_with_f64),
        cmocka_unit_test(test_gradient_agrees_with_finite_differences),
        cmocka_unit_test(test_fifty_thousand_terms_cost_no_digits),
        cmocka_unit_test(test_huge_finite_logits_never_give_nan),
        cmocka_unit_test(test_inf_and_nan_reach_the_loss_and_every_gradient),
        cmocka_unit_test(test_gradient_beyond_f16_becomes_inf),
        cmocka_unit_test(test_targets_outside_the_vocabulary_are_refused),
        cmocka_unit_test(test_threads_do_not_show_in_the_bits),
    };
    return test_main(tests, NULL, NULL);
}

/* Proves AdamW against f64 over several steps, that a skipped step writes nothing, and that masked weights stay exactly 0.
 * Refuses to compare with the same code: the oracle is the paper's formulas in f64. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

enum { N = 20011, STEPS = 6 };

static const cpl_step_rules rules = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f};

typedef struct {
    float *param, *m, *v; /* owned */
    void *work;           /* owned */
    uint8_t *mask;        /* owned */
    cpl_step_state state;
} model;

static model model_create(cpl_dtype dt) {
    model x = {
        .param = test_normals(1, N, 0.5f), .m = test_array(N, 4), .v = test_array(N, 4), .work = test_array(N, cpl_dtype_size(dt))};
    x.mask = test_array(N, 1);
    for (int i = 0; i < N; i++) {
        x.mask[i] = i % 3 != 0;
    }
    x.state = (cpl_step_state){.lr = 0.01f, .grad_factor = 0.25f};
    return x;
}
static void model_destroy(model *x) {
    test_release(&x->param);
    test_release(&x->m);
    test_release(&x->v);
    test_release(&x->work);
    test_release(&x->mask);
}
static void run(cpl_device *dev, cpl_dtype dt, model *x, bool masked, float decay, int steps) {
    for (int t = 0; t < steps; t++) {
        float *grad = test_normals(100 + (uint32_t)t, N, 4.0f);
        x->state.adam_step++;
        assert_ok(CPL_OPS(dev, adamw, dt, x->param, x->work, NULL, x->m, x->v, grad, masked ? x->mask : NULL, N, decay, &x->state,
                          &rules));
        test_release(&grad);
    }
}

/* Loshchilov & Hutter 2019, algorithm 2, one weight. */
static double oracle(int i, bool masked, double decay, int steps) {
    float *start = test_normals(1, i + 1, 0.5f);
    double p = start[i], m = 0, v = 0, b1 = rules.beta1, b2 = rules.beta2;
    test_release(&start);
    for (int t = 1; t <= steps; t++) {
        float *grad = test_normals(100 + (uint32_t)t - 1, i + 1, 4.0f);
        double g = grad[i] * 0.25;
        test_release(&grad);
        m = b1 * m + (1 - b1) * g;
        v = b2 * v + (1 - b2) * g * g;
        p -= (double)0.01f * (m / (1 - pow(b1, t)) / (sqrt(v / (1 - pow(b2, t))) + 1e-8) + decay * p);
    }
    return masked && i % 3 == 0 ? 0 : p;
}

static void agrees_with_f64(cpl_device *dev) {
    const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};
    const int sample[] = {0, 1, 2, 3, 500, 1023, 1024, 1025, 2049};
    for (int k = 0; k < 6; k++) {
        cpl_dtype dt = types[k % 3];
        bool masked = k >= 3;
        double decay = k % 2 ? (double)0.1f : 0;
        model x = model_create(dt);
        run(dev, dt, &x, masked, (float)decay, STEPS);
        for (size_t s = 0; s < sizeof sample / sizeof *sample; s++) {
            double want = oracle(sample[s], masked, decay, STEPS);
            test_close("adamw", CPL_F32, x.param + sample[s], &want, 1, 2e-7, 2e-6);
        }
        for (int i = 0; i < N; i++) {
            assert_true(cpl_act_get(dt, x.work, i) == cpl_act_round(dt, x.param[i]));
        }
        model_destroy(&x);
    }
}
static void test_adamw_agrees_with_f64_over_several_steps(void **unused) {
    (void)unused;
    test_on_devices(agrees_with_f64);
}

static void skip_writes_nothing(cpl_device *dev) {
    model x = model_create(CPL_F16), before = model_create(CPL_F16);
    run(dev, CPL_F16, &x, false, 0.1f, 2);
    run(dev, CPL_F16, &before, false, 0.1f, 2);
    x.state.skip = 1;
    x.state.grad_factor = 0;
    ((uint16_t *)x.work)[5] = ((uint16_t *)before.work)[5] = 0x1234; /* not what rounding would write */
    run(dev, CPL_F16, &x, true, 0.1f, 3);
    test_same_bits("param", x.param, before.param, N * 4);
    test_same_bits("m", x.m, before.m, N * 4);
    test_same_bits("v", x.v, before.v, N * 4);
    test_same_bits("work", x.work, before.work, N * 2);
    model_destroy(&x);
    model_destroy(&before);
}
static void test_skipped_step_leaves_every_bit(void **unused) {
    (void)unused;
    test_on_devices(skip_writes_nothing);
}

static void masked_are_zero(cpl_device *dev) {
    model x = model_create(CPL_BF16);
    run(dev, CPL_BF16, &x, false, 0, 1);
    x.param[3] = NAN;
    x.m[6] = INFINITY;
    run(dev, CPL_BF16, &x, true, 0, 1);
    const float zero = 0;
    for (int i = 0; i < N; i += 3) {
        assert_memory_equal(&x.param[i], &zero, 4);
        assert_memory_equal(&x.m[i], &zero, 4);
        assert_memory_equal(&x.v[i], &zero, 4);
        assert_int_equal(((uint16_t *)x.work)[i], 0);
    }
    model_destroy(&x);
}
static void test_masked_weights_and_moments_are_exactly_0(void **unused) {
    (void)unused;
    test_on_devices(masked_are_zero);
}

static void work_is_optional(cpl_device *dev) {
    model x = model_create(CPL_F32), y = model_create(CPL_F32), z = model_create(CPL_F32);
    run(dev, CPL_F32, &x, true, 0.1f, 2);
    test_release(&y.work);
    run(dev, CPL_F32, &y, true, 0.1f, 2);
    test_release(&z.work);
    z.work = z.param;
    run(dev, CPL_F32, &z, true, 0.1f, 2);
    z.work = NULL;
    test_same_bits("work apart", x.work, x.param, N * 4);
    test_same_bits("no work", x.param, y.param, N * 4);
    test_same_bits("work is param", x.param, z.param, N * 4);
    model_destroy(&x);
    model_destroy(&y);
    model_destroy(&z);
}
static void test_working_copy_may_be_absent_apart_or_the_parameter(void **unused) {
    (void)unused;
    test_on_devices(work_is_optional);
}

/* Two other ranks' copies, one of them at an odd address, beside the own. */
static void others_get_it(cpl_device *dev) {
    const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};
    for (int k = 0; k < 3; k++) {
        size_t size = cpl_dtype_size(types[k]);
        for (int odd = 0; odd < 2; odd++) {
            model x = model_create(types[k]), y = model_create(types[k]);
            char *far[2] = {test_array(N + 1, size), test_array(N + 1, size)};
            const cpl_reach others = {{far[0], NULL, far[1] + (size_t)odd * size}, 3, 1};
            float *grad = test_normals(100, N, 4.0f);
            run(dev, types[k], &x, k > 0, 0.1f, 1);
            y.state.adam_step++;
            assert_ok(CPL_OPS(dev, adamw, types[k], y.param, types[k] == CPL_F32 ? y.param : y.work, &others, y.m, y.v, grad,
                              k > 0 ? y.mask : NULL, N, 0.1f, &y.state, &rules));
            test_same_bits("param", y.param, x.param, N * 4);
            test_same_bits("first other", others.at[0], x.work, N * size);
            test_same_bits("second other", others.at[2], x.work, N * size);
            y.state.skip = 1;
            memset(others.at[0], 0, N * size);
            assert_ok(CPL_OPS(dev, adamw, types[k], y.param, y.work, &others, y.m, y.v, grad, NULL, N, 0.1f, &y.state, &rules));
            for (size_t i = 0; i < N * size; i++) {
                assert_int_equal(((char *)others.at[0])[i], 0);
            }
            test_release(&grad);
            test_release(&far[0]);
            test_release(&far[1]);
            model_destroy(&x);
            model_destroy(&y);
        }
    }
}
static void test_other_ranks_working_copies_get_the_same(void **unused) {
    (void)unused;
    test_on_devices(others_get_it);
}

static void test_threads_and_position_do_not_show_in_the_bits(void **unused) {
    (void)unused;
    for (int k = 0; test_isas[k] != NULL; k++) {
        cpl_device *one = test_device(test_isas[k], 1), *two = test_device(test_isas[k], 2);
        if (one == NULL) {
            continue;
        }
        model x = model_create(CPL_F16), y = model_create(CPL_F16), z = model_create(CPL_F16);
        run(one, CPL_F16, &x, true, 0.1f, 3);
        run(two, CPL_F16, &y, true, 0.1f, 3);
        for (int t = 0; t < 3; t++) { /* in two shards that begin anywhere */
            float *grad = test_normals(100 + (uint32_t)t, N, 4.0f);
            z.state.adam_step++;
            assert_ok(CPL_OPS(one, adamw, CPL_F16, z.param, z.work, NULL, z.m, z.v, grad, z.mask, 7, 0.1f, &z.state, &rules));
            assert_ok(CPL_OPS(one, adamw, CPL_F16, z.param + 7, (uint16_t *)z.work + 7, NULL, z.m + 7, z.v + 7, grad + 7,
                              z.mask + 7, N - 7, 0.1f, &z.state, &rules));
            test_release(&grad);
        }
        test_same_bits("threads, param", x.param, y.param, N * 4);
        test_same_bits("threads, v", x.v, y.v, N * 4);
        test_same_bits("shards, param", x.param, z.param, N * 4);
        test_same_bits("shards, work", x.work, z.work, N * 2);
        model_destroy(&x);
        model_destroy(&y);
        model_destroy(&z);
        cpl_device_destroy(&one);
        cpl_device_destroy(&two);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adamw_agrees_with_f64_over_several_steps),
        cmocka_unit_test(test_skipped_step_leaves_every_bit),
        cmocka_unit_test(test_masked_weights_and_moments_are_exactly_0),
        cmocka_unit_test(test_working_copy_may_be_absent_apart_or_the_parameter),
        cmocka_unit_test(test_other_ranks_working_copies_get_the_same),
        cmocka_unit_test(test_threads_and_position_do_not_show_in_the_bits),
    };
    return test_main(tests, NULL, NULL);
}

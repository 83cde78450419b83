/* Proves the loss scaler's state machine over scripted and random sequences.
 * Refuses to trust one formula twice: the model here counts in powers of two. */
#include "tests/support/support.h"
#include "io/base/rng.h"
#include <limits.h>
#include <math.h>
#include <string.h>

static const cpl_step_rules usual = {.dynamic = true,
                                     .growth = 2,
                                     .backoff = 0.5f,
                                     .growth_interval = 3,
                                     .hysteresis = 1,
                                     .min_scale = 1,
                                     .max_scale = 16777216,
                                     .clip = 1,
                                     .beta1 = 0.9f,
                                     .beta2 = 0.95f,
                                     .eps = 1e-8f,
                                     .inv_micro_batches = 0.125f};

static cpl_step_state begin(float scale, int32_t hysteresis) {
    return (cpl_step_state){.loss_scale = scale, .hysteresis_left = hysteresis, .lr = 3e-4f};
}

static void step(cpl_device *dev, cpl_step_state *state, const cpl_step_rules *rules, uint32_t overflow, double sum) {
    const double parts[3] = {sum / 2, sum / 4, sum / 4};
    assert_ok(CPL_OPS(dev, step_control, state, rules, &overflow, parts, 3));
}
static void good(cpl_device *dev, cpl_step_state *state, const cpl_step_rules *rules) {
    step(dev, state, rules, 0, 4.0);
    assert_int_equal(state->skip, 0);
}
static void bad(cpl_device *dev, cpl_step_state *state, const cpl_step_rules *rules) {
    step(dev, state, rules, 1, INFINITY);
    assert_int_equal(state->skip, 1);
}

static void growth_resets_good_steps(cpl_device *dev) {
    cpl_step_state s = begin(1024, 1);
    const float scales[] = {1024, 1024, 2048, 2048, 2048, 4096, 4096};
    const int32_t counts[] = {1, 2, 0, 1, 2, 0, 1};
    for (int i = 0; i < 7; i++) {
        good(dev, &s, &usual);
        assert_true(s.loss_scale == scales[i]);
        assert_int_equal(s.good_steps, counts[i]);
        assert_int_equal(s.adam_step, i + 1);
    }
}
static void test_growth_at_the_interval_returns_good_steps_to_0(void **unused) {
    (void)unused;
    test_on_devices(growth_resets_good_steps);
}

static void hysteresis_refills(cpl_device *dev) {
    cpl_step_rules rules = usual;
    rules.hysteresis = 2;
    rules.growth_interval = 1000;
    cpl_step_state s = begin(1024, 2);
    for (int i = 0; i < 20; i++) { /* never two in a row */
        bad(dev, &s, &rules);
        assert_int_equal(s.hysteresis_left, 1);
        good(dev, &s, &rules);
        assert_int_equal(s.hysteresis_left, 2);
    }
    assert_true(s.loss_scale == 1024);
    bad(dev, &s, &rules);
    assert_true(s.loss_scale == 1024);
    bad(dev, &s, &rules);
    assert_true(s.loss_scale == 512);
    bad(dev, &s, &rules); /* the row goes on: used up is used up */
    assert_true(s.loss_scale == 256);
    assert_int_equal(s.hysteresis_left, 0);
    good(dev, &s, &rules);
    bad(dev, &s, &rules);
    assert_true(s.loss_scale == 256);
}
static void test_hysteresis_counts_consecutive_overflows_and_one_good_step_refills_it(void **unused) {
    (void)unused;
    test_on_devices(hysteresis_refills);
}

static void every_overflow_backs_off(cpl_device *dev) {
    cpl_step_state s = begin(1024, 1);
    bad(dev, &s, &usual);
    assert_true(s.loss_scale == 512);
    bad(dev, &s, &usual);
    assert_true(s.loss_scale == 256);
    good(dev, &s, &usual);
    bad(dev, &s, &usual);
    assert_true(s.loss_scale == 128);
}
static void test_hysteresis_1_backs_off_on_every_overflow(void **unused) {
    (void)unused;
    test_on_devices(every_overflow_backs_off);
}

static void skip_keeps_adam_step(cpl_device *dev) {
    cpl_step_state s = begin(1024, 1);
    good(dev, &s, &usual);
    good(dev, &s, &usual);
    bad(dev, &s, &usual);
    assert_int_equal(s.adam_step, 2);
    assert_int_equal(s.good_steps, 0);
    assert_true(s.grad_factor == 0);
    assert_true(s.lr == 3e-4f);
    for (int i = 0; i < 2; i++) {
        good(dev, &s, &usual);
    }
    assert_true(s.loss_scale == 512); /* the interval began anew */
    good(dev, &s, &usual);
    assert_true(s.loss_scale == 1024);
    assert_int_equal(s.adam_step, 5);
}
static void test_skipped_step_advances_neither_adam_nor_the_interval(void **unused) {
    (void)unused;
    test_on_devices(skip_keeps_adam_step);
}

static void scale_stays_in_bounds(cpl_device *dev) {
    cpl_step_rules rules = usual;
    rules.min_scale = 4;
    rules.max_scale = 16;
    rules.growth = 4;
    rules.backoff = 0.125f;
    rules.growth_interval = 1;
    cpl_step_state s = begin(8, 1);
    good(dev, &s, &rules);
    assert_true(s.loss_scale == 16);
    good(dev, &s, &rules);
    assert_true(s.loss_scale == 16);
    bad(dev, &s, &rules);
    assert_true(s.loss_scale == 4);
    bad(dev, &s, &rules);
    assert_true(s.loss_scale == 4);
}
static void test_scale_is_never_below_min_nor_above_max(void **unused) {
    (void)unused;
    test_on_devices(scale_stays_in_bounds);
}

static void stuck_counts(cpl_device *dev) {
    cpl_step_state s = begin(2, 1);
    bad(dev, &s, &usual); /* 2 to 1: lowered, not stuck */
    assert_int_equal(s.stuck_steps, 0);
    for (int i = 1; i <= 5; i++) {
        bad(dev, &s, &usual);
        assert_int_equal(s.stuck_steps, i);
    }
    good(dev, &s, &usual);
    assert_int_equal(s.stuck_steps, 0);
    bad(dev, &s, &usual);
    assert_int_equal(s.stuck_steps, 1);
    s.stuck_steps = INT32_MAX;
    bad(dev, &s, &usual);
    assert_int_equal(s.stuck_steps, INT32_MAX);
}
static void test_stuck_steps_count_overflows_in_a_row_at_min(void **unused) {
    (void)unused;
    test_on_devices(stuck_counts);
}

static void fixed_scale(cpl_device *dev) {
    cpl_step_rules rules = usual;
    rules.dynamic = false;
    cpl_step_state s = begin(1024, 1);
    for (int i = 0; i < 10; i++) {
        good(dev, &s, &rules);
    }
    bad(dev, &s, &rules);
    bad(dev, &s, &rules);
    assert_true(s.loss_scale == 1024);
    assert_int_equal(s.stuck_steps, 2);
    assert_int_equal(s.adam_step, 10);
}
static void test_fixed_scale_skips_and_never_changes(void **unused) {
    (void)unused;
    test_on_devices(fixed_scale);
}

static void norm_decides_too(cpl_device *dev) {
    const double sums[] = {INFINITY, NAN, 1e300};
    for (int i = 0; i < 3; i++) {
        cpl_step_state s = begin(1024, 1);
        step(dev, &s, &usual, 0, sums[i]);
        assert_int_equal(s.skip, 1);
        assert_true(s.loss_scale == 512);
        assert_false(isfinite(s.grad_norm));
        assert_int_equal(s.adam_step, 0);
    }
    cpl_step_state s = begin(1024, 1);
    step(dev, &s, &usual, 4, 1.0); /* another rank's flag, a clean sum */
    assert_int_equal(s.skip, 1);
    assert_false(isfinite(s.grad_norm));
}
static void test_norm_that_is_not_finite_is_an_overflow(void **unused) {
    (void)unused;
    test_on_devices(norm_decides_too);
}

static void norm_and_factor(cpl_device *dev) {
    cpl_step_rules rules = usual;
    rules.growth_interval = 1; /* the factor is of the scale this step used, not of the next one */
    cpl_step_state s = begin(4096, 1);
    double norm = 2.5, sum = pow(norm * 4096 / 0.125, 2);
    step(dev, &s, &rules, 0, sum);
    assert_true(s.grad_norm == 2.5f);
    assert_true(s.grad_factor == (float)(0.125 / 4096 * (1.0 / (2.5 + 1e-6))));
    assert_true(s.loss_scale == 8192);
    s = begin(4096, 1);
    step(dev, &s, &rules, 0, sum / 100); /* norm 0.25: under the clip */
    assert_true(s.grad_factor == 0.125f / 4096);
    rules.clip = 0;
    s = begin(4096, 1);
    step(dev, &s, &rules, 0, sum);
    assert_true(s.grad_factor == 0.125f / 4096);
    s = begin(4096, 1);
    step(dev, &s, &usual, 0, 0.0);
    assert_true(s.grad_norm == 0 && s.grad_factor == 0.125f / 4096 && s.skip == 0);
}
static void test_norm_and_factor_are_of_the_unscaled_average(void **unused) {
    (void)unused;
    test_on_devices(norm_and_factor);
}

/* Exponents of the scale instead of the scale, runs instead of counters. */
static void random_sequences(cpl_device *dev) {
    for (uint32_t trial = 0; trial < 40; trial++) {
        cpl_step_rules rules = usual;
        rules.hysteresis = 1 + (int32_t)(trial % 4);
        rules.growth_interval = 1 + (int32_t)(trial % 7);
        cpl_step_state s = begin(65536, rules.hysteresis);
        int log2_scale = 16, run_good = 0, run_bad = 0, at_min = 0, updates = 0;
        float odds = trial % 3 == 0 ? 0.9f : 0.3f;
        for (uint64_t i = 0; i < 500; i++) {
            bool overflow = cpl_rng_uniform(7, CPL_RNG_TEST, trial, i) < odds;
            if (overflow) {
                at_min = log2_scale == 0 ? at_min + 1 : 0;
                run_good = 0;
                run_bad++;
                log2_scale -= run_bad >= rules.hysteresis && log2_scale > 0;
                bad(dev, &s, &rules);
            } else {
                at_min = run_bad = 0;
                run_good++;
                updates++;
                log2_scale += run_good % rules.growth_interval == 0 && log2_scale < 24;
                good(dev, &s, &rules);
            }
            assert_true(s.loss_scale == ldexpf(1, log2_scale));
            assert_int_equal(s.stuck_steps, at_min);
            assert_int_equal(s.adam_step, updates);
            assert_int_equal(s.good_steps, run_good % rules.growth_interval);
        }
    }
}
static void test_random_sequences_follow_the_model(void **unused) {
    (void)unused;
    test_on_devices(random_sequences);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_growth_at_the_interval_returns_good_steps_to_0),
        cmocka_unit_test(test_hysteresis_counts_consecutive_overflows_and_one_good_step_refills_it),
        cmocka_unit_test(test_hysteresis_1_backs_off_on_every_overflow),
        cmocka_unit_test(test_skipped_step_advances_neither_adam_nor_the_interval),
        cmocka_unit_test(test_scale_is_never_below_min_nor_above_max),
        cmocka_unit_test(test_stuck_steps_count_overflows_in_a_row_at_min),
        cmocka_unit_test(test_fixed_scale_skips_and_never_changes),
        cmocka_unit_test(test_norm_that_is_not_finite_is_an_overflow),
        cmocka_unit_test(test_norm_and_factor_are_of_the_unscaled_average),
        cmocka_unit_test(test_random_sequences_follow_the_model),
    };
    return test_main(tests, NULL, NULL);
}

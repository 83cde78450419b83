/* Learning rates against values worked out by hand.
 * Refuses a schedule that depends on anything but the step. */
#include "jobs/optim/schedule.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

static void expect_rate(const cpl_training *t, int64_t step, int64_t steps, double expected) {
    double rate = cpl_schedule_lr(t, step, steps);
    if (!(fabs(rate - expected) <= 1e-15 * fabs(t->lr))) {
        fail_msg("step %lld of %lld: rate %.17g, expected %.17g", (long long)step, (long long)steps, rate, expected);
    }
}

static void test_warmup_rises_linearly_and_never_starts_at_zero(void **state) {
    for (int schedule = CPL_SCHEDULE_CONSTANT; schedule <= CPL_SCHEDULE_WSD; schedule++) {
        cpl_training t = {.lr = 8e-4, .min_lr = 0.1, .warmup = 4, .decay = 0.2, .schedule = schedule};
        expect_rate(&t, 0, 100, 2e-4);
        expect_rate(&t, 1, 100, 4e-4);
        expect_rate(&t, 2, 100, 6e-4);
        expect_rate(&t, 3, 100, 8e-4);
        expect_rate(&t, 4, 100, 8e-4); /* the first step after it is at the peak */
    }
}

static void test_constant_stays_to_the_end(void **state) {
    cpl_training t = {.lr = 3e-4, .min_lr = 0.1, .warmup = 0, .schedule = CPL_SCHEDULE_CONSTANT};
    expect_rate(&t, 0, 10, 3e-4);
    expect_rate(&t, 9, 10, 3e-4);
}

static void test_cosine_passes_its_quarters(void **state) {
    cpl_training t = {.lr = 1, .min_lr = 0, .warmup = 10, .schedule = CPL_SCHEDULE_COSINE};
    expect_rate(&t, 10, 90, 1);
    expect_rate(&t, 30, 90, 0.5 * (1 + sqrt(0.5)));
    expect_rate(&t, 50, 90, 0.5);
    expect_rate(&t, 70, 90, 0.5 * (1 - sqrt(0.5)));
    t.min_lr = 0.1;
    expect_rate(&t, 50, 90, 0.55);
    /* One step before the end: 1 - 0.45 (1 - cos(79 pi / 80)). */
    expect_rate(&t, 89, 90, 1 - 0.45 * (1 - cos(M_PI * 79 / 80)));
}

static void test_linear_falls_in_equal_steps(void **state) {
    cpl_training t = {.lr = 1, .min_lr = 0.5, .warmup = 0, .schedule = CPL_SCHEDULE_LINEAR};
    for (int64_t step = 0; step < 8; step++) {
        expect_rate(&t, step, 8, 1 - 0.0625 * (double)step);
    }
}

static void test_wsd_is_constant_and_then_falls_in_the_last_part(void **state) {
    cpl_training t = {.lr = 1, .min_lr = 0.2, .warmup = 2, .decay = 0.25, .schedule = CPL_SCHEDULE_WSD};
    expect_rate(&t, 2, 40, 1);
    expect_rate(&t, 29, 40, 1);
    expect_rate(&t, 30, 40, 1); /* the fall begins here: 0 of 10 */
    expect_rate(&t, 35, 40, 0.6);
    expect_rate(&t, 39, 40, 0.28);
    t.decay = 0;
    expect_rate(&t, 39, 40, 1);
    t.decay = 1; /* falls from the end of the warm-up */
    expect_rate(&t, 21, 40, 0.6);
}

static void test_a_warmup_longer_than_the_run_only_rises(void **state) {
    for (int schedule = CPL_SCHEDULE_CONSTANT; schedule <= CPL_SCHEDULE_WSD; schedule++) {
        cpl_training t = {.lr = 1, .min_lr = 0.1, .warmup = 100, .decay = 0.5, .schedule = schedule};
        expect_rate(&t, 9, 10, 0.1);
    }
}

static void test_rates_stay_between_the_bounds_for_every_step(void **state) {
    for (int schedule = CPL_SCHEDULE_CONSTANT; schedule <= CPL_SCHEDULE_WSD; schedule++) {
        for (int64_t steps = 1; steps < 30; steps++) {
            for (int64_t warmup = 0; warmup < 5; warmup++) {
                cpl_training t = {.lr = 1, .min_lr = 0.25, .warmup = warmup, .decay = 0.3, .schedule = schedule};
                double before = 2;
                for (int64_t step = 0; step < steps; step++) {
                    double rate = cpl_schedule_lr(&t, step, steps);
                    assert_true(rate > 0 && rate <= 1);
                    assert_true(step < warmup || rate >= 0.25);
                    assert_true(step <= warmup || rate <= before); /* never up again */
                    before = rate;
                }
            }
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_warmup_rises_linearly_and_never_starts_at_zero),
        cmocka_unit_test(test_constant_stays_to_the_end),
        cmocka_unit_test(test_cosine_passes_its_quarters),
        cmocka_unit_test(test_linear_falls_in_equal_steps),
        cmocka_unit_test(test_wsd_is_constant_and_then_falls_in_the_last_part),
        cmocka_unit_test(test_a_warmup_longer_than_the_run_only_rises),
        cmocka_unit_test(test_rates_stay_between_the_bounds_for_every_step),
    };
    return cmocka_run_group_tests_name("schedules", tests, NULL, NULL);
}

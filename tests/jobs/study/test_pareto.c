/* The front and the score of a sweep against definitions written out.
 * Refuses a front that depends on the order of the trials, but for exact duplicates. */
#include "jobs/study/pareto.h"
#include "io/base/rng.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

static void front(int64_t n, int axes, const double *const *value, const double *expected) {
    double optimal[64];
    cpl_pareto(n, axes, value, optimal);
    for (int64_t i = 0; i < n; i++) {
        if (isnan(expected[i]) ? !isnan(optimal[i]) : optimal[i] != expected[i]) {
            fail_msg("trial %lld: got %g, expected %g", (long long)i, optimal[i], expected[i]);
        }
    }
}

static void test_a_trial_that_another_beats_on_both_axes_is_not_optimal(void **state) {
    const double loss[] = {3, 2, 1, 2.5, 1.5}, bytes[] = {1, 2, 3, 2.5, 2.9};
    front(5, 2, (const double *const[]){loss, bytes}, (const double[]){1, 1, 1, 0, 1});
}

static void test_equal_on_one_axis_and_worse_on_the_other_is_beaten(void **state) {
    const double loss[] = {2, 2, 3, 1}, bytes[] = {5, 4, 4, 9};
    front(4, 2, (const double *const[]){loss, bytes}, (const double[]){0, 1, 0, 1});
}

static void test_of_exact_duplicates_the_first_stays(void **state) {
    const double loss[] = {2, 1, 2, 1, 1}, bytes[] = {1, 2, 1, 2, 2};
    front(5, 2, (const double *const[]){loss, bytes}, (const double[]){1, 1, 0, 0, 0});
}

static void test_a_trial_with_a_gap_is_not_judged_and_beats_nobody(void **state) {
    const double loss[] = {NAN, 2, 0, 3}, bytes[] = {0, 2, NAN, 1};
    front(4, 2, (const double *const[]){loss, bytes}, (const double[]){NAN, 1, NAN, 1});
    const double none[] = {NAN, NAN};
    front(2, 1, (const double *const[]){none}, none);
}

static void test_infinite_losses_are_beaten_like_any_other(void **state) {
    const double loss[] = {INFINITY, 2, INFINITY}, bytes[] = {3, 3, 1};
    front(3, 2, (const double *const[]){loss, bytes}, (const double[]){0, 1, 1});
}

static void test_one_axis_has_one_best_and_three_axes_keep_more(void **state) {
    const double a[] = {3, 1, 2, 1}, b[] = {1, 3, 2, 3}, c[] = {2, 2, 1, 1};
    front(4, 1, (const double *const[]){a}, (const double[]){0, 1, 0, 0});
    front(4, 2, (const double *const[]){a, b}, (const double[]){1, 1, 1, 0});
    front(4, 3, (const double *const[]){a, b, c}, (const double[]){1, 0, 1, 1});
}

/* By the definition, over random trials with many equal values: optimal if and only if nobody dominates, first of its duplicates.
 */
static void test_random_fronts_follow_the_definition(void **state) {
    enum { N = 40 };
    for (uint32_t round = 0; round < 200; round++) {
        double x[3][N], expected[N];
        int axes = 1 + (int)(round % 3);
        for (int a = 0; a < 3; a++) {
            for (int i = 0; i < N; i++) {
                x[a][i] = floor(6 * cpl_rng_uniform(5, CPL_RNG_TEST, round, (uint64_t)a * N + (uint64_t)i));
            }
        }
        for (int j = 0; j < N; j++) {
            expected[j] = 1;
            for (int i = 0; i < N; i++) {
                int worse = 0, better = 0;
                for (int a = 0; a < axes; a++) {
                    worse += x[a][i] > x[a][j];
                    better += x[a][i] < x[a][j];
                }
                if (worse == 0 && (better > 0 || i < j)) {
                    expected[j] = 0;
                }
            }
        }
        front(N, axes, (const double *const[]){x[0], x[1], x[2]}, expected);
    }
}

static double score(double loss, double loss0, cpl_score_term latency, cpl_score_term bytes) {
    return cpl_score(loss, loss0, (const cpl_score_term[]){latency, bytes}, 2);
}

static void test_the_score_is_relative_to_the_unchanged_model(void **state) {
    const cpl_score_term nothing = {NAN, NAN, 0};
    assert_true(score(3, 2, nothing, nothing) == 1.5);
    assert_true(score(2, 2, (cpl_score_term){5, 10, 0.2}, (cpl_score_term){25, 100, 0.4}) == 1 + 0.2 * 5 / 10 + 0.4 * 25 / 100);
    assert_true(score(2, 2, (cpl_score_term){10, 10, 1}, (cpl_score_term){100, 100, 1}) == 3);
    assert_true(isnan(score(2, 2, (cpl_score_term){NAN, 10, 0.1}, nothing)));
    assert_true(isnan(score(NAN, 2, nothing, nothing)));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_trial_that_another_beats_on_both_axes_is_not_optimal),
        cmocka_unit_test(test_equal_on_one_axis_and_worse_on_the_other_is_beaten),
        cmocka_unit_test(test_of_exact_duplicates_the_first_stays),
        cmocka_unit_test(test_a_trial_with_a_gap_is_not_judged_and_beats_nobody),
        cmocka_unit_test(test_infinite_losses_are_beaten_like_any_other),
        cmocka_unit_test(test_one_axis_has_one_best_and_three_axes_keep_more),
        cmocka_unit_test(test_random_fronts_follow_the_definition),
        cmocka_unit_test(test_the_score_is_relative_to_the_unchanged_model),
    };
    return cmocka_run_group_tests_name("choosing", tests, NULL, NULL);
}

/* Which rank gets which GPU, in the ways in which launchers show GPUs to ranks.
 * Refuses nothing for want of GPUs: it needs none. */
#include "jobs/assign.h"
#include "tests/support/support.h"

enum { MOST = 4, RANKS_MAX = 8 };

static int gpu[RANKS_MAX], distinct, shared;

/* see [ranks][MOST]: ids, 0 ends the list. */
static void assign(int ranks, const int64_t (*see)[MOST]) {
    int64_t visible[RANKS_MAX] = {0};
    for (int r = 0; r < ranks; r++) {
        while (visible[r] < MOST && see[r][visible[r]] != 0) {
            visible[r]++;
        }
    }
    assert_ok(cpl_gpus_assign(ranks, visible, &see[0][0], MOST, gpu, &distinct, &shared));
}

static void expect(int ranks, const int *want, int want_distinct, int want_shared) {
    for (int r = 0; r < ranks; r++) {
        assert_int_equal(gpu[r], want[r]);
    }
    assert_int_equal(distinct, want_distinct);
    assert_int_equal(shared, want_shared);
}

static void test_all_visible_the_nth_rank_takes_the_nth(void **state) {
    assign(3, (const int64_t[][MOST]){{11, 12, 13, 14}, {11, 12, 13, 14}, {11, 12, 13, 14}});
    expect(3, (const int[]){0, 1, 2}, 4, 1);
}

static void test_one_visible_each_takes_its_own(void **state) {
    assign(3, (const int64_t[][MOST]){{13}, {11}, {12}});
    expect(3, (const int[]){0, 0, 0}, 3, 1);
}

static void test_the_same_one_visible_to_all_is_shared(void **state) {
    assign(3, (const int64_t[][MOST]){{11}, {11}, {11}});
    expect(3, (const int[]){0, 0, 0}, 1, 3);
}

static void test_neighbours_share(void **state) {
    assign(4, (const int64_t[][MOST]){{11, 12}, {11, 12}, {11, 12}, {11, 12}});
    expect(4, (const int[]){0, 0, 1, 1}, 2, 2);
    assign(5, (const int64_t[][MOST]){{11, 12}, {11, 12}, {11, 12}, {11, 12}, {11, 12}});
    expect(5, (const int[]){0, 0, 0, 1, 1}, 2, 3);
}

static void test_who_sees_fewer_chooses_first(void **state) {
    assign(2, (const int64_t[][MOST]){{11, 12}, {11}});
    expect(2, (const int[]){1, 0}, 2, 1);
}

static void test_a_rank_that_sees_none_gets_none(void **state) {
    assign(3, (const int64_t[][MOST]){{0}, {11}, {12}});
    expect(3, (const int[]){-1, 0, 0}, 2, 1);
    assign(1, (const int64_t[][MOST]){{0}});
    expect(1, (const int[]){-1}, 0, 0);
}

static void test_uneven_views_are_told_by_the_most_shared(void **state) {
    assign(4, (const int64_t[][MOST]){{11}, {11}, {11}, {12}});
    expect(4, (const int[]){0, 0, 0, 0}, 2, 3);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_visible_the_nth_rank_takes_the_nth),
        cmocka_unit_test(test_one_visible_each_takes_its_own),
        cmocka_unit_test(test_the_same_one_visible_to_all_is_shared),
        cmocka_unit_test(test_neighbours_share),
        cmocka_unit_test(test_who_sees_fewer_chooses_first),
        cmocka_unit_test(test_a_rank_that_sees_none_gets_none),
        cmocka_unit_test(test_uneven_views_are_told_by_the_most_shared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

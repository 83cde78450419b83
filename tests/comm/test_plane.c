/* Which way device memory goes, chosen from what all ranks say of themselves; and how parts are cut.
 * Refuses to need a GPU or a second rank. */
#include "comm/internal.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

static const cpl_place two_hosts[4] = {{"a", "0000:1b:00.0", CPL_NCCL_AUTO, 1, CPL_NCCL_AUTO, CPL_NCCL_AUTO},
                                       {"a", "0000:43:00.0", CPL_NCCL_AUTO, 1, CPL_NCCL_AUTO, CPL_NCCL_AUTO},
                                       {"b", "0000:1b:00.0", CPL_NCCL_AUTO, 1, CPL_NCCL_AUTO, CPL_NCCL_AUTO},
                                       {"b", "0000:43:00.0", CPL_NCCL_AUTO, 1, CPL_NCCL_AUTO, CPL_NCCL_AUTO}};
static cpl_place place[4];
static char why[128];

static void test_ranks_with_a_gpu_each_take_nccl(void **state) {
    assert_true(cpl_plane_chosen(two_hosts, 4, why, sizeof why));
    assert_string_equal(why, "");
}

static void expect_mpi(int size, const char *reason) {
    assert_false(cpl_plane_chosen(place, size, why, sizeof why));
    assert_string_equal(why, reason);
    memcpy(place, two_hosts, sizeof place);
}

static void test_what_keeps_ranks_from_nccl_is_named(void **state) {
    memcpy(place, two_hosts, sizeof place);
    strcpy(place[3].gpu, "0000:1b:00.0");
    expect_mpi(4, "ranks 2 and 3 share a GPU");
    place[1].gpu[0] = '\0';
    expect_mpi(4, "rank 1 computes on the CPU");
    place[0].built = place[1].built = 0;
    expect_mpi(2, "NCCL is not in this build");
    place[2].wish = CPL_NCCL_NEVER;
    expect_mpi(4, "CUPEL_NCCL=0");
    place[0].wish = CPL_NCCL_ALWAYS;
    strcpy(place[1].gpu, place[0].gpu);
    expect_mpi(2, "ranks 0 and 1 share a GPU");
}

static void test_one_rank_takes_nccl_where_it_is_demanded(void **state) {
    memcpy(place, two_hosts, sizeof place);
    expect_mpi(1, "one rank has nothing to exchange");
    place[0].wish = CPL_NCCL_ALWAYS;
    assert_true(cpl_plane_chosen(place, 1, why, sizeof why));
}

static void test_sums_begin_early_between_hosts_or_as_rank_0_says(void **state) {
    memcpy(place, two_hosts, sizeof place);
    assert_true(cpl_plane_early(place, 4) && !cpl_plane_early(place, 2) && !cpl_plane_early(place, 1));
    place[0].overlap = CPL_NCCL_NEVER;
    assert_false(cpl_plane_early(place, 4));
    place[0].overlap = CPL_NCCL_ALWAYS;
    place[1].overlap = CPL_NCCL_NEVER;
    assert_true(cpl_plane_early(place, 2));
}

static void test_devices_of_one_host_reach_each_other_where_that_is_tried(void **state) {
    memcpy(place, two_hosts, sizeof place);
    assert_true(cpl_plane_reach(place, 2) == CPL_NCCL_AUTO);
    assert_true(cpl_plane_reach(place, 1) == CPL_NCCL_NEVER && cpl_plane_reach(place, 4) == CPL_NCCL_NEVER);
    place[0].reach = CPL_NCCL_ALWAYS;
    place[1].reach = CPL_NCCL_NEVER;
    assert_true(cpl_plane_reach(place, 2) == CPL_NCCL_ALWAYS && cpl_plane_reach(place, 4) == CPL_NCCL_NEVER);
    place[0].overlap = CPL_NCCL_ALWAYS;
    assert_true(cpl_plane_reach(place, 2) == CPL_NCCL_NEVER);
    place[0].overlap = CPL_NCCL_AUTO;
    place[0].reach = CPL_NCCL_NEVER;
    assert_true(cpl_plane_reach(place, 2) == CPL_NCCL_NEVER);
}

static void test_slices_cover_a_part_once_and_start_at_chunks(void **state) {
    static const int64_t lengths[] = {0, 1, 4095, 4096, 4097, 123456};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        for (int slices = 1; slices <= 5; slices++) {
            int64_t at = 7, first = 0, last = 0;
            for (int k = 0; k < slices; k++) {
                cpl_comm_slice(7, 7 + lengths[i], k, slices, &first, &last);
                assert_int_equal(first, at);
                assert_true(last >= first && (first - 7) % CPL_SUM_CHUNK == 0);
                at = last;
            }
            assert_int_equal(at, 7 + lengths[i]);
        }
    }
}

/* The plan counts it whether NCCL will be there or not: it must not matter. */
static void test_sum_by_tree_takes_little_memory_beside_the_buffer(void **state) {
    assert_int_equal(cpl_reduction_bytes(1 << 20, 1, true), 0);
    assert_int_equal(cpl_reduction_bytes(1 << 20, 2, true), CPL_SHARED_LEAST); /* the board */
    assert_int_equal(cpl_reduction_bytes(1 << 20, 8, false), CPL_SHARED_LEAST);
    assert_int_equal(cpl_reduction_bytes(1 << 20, CPL_REACH_MOST + 1, false), 0);
    for (int ranks = 4; ranks <= 64; ranks *= 2) {
        for (int64_t total = 1 << 24; total <= (int64_t)1 << 34; total *= 4) {
            int64_t board = ranks <= CPL_REACH_MOST ? CPL_SHARED_LEAST : 0;
            int64_t bytes = cpl_reduction_bytes(total / ranks, ranks, true) - board;
            assert_true(bytes > 0 && bytes <= total * 4 / 8 && bytes <= (int64_t)1 << 26);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks_with_a_gpu_each_take_nccl),
        cmocka_unit_test(test_what_keeps_ranks_from_nccl_is_named),
        cmocka_unit_test(test_one_rank_takes_nccl_where_it_is_demanded),
        cmocka_unit_test(test_sums_begin_early_between_hosts_or_as_rank_0_says),
        cmocka_unit_test(test_devices_of_one_host_reach_each_other_where_that_is_tried),
        cmocka_unit_test(test_slices_cover_a_part_once_and_start_at_chunks),
        cmocka_unit_test(test_sum_by_tree_takes_little_memory_beside_the_buffer),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

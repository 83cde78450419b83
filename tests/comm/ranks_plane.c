/* Sums and collections by a plane (what NCCL is asked for), against those through host memory, on as many ranks as mpirun starts.
 * Refuses to leave a test before all ranks know its result. */
#include "tests/comm/fake_plane.h"
#include "tests/support/expect.h"

static cpl_device *dev;

static int all_ranks(void **state) {
    cpl_comm_detach(world);
    return test_all_ranks(state);
}

/* [size+1] parts of [3, n+3); `shape` 0: about even, 1: rank 0 has all, 2: the last has all, 3: every other one is empty, 4: even.
 */
static void parts(int64_t *begin, int64_t n, int shape) {
    int holders = size / 2 + size % 2;
    for (int r = 0; r <= size; r++) {
        int64_t share = shape == 1   ? (r > 0) * n
                        : shape == 2 ? (r == size) * n
                        : shape == 3 ? n * ((r + 1) / 2) / holders
                                     : n * r / size;
        begin[r] = 3 + (r == size ? n : share > n ? n : share);
    }
}

static float *values(int of, int64_t n) {
    float *x = calloc((size_t)n + 3, sizeof *x);
    assert_non_null(x);
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = ((uint32_t)i * 2654435761u) ^ ((uint32_t)(of + 1) * 40503u << 7);
        x[i + 3] = (float)(int32_t)bits * 0x1p-31f * (float)(1 << (i % 20));
    }
    return x;
}

static int64_t different(const float *a, const float *b, int64_t first, int64_t last) {
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) {
        n += memcmp(&a[i], &b[i], sizeof *a) != 0;
    }
    return n;
}

static void test_sum_by_tree_has_the_bits_of_the_one_through_host_memory(void **state) {
    for (int late = 0; late < 2; late++) {
        for (int shape = 0; shape < 5; shape++) {
            static const int64_t counts[] = {0, 1, 5003, 200000};
            for (int k = 0; k < 4; k++) {
                int64_t begin[FAKE_RANKS + 1], n = counts[k];
                parts(begin, n, shape);
                float *expected = values(rank, n), *x = values(rank, n);
                EXPECT_OK(cpl_comm_reduce_scatter(world, dev, expected, begin));
                fake_plane *f = fake_attach(world, dev, late);
                EXPECT_OK(cpl_comm_reduce_scatter(world, dev, x, begin));
                EXPECT(different(x, expected, begin[rank], begin[rank + 1]) == 0);
                EXPECT(size > 2 ? f->reduces == 0 : f->exchanges == 0);
                cpl_comm_detach(world);
                free(x);
                free(expected);
            }
        }
    }
}

/* Announced from the end to the beginning, as a backward pass does, with one range out of order. */
static void announce(cpl_reduction *r, const int64_t *begin, int64_t n, int64_t range) {
    int64_t odd = 3 + range < 3 + n ? 3 + range : 3 + n;
    for (int64_t last = 3 + n; last > odd; last -= range) {
        EXPECT_OK(cpl_reduction_add(r, last - range > odd ? last - range : odd, last));
    }
    EXPECT_OK(cpl_reduction_add(r, 3, odd));
    EXPECT_OK(cpl_reduction_end(r));
}

static void test_sum_range_by_range_is_that_of_the_whole(void **state) {
    const int64_t n = 5 * CPL_BUCKET + 77;
    for (int late = 0; late < 2; late++) {
        for (int exact = 0; exact < 2; exact++) {
            for (int shape = 0; shape < 4; shape++) {
                int64_t begin[FAKE_RANKS + 1], far = 0;
                cpl_reduction r;
                parts(begin, n, shape);
                float *expected = values(rank, n), *x = values(rank, n);
                EXPECT_OK(cpl_comm_reduce_scatter(world, dev, expected, begin));
                fake_plane *f = fake_attach(world, dev, late);
                cpl_reduction_begin(&r, world, dev, x, begin, exact);
                announce(&r, begin, n, CPL_BUCKET / 3 + 64);
                for (int64_t i = begin[rank]; i < begin[rank + 1]; i++) {
                    float d = x[i] - expected[i], room = 1e-5f * (float)(1 << ((i - 3) % 20));
                    far += !(d <= room && d >= -room);
                }
                EXPECT(far == 0);
                EXPECT(different(x, expected, begin[rank], begin[rank + 1]) == 0 || (size > 2 && !exact));
                /* Three ranges a bucket, and the rest. */
                EXPECT(exact && size > 2 ? f->reduces == 0 : f->reduces >= 4 && f->reduces <= 6);
                cpl_comm_detach(world);
                free(x);
                free(expected);
            }
        }
    }
}

static void test_sum_range_by_range_without_a_plane_is_one_sum(void **state) {
    int64_t begin[FAKE_RANKS + 1], n = 5003;
    cpl_reduction r;
    parts(begin, n, 0);
    float *expected = values(rank, n), *x = values(rank, n);
    EXPECT_OK(cpl_comm_reduce_scatter(world, dev, expected, begin));
    cpl_reduction_begin(&r, world, dev, x, begin, false);
    announce(&r, begin, n, 1000);
    EXPECT(different(x, expected, begin[rank], begin[rank + 1]) == 0);
    free(x);
    free(expected);
}

static void test_ranges_that_leave_a_hole_are_refused(void **state) {
    int64_t begin[FAKE_RANKS + 1];
    float x[103] = {0};
    cpl_reduction r;
    parts(begin, 100, 0);
    fake_attach(world, dev, true);
    cpl_reduction_begin(&r, world, dev, x, begin, false);
    EXPECT_OK(cpl_reduction_add(&r, 10, 103));
    EXPECT(cpl_reduction_end(&r) == CPL_INTERNAL && strstr(cpl_status_message(), "93 of 100") != NULL);
    EXPECT(cpl_reduction_add(&r, 0, 10) == CPL_INTERNAL);
    EXPECT(cpl_reduction_add(&r, 100, 104) == CPL_INTERNAL);
}

static void test_parts_reach_all_ranks_whole_and_in_slices(void **state) {
    for (int late = 0; late < 2; late++) {
        for (int shape = 0; shape < 5; shape++) {
            for (int slices = 1; slices < 6; slices++) {
                static const int64_t counts[] = {0, 1, 4096, 50001};
                for (int k = 0; k < 4; k++) {
                    int64_t begin[FAKE_RANKS + 1], n = counts[k];
                    parts(begin, n, shape);
                    float *expected = values(0, n), *x = calloc((size_t)n + 3, sizeof *x);
                    memcpy(x + begin[rank], expected + begin[rank], (size_t)(begin[rank + 1] - begin[rank]) * sizeof *x);
                    fake_attach(world, dev, late);
                    for (int slice = 0; slice < slices; slice++) {
                        EXPECT_OK(cpl_comm_allgather_slice(world, dev, x, sizeof *x, begin, slice, slices));
                    }
                    EXPECT(different(x, expected, 0, n + 3) == 0);
                    cpl_comm_detach(world);
                    free(x);
                    free(expected);
                }
            }
        }
    }
}

static void test_flag_of_one_rank_reaches_all(void **state) {
    for (int late = 0; late < 2; late++) {
        fake_attach(world, dev, late);
        uint32_t flag = rank == size - 1, none = 0;
        EXPECT_OK(cpl_comm_or_flag(world, dev, &flag));
        EXPECT_OK(cpl_comm_or_flag(world, dev, &none));
        EXPECT(flag == 1 && none == 0 && cpl_comm_enqueues(world) && cpl_comm_overlaps(world));
        cpl_comm_detach(world);
        EXPECT(cpl_comm_enqueues(world) == (size == 1) && !cpl_comm_overlaps(world));
    }
}

static void test_other_memory_still_goes_through_the_host(void **state) {
    cpl_device other = {.kind = "cpu"};
    int64_t begin[FAKE_RANKS + 1];
    parts(begin, 100, 0);
    float *x = values(rank, 100), *expected = values(rank, 100);
    EXPECT_OK(cpl_comm_reduce_scatter(world, dev, expected, begin));
    fake_plane *f = fake_attach(world, dev, true);
    EXPECT_OK(cpl_comm_reduce_scatter(world, &other, x, begin));
    EXPECT(different(x, expected, begin[rank], begin[rank + 1]) == 0 && f->reduces + f->exchanges == 0);
    free(x);
    free(expected);
}

static void test_ranks_on_the_cpu_take_mpi_and_say_why(void **state) {
    char text[160];
    EXPECT_OK(cpl_comm_route(world, dev, text, sizeof text));
    EXPECT(strstr(text, size > 1 ? "host memory over MPI: rank 0 computes on the CPU" : "one rank") == text);
    EXPECT_OK(cpl_comm_attach(world, dev));
    EXPECT(!cpl_comm_overlaps(world));
    setenv("CUPEL_NCCL", "1", 1);
    EXPECT(cpl_comm_attach(world, dev) == CPL_UNSUPPORTED && strstr(cpl_status_message(), "CUPEL_NCCL=1") != NULL);
    setenv("CUPEL_NCCL", rank == size - 1 ? "yes" : "", 1);
    EXPECT(cpl_comm_attach(world, dev) == CPL_USAGE && strstr(cpl_status_message(), "CUPEL_NCCL=yes") != NULL);
    setenv("CUPEL_NCCL", "0", 1);
    EXPECT_OK(cpl_comm_route(world, dev, text, sizeof text));
    EXPECT(size == 1 || strstr(text, "CUPEL_NCCL=0") != NULL);
    unsetenv("CUPEL_NCCL");
}

#define TEST(name) cmocka_unit_test_teardown(name, all_ranks)

int main(int argc, char **argv) {
    if (cpl_world_init(&world, &argc, &argv) != CPL_OK || cpl_device_create(&dev, "cpu", 0, 1) != CPL_OK) {
        fprintf(stderr, "%s\n", cpl_status_message());
        return 1;
    }
    rank = cpl_comm_rank(world);
    size = cpl_comm_size(world);
    const struct CMUnitTest tests[] = {
        TEST(test_sum_by_tree_has_the_bits_of_the_one_through_host_memory),
        TEST(test_sum_range_by_range_is_that_of_the_whole),
        TEST(test_sum_range_by_range_without_a_plane_is_one_sum),
        TEST(test_ranges_that_leave_a_hole_are_refused),
        TEST(test_parts_reach_all_ranks_whole_and_in_slices),
        TEST(test_flag_of_one_rank_reaches_all),
        TEST(test_other_memory_still_goes_through_the_host),
        TEST(test_ranks_on_the_cpu_take_mpi_and_say_why),
    };
    if (rank != 0 && freopen("/dev/null", "w", stdout) == NULL) {
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cpl_device_destroy(&dev);
    cpl_world_finish(&world);
    return failed != 0;
}

/* What groups of ranks promise, tried on as many ranks as mpirun starts (test_comm_ranks.sh: 1, 2, 3, 4).
 * Refuses to leave a test before all ranks know its result, so that a failure is a failure and no hang. */
#include "comm/internal.h"
#include "io/base/hash.h"
#include "io/base/rng.h"
#include "tests/comm/coded_device.h"
#include "tests/support/expect.h"
#include <unistd.h>

static cpl_device host_device = {.kind = "cpu"};

static void *array(size_t count, size_t element) {
    void *x = calloc(count > 0 ? count : 1, element);
    assert_non_null(x);
    return x;
}

static void test_small_values_are_combined_over_test_all_ranks(void **state) {
    int64_t x[2] = {rank + 1, -rank}, before = -1;
    double f[2] = {rank == size - 1 ? 0.1 : 0.0, rank};
    char text[8] = "";
    EXPECT_OK(cpl_comm_barrier(world));
    EXPECT_OK(cpl_comm_allreduce_i64(world, x, 2, CPL_SUM));
    EXPECT(x[0] == size * (size + 1) / 2 && x[1] == -size * (size - 1) / 2);
    x[0] = rank;
    EXPECT_OK(cpl_comm_allreduce_i64(world, x, 1, CPL_MIN));
    EXPECT(x[0] == 0);
    EXPECT_OK(cpl_comm_allreduce_f64(world, f, 1, CPL_SUM));
    EXPECT_OK(cpl_comm_allreduce_f64(world, f + 1, 1, CPL_MAX));
    EXPECT(f[0] == 0.1 && f[1] == size - 1);
    EXPECT_OK(cpl_comm_exscan_i64(world, 10 + rank, &before));
    EXPECT(before == 10 * rank + rank * (rank - 1) / 2);
    if (rank == size - 1) {
        strcpy(text, "hello");
    }
    EXPECT_OK(cpl_comm_bcast(world, text, sizeof text, size - 1));
    EXPECT(strcmp(text, "hello") == 0);
    cpl_comm_progress(world);
}

static void test_agree_takes_the_worst_status_of_the_lowest_rank_with_its_message(void **state) {
    char expected[64];
    EXPECT_OK(cpl_agree(world, CPL_OK));
    for (int bad = 0; bad < size; bad++) {
        /* Ranks above `bad` fail as badly, those below less. */
        cpl_status own = cpl_fail(rank < bad ? CPL_INPUT : CPL_IO, __FILE__, __LINE__, "disk of %d", rank);
        EXPECT(cpl_agree(world, own) == CPL_IO);
        snprintf(expected, sizeof expected, size > 1 ? "rank %d: disk of %d" : "disk of %d", bad, bad);
        EXPECT(strcmp(cpl_status_message(), expected) == 0);
        cpl_status_clear();
        own = rank == bad ? cpl_fail(CPL_NO_MEMORY, __FILE__, __LINE__, "no room") : CPL_OK;
        EXPECT(cpl_agree(world, own) == CPL_NO_MEMORY);
        EXPECT(size == 1 || strncmp(cpl_status_message(), "rank ", 5) == 0);
    }
    EXPECT_OK(cpl_agree(world, CPL_OK));
}

static void test_a_status_agreed_twice_names_its_rank_once(void **state) {
    cpl_status st = rank == size - 1 ? cpl_fail(CPL_INPUT, __FILE__, __LINE__, "bad byte") : CPL_OK;
    st = cpl_fail_context(cpl_agree(world, st), "reading");
    EXPECT(cpl_agree(world, st) == CPL_INPUT);
    char expected[64];
    snprintf(expected, sizeof expected, size > 1 ? "reading: rank %d: bad byte" : "reading: bad byte", size - 1);
    EXPECT(strcmp(cpl_status_message(), expected) == 0);
}

static void test_agree_word_is_the_or_of_test_all_ranks(void **state) {
    uint32_t word = 0;
    EXPECT_OK(cpl_comm_agree_word(world, &word));
    EXPECT(word == 0);
    word = rank == size - 1 ? CPL_WORD_OVERFLOW : 0;
    word |= rank == 0 ? CPL_WORD_STOP : 0;
    EXPECT_OK(cpl_comm_agree_word(world, &word));
    EXPECT(word == (CPL_WORD_OVERFLOW | CPL_WORD_STOP));
}

/* --- sums --- */

enum { MICRO = 8 };

static float gradient(int micro, int64_t i) {
    return cpl_rng_normal(7, CPL_RNG_TEST, (uint32_t)micro, (uint64_t)i) * (float)(1 << (i % 20));
}

/* Balanced tree over leaves [lo, hi), written without the code under test. */
static float tree(int lo, int hi, int64_t i) {
    return hi - lo == 1 ? gradient(lo, i) : tree(lo, lo + (hi - lo) / 2, i) + tree(lo + (hi - lo) / 2, hi, i);
}

/* [size+1] parts of n elements from `first`; `shape` 0: even, 1: rank 0 has all, 2: the last has all, 3: every other one is empty.
 */
static void parts(int64_t *begin, int64_t first, int64_t n, int shape) {
    int holders = size / 2 + size % 2;
    begin[0] = first;
    for (int r = 1; r < size; r++) {
        int64_t share = shape == 0 ? n * r / size : shape == 1 ? n : shape == 2 ? 0 : n * ((r + 1) / 2) / holders;
        begin[r] = first + share;
    }
    begin[size] = first + n;
}

static void sum_once(cpl_device *dev, int64_t n, int shape, int micro) {
    int64_t begin[65];
    parts(begin, 3, n, shape);
    float *x = array((size_t)n + 3, sizeof *x);
    int each = micro / size;
    for (int64_t i = 0; i < n; i++) {
        x[i + 3] = tree(rank * each, (rank + 1) * each, i);
    }
    coded_flip(dev, x, (size_t)(n + 3) * sizeof *x);
    EXPECT_OK(cpl_comm_reduce_scatter(world, dev, x, begin));
    EXPECT_OK(cpl_comm_allgather(world, dev, x, sizeof *x, begin));
    coded_flip(dev, x, (size_t)(n + 3) * sizeof *x);
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) {
        float expected = tree(0, micro, i);
        different += memcmp(&expected, &x[i + 3], sizeof expected) != 0;
    }
    EXPECT(different == 0 && x[0] == 0.0f && x[2] == 0.0f);
    free(x);
}

static void test_tree_sum_continues_the_tree_over_micro_batches(void **state) {
    int micro = size == 3 ? 3 : MICRO; /* three ranks: their own tree of one leaf each, r0 + (r1 + r2) */
    for (int shape = 0; shape < 4; shape++) {
        sum_once(&host_device, 0, shape, micro);
        sum_once(&host_device, 1, shape, micro);
        sum_once(&host_device, 5003, shape, micro);
    }
    /* The bits of the sum, for the script to compare over numbers of ranks. */
    enum { N = 10007 };
    int64_t begin[65];
    parts(begin, 0, N, 0);
    float *x = array(N, sizeof *x);
    for (int64_t i = 0; i < N; i++) {
        x[i] = tree(rank * (micro / size), (rank + 1) * (micro / size), i);
    }
    EXPECT_OK(cpl_comm_reduce_scatter(world, &host_device, x, begin));
    EXPECT_OK(cpl_comm_allgather(world, &host_device, x, sizeof *x, begin));
    cpl_sha256 h;
    char hex[CPL_SHA256_HEX];
    cpl_sha256_init(&h);
    cpl_sha256_add(&h, x, N * sizeof *x);
    cpl_sha256_end(&h, hex);
    printf("sum bits %s\n", hex);
    free(x);
}

static void test_sum_through_many_small_slices_has_the_same_bits(void **state) {
    size_t limit = world->stage_limit;
    cpl_free(&world->stage);
    world->stage_size = 0;
    world->stage_limit = 1;
    for (int shape = 0; shape < 4; shape++) {
        sum_once(&host_device, CPL_STAGE_PIECE / 4 * size, shape, size); /* whole slices */
        sum_once(&host_device, 4099, shape, size);
    }
    EXPECT(world->stage_size <= (size_t)size * CPL_STAGE_PIECE);
    world->stage_limit = limit;
}

static void test_device_memory_is_summed_by_way_of_the_host(void **state) {
    cpl_device dev = coded_device(-1);
    size_t limit = world->stage_limit;
    world->stage_limit = 1;
    for (int shape = 0; shape < 4; shape++) {
        sum_once(&dev, 2500, shape, size);
    }
    world->stage_limit = limit;
    EXPECT(size == 1 || coded_copies(&dev) > 0);
    uint32_t flag = rank == size - 1 ? 4 : 0;
    coded_flip(&dev, &flag, sizeof flag);
    EXPECT_OK(cpl_comm_or_flag(world, &dev, &flag));
    coded_flip(&dev, &flag, sizeof flag);
    EXPECT(flag == 4);
}

static void test_device_failure_on_one_rank_becomes_the_failure_of_all(void **state) {
    cpl_device dev = coded_device(rank == size - 1 ? 2 : -1);
    int64_t begin[65];
    float x[4000] = {0};
    parts(begin, 0, 4000, 0);
    cpl_status expected = size > 1 ? CPL_DEVICE : CPL_OK;
    EXPECT(cpl_comm_reduce_scatter(world, &dev, x, begin) == expected);
    EXPECT(size == 1 || strstr(cpl_status_message(), "copy 2 failed") != NULL);
    cpl_device other = coded_device(rank == 0 ? 1 : -1);
    EXPECT(cpl_comm_allgather(world, &other, x, sizeof *x, begin) == expected);
    EXPECT(size == 1 || strstr(cpl_status_message(), "rank 0: ") == cpl_status_message());
}

static void gather_once(cpl_device *dev, size_t element, int64_t n, int shape) {
    int64_t begin[65];
    parts(begin, 1, n, shape);
    unsigned char *x = array((size_t)(n + 1), element);
    size_t from = (size_t)begin[rank] * element, to = (size_t)begin[rank + 1] * element;
    for (size_t i = 0; i < (size_t)(n + 1) * element; i++) {
        x[i] = i >= from && i < to ? (unsigned char)(i * 31 + i / 256) : 0;
    }
    coded_flip(dev, x, (size_t)(n + 1) * element);
    EXPECT_OK(cpl_comm_allgather(world, dev, x, element, begin));
    coded_flip(dev, x, (size_t)(n + 1) * element);
    size_t different = 0;
    for (size_t i = element; i < (size_t)(n + 1) * element; i++) {
        different += x[i] != (unsigned char)(i * 31 + i / 256);
    }
    EXPECT(different == 0);
    free(x);
}

static void test_allgather_gives_every_part_to_every_rank_directly_and_in_slices(void **state) {
    cpl_device coded = coded_device(-1);
    size_t direct = world->direct_limit, limit = world->stage_limit;
    for (int way = 0; way < 3; way++) {
        world->direct_limit = way == 1 ? 0 : direct;
        world->stage_limit = way == 0 ? limit : 1;
        for (int shape = 0; shape < 4; shape++) {
            for (size_t element = 1; element <= 8; element++) {
                gather_once(way == 2 ? &coded : &host_device, element, 3001, shape);
            }
            gather_once(way == 2 ? &coded : &host_device, 3000, 7, shape); /* an element larger than a slice */
            gather_once(way == 2 ? &coded : &host_device, 4, 0, shape);
        }
    }
    world->direct_limit = direct;
    world->stage_limit = limit;
}

static void test_parts_that_overlap_are_refused(void **state) {
    int64_t begin[65];
    float x[8] = {0};
    parts(begin, 0, 8, 0);
    begin[size] = -1;
    EXPECT(cpl_comm_reduce_scatter(world, &host_device, x, begin) == CPL_INTERNAL);
    EXPECT(cpl_comm_allgather(world, &host_device, x, sizeof *x, begin) == CPL_INTERNAL);
    begin[size] = INT64_MAX;
    EXPECT(cpl_comm_allgather(world, &host_device, x, sizeof *x, begin) == CPL_INTERNAL);
}

/* --- groups, names, counter --- */

static void test_groups_work_apart_and_name_world_ranks(void **state) {
    cpl_comm *group = NULL;
    int color = rank % 2;
    EXPECT(cpl_comm_split(world, rank == size - 1 ? -1 : 0, &group) == CPL_INTERNAL && group == NULL);
    EXPECT_OK(cpl_comm_split(world, color, &group));
    EXPECT(cpl_comm_rank(group) == rank / 2 && cpl_comm_size(group) == (size - color + 1) / 2);
    EXPECT(cpl_comm_local_rank(group) == cpl_comm_local_rank(world));
    int64_t sum = rank;
    EXPECT_OK(cpl_comm_allreduce_i64(group, &sum, 1, CPL_SUM));
    EXPECT(sum == (size > 2 + color ? 2 * color + 2 : color));
    cpl_status st = color == 1 && rank == size - 1 - size % 2 ? cpl_fail(CPL_IO, __FILE__, __LINE__, "odd") : CPL_OK;
    st = cpl_agree(group, st);
    EXPECT(st == (color == 1 ? CPL_IO : CPL_OK));
    EXPECT(color == 0 || cpl_comm_size(group) == 1 || strcmp(cpl_status_message(), "rank 3: odd") == 0);
    EXPECT(cpl_agree(world, st) == (size > 1 ? CPL_IO : CPL_OK));
    EXPECT(size == 1 || strcmp(cpl_status_message(), size == 4 ? "rank 3: odd" : "rank 1: odd") == 0);
    cpl_comm_destroy(&group);
    EXPECT(group == NULL);
}

static void test_names_of_hosts_and_of_the_library(void **state) {
    cpl_arena *arena = NULL;
    char *names = NULL, own[65] = "", library[128] = "", tiny[4];
    gethostname(own, sizeof own - 1);
    EXPECT_OK(cpl_arena_create(&arena));
    EXPECT_OK(cpl_comm_hostnames(world, &names, arena));
    int here = cpl_comm_local_size(world);
    EXPECT(here >= 1 && here <= size && cpl_comm_local_rank(world) >= 0 && cpl_comm_local_rank(world) < here);
    EXPECT(names != NULL && strstr(names, own) != NULL && (strchr(names, ',') != NULL) == (here < size));
    EXPECT(strcmp(cpl_comm_kind(world), "mpi") == 0 && cpl_comm_mpi(world) != NULL);
    cpl_comm_library(library, sizeof library);
    cpl_comm_library(tiny, sizeof tiny);
    EXPECT(strpbrk(library, "0123456789") != NULL && strchr(library, ',') == NULL && strncmp(tiny, library, 3) == 0 &&
           tiny[3] == '\0');
    cpl_arena_destroy(&arena);
}

/* Groups of two; their leaders take trials at different speeds and tell their group. */
static void test_counter_hands_out_every_number_once_over_groups_of_different_speed(void **state) {
    enum { TRIALS = 60 };
    cpl_comm *group = NULL;
    cpl_counter *counter = NULL;
    int64_t taken[TRIALS + 5] = {0}, next = 0;
    EXPECT_OK(cpl_comm_split(world, rank / 2, &group));
    EXPECT_OK(cpl_counter_create(&counter, world, 5));
    while (wrong == 0) {
        if (cpl_comm_rank(group) == 0) {
            EXPECT_OK(cpl_counter_next(counter, &next));
        }
        EXPECT_OK(cpl_comm_bcast(group, &next, sizeof next, 0));
        EXPECT(next >= 5);
        if (next >= TRIALS + 5) {
            break;
        }
        taken[next] += cpl_comm_rank(group) == 0;
        usleep((useconds_t)(200 + 2000 * (rank / 2)));
        cpl_comm_progress(world);
    }
    EXPECT_OK(cpl_comm_allreduce_i64(world, taken, TRIALS + 5, CPL_SUM));
    for (int i = 0; i < TRIALS + 5; i++) {
        EXPECT(taken[i] == (i >= 5));
    }
    cpl_counter_destroy(&counter);
    cpl_comm_destroy(&group);
}

/* Rank 0, where the number lives, waits in a collective call that the others enter when they have their numbers. */
static void test_counter_is_served_while_its_rank_waits_for_all(void **state) {
    cpl_counter *counter = NULL;
    int64_t next[3] = {0}, sum = 0, begin[65];
    float x[64] = {0};
    EXPECT_OK(cpl_counter_create(&counter, world, 1));
    for (int way = 0; way < 3; way++) {
        if (rank > 0) {
            EXPECT_OK(cpl_counter_next(counter, &next[way]));
        }
        parts(begin, 0, 64, 0);
        EXPECT_OK(way == 0   ? cpl_comm_barrier(world)
                  : way == 1 ? cpl_comm_reduce_scatter(world, &host_device, x, begin)
                             : cpl_comm_allgather(world, &host_device, x, sizeof *x, begin));
        sum += next[way];
    }
    EXPECT_OK(cpl_comm_allreduce_i64(world, &sum, 1, CPL_SUM));
    int64_t taken = 3 * (size - 1);
    EXPECT(sum == taken * (taken + 1) / 2);
    cpl_counter_destroy(&counter);
}

/* Rank 0 waits for the others' files without any call of MPI, but for cpl_comm_progress where MPI has
 * no one-sided calls or other hosts take part. */
static void test_counter_needs_no_help_of_the_rank_that_holds_it(void **state) {
    cpl_counter *counter = NULL;
    int64_t next = -1;
    char name[64];
    EXPECT_OK(cpl_counter_create(&counter, world, 0));
    if (rank > 0) {
        EXPECT_OK(cpl_counter_next(counter, &next));
        EXPECT(next >= 0 && next < size - 1);
        snprintf(name, sizeof name, "counter-%d", rank);
        FILE *f = fopen(name, "w");
        EXPECT(f != NULL && fclose(f) == 0);
    }
    for (int r = 1; rank == 0 && r < size; r++) {
        snprintf(name, sizeof name, "counter-%d", r);
        int waited = 0;
        while (access(name, F_OK) != 0 && waited < 20000) {
            usleep(1000);
            waited++;
            if (!cpl_comm_mpi_one_sided() || cpl_comm_local_size(world) < size) {
                cpl_comm_progress(world);
            }
        }
        EXPECT(waited < 20000);
        remove(name);
    }
    EXPECT_OK(cpl_comm_barrier(world));
    cpl_counter_destroy(&counter);
}

#define TEST(name) cmocka_unit_test_teardown(name, test_all_ranks)

int main(int argc, char **argv) {
    if (cpl_world_init(&world, &argc, &argv) != CPL_OK) {
        fprintf(stderr, "%s\n", cpl_status_message());
        return 1;
    }
    rank = cpl_comm_rank(world);
    size = cpl_comm_size(world);
    const struct CMUnitTest tests[] = {
        TEST(test_small_values_are_combined_over_test_all_ranks),
        TEST(test_agree_takes_the_worst_status_of_the_lowest_rank_with_its_message),
        TEST(test_a_status_agreed_twice_names_its_rank_once),
        TEST(test_agree_word_is_the_or_of_test_all_ranks),
        TEST(test_tree_sum_continues_the_tree_over_micro_batches),
        TEST(test_sum_through_many_small_slices_has_the_same_bits),
        TEST(test_device_memory_is_summed_by_way_of_the_host),
        TEST(test_device_failure_on_one_rank_becomes_the_failure_of_all),
        TEST(test_allgather_gives_every_part_to_every_rank_directly_and_in_slices),
        TEST(test_parts_that_overlap_are_refused),
        TEST(test_groups_work_apart_and_name_world_ranks),
        TEST(test_names_of_hosts_and_of_the_library),
        TEST(test_counter_hands_out_every_number_once_over_groups_of_different_speed),
        TEST(test_counter_is_served_while_its_rank_waits_for_all),
        TEST(test_counter_needs_no_help_of_the_rank_that_holds_it),
    };
    if (rank != 0 && freopen("/dev/null", "w", stdout) == NULL) {
        return 1;
    }
    printf("one-sided: %d\n", cpl_comm_mpi_one_sided());
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cpl_world_finish(&world);
    return failed != 0;
}

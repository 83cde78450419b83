/* Sums, collections and flags over NCCL against those through host memory over MPI, bit for bit, at once, range by range and in a
 * recorded graph; on as many ranks as mpirun starts, each with a GPU of its own.
 * Refuses to pass where NCCL was not taken. */
#include "comm/internal.h"
#include "tests/support/expect.h"

enum { RANKS = 64, MARK = 0 };
static cpl_device *dev;

/* [size+1] parts of [64, n+64); `shape` 0: about even, odd lengths, 1: rank 0 has all, 2: the last has all, 3: every other one is
 * empty, 4: even. */
static void parts(int64_t *begin, int64_t n, int shape) {
    int holders = size / 2 + size % 2;
    for (int r = 0; r <= size; r++) {
        int64_t share = shape == 0   ? (n * r / size) | (r > 0)
                        : shape == 1 ? (r > 0) * n
                        : shape == 2 ? (r == size) * n
                        : shape == 3 ? n * ((r + 1) / 2) / holders
                                     : n / size * r;
        begin[r] = 64 + (r == size ? n : share > n ? n : share);
    }
}

typedef struct {
    int64_t n, begin[RANKS + 1];
    float *host, *expected; /* owned, host [n+64] */
    float *x;               /* owned, device [n+64] */
    uint32_t *flag;         /* owned, device: 1 on the last rank */
    int slices;
} buffers;

static float value(int of, int64_t i) {
    uint32_t bits = ((uint32_t)i * 2654435761u) ^ ((uint32_t)(of + 1) * 40503u << 7);
    return (float)(int32_t)bits * 0x1p-31f * (float)(1 << (i % 20));
}

static void fill(buffers *b) {
    uint32_t flag = rank == size - 1;
    for (int64_t i = 0; i < b->n + 64; i++) {
        b->host[i] = value(rank, i);
    }
    EXPECT_OK(CPL_OPS(dev, upload, b->x, b->host, (size_t)(b->n + 64) * sizeof *b->x));
    EXPECT_OK(CPL_OPS(dev, upload, b->flag, &flag, sizeof flag));
}

static void fetch(buffers *b, float *to) {
    EXPECT_OK(cpl_device_mark(dev, MARK));
    EXPECT_OK(cpl_comm_wait(world, dev, MARK, "test"));
    EXPECT_OK(CPL_OPS(dev, download, to, b->x, (size_t)(b->n + 64) * sizeof *b->x));
}

/* expected: the sum in every part, by MPI. */
static void begin(buffers *b, int64_t n, int shape, int slices) {
    *b = (buffers){.n = n, .slices = slices};
    parts(b->begin, n, shape);
    b->host = calloc((size_t)n + 64, sizeof *b->host);
    b->expected = calloc((size_t)n + 64, sizeof *b->expected);
    assert_true(b->host != NULL && b->expected != NULL);
    assert_int_equal(cpl_device_alloc(dev, &b->x, (size_t)n + 64, sizeof *b->x, "test"), CPL_OK);
    assert_int_equal(cpl_device_alloc(dev, &b->flag, 1, sizeof *b->flag, "test"), CPL_OK);
    cpl_plane *plane = world->plane;
    world->plane = NULL;
    fill(b);
    EXPECT_OK(cpl_comm_reduce_scatter(world, dev, b->x, b->begin));
    EXPECT_OK(cpl_comm_allgather(world, dev, b->x, sizeof *b->x, b->begin));
    EXPECT_OK(CPL_OPS(dev, download, b->expected, b->x, (size_t)(n + 64) * sizeof *b->x));
    world->plane = plane;
}

static void end(buffers *b) {
    cpl_device_free(dev, &b->x);
    cpl_device_free(dev, &b->flag);
    free(b->host);
    free(b->expected);
}

static void compare(buffers *b) {
    uint32_t flag = 0;
    fetch(b, b->host);
    EXPECT_OK(CPL_OPS(dev, download, &flag, b->flag, sizeof flag));
    EXPECT(flag == 1);
    EXPECT(memcmp(b->host + 64, b->expected + 64, (size_t)b->n * sizeof *b->host) == 0);
    EXPECT(b->host[0] == value(rank, 0) && b->host[63] == value(rank, 63));
}

static cpl_status at_once(void *context) {
    cpl_status st = CPL_OK;
    buffers *b = context;
    CPL_TRY(cpl_comm_or_flag(world, dev, b->flag));
    CPL_TRY(cpl_comm_reduce_scatter(world, dev, b->x, b->begin));
    for (int k = 0; k < b->slices; k++) {
        CPL_TRY(cpl_comm_allgather_slice(world, dev, b->x, sizeof *b->x, b->begin, k, b->slices));
    }
done:
    return st;
}

/* From the end to the beginning, as a backward pass does. exact: for more than 2 ranks. */
static cpl_status by_ranges(void *context) {
    cpl_status st = CPL_OK;
    buffers *b = context;
    cpl_reduction r;
    const int64_t range = CPL_BUCKET / 3 + 64;
    cpl_reduction_begin(&r, world, dev, b->x, b->begin, true);
    for (int64_t last = 64 + b->n; last > 64; last -= range) {
        CPL_TRY(cpl_reduction_add(&r, last - range > 64 ? last - range : 64, last));
    }
    CPL_TRY(cpl_reduction_end(&r));
    CPL_TRY(cpl_comm_or_flag(world, dev, b->flag));
    CPL_TRY(cpl_comm_allgather(world, dev, b->x, sizeof *b->x, b->begin));
done:
    return st;
}

static void test_nccl_gives_the_bits_of_mpi(void **state) {
    static const int64_t counts[] = {1, 7, 5003, 1 << 20, 5000011};
    for (int shape = 0; shape < 5; shape++) {
        for (int k = 0; k < 5; k++) {
            buffers b;
            begin(&b, counts[k], shape, 1 + k);
            fill(&b);
            EXPECT_OK(at_once(&b));
            compare(&b);
            fill(&b);
            EXPECT_OK(by_ranges(&b));
            compare(&b);
            end(&b);
        }
    }
}

static void test_nccl_in_a_recorded_graph_gives_the_same_bits(void **state) {
    cpl_status (*const body[])(void *) = {at_once, by_ranges};
    for (int way = 0; way < 2; way++) {
        buffers b;
        cpl_graph *graph = NULL;
        begin(&b, 5000011, 0, 3);
        fill(&b);
        EXPECT_OK(body[way](&b));
        EXPECT_OK(cpl_device_record(dev, body[way], &b, &graph));
        EXPECT(graph != NULL);
        for (int i = 0; i < 3 && graph != NULL; i++) {
            fill(&b);
            EXPECT_OK(cpl_device_replay(dev, graph));
            compare(&b);
        }
        cpl_graph_destroy(dev, &graph);
        end(&b);
    }
}

/* NCCL's own order over more than 2 ranks: the same bits whenever the same ranges are summed. */
static void test_nccl_sums_in_the_same_order_again(void **state) {
    buffers b;
    float *again = calloc(3000064, sizeof *again);
    begin(&b, 3000000, 0, 1);
    for (int i = 0; i < 4; i++) {
        cpl_reduction r;
        fill(&b);
        cpl_reduction_begin(&r, world, dev, b.x, b.begin, false);
        EXPECT_OK(cpl_reduction_add(&r, 2000000, 3000064));
        EXPECT_OK(cpl_reduction_add(&r, 64, 2000000));
        EXPECT_OK(cpl_reduction_end(&r));
        fetch(&b, i == 0 ? again : b.host);
        size_t bytes = (size_t)(b.begin[rank + 1] - b.begin[rank]) * sizeof *again;
        EXPECT(i == 0 || memcmp(again + b.begin[rank], b.host + b.begin[rank], bytes) == 0);
    }
    free(again);
    end(&b);
}

static void test_groups_have_a_communicator_of_their_own(void **state) {
    cpl_comm *group = NULL;
    int64_t first[RANKS + 1];
    EXPECT_OK(cpl_comm_split(world, rank % 2, &group));
    EXPECT_OK(cpl_comm_attach(group, dev));
    EXPECT(cpl_comm_overlaps(group));
    for (int r = 0; r <= cpl_comm_size(group); r++) {
        first[r] = r;
    }
    uint32_t *word = NULL, words[RANKS] = {0};
    words[cpl_comm_rank(group)] = (uint32_t)rank + 1;
    EXPECT_OK(cpl_device_alloc(dev, &word, RANKS, sizeof *word, "test"));
    EXPECT_OK(CPL_OPS(dev, upload, word, words, sizeof words));
    EXPECT_OK(cpl_comm_allgather(group, dev, word, sizeof *word, first));
    EXPECT_OK(CPL_OPS(dev, download, words, word, sizeof words));
    for (int r = 0; r < cpl_comm_size(group); r++) {
        EXPECT(words[r] == (uint32_t)(rank % 2 + 2 * r + 1));
    }
    cpl_device_free(dev, &word);
    cpl_comm_destroy(&group);
}

#define TEST(name) cmocka_unit_test_teardown(name, test_all_ranks)

int main(int argc, char **argv) {
    char version[64];
    setenv("CUPEL_NCCL", "1", 1);
    if (cpl_world_init(&world, &argc, &argv) != CPL_OK ||
        cpl_agree(world, cpl_device_create(&dev, "cuda", cpl_comm_local_rank(world), 0)) != CPL_OK ||
        cpl_comm_attach(world, dev) != CPL_OK) {
        fprintf(stderr, "%s\n", cpl_status_message());
        return 1;
    }
    rank = cpl_comm_rank(world);
    size = cpl_comm_size(world);
    cpl_comm_nccl(version, sizeof version);
    const struct CMUnitTest tests[] = {
        TEST(test_nccl_gives_the_bits_of_mpi),
        TEST(test_nccl_in_a_recorded_graph_gives_the_same_bits),
        TEST(test_nccl_sums_in_the_same_order_again),
        TEST(test_groups_have_a_communicator_of_their_own),
    };
    if (rank != 0 && freopen("/dev/null", "w", stdout) == NULL) {
        return 1;
    }
    printf("NCCL %s, %d ranks\n", version, size);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    cpl_comm_detach(world);
    cpl_device_destroy(&dev);
    cpl_world_finish(&world);
    return failed != 0;
}

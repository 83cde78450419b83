/* Devices that meet: several on one GPU stand for ranks, each with a board in its memory. Copies beside a device's other work.
 * Refuses to prove what a map between processes does: that needs two GPUs (tests/comm/cuda). */
#include "tests/support/twin.h"
#include <unistd.h>

enum { MEETINGS = 50, WORDS = 1 << 20 };

/* Before each meeting a device tells every other its number and that of the meeting; behind it stands what it was told. */
static void meet_often(int ranks) {
    cpl_device *dev[4];
    cpl_reach board = {.count = ranks};
    uint32_t *told[4], *seen[4], *word[4], host[MEETINGS * 4], bits[MEETINGS];
    for (int r = 0; r < ranks; r++) {
        assert_ok(cpl_device_create(&dev[r], "cuda", 0, 1));
        assert_ok(cpl_device_alloc(dev[r], &board.at[r], CPL_BOARD_WORDS, sizeof(uint32_t), "board"));
        assert_ok(cpl_device_alloc(dev[r], &told[r], 4, sizeof(uint32_t), "told"));
        assert_ok(cpl_device_alloc(dev[r], &seen[r], MEETINGS * 4, sizeof(uint32_t), "seen"));
        assert_ok(cpl_device_alloc(dev[r], &word[r], 2 * MEETINGS, sizeof(uint32_t), "words"));
        for (int i = 0; i < MEETINGS; i++) {
            host[i] = (uint32_t)(i % ranks == r && i % 3 == 0); /* one of them raises it */
        }
        assert_ok(CPL_OPS(dev[r], upload, word[r], host, MEETINGS * sizeof(uint32_t)));
    }
    uint32_t *say[4];
    for (int r = 0; r < ranks; r++) {
        for (int i = 0; i < MEETINGS; i++) {
            host[i] = (uint32_t)(100 * i + r);
        }
        assert_ok(cpl_device_alloc(dev[r], &say[r], MEETINGS, sizeof(uint32_t), "say"));
        assert_ok(CPL_OPS(dev[r], upload, say[r], host, MEETINGS * sizeof(uint32_t)));
    }
    for (int i = 0; i < MEETINGS; i++) {
        for (int k = 0; k < ranks; k++) {
            int r = (i + k) % ranks; /* another one comes first each time */
            board.own = r;
            for (int q = 0; q < ranks; q++) {
                assert_ok(CPL_OPS(dev[r], copy, told[q] + r, say[r] + i, sizeof(uint32_t)));
            }
            assert_ok(cpl_device_meet(dev[r], &board, word[r] + i));
            assert_ok(CPL_OPS(dev[r], copy, seen[r] + 4 * i, told[r], 4 * sizeof(uint32_t)));
            assert_ok(cpl_device_meet(dev[r], &board, NULL)); /* before the next is told */
        }
    }
    for (int r = 0; r < ranks; r++) {
        assert_ok(CPL_OPS(dev[r], download, host, seen[r], sizeof host));
        assert_ok(CPL_OPS(dev[r], download, bits, word[r], sizeof bits));
        for (int i = 0; i < MEETINGS; i++) {
            for (int q = 0; q < ranks; q++) {
                assert_int_equal(host[4 * i + q], 100 * i + q);
            }
            assert_int_equal(bits[i], i % 3 == 0);
        }
    }
    for (int r = 0; r < ranks; r++) {
        cpl_device_destroy(&dev[r]);
    }
}

static void test_devices_wait_for_each_other_and_combine_their_words(void **state) {
    (void)state;
    alarm(120); /* a device that does not come is waited for without end */
    for (int ranks = 1; ranks <= 4; ranks++) {
        meet_often(ranks);
    }
    alarm(0);
}

/* x [4][WORDS]: 0 to 1, 1 to 2 beside other work, 2 to 3. */
typedef struct {
    cpl_device *dev;
    uint32_t *x[4];
} carried;

static cpl_status carry(void *context) {
    cpl_status st = CPL_OK;
    const carried *c = context;
    CPL_TRY(CPL_OPS(c->dev, copy, c->x[1], c->x[0], WORDS * sizeof(uint32_t)));
    for (int half = 0; half < 2; half++) {
        uint32_t *to = c->x[2] + half * (WORDS / 2), *from = c->x[1] + half * (WORDS / 2);
        CPL_TRY(cpl_device_copy_beside(c->dev, to, from, WORDS / 2 * sizeof(uint32_t)));
    }
    CPL_TRY(cpl_device_join(c->dev));
    CPL_TRY(CPL_OPS(c->dev, copy, c->x[3], c->x[2], WORDS * sizeof(uint32_t)));
    CPL_TRY(CPL_OPS(c->dev, zero, c->x[1], WORDS * sizeof(uint32_t)));
done:
    return st;
}

static void check_carried(const carried *c, uint32_t *host, uint32_t first) {
    assert_ok(CPL_OPS(c->dev, download, host, c->x[3], WORDS * sizeof *host));
    for (uint32_t i = 0; i < WORDS; i++) {
        assert_int_equal(host[i], first + i);
    }
}

static void test_copies_beside_come_after_what_was_before_and_before_what_follows_a_join(void **state) {
    (void)state;
    cpl_graph *graph = NULL;
    carried c = {.dev = NULL};
    uint32_t *host = test_array(WORDS, sizeof *host);
    assert_ok(cpl_device_create(&c.dev, "cuda", 0, 1));
    for (int i = 0; i < 4; i++) {
        assert_ok(cpl_device_alloc(c.dev, &c.x[i], WORDS, sizeof(uint32_t), "words"));
    }
    assert_ok(cpl_device_join(c.dev)); /* of nothing */
    for (uint32_t turn = 1; turn <= 4; turn++) {
        for (uint32_t i = 0; i < WORDS; i++) {
            host[i] = 1000 * turn + i;
        }
        assert_ok(CPL_OPS(c.dev, upload, c.x[0], host, WORDS * sizeof *host));
        if (turn == 2) { /* as a graph from here on */
            assert_ok(cpl_device_record(c.dev, carry, &c, &graph));
        }
        assert_ok(graph == NULL ? carry(&c) : cpl_device_replay(c.dev, graph));
        check_carried(&c, host, 1000 * turn);
    }
    cpl_graph_destroy(c.dev, &graph);
    cpl_device_destroy(&c.dev);
    test_release(&host);
}

static void test_a_device_does_not_reach_itself_or_nobody(void **state) {
    (void)state;
    char identity[64];
    cpl_device_identity(test_on[1], identity, sizeof identity);
    assert_false(cpl_device_reaches(test_on[1], identity));
    assert_false(cpl_device_reaches(test_on[1], "ffff:ff:1f.0"));
    assert_false(cpl_device_reaches(test_on[0], identity));
}

static void test_the_cpu_says_that_it_shares_nothing(void **state) {
    (void)state;
    cpl_shared_name name = {{0}};
    void *out = &name;
    const cpl_reach board = {.count = 0};
    assert_int_equal(cpl_device_share(test_on[0], &name, &name), CPL_INTERNAL);
    assert_int_equal(cpl_device_map(test_on[0], &name, &out), CPL_INTERNAL);
    assert_null(out);
    assert_int_equal(cpl_device_meet(test_on[0], &board, NULL), CPL_INTERNAL);
    assert_int_equal(cpl_device_copy_beside(test_on[0], &name, &name, 0), CPL_INTERNAL);
    assert_int_equal(cpl_device_join(test_on[0]), CPL_INTERNAL);
    cpl_device_unmap(test_on[0], NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices_wait_for_each_other_and_combine_their_words),
        cmocka_unit_test(test_copies_beside_come_after_what_was_before_and_before_what_follows_a_join),
        cmocka_unit_test(test_a_device_does_not_reach_itself_or_nobody),
        cmocka_unit_test(test_the_cpu_says_that_it_shares_nothing),
    };
    return test_gpu_main(tests, sizeof tests / sizeof tests[0]);
}

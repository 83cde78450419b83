/* The order of samples and the parts of a corpus: bijections, independence of ranks and of files, nothing held out in training.
 * Refuses tokens that do not say where they stand: token p of the row is p. */
#include "tests/io/corpus_rig.h"
#include <math.h>

/* A raw u16 shard of the tokens begin, begin + 1 ... end - 1. */
static void write_positions(const char *path, int begin, int end) {
    uint16_t *tokens = malloc((size_t)(end - begin) * sizeof *tokens);
    assert_non_null(tokens);
    for (int p = begin; p < end; p++) {
        tokens[p - begin] = (uint16_t)p;
    }
    rig_write(path, tokens, (size_t)(end - begin) * sizeof *tokens);
    free(tokens);
}

static cpl_corpus *open_positions(int n) {
    cpl_corpus *c = NULL;
    write_positions("row.bin", 0, n);
    assert_ok(rig_open(&c, "row.bin", 0));
    return c;
}

/* The window that sample i is, with its tokens and targets checked. */
static int64_t sample_window(const cpl_split *s, uint64_t seed, uint64_t i) {
    int32_t tokens[64], targets[64];
    assert_true(s->T <= 64);
    memset(targets, -1, sizeof targets);
    assert_ok(cpl_split_sample(s, seed, i, tokens, targets));
    for (int64_t t = 0; t < s->T; t++) {
        assert_int_equal(tokens[t], tokens[0] + t);
        assert_int_equal(targets[t], tokens[0] + t + 1);
    }
    assert_int_equal((tokens[0] - s->begin) % s->T, 0);
    return (tokens[0] - s->begin) / s->T;
}

static void test_epoch_is_a_bijection_that_changes_with_epoch_and_seed(void **state) {
    enum { T = 7, WINDOWS = 1000 };
    cpl_corpus *c = open_positions(T * WINDOWS + 3); /* two tokens too few for another window */
    cpl_split train, val;
    cpl_corpus_split(c, 0.0, T, &train, &val);
    assert_int_equal(train.windows, WINDOWS);
    int64_t order[4][WINDOWS];
    for (int e = 0; e < 4; e++) { /* epochs 0, 1, 2 of seed 5; epoch 0 of seed 6 */
        char seen[WINDOWS] = {0};
        for (int i = 0; i < WINDOWS; i++) {
            order[e][i] = sample_window(&train, e < 3 ? 5 : 6, (uint64_t)(e % 3) * WINDOWS + (uint64_t)i);
            assert_in_range(order[e][i], 0, WINDOWS - 1);
            assert_int_equal(seen[order[e][i]]++, 0);
        }
    }
    for (int a = 0; a < 4; a++) {
        for (int b = -1; b < a; b++) { /* -1: file order */
            int same = 0;
            for (int i = 0; i < WINDOWS; i++) {
                same += order[a][i] == (b < 0 ? i : order[b][i]);
            }
            assert_true(same < 15); /* chance: Poisson of mean 1, P(>= 15) < 1e-12 */
        }
    }
    cpl_corpus_close(&c);
}

static void test_sample_is_the_documented_function_of_seed_and_index(void **state) {
    cpl_corpus *c = open_positions(1000);
    cpl_split train, val;
    cpl_corpus_split(c, 0.25, 8, &train, &val);
    const uint64_t indices[] = {0, 1, 92, 93, 94, 1000003, (uint64_t)1 << 40, UINT64_MAX};
    assert_int_equal(train.windows, 93);
    for (size_t i = 0; i < sizeof indices / sizeof *indices; i++) {
        uint64_t w = cpl_rng_permute(77, CPL_RNG_DATA, (uint32_t)(indices[i] / 93), 93, indices[i] % 93);
        assert_int_equal(sample_window(&train, 77, indices[i]), w);
    }
    cpl_corpus_close(&c);
}

static void test_order_does_not_depend_on_ranks_or_on_what_was_asked_before(void **state) {
    enum { SAMPLES = 240 }; /* several epochs of 62 windows */
    cpl_corpus *c = open_positions(1000);
    cpl_split train, val;
    int64_t whole[SAMPLES];
    cpl_corpus_split(c, 0.0, 16, &train, &val);
    for (uint64_t i = 0; i < SAMPLES; i++) {
        whole[i] = sample_window(&train, 3, i);
    }
    cpl_corpus_close(&c);
    for (uint64_t ranks = 1; ranks <= 4; ranks++) {
        for (uint64_t rank = 0; rank < ranks; rank++) {
            c = open_positions(1000);
            cpl_corpus_split(c, 0.0, 16, &train, &val);
            for (uint64_t i = rank; i < SAMPLES; i += ranks) { /* shared out one by one, asked for from the last to the first */
                uint64_t mine = rank + (SAMPLES - 1 - rank) / ranks * ranks - (i - rank);
                assert_int_equal(sample_window(&train, 3, mine), whole[mine]);
            }
            for (uint64_t i = SAMPLES / ranks * rank; i < SAMPLES / ranks * (rank + 1); i++) { /* shared out in blocks */
                assert_int_equal(sample_window(&train, 3, i), whole[i]);
            }
            cpl_corpus_close(&c);
        }
    }
}

static void test_samples_are_the_same_however_the_row_is_cut_into_files(void **state) {
    enum { N = 500, T = 9 };
    const char *paths[] = {"p0.bin", "p1.h5", "p2.bin", "p3.bin", "p4.h5", "p5.bin"};
    const int cut[] = {0, 1, 3, 200, 204, 498, N};
    cpl_corpus *one = open_positions(N), *many = NULL;
    for (int f = 0; f < 6; f++) {
        int32_t tokens[N];
        uint16_t narrow[N];
        int n = cut[f + 1] - cut[f];
        for (int i = 0; i < n; i++) {
            tokens[i] = cut[f] + i;
            narrow[i] = (uint16_t)(cut[f] + i);
        }
        if (f == 1 || f == 4) {
            rig_write_h5(paths[f], tokens, n, 1000, "shards");
        } else if (f == 3) {
            rig_write_llmc(paths[f], CPL_LLMC_MAGIC, 1, n, narrow, (size_t)n * 2);
        } else {
            write_positions(paths[f], cut[f], cut[f + 1]);
        }
    }
    assert_ok(cpl_corpus_open(&many, paths, 6, 0));
    cpl_split a, b, val;
    cpl_corpus_split(one, 0.1, T, &a, &val);
    cpl_corpus_split(many, 0.1, T, &b, &val);
    for (uint64_t i = 0; i < 200; i++) {
        assert_int_equal(sample_window(&a, 9, i), sample_window(&b, 9, i));
    }
    cpl_corpus_close(&one);
    cpl_corpus_close(&many);
}

static void test_no_training_window_touches_held_out_tokens(void **state) {
    const int sizes[] = {2, 3, 10, 33, 100, 1001};
    const double fractions[] = {0.0, 0.05, 0.1, 1.0 / 3, 0.5, 0.9, 0.999, 1.0};
    for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
        cpl_corpus *c = open_positions(sizes[n]);
        for (size_t f = 0; f < sizeof fractions / sizeof *fractions; f++) {
            for (int64_t T = 1; T <= 16; T += 5) {
                cpl_split train, val;
                int32_t tokens[16], targets[16];
                cpl_corpus_split(c, fractions[f], T, &train, &val);
                int64_t held = (int64_t)floor(fractions[f] * sizes[n]);
                assert_int_equal(train.begin, 0);
                assert_int_equal(train.end, sizes[n] - held);
                assert_int_equal(val.begin, train.end);
                assert_int_equal(val.end, sizes[n]);
                for (int64_t w = 0; w < train.windows; w++) {
                    assert_ok(cpl_split_window(&train, w, tokens, targets));
                    assert_int_equal(tokens[0], w * T);
                    assert_true(targets[T - 1] < val.begin);
                }
                for (int64_t w = 0; w < val.windows; w++) {
                    assert_ok(cpl_split_window(&val, w, tokens, targets));
                    assert_int_equal(tokens[0], val.begin + w * T);
                    assert_true(targets[T - 1] < val.end);
                }
                /* as many windows as fit: one more would end beyond the part */
                assert_true(train.begin + (train.windows + 1) * T >= train.end);
                assert_true(val.begin + (val.windows + 1) * T >= val.end);
            }
        }
        cpl_corpus_close(&c);
    }
}

static void test_impossible_fractions_are_brought_into_range(void **state) {
    cpl_corpus *c = open_positions(100);
    cpl_split train, val;
    const struct {
        double fraction;
        int64_t held;
    } cases[] = {{-0.5, 0}, {NAN, 0}, {-INFINITY, 0}, {1.5, 100}, {INFINITY, 100}, {0.999999999, 99}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cpl_corpus_split(c, cases[i].fraction, 4, &train, &val);
        assert_int_equal(val.end - val.begin, cases[i].held);
        assert_int_equal(train.end, 100 - cases[i].held);
    }
    cpl_corpus_split(c, 0.1, 0, &train, &val);
    assert_int_equal(train.windows, 0);
    cpl_corpus_split(c, 0.1, INT64_MAX, &train, &val);
    assert_int_equal(train.windows, 0);
    cpl_corpus_close(&c);
}

static void test_too_small_corpus_says_how_many_tokens_are_missing(void **state) {
    cpl_corpus *c = open_positions(1000);
    cpl_split train, val;
    cpl_corpus_split(c, 0.1, 256, &train, &val);
    assert_fails(
        cpl_split_check(&train, 8, "row.bin (training part)"), CPL_INPUT,
        "row.bin (training part) has 900 tokens, a global batch of 8 sequences of 256 needs 2049: 1149 tokens are missing");
    assert_ok(cpl_split_check(&train, 3, "row.bin"));
    assert_int_equal(train.windows, 3);
    assert_int_equal(cpl_split_check(&train, 4, "row.bin"), CPL_INPUT);
    for (int64_t sequences = 1; sequences < 60; sequences++) { /* exactly: with one token less a window is missing */
        cpl_corpus_split(c, 0.0, 17, &train, &val);
        assert_int_equal(cpl_split_check(&train, sequences, "row.bin") == CPL_OK, train.windows >= sequences);
    }
    assert_fails(cpl_split_check(&train, 0, "row.bin"), CPL_INPUT,
                 "row.bin: a global batch of 0 sequences of 17 tokens, expected at least one of each and less than 2^63");
    assert_int_equal(cpl_split_check(&train, INT64_MAX, "row.bin"), CPL_INPUT);
    assert_int_equal(cpl_split_check(&train, INT64_MAX / 17, "row.bin"), CPL_INPUT);
    cpl_corpus_close(&c);
}

static void test_part_without_a_window_gives_no_sample(void **state) {
    cpl_corpus *c = open_positions(100);
    cpl_split train, val;
    int32_t tokens[64], targets[64];
    cpl_corpus_split(c, 0.5, 50, &train, &val);
    assert_int_equal(train.windows, 0); /* 50 tokens hold no 51 */
    assert_fails(cpl_split_sample(&train, 1, 0, tokens, targets), CPL_INPUT,
                 "row.bin: this part of the corpus has 50 tokens, a sequence of 50 needs 51");
    assert_fails(cpl_split_window(&train, 0, tokens, targets), CPL_INPUT,
                 "row.bin: window 0 of 50 tokens asked for, this part of the corpus has 0");
    cpl_corpus_split(c, 0.5, 49, &train, &val);
    assert_int_equal(sample_window(&train, 1, 12345), 0); /* one window: every epoch is it */
    assert_int_equal(cpl_split_window(&train, 1, tokens, targets), CPL_INPUT);
    assert_int_equal(cpl_split_window(&train, -1, tokens, targets), CPL_INPUT);
    cpl_corpus_close(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_epoch_is_a_bijection_that_changes_with_epoch_and_seed),
        cmocka_unit_test(test_sample_is_the_documented_function_of_seed_and_index),
        cmocka_unit_test(test_order_does_not_depend_on_ranks_or_on_what_was_asked_before),
        cmocka_unit_test(test_samples_are_the_same_however_the_row_is_cut_into_files),
        cmocka_unit_test(test_no_training_window_touches_held_out_tokens),
        cmocka_unit_test(test_impossible_fractions_are_brought_into_range),
        cmocka_unit_test(test_too_small_corpus_says_how_many_tokens_are_missing),
        cmocka_unit_test(test_part_without_a_window_gives_no_sample),
    };
    return cmocka_run_group_tests_name("io/corpus_order", tests, rig_enter, rig_leave);
}

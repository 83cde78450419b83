/* Philox4x32-10 against its published answers, and what is drawn from it.
 * Refuses to call a sequence random because its mean is right: bounds here catch wrong code, not weak generators. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/rng.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result. */
static void test_philox_gives_the_known_answers(void **state) {
    static const uint32_t row[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
    };
    for (size_t i = 0; i < 3; i++) {
        uint32_t out[4];
        cpl_rng_block((uint64_t)row[i][5] << 32 | row[i][4], (cpl_rng_purpose)row[i][3], row[i][2],
                      (uint64_t)row[i][1] << 32 | row[i][0], out);
        assert_memory_equal(out, row[i] + 6, sizeof out);
    }
}

static void test_seed_purpose_step_and_index_all_change_the_block(void **state) {
    uint32_t a[4], b[4];
    cpl_rng_block(1, CPL_RNG_DATA, 2, 3, a);
    cpl_rng_block(2, CPL_RNG_DATA, 2, 3, b);
    assert_memory_not_equal(a, b, sizeof a);
    cpl_rng_block(1, CPL_RNG_INIT, 2, 3, b);
    assert_memory_not_equal(a, b, sizeof a);
    cpl_rng_block(1, CPL_RNG_DATA, 3, 3, b);
    assert_memory_not_equal(a, b, sizeof a);
    cpl_rng_block(1, CPL_RNG_DATA, 2, 3 + (1ULL << 32), b);
    assert_memory_not_equal(a, b, sizeof a);
    cpl_rng_block(1 + (1ULL << 32), CPL_RNG_DATA, 2, 3, b);
    assert_memory_not_equal(a, b, sizeof a);
}

/* Means of N draws lie within 5 standard errors; the sequence is fixed, so this never flickers. */
static void test_normals_have_the_moments_of_a_standard_normal(void **state) {
    enum { N = 200000 };
    double m1 = 0, m2 = 0, m3 = 0, m4 = 0;
    for (uint64_t i = 0; i < N; i++) {
        double x = cpl_rng_normal(42, CPL_RNG_INIT, 0, i);
        assert_true(isfinite(x) && fabs(x) < 7);
        m1 += x;
        m2 += x * x;
        m3 += x * x * x;
        m4 += x * x * x * x;
    }
    assert_true(fabs(m1 / N) < 5 * sqrt(1.0 / N));
    assert_true(fabs(m2 / N - 1) < 5 * sqrt(2.0 / N));
    assert_true(fabs(m3 / N) < 5 * sqrt(15.0 / N));
    assert_true(fabs(m4 / N - 3) < 5 * sqrt(96.0 / N));
}

static void test_uniforms_fill_the_unit_interval_and_never_reach_one(void **state) {
    enum { N = 160000, BINS = 16 };
    int bin[BINS] = {0};
    for (uint64_t i = 0; i < N; i++) {
        float x = cpl_rng_uniform(7, CPL_RNG_SAMPLE, 1, i);
        assert_true(x >= 0 && x < 1);
        bin[(int)(x * BINS)]++;
    }
    for (int i = 0; i < BINS; i++) {
        assert_true(abs(bin[i] - N / BINS) < 5 * 100); /* 5 sqrt(N/BINS) */
    }
}

static void test_permutation_is_a_bijection_for_every_small_and_odd_size(void **state) {
    static const uint64_t size[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 4096, 4097, 65537};
    for (size_t s = 0; s < sizeof size / sizeof *size; s++) {
        unsigned char *seen = calloc(size[s], 1);
        assert_non_null(seen);
        for (uint64_t i = 0; i < size[s]; i++) {
            uint64_t to = cpl_rng_permute(9, CPL_RNG_DATA, 5, size[s], i);
            assert_true(to < size[s]);
            assert_int_equal(seen[to], 0);
            seen[to] = 1;
        }
        free(seen);
    }
}

static void test_permutations_of_two_epochs_and_seeds_differ(void **state) {
    enum { N = 10000 };
    int same_step = 0, same_seed = 0, fixed = 0;
    for (uint64_t i = 0; i < N; i++) {
        uint64_t a = cpl_rng_permute(1, CPL_RNG_DATA, 0, N, i);
        same_step += a == cpl_rng_permute(1, CPL_RNG_DATA, 1, N, i);
        same_seed += a == cpl_rng_permute(2, CPL_RNG_DATA, 0, N, i);
        fixed += a == i;
    }
    assert_true(same_step < 12 && same_seed < 12 && fixed < 12); /* 1 expected of each */
}

static void test_permutation_of_huge_sets_stays_inside(void **state) {
    static const uint64_t size[] = {(1ULL << 40) + 1, (1ULL << 62) + 12345, UINT64_MAX};
    for (size_t s = 0; s < 3; s++) {
        for (uint64_t i = 0; i < 200; i++) {
            assert_true(cpl_rng_permute(3, CPL_RNG_DATA, 0, size[s], size[s] - 1 - i) < size[s]);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox_gives_the_known_answers),
        cmocka_unit_test(test_seed_purpose_step_and_index_all_change_the_block),
        cmocka_unit_test(test_normals_have_the_moments_of_a_standard_normal),
        cmocka_unit_test(test_uniforms_fill_the_unit_interval_and_never_reach_one),
        cmocka_unit_test(test_permutation_is_a_bijection_for_every_small_and_odd_size),
        cmocka_unit_test(test_permutations_of_two_epochs_and_seeds_differ),
        cmocka_unit_test(test_permutation_of_huge_sets_stays_inside),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

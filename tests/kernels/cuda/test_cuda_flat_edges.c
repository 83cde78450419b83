/* Flat operations on the GPU where their fast paths end: NaN, buffers that only their element aligns, storms of ties and of NaN,
 * groups wider than a block holds, scales at the ends of f32. Refuses tolerance but for sums, which are added in another order. */
#include "tests/support/twin.h"
#include <math.h>
#include <string.h>

static void free_all(test_twin **twins, int n) {
    for (int i = 0; i < n; i++) {
        test_twin_free(twins[i]);
    }
}
static float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Every pattern of 16 bits both ways, and NaN of every payload position. */
static void test_casts_keep_nan_and_every_value_of_16_bits(void **state) {
    enum { N = 65536 };
    const cpl_dtype types[] = {CPL_BF16, CPL_F16};
    for (int t = 0; t < 2; t++) {
        uint16_t *all = test_array(N, sizeof *all);
        float *wide = test_array(N, sizeof *wide);
        for (uint32_t i = 0; i < N; i++) {
            all[i] = (uint16_t)i;
            wide[i] = from_bits(i % 4 == 0 ? (i << 16 | 0x7f800000u | 1u << i / 4 % 23) : i * 65537u + i / 7);
        }
        test_twin x = test_twin_of(all, N * 2), y = test_twin_new(N * 4), z = test_twin_of(wide, N * 4),
                  narrow = test_twin_new(N * 2);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], cast_to_f32, types[t], y.on[d], x.on[d], N));
            assert_ok(CPL_OPS(test_on[d], cast_from_f32, types[t], narrow.on[d], z.on[d], N));
        }
        test_twin_same("to f32", &y);
        test_twin_same("from f32", &narrow);
        free_all((test_twin *[]){&x, &y, &z, &narrow}, 4);
    }
}

/* One element off a 16-byte boundary, as a tensor behind one of odd size. */
static void test_unaligned_buffers(void **state) {
    enum { N = 20011, BEGIN = 3 };
    const int64_t begin[BEGIN] = {1, 777, N};
    for (int off = 1; off < 4; off++) {
        test_twin x = test_twin_act(CPL_F32, 1, N + off, 1.0f), y = test_twin_act(CPL_F32, 2, N + off, 1.0f);
        test_twin half = test_twin_new((N + 4) * 2), mask = test_twin_zero(N + 4), counts = test_twin_zero(2048 * 8);
        test_twin words = test_twin_zero(8 * 8), sum = test_twin_zero(8);
        for (int d = 0; d < 2; d++) {
            float *a = (float *)x.on[d] + off, *b = (float *)y.on[d] + off;
            int64_t *word = words.on[d];
            uint8_t *m = (uint8_t *)mask.on[d] + off;
            assert_ok(CPL_OPS(test_on[d], add_f32, b, a, N));
            assert_ok(CPL_OPS(test_on[d], cast_from_f32, CPL_F16, (uint16_t *)half.on[d] + off, a, N));
            assert_ok(CPL_OPS(test_on[d], select_histogram, counts.on[d], word, a, N, 1, 0, 0, 11));
            assert_ok(CPL_OPS(test_on[d], select_mask, m, a, N, 0x3f000000, word + 1));
            assert_ok(CPL_OPS(test_on[d], apply_mask, b, m, N));
            assert_ok(CPL_OPS(test_on[d], exponents, counts.on[d], (float *)(word + 2), a, N, 2.0f));
            assert_ok(
                CPL_OPS(test_on[d], grad_scan, (uint32_t *)(word + 3), (uint32_t *)(word + 4), NULL, a - 1, begin, BEGIN - 1));
            assert_ok(CPL_OPS(test_on[d], sum_f32, sum.on[d], a, N));
        }
        test_twin_same("sum", &y);
        test_twin_same("cast", &half);
        test_twin_same("mask", &mask);
        test_twin_same("counts", &counts);
        test_twin_same("words", &words);
        double *s = test_twin_read(&sum, 0), *t = test_twin_read(&sum, 1);
        assert_true(fabs(*s - *t) <= N * 0x1p-53 * N);
        cpl_free(&s);
        cpl_free(&t);
        free_all((test_twin *[]){&x, &y, &half, &mask, &counts, &words, &sum}, 7);
    }
}

/* What an overflow of the whole backward pass leaves: every element bad, in tensors of all sizes, the first not at 0. */
static void test_a_gradient_of_nan_and_inf_alone(void **state) {
    enum { TENSORS = 6 };
    const int64_t begin[TENSORS + 1] = {4, 5, 5, 9001, 9002, 40000, 50001};
    float *host = test_array(begin[TENSORS], sizeof *host);
    for (int64_t i = 0; i < begin[TENSORS]; i++) {
        host[i] = i < 9001 ? NAN : i == 45000 ? NAN : -INFINITY;
    }
    test_twin x = test_twin_of(host, (size_t)begin[TENSORS] * 4), kinds = test_twin_new(TENSORS * 4), any = test_twin_zero(4);
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], grad_scan, kinds.on[d], any.on[d], NULL, x.on[d], begin, TENSORS));
    }
    test_twin_same("kinds", &kinds);
    test_twin_same("any", &any);
    free_all((test_twin *[]){&x, &kinds, &any}, 3);
}

/* Every weight in one bin, more of them than 16 bits count; then ties that end in the middle of a piece, at its ends, and nowhere.
 */
static void test_storms_of_ties(void **state) {
    enum { N = 5000011 };
    float *host = test_array(N, sizeof *host);
    for (int64_t i = 0; i < N; i++) {
        host[i] = i % 1000 == 999 ? 1.0f : i % 2 ? 0.5f : -0.5f;
    }
    test_twin w = test_twin_of(host, (size_t)N * 4);
    for (int before = 0; before <= 21; before += before ? 10 : 11) {
        test_twin counts = test_twin_zero(2048 * 8), nans = test_twin_zero(8);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], select_histogram, counts.on[d], nans.on[d], w.on[d], N, 1,
                              before ? 0x3f000000u >> (31 - before) : 0, before, before ? 10 : 11));
        }
        test_twin_same("histogram", &counts);
        free_all((test_twin *[]){&counts, &nans}, 2);
    }
    const int64_t removed[] = {0, 1, 8183, 8184, 8185, 2500000, N};
    for (int k = 0; k < 7; k++) {
        int64_t *left = test_array(1, sizeof *left);
        *left = removed[k];
        test_twin mask = test_twin_new(N), budget = test_twin_of(left, sizeof *left);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], select_mask, mask.on[d], w.on[d], N, 0x3f000000u, budget.on[d]));
        }
        test_twin_same("mask", &mask);
        test_twin_same("ties left", &budget);
        free_all((test_twin *[]){&mask, &budget}, 2);
    }
    test_twin_free(&w);
}

/* In place, without codes or zeros; error figures added to what is there. */
static void check_quantize(cpl_quant_spec spec, int64_t rows, int64_t cols, float scale) {
    int64_t n = rows * cols, groups = spec.group > cols ? 1 : rows * ((cols + spec.group - 1) / spec.group);
    test_twin w = test_twin_act(CPL_F32, 12, n, scale), codes = test_twin_new((size_t)n),
              scales = test_twin_new((size_t)groups * 4);
    test_twin zeros = test_twin_zero((size_t)groups), error = test_twin_zero(sizeof(cpl_quant_error)), refused = test_twin_zero(8);
    for (int d = 0; d < 2; d++) {
        assert_ok(
            CPL_OPS(test_on[d], quantize, &spec, w.on[d], rows, cols, NULL, scales.on[d], NULL, NULL, error.on[d], refused.on[d]));
        assert_ok(CPL_OPS(test_on[d], quantize, &spec, w.on[d], rows, cols, codes.on[d], scales.on[d], zeros.on[d], w.on[d],
                          error.on[d], refused.on[d]));
    }
    test_twin_same("refused", &refused);
    int64_t *count = test_twin_read(&refused, 0);
    if (*count == 0) {
        test_twin_same("codes", &codes);
        test_twin_same("scales", &scales);
        test_twin_same("zeros", &zeros);
        test_twin_same("w_hat", &w);
        cpl_quant_error *a = test_twin_read(&error, 0), *b = test_twin_read(&error, 1);
        assert_true(fabs(a->sum_sq_error - b->sum_sq_error) <= 1e-12 * a->sum_sq_error);
        assert_true(fabs(a->sum_sq - b->sum_sq) <= 1e-12 * a->sum_sq);
        assert_true(fabs(a->sum_noise - b->sum_noise) <= 1e-12 * a->sum_noise);
        assert_true(a->max_error == b->max_error);
        test_same_bits("code counts", b->code_count, a->code_count, sizeof a->code_count);
        cpl_free(&a);
        cpl_free(&b);
    }
    cpl_free(&count);
    free_all((test_twin *[]){&w, &codes, &scales, &zeros, &error, &refused}, 6);
}

static void test_groups_of_every_width_and_scales_of_every_size(void **state) {
    static const int64_t shapes[][3] = {{3, 20000, 20000}, {2, 9001, 9001}, {5, 1600, 1600}, {5, 2052, 1024},  {7, 511, 300},
                                        {9, 1030, 513},    {4, 512, 512},   {4, 516, 512},   {50, 400, 20000}, {2, 50001, 32}};
    static const float scales[] = {1e-43f, 1e-38f, 1e-6f, 1.0f, 1e30f, 1e37f};
    for (int i = 0; i < 10; i++) {
        for (int k = 0; k < 4; k++) {
            cpl_quant_spec spec = {k % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC, k < 2 ? 4 : 8, shapes[i][2],
                                   k < 2 ? CPL_F16 : CPL_F32};
            check_quantize(spec, shapes[i][0], shapes[i][1], 0.02f);
        }
    }
    for (int i = 0; i < 6; i++) {
        for (int bits = 2; bits <= 8; bits += 3) {
            for (int k = 0; k < 4; k++) {
                cpl_quant_spec spec = {k % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC, bits, 128, k < 2 ? CPL_F16 : CPL_F32};
                check_quantize(spec, 64, 640, scales[i]);
            }
        }
    }
}

static void test_the_same_bits_twice(void **state) {
    enum { ROWS = 96, COLS = 4096, N = ROWS * COLS };
    const cpl_quant_spec spec = {CPL_QUANT_SYMMETRIC, 4, 128, CPL_F16};
    test_twin w = test_twin_act(CPL_F32, 1, N, 0.02f), scales = test_twin_new(N / 128 * 4), refused = test_twin_zero(8);
    test_twin error[2], sums[2];
    void *bits[2][2];
    for (int run = 0; run < 2; run++) {
        error[run] = test_twin_zero(sizeof(cpl_quant_error));
        sums[run] = test_twin_zero((N / CPL_SUM_CHUNK + 1) * 8);
        assert_ok(CPL_OPS(test_on[1], quantize, &spec, w.on[1], ROWS, COLS, NULL, scales.on[1], NULL, NULL, error[run].on[1],
                          refused.on[1]));
        assert_ok(CPL_OPS(test_on[1], sum_squares, sums[run].on[1], w.on[1], N));
        assert_ok(CPL_OPS(test_on[1], sum_f32, (double *)sums[run].on[1] + N / CPL_SUM_CHUNK, w.on[1], N));
        bits[run][0] = test_twin_read(&error[run], 1);
        bits[run][1] = test_twin_read(&sums[run], 1);
    }
    test_same_bits("error", bits[0][0], bits[1][0], error[0].bytes);
    test_same_bits("sums", bits[0][1], bits[1][1], sums[0].bytes);
    for (int i = 0; i < 4; i++) {
        cpl_free(&bits[i / 2][i % 2]);
    }
    free_all((test_twin *[]){&w, &scales, &refused, &error[0], &error[1], &sums[0], &sums[1]}, 7);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_casts_keep_nan_and_every_value_of_16_bits),
        cmocka_unit_test(test_unaligned_buffers),
        cmocka_unit_test(test_a_gradient_of_nan_and_inf_alone),
        cmocka_unit_test(test_storms_of_ties),
        cmocka_unit_test(test_groups_of_every_width_and_scales_of_every_size),
        cmocka_unit_test(test_the_same_bits_twice),
    };
    return test_gpu_main(tests, sizeof tests / sizeof tests[0]);
}

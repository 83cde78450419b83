/* Proves that one bad value anywhere is found and named by its tensor and kind, and that norms and exponent counts are exact.
 * Refuses to test round sizes only. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

enum { N = 70001 };
static const int64_t begin[] = {0, 1, 1, 100, 40000, N};
enum { TENSORS = 5 };

static void scan(cpl_device *dev, const float *x, uint32_t kinds[TENSORS], uint32_t *any) {
    memset(kinds, 0xff, TENSORS * sizeof *kinds);
    assert_ok(CPL_OPS(dev, grad_scan, kinds, any, NULL, x, begin, TENSORS));
}

static void finds_each(cpl_device *dev) {
    const int64_t places[] = {0, 1, 99, 100, 16483, 16484, 39999, 40000, 56384, N - 1};
    const float values[] = {INFINITY, -INFINITY, NAN, -NAN};
    float *x = test_normals(1, N, 1.0f);
    x[17] = 3.402823466e38f; /* the largest finite value is finite */
    x[18] = 1e-45f;
    uint32_t kinds[TENSORS], any = 0;
    scan(dev, x, kinds, &any);
    assert_int_equal(any, 0);
    for (int t = 0; t < TENSORS; t++) {
        assert_int_equal(kinds[t], 0);
    }
    for (size_t k = 0; k < sizeof places / sizeof *places; k++) {
        for (int v = 0; v < 4; v++) {
            float kept = x[places[k]];
            x[places[k]] = values[v];
            any = 0;
            scan(dev, x, kinds, &any);
            assert_int_equal(any, 1);
            for (int t = 0; t < TENSORS; t++) {
                bool here = places[k] >= begin[t] && places[k] < begin[t + 1];
                assert_int_equal(kinds[t], here ? (v < 2 ? 1 : 2) : 0);
            }
            x[places[k]] = kept;
        }
    }
    test_release(&x);
}
static void test_any_bad_value_is_found_in_its_tensor(void **unused) {
    (void)unused;
    test_on_devices(finds_each);
}

static void both_kinds(cpl_device *dev) {
    float *x = test_normals(1, N, 1.0f);
    uint32_t kinds[TENSORS], any = 1;
    scan(dev, x, kinds, &any);
    assert_int_equal(any, 1); /* is raised, never lowered */
    x[50000] = NAN;
    x[69000] = -INFINITY;
    x[200] = INFINITY;
    scan(dev, x, kinds, &any);
    const uint32_t want[TENSORS] = {0, 0, 0, 1, 3};
    assert_memory_equal(kinds, want, sizeof want);
    any = 0;
    assert_ok(CPL_OPS(dev, grad_scan, kinds, &any, NULL, x, begin, 0));
    assert_int_equal(any, 0);
    test_release(&x);
}
static void test_kinds_of_a_tensor_add_up_and_the_flag_stays_raised(void **unused) {
    (void)unused;
    test_on_devices(both_kinds);
}

static void squares(cpl_device *dev) {
    float *x = test_normals(2, N, 3.0f);
    enum { CHUNKS = (N + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK };
    double sums[CHUNKS];
    assert_ok(CPL_OPS(dev, sum_squares, sums, x, N));
    for (int c = 0; c < CHUNKS; c++) {
        long double want = 0;
        for (int64_t i = (int64_t)c * CPL_SUM_CHUNK; i < N && i < (int64_t)(c + 1) * CPL_SUM_CHUNK; i++) {
            want += (long double)x[i] * x[i];
        }
        assert_true(fabsl(sums[c] - want) <= 1e-13L * want);
    }
    const int64_t tensors[] = {0, 70, 9000, N};
    double along[CHUNKS];
    uint32_t kinds[3], any = 0;
    assert_ok(CPL_OPS(dev, grad_scan, kinds, &any, along, x, tensors, 3));
    test_same_bits("sums made by the scan", along, sums, sizeof sums);
    x[5000] = 3e38f; /* its square is finite in f64 */
    x[9000] = NAN;
    assert_ok(CPL_OPS(dev, sum_squares, sums, x, N));
    assert_true(sums[1] > 8.9e76 && isfinite(sums[1]) && isnan(sums[2]));
    test_release(&x);
}
static void test_sums_of_squares_are_per_chunk_in_f64(void **unused) {
    (void)unused;
    test_on_devices(squares);
}

/* The tree over ranks that kernels/ops.def says. */
static float tree_of(float *const *x, int low, int high, int64_t i) {
    if (high - low < 2) {
        return x[low][i];
    }
    int middle = low + (high - low) / 2;
    float left = tree_of(x, low, middle, i), right = tree_of(x, middle, high, i);
    return left + right;
}

/* All ranks' parts one after another, on one device, in two stretches each, the later one with the other ranks' gradients in
 * buffers of their own; from an address that is a multiple of 16 bytes, or not. */
static void sums_over(cpl_device *dev, int ranks, int shift) {
    enum { CHUNKS = (N + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK };
    cpl_reach kinds = {.count = ranks}, sums = {.count = ranks};
    float *x[CPL_REACH_MOST], *kept[CPL_REACH_MOST], *apart[CPL_REACH_MOST], *want = test_array(N, sizeof *want);
    uint32_t *any = test_array(ranks, sizeof *any), found_kinds[TENSORS], want_kinds[TENSORS], want_any = 0, seen = 0;
    double *want_sums = test_array(CHUNKS, sizeof *want_sums);
    for (int r = 0; r < ranks; r++) {
        x[r] = test_normals(20 + (uint32_t)r, N + 1, 1.0f);
        x[r][shift + (r * 9973 + 150) % N] = r % 2 ? NAN : -INFINITY;
        kept[r] = test_array(N, sizeof *kept[r]);
        memcpy(kept[r], x[r] + shift, N * sizeof *want);
        apart[r] = test_array(N, sizeof *apart[r]);
        memcpy(apart[r], kept[r], N * sizeof *want);
        assert_ok(cpl_device_alloc(dev, &kinds.at[r], TENSORS, sizeof(uint32_t), "kinds")); /* atomically, over devices */
        sums.at[r] = test_array(CHUNKS, sizeof(double));
    }
    for (int r = 0; r < ranks; r++) {
        int64_t first = CHUNKS * r / ranks * CPL_SUM_CHUNK, last = r + 1 == ranks ? N : CHUNKS * (r + 1) / ranks * CPL_SUM_CHUNK;
        int64_t middle = first + (last - first) / CPL_SUM_CHUNK * r / ranks * CPL_SUM_CHUNK; /* rank 0: all in the second */
        cpl_sum_part part[2] = {{.first = first, .last = middle}, {.first = middle, .last = last}};
        kinds.own = sums.own = part[0].grad.own = part[1].grad.own = r;
        part[0].grad.count = part[1].grad.count = ranks;
        for (int q = 0; q < ranks; q++) {
            part[0].grad.at[q] = x[q] + shift + first;
            part[1].grad.at[q] = q == r ? x[q] + shift + middle : apart[q] + middle;
        }
        assert_ok(CPL_OPS(dev, grad_sum, part, &kinds, &sums, &any[r], begin, TENSORS));
        for (int64_t i = first; i < last; i++) {
            want[i] = tree_of(kept, 0, ranks, i);
            if (isfinite(want[i])) { /* the bits of a NaN are the device's own */
                assert_memory_equal(&x[r][shift + i], &want[i], sizeof want[i]);
            } else {
                assert_true(isinf(want[i]) ? x[r][shift + i] == want[i] : isnan(x[r][shift + i]));
            }
        }
        seen |= any[r];
    }
    assert_ok(CPL_OPS(dev, sum_squares, want_sums, want, N));
    for (int r = 0; r < ranks; r++) {
        for (int c = 0; c < CHUNKS; c++) {
            double sum = ((double *)sums.at[r])[c];
            assert_true(sum == want_sums[c] || (isnan(sum) && isnan(want_sums[c])));
        }
        scan(dev, kept[r], want_kinds, &want_any);
        assert_ok(CPL_OPS(dev, download, found_kinds, kinds.at[r], sizeof found_kinds));
        assert_memory_equal(found_kinds, want_kinds, sizeof want_kinds);
        test_release(&x[r]);
        test_release(&kept[r]);
        test_release(&apart[r]);
        cpl_device_free(dev, &kinds.at[r]);
        test_release(&sums.at[r]);
    }
    assert_int_equal(seen, want_any);
    test_release(&any);
    test_release(&want);
    test_release(&want_sums);
}
static void sums_ranks(cpl_device *dev) {
    for (int ranks = 1; ranks <= CPL_REACH_MOST; ranks++) {
        sums_over(dev, ranks, ranks % 2);
        sums_over(dev, ranks, 1 - ranks % 2);
    }
}
static void test_gradients_of_ranks_are_summed_as_a_tree_and_scanned(void **unused) {
    (void)unused;
    test_on_devices(sums_ranks);
}

static void finite_ranks(cpl_device *dev) {
    float *x = test_normals(5, N, 1e30f), *y = test_normals(6, N, 1.0f);
    enum { CHUNKS = (N + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK };
    uint32_t kinds[2][TENSORS] = {{0}}, any = 0;
    double sums[2][CHUNKS];
    const cpl_reach found = {{kinds[0], kinds[1]}, 2, 1}, squares_of = {{sums[0], sums[1]}, 2, 1};
    cpl_sum_part part[2] = {{{{x + CPL_SUM_CHUNK, y + CPL_SUM_CHUNK}, 2, 1}, CPL_SUM_CHUNK, CPL_SUM_CHUNK}};
    part[1] = part[0];
    memset(sums, 0xff, sizeof sums);
    assert_ok(CPL_OPS(dev, grad_sum, part, &found, &squares_of, &any, begin, TENSORS));
    assert_true(isnan(sums[0][1]));
    part[0].last = 2 * CPL_SUM_CHUNK;
    assert_ok(CPL_OPS(dev, grad_sum, part, &found, &squares_of, &any, begin, TENSORS));
    assert_int_equal(any, 0);
    for (int t = 0; t < TENSORS; t++) {
        assert_int_equal(kinds[0][t] | kinds[1][t], 0);
    }
    assert_true(isnan(sums[0][0]) && isnan(sums[1][2]) && sums[0][1] > 0 && sums[0][1] == sums[1][1]);
    test_release(&x);
    test_release(&y);
}
static void test_a_part_leaves_the_rest_alone(void **unused) {
    (void)unused;
    test_on_devices(finite_ranks);
}

static void counts_exponents(cpl_device *dev) {
    float *x = test_normals(3, N, 1e-3f);
    const float special[] = {0, -0.0f, 1e-45f, -1.1e-38f, INFINITY, -INFINITY, NAN, 3.402823466e38f, -65504, 1.17549435e-38f};
    memcpy(x + 30000, special, sizeof special);
    int64_t counts[256], want[256] = {0};
    memset(counts, 0, sizeof counts);
    counts[7] = 1000;
    want[7] = 1000;
    for (int i = 0; i < N; i++) {
        int e = 0;
        if (!isfinite(x[i])) {
            e = 255;
        } else if (fabsf(x[i]) >= 1.17549435e-38f) {
            e = ilogbf(x[i]) + 127;
        }
        want[e]++;
    }
    float most = 1;
    assert_ok(CPL_OPS(dev, exponents, counts, &most, x, N, 1));
    assert_memory_equal(counts, want, sizeof want);
    assert_true(most == 3.402823466e38f);
    x[30007] = 0;
    most = 70000;
    assert_ok(CPL_OPS(dev, exponents, counts, &most, x, N, 1));
    assert_true(most == 70000);
    most = 0;
    assert_ok(CPL_OPS(dev, exponents, counts, &most, x, N, 1));
    assert_true(most == 65504);
    most = 0;
    assert_ok(CPL_OPS(dev, exponents, counts, &most, x, N, 0.25f));
    assert_true(most == 16376);
    test_release(&x);
}
static void test_exponents_are_counted_and_the_largest_finite_value_is_kept(void **unused) {
    (void)unused;
    test_on_devices(counts_exponents);
}

static void test_sums_have_the_same_bits_on_every_instruction_set_and_thread_count(void **unused) {
    (void)unused;
    float *x = test_normals(4, N, 1.0f);
    double first[(N + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK], sums[(N + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK];
    for (int k = 0; test_isas[k] != NULL; k++) {
        for (int threads = 1; threads <= 3; threads++) {
            cpl_device *dev = test_device(test_isas[k], threads);
            if (dev != NULL) {
                assert_ok(CPL_OPS(dev, sum_squares, k == 0 && threads == 1 ? first : sums, x, N));
                test_same_bits("sum_squares", first, k == 0 && threads == 1 ? first : sums, sizeof first);
                cpl_device_destroy(&dev);
            }
        }
    }
    test_release(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_any_bad_value_is_found_in_its_tensor),
        cmocka_unit_test(test_kinds_of_a_tensor_add_up_and_the_flag_stays_raised),
        cmocka_unit_test(test_gradients_of_ranks_are_summed_as_a_tree_and_scanned),
        cmocka_unit_test(test_a_part_leaves_the_rest_alone),
        cmocka_unit_test(test_sums_of_squares_are_per_chunk_in_f64),
        cmocka_unit_test(test_exponents_are_counted_and_the_largest_finite_value_is_kept),
        cmocka_unit_test(test_sums_have_the_same_bits_on_every_instruction_set_and_thread_count),
    };
    return test_main(tests, NULL, NULL);
}

/* Proves that histograms and mask together remove exactly the k smallest magnitudes, the first of equals first; that a sample is of
 * the pieces it says, and that a window lists its weights, each once.
 * Refuses an oracle that shares code: it sorts (|w|, index). */
#include "tests/support/support.h"
#include "io/base/rng.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { N = 70003 };

typedef struct {
    double magnitude;
    int64_t index;
} entry;
static int by_magnitude_then_index(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->magnitude != y->magnitude) {
        return x->magnitude < y->magnitude ? -1 : 1;
    }
    return x->index < y->index ? -1 : x->index > y->index;
}

/* order[i] = index of the weight that goes i-th. */
static int64_t *sorted_order(const float *w, int64_t n) {
    entry *sorted = test_array(n, sizeof *sorted);
    int64_t *order = test_array(n, sizeof *order);
    for (int64_t i = 0; i < n; i++) {
        sorted[i] = (entry){fabs((double)w[i]), i};
    }
    qsort(sorted, (size_t)n, sizeof *sorted, by_magnitude_then_index);
    for (int64_t i = 0; i < n; i++) {
        order[i] = sorted[i].index;
    }
    test_release(&sorted);
    return order;
}
static void oracle(uint8_t *mask, const int64_t *order, int64_t n, int64_t k) {
    for (int64_t i = 0; i < n; i++) {
        mask[order[i]] = i >= k;
    }
}

/* Radix selection of the k-th smallest key, 1 <= k, by passes of the given widths (31 bits in all). */
static uint32_t threshold_of(cpl_device *dev, const float *w, int64_t n, int64_t k, const int *widths, int64_t *ties_removed) {
    uint32_t prefix = 0;
    int taken = 0;
    int64_t below = 0;
    for (int p = 0; widths[p] != 0; p++) {
        int64_t nans = 0, *counts = test_array((int64_t)1 << widths[p], sizeof *counts);
        assert_ok(CPL_OPS(dev, select_histogram, counts, &nans, w, n, 1, prefix, taken, widths[p]));
        assert_int_equal(nans, 0);
        uint32_t bin = 0;
        while (below + counts[bin] < k) {
            below += counts[bin++];
        }
        prefix = prefix << widths[p] | bin;
        taken += widths[p];
        test_release(&counts);
    }
    assert_int_equal(taken, 31);
    *ties_removed = k - below;
    return prefix;
}

static const int two_passes[] = {16, 15, 0}, three_passes[] = {11, 10, 10, 0}, many_passes[] = {1, 5, 8, 17, 0};

static void check(cpl_device *dev, const float *w, const int64_t *order, int64_t n, int64_t k, const int *widths) {
    uint8_t *mask = test_array(n, 1), *want = test_array(n, 1);
    memset(mask, 7, (size_t)n);
    int64_t ties = 0;
    uint32_t threshold = k == 0 ? 0 : threshold_of(dev, w, n, k, widths, &ties);
    assert_ok(CPL_OPS(dev, select_mask, mask, w, n, threshold, &ties));
    assert_int_equal(ties, 0);
    oracle(want, order, n, k);
    test_same_bits("mask", mask, want, (size_t)n);
    test_release(&mask);
    test_release(&want);
}

static void check_all_k(cpl_device *dev, const float *w) {
    const int64_t ks[] = {0, 1, 2, 1000, N / 3, N / 2, N - 1, N};
    int64_t *order = sorted_order(w, N);
    for (size_t i = 0; i < sizeof ks / sizeof *ks; i++) {
        check(dev, w, order, N, ks[i], i % 2 ? three_passes : two_passes);
    }
    check(dev, w, order, N, 12345, many_passes);
    test_release(&order);
}

static void distinct(cpl_device *dev) {
    float *w = test_normals(1, N, 0.02f);
    check_all_k(dev, w);
    const int64_t first = 0;
    check(dev, w, &first, 1, 1, two_passes);
    test_release(&w);
}
static void test_mask_removes_exactly_the_k_smallest(void **unused) {
    (void)unused;
    test_on_devices(distinct);
}

static void ties(cpl_device *dev) {
    float *w = test_array(N, sizeof *w);
    check_all_k(dev, w); /* all zeros */
    for (int64_t i = 0; i < N; i++) {
        w[i] = i % 2 ? 0.0f : -0.0f;
    }
    check_all_k(dev, w);
    for (int64_t i = 0; i < N; i++) {
        uint32_t r[4];
        cpl_rng_block(5, CPL_RNG_TEST, 0, (uint64_t)i, r);
        w[i] = (float)(r[0] % 4) * 0.25f * (r[1] % 2 ? 1.0f : -1.0f);
    }
    check_all_k(dev, w);
    test_release(&w);
}
static void test_massive_ties_go_by_index_and_both_zeros_are_equal(void **unused) {
    (void)unused;
    test_on_devices(ties);
}

static void extremes(cpl_device *dev) {
    float *w = test_normals(2, N, 1e-42f); /* subnormal and 0 */
    for (int64_t i = 0; i < N; i += 5) {
        w[i] *= 1e30f;
    }
    for (int64_t i = 0; i < N; i += 7) {
        w[i] = i % 2 ? INFINITY : -INFINITY;
    }
    for (int64_t i = 0; i < N; i += 11) {
        w[i] = 3.402823466e38f;
    }
    check_all_k(dev, w);
    test_release(&w);
}
static void test_subnormal_huge_and_infinite_weights_keep_their_order(void **unused) {
    (void)unused;
    test_on_devices(extremes);
}

static void histogram(cpl_device *dev) {
    float *w = test_normals(3, N, 1.0f);
    int64_t counts[32] = {100}, nans = 5, want[32] = {100}, nans_wanted = 5;
    w[9] = NAN;
    w[N - 1] = -NAN;
    const uint32_t prefix = 0x7f; /* |w| in [1, 2) has exponent 127: its 8 bits */
    for (int64_t i = 0; i < N; i++) {
        nans_wanted += isnan(w[i]);
        double a = fabs((double)w[i]);
        if (a >= 1 && a < 2) {
            want[(int)((a - 1) * 32)]++;
        }
    }
    assert_ok(CPL_OPS(dev, select_histogram, counts, &nans, w, N, 1, prefix, 8, 5));
    assert_memory_equal(counts, want, sizeof want);
    assert_int_equal(nans, nans_wanted);
    assert_ok(CPL_OPS(dev, select_histogram, counts, &nans, w, 0, 1, prefix, 8, 5));
    assert_memory_equal(counts, want, sizeof want);
    assert_int_equal(CPL_OPS(dev, select_histogram, counts, &nans, w, N, 1, 0, 20, 12), CPL_INTERNAL);
    test_release(&w);
}
static void test_histogram_adds_the_bins_below_its_prefix_and_counts_nans(void **unused) {
    (void)unused;
    test_on_devices(histogram);
}

/* Counts of the top bits in every stride-th piece, of a buffer that ends in a piece and of one that no vector is aligned to. */
static void samples(cpl_device *dev) {
    enum { MOST = 9 * CPL_SELECT_PIECE + 777 };
    float *w = test_normals(6, MOST + 1, 1.0f);
    for (int64_t i = 0; i < MOST; i += 1009) {
        w[i] = NAN;
    }
    const int64_t sizes[] = {1, CPL_SELECT_PIECE - 1, CPL_SELECT_PIECE, 3 * CPL_SELECT_PIECE, MOST},
                  strides[] = {1, 2, 3, 8, 9, 100};
    for (int t = 0; t < 5 * 6 * 2; t++) {
        int64_t n = sizes[t / 12], stride = strides[t / 2 % 6], nans = 0, nans_wanted = 0;
        int64_t *counts = test_array(2048, sizeof *counts), *want = test_array(2048, sizeof *want);
        const float *x = w + t % 2;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, &x[i], sizeof bits);
            want[bits << 1 >> 21] += i / CPL_SELECT_PIECE % stride == 0;
            nans_wanted += isnan(x[i]) && i / CPL_SELECT_PIECE % stride == 0;
        }
        assert_ok(CPL_OPS(dev, select_histogram, counts, &nans, x, n, stride, 0, 0, 11));
        test_same_bits("sampled counts", counts, want, 2048 * sizeof *counts);
        assert_int_equal(nans, nans_wanted);
        test_release(&counts);
        test_release(&want);
    }
    test_release(&w);
}
static void test_a_sample_is_of_every_stride_th_piece(void **unused) {
    (void)unused;
    test_on_devices(samples);
}

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static int by_bits(const void *a, const void *b) {
    const uint32_t x = bits_of(*(const float *)a), y = bits_of(*(const float *)b);
    return (x > y) - (x < y);
}

/* In three calls, of which the second is of nothing; 5 are in the list already. */
static void check_window(cpl_device *dev, const float *w, int64_t n, uint32_t first, uint32_t last, int64_t capacity) {
    enum { ALREADY = 5 };
    float *list = test_array(n + ALREADY, sizeof *list), *want = test_array(n, sizeof *want);
    int64_t found = ALREADY, below = 7, nans = 9, wanted = 0, below_wanted = 7, nans_wanted = 9, cut = n / 3 + 1;
    for (int64_t i = 0; i < n + ALREADY; i++) {
        list[i] = -7;
    }
    for (int64_t i = 0; i < n; i++) {
        uint32_t key = bits_of(w[i]) & 0x7fffffffu;
        below_wanted += key < first;
        nans_wanted += isnan(w[i]);
        if (key >= first && key <= last) {
            want[wanted++] = w[i];
        }
    }
    cut = cut < n ? cut : n;
    assert_ok(CPL_OPS(dev, select_window, list, capacity, &found, &below, &nans, w, cut, first, last));
    assert_ok(CPL_OPS(dev, select_window, list, capacity, &found, &below, &nans, w + cut, 0, first, last));
    assert_ok(CPL_OPS(dev, select_window, list, capacity, &found, &below, &nans, w + cut, n - cut, first, last));
    assert_int_equal(found, wanted + ALREADY);
    assert_int_equal(below, below_wanted);
    assert_int_equal(nans, nans_wanted);
    int64_t listed = found < capacity ? found : capacity, j = 0;
    for (int64_t i = 0; i < n + ALREADY; i++) {
        assert_true(list[i] == -7 || (i >= ALREADY && i < listed));
    }
    qsort(want, (size_t)wanted, sizeof *want, by_bits);
    qsort(list + ALREADY, listed > ALREADY ? (size_t)(listed - ALREADY) : 0, sizeof *list, by_bits);
    for (int64_t i = ALREADY; i < listed; i++, j++) { /* all that were wanted, or some of them where there was no room */
        while (listed < found && j < wanted && bits_of(want[j]) != bits_of(list[i])) {
            j++;
        }
        assert_true(j < wanted && bits_of(want[j]) == bits_of(list[i]));
    }
    test_release(&list);
    test_release(&want);
}

static void windows(cpl_device *dev) {
    const uint32_t keys[][2] = {
        {0, 0}, {0, 0x7f800000}, {0x7f800000, 0x7f800000}, {0x3f000000, 0x3f7fffff}, {0x3f800000, 0x3f800000}, {1, 0x3d000000}};
    const int64_t sizes[] = {1, 4095, 8192, N};
    float *w = test_normals(7, N + 3, 1.0f);
    const float odd[] = {0.0f, -0.0f, 1e-42f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, -NAN, 0.5f};
    for (int64_t i = 0; i < N; i += 17) {
        w[i] = odd[i / 17 % 10];
    }
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 6; k++) {
            check_window(dev, w + i, sizes[i], keys[k][0], keys[k][1], sizes[i] + 5);
            check_window(dev, w + i, sizes[i], keys[k][0], keys[k][1], sizes[i] / 50 + 5);
            check_window(dev, w + i, sizes[i], keys[k][0], keys[k][1], 0);
        }
    }
    int64_t none = 0;
    assert_int_equal(CPL_OPS(dev, select_window, w, 0, &none, &none, &none, w, N, 2, 1), CPL_INTERNAL);
    assert_int_equal(CPL_OPS(dev, select_window, w, 0, &none, &none, &none, w, N, 0, 0x7f800001), CPL_INTERNAL);
    test_release(&w);
}
static void test_a_window_lists_each_of_its_weights_once_as_far_as_there_is_room(void **unused) {
    (void)unused;
    test_on_devices(windows);
}

static void shards(cpl_device *dev) {
    float *w = test_array(N, sizeof *w);
    for (int64_t i = 0; i < N; i++) {
        w[i] = (float)(i % 3) * -0.5f;
    }
    int64_t k = N / 2, ties_removed;
    uint32_t threshold = threshold_of(dev, w, N, k, two_passes, &ties_removed);
    uint8_t *mask = test_array(N, 1), *want = test_array(N, 1);
    const int64_t cuts[] = {0, 17, 17, 40001, 65999, N}; /* the caller gives each shard what is left: an exclusive scan */
    for (int s = 0; s < 5; s++) {
        assert_ok(CPL_OPS(dev, select_mask, mask + cuts[s], w + cuts[s], cuts[s + 1] - cuts[s], threshold, &ties_removed));
    }
    int64_t *order = sorted_order(w, N);
    oracle(want, order, N, k);
    test_release(&order);
    test_same_bits("sharded mask", mask, want, N);
    int64_t many = 10;
    assert_ok(CPL_OPS(dev, select_mask, mask, w, 4, 0x3f000000, &many)); /* 0 -.5 -1 0: one tie */
    assert_int_equal(many, 9);
    test_release(&w);
    test_release(&mask);
    test_release(&want);
}
static void test_ties_left_carry_over_from_shard_to_shard(void **unused) {
    (void)unused;
    test_on_devices(shards);
}

static void many_ties(cpl_device *dev) {
    enum { MANY = 4500001 }; /* more than are counted at a time */
    float *w = test_array(MANY, sizeof *w);
    uint8_t *mask = test_array(MANY, 1);
    const int64_t ks[] = {0, 4194303, 4194305, MANY};
    for (int i = 0; i < 4; i++) {
        int64_t ties_left = ks[i];
        assert_ok(CPL_OPS(dev, select_mask, mask, w, MANY, 0, &ties_left));
        assert_int_equal(ties_left, 0);
        for (int64_t j = 0; j < MANY; j++) {
            if (mask[j] != (j >= ks[i])) {
                fail_msg("k %lld: weight %lld", (long long)ks[i], (long long)j);
            }
        }
    }
    test_release(&w);
    test_release(&mask);
}
static void test_millions_of_equal_weights_go_from_the_first_on(void **unused) {
    (void)unused;
    test_on_devices(many_ties);
}

static void applies(cpl_device *dev) {
    float *x = test_normals(4, N, 1.0f), *want = test_normals(4, N, 1.0f);
    uint8_t *mask = test_array(N, 1);
    x[4] = NAN;
    for (int64_t i = 0; i < N; i++) {
        mask[i] = (uint8_t)(i % 4);
        want[i] = i % 4 ? want[i] : 0;
    }
    assert_ok(CPL_OPS(dev, apply_mask, x, mask, N));
    test_same_bits("masked", x, want, N * sizeof *x);
    test_release(&x);
    test_release(&want);
    test_release(&mask);
}
static void test_apply_mask_makes_plain_zeros_even_of_nan(void **unused) {
    (void)unused;
    test_on_devices(applies);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_mask_removes_exactly_the_k_smallest),
        cmocka_unit_test(test_massive_ties_go_by_index_and_both_zeros_are_equal),
        cmocka_unit_test(test_subnormal_huge_and_infinite_weights_keep_their_order),
        cmocka_unit_test(test_histogram_adds_the_bins_below_its_prefix_and_counts_nans),
        cmocka_unit_test(test_a_sample_is_of_every_stride_th_piece),
        cmocka_unit_test(test_a_window_lists_each_of_its_weights_once_as_far_as_there_is_room),
        cmocka_unit_test(test_ties_left_carry_over_from_shard_to_shard),
        cmocka_unit_test(test_millions_of_equal_weights_go_from_the_first_on),
        cmocka_unit_test(test_apply_mask_makes_plain_zeros_even_of_nan),
    };
    return test_main(tests, NULL, NULL);
}

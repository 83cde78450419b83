/* Proves copies, casts in both directions and sums over odd sizes and addresses.
 * Refuses tolerances where the result is exact. */
#include "tests/support/support.h"
#include "io/base/rng.h"
#include <math.h>
#include <string.h>

enum { N = 600011 };
static const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};

static void copies(cpl_device *dev) {
    enum { ROOM = N + 64 };
    unsigned char *x = test_array(ROOM, 1), *seen = test_array(ROOM, 1), *filled = test_array(ROOM, 1), *y = NULL, *z = NULL;
    for (int i = 0; i < ROOM; i++) {
        x[i] = (unsigned char)(i * 31 + i / 253);
        filled[i] = 0xee;
    }
    assert_ok(cpl_device_alloc(dev, &y, ROOM, 1, "copies"));
    assert_ok(cpl_device_alloc(dev, &z, ROOM, 1, "copies"));
    assert_ok(CPL_OPS(dev, upload, z, filled, ROOM));
    assert_ok(CPL_OPS(dev, upload, y + 3, x + 1, N));
    assert_ok(CPL_OPS(dev, copy, z + 5, y + 3, N));
    assert_ok(CPL_OPS(dev, download, seen, z, ROOM));
    assert_memory_equal(seen + 5, x + 1, N);
    assert_int_equal(seen[4], 0xee);
    assert_int_equal(seen[N + 5], 0xee);
    assert_ok(CPL_OPS(dev, zero, z + 6, N - 2));
    memset(seen, 0xdd, ROOM);
    assert_ok(CPL_OPS(dev, download, seen + 7, z + 5, N));
    assert_int_equal(seen[6], 0xdd);
    assert_int_equal(seen[7 + N], 0xdd);
    assert_int_equal(seen[7], x[1]);
    assert_int_equal(seen[7 + N - 1], x[N]);
    for (int i = 8; i < 7 + N - 1; i++) {
        assert_int_equal(seen[i], 0);
    }
    assert_ok(CPL_OPS(dev, zero, z, 0));
    assert_ok(CPL_OPS(dev, copy, z, y, 0));
    assert_ok(dev->ops->synchronize(dev));
    cpl_device_free(dev, &y);
    cpl_device_free(dev, &z);
    test_release(&x);
    test_release(&seen);
    test_release(&filled);
}
static void test_copies_move_all_bytes_and_no_others(void **unused) {
    (void)unused;
    test_on_devices(copies);
}

/* Every 16-bit pattern, compared with its meaning: (-1)^s 2^(e-bias) (1 + f). */
static void widens(cpl_device *dev) {
    enum { ALL = 65536 };
    uint16_t *h = test_array(ALL, 2), *back = test_array(ALL, 2);
    float *y = test_array(ALL, 4);
    for (int i = 0; i < ALL; i++) {
        h[i] = (uint16_t)i;
    }
    for (int f16 = 0; f16 < 2; f16++) {
        cpl_dtype dt = f16 ? CPL_F16 : CPL_BF16;
        int fraction_bits = f16 ? 10 : 7, top = f16 ? 31 : 255, bias = f16 ? 15 : 127;
        assert_ok(CPL_OPS(dev, cast_to_f32, dt, y, h, ALL));
        assert_ok(CPL_OPS(dev, cast_from_f32, dt, back, y, ALL));
        for (int i = 0; i < ALL; i++) {
            int e = (i & 0x7fff) >> fraction_bits, f = i & ((1 << fraction_bits) - 1);
            double want = e == 0 ? ldexp(f, 1 - bias - fraction_bits) : ldexp((1 << fraction_bits) + f, e - bias - fraction_bits);
            want = e == top ? (f ? (double)NAN : (double)INFINITY) : want;
            want = i & 0x8000 ? -want : want;
            assert_true(isnan(want) ? isnan(y[i]) : (double)y[i] == want && !signbit(y[i]) == !signbit(want));
            assert_true(isnan(want) ? (back[i] & 0x7fff) > (top << fraction_bits) : back[i] == h[i]);
        }
    }
    test_release(&h);
    test_release(&back);
    test_release(&y);
}
static void test_every_16_bit_value_widens_exactly_and_comes_back(void **unused) {
    (void)unused;
    test_on_devices(widens);
}

/* Random bit patterns and halfway cases: no stored neighbour is nearer, ties go to the even one. */
static void rounds(cpl_device *dev) {
    float *x = test_array(N, 4);
    uint16_t *h = test_array(N, 2);
    for (int64_t i = 0; i < N; i++) {
        uint32_t r[4];
        cpl_rng_block(9, CPL_RNG_TEST, 0, (uint64_t)i, r);
        uint32_t u = i % 2 ? r[0] : (r[0] & 0x9fffffffu) | 0x20000000u;
        u = i % 3 ? u : (u & 0xffffe000u) | 0x1000u; /* halfway in f16 */
        u = i % 5 ? u : (u & 0xffff0000u) | 0x8000u; /* halfway in bf16 */
        x[i] = cpl_f32_from_bits(u);
    }
    for (int f16 = 0; f16 < 2; f16++) {
        cpl_dtype dt = f16 ? CPL_F16 : CPL_BF16;
        assert_ok(CPL_OPS(dev, cast_from_f32, dt, h, x, N));
        double largest = f16 ? 65504 : 0x1.fep127, unit = f16 ? 32 : 0x1p120;
        for (int64_t i = 0; i < N; i++) {
            if (isnan(x[i])) {
                assert_true(isnan(cpl_act_get(dt, h, i)));
                continue;
            }
            double want = fabs((double)x[i]);
            double got = fabs((double)cpl_act_get(dt, h, i));
            if (want >= largest + unit / 2) {
                assert_true(isinf(got));
                continue;
            }
            uint16_t near[2] = {(uint16_t)((h[i] & 0x7fff) + 1), (uint16_t)((h[i] & 0x7fff) - 1)};
            for (int s = 0; s < (got == 0 ? 1 : 2); s++) { /* 0 has no neighbour below */
                double other = isinf(cpl_act_get(dt, near, s)) ? largest + unit : (double)cpl_act_get(dt, near, s);
                assert_true(fabs(want - got) < fabs(want - other) || (fabs(want - got) == fabs(want - other) && h[i] % 2 == 0));
            }
        }
    }
    test_release(&x);
    test_release(&h);
}
static void test_rounding_is_to_nearest_even_and_overflows_to_inf(void **unused) {
    (void)unused;
    test_on_devices(rounds);
}

static void adds(cpl_device *dev) {
    float *x = test_normals(1, N, 1.0f), *y = test_normals(2, N, 1.0f), *kept = test_normals(2, N, 1.0f);
    assert_ok(CPL_OPS(dev, add_f32, y, x, N));
    long double exact = 0;
    for (int64_t i = 0; i < N; i++) {
        assert_true(y[i] == kept[i] + x[i]);
        exact += x[i];
    }
    double sum = 5;
    assert_ok(CPL_OPS(dev, sum_f32, &sum, x, N));
    assert_true(fabsl(sum - 5 - exact) < 1e-10L);
    sum = 5;
    assert_ok(CPL_OPS(dev, sum_f32, &sum, x, 3));
    assert_true(fabs(sum - (5 + (double)x[0] + x[1] + x[2])) < 1e-14);
    assert_ok(CPL_OPS(dev, cast_from_f32, CPL_F32, y, x, N));
    test_same_bits("f32 to f32", x, y, N * 4);
    test_release(&x);
    test_release(&y);
    test_release(&kept);
}
static void test_addition_is_exact_and_sums_are_in_f64(void **unused) {
    (void)unused;
    test_on_devices(adds);
}

static void test_sum_and_casts_do_not_depend_on_threads_or_instruction_set(void **unused) {
    (void)unused;
    float *x = test_normals(3, N, 1.0f);
    double first = 0;
    void *stored[3] = {test_array(N, 4), test_array(N, 2), test_array(N, 2)}, *again = test_array(N, 4);
    for (int k = 0; test_isas[k] != NULL; k++) {
        for (int threads = 1; threads <= 3; threads++) {
            cpl_device *dev = test_device(test_isas[k], threads);
            if (dev == NULL) {
                continue;
            }
            bool reference = k == 0 && threads == 1;
            double sum = 0;
            assert_ok(CPL_OPS(dev, sum_f32, &sum, x, N));
            first = reference ? sum : first;
            test_same_bits("sum", &first, &sum, sizeof sum);
            for (int t = 0; t < 3; t++) {
                assert_ok(CPL_OPS(dev, cast_from_f32, types[t], reference ? stored[t] : again, x, N));
                test_same_bits("cast", stored[t], reference ? stored[t] : again, N * cpl_dtype_size(types[t]));
            }
            cpl_device_destroy(&dev);
        }
    }
    for (int t = 0; t < 3; t++) {
        test_release(&stored[t]);
    }
    test_release(&again);
    test_release(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies_move_all_bytes_and_no_others),
        cmocka_unit_test(test_every_16_bit_value_widens_exactly_and_comes_back),
        cmocka_unit_test(test_rounding_is_to_nearest_even_and_overflows_to_inf),
        cmocka_unit_test(test_addition_is_exact_and_sums_are_in_f64),
        cmocka_unit_test(test_sum_and_casts_do_not_depend_on_threads_or_instruction_set),
    };
    return test_main(tests, NULL, NULL);
}

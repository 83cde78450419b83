/* Proves the quantizer bit for bit against a scalar oracle, what it refuses, its error figures, and packing.
 * Refuses an oracle that rounds by the kernel's trick: it calls nearbyint in f64 on the same f32 quotient. */
#include "tests/support/support.h"
#include "io/base/rng.h"
#include "kernels/pack.h"
#include <math.h>
#include <string.h>

enum { ROWS = 19, COLS = 1091, N = ROWS * COLS };

/* One group of weights w[0..n): scale, zero point, codes, values. False where the scale is not usable. */
static bool oracle(const cpl_quant_spec *spec, const float *w, int64_t n, uint8_t *codes, float *scale, uint8_t *zero,
                   float *w_hat) {
    bool symmetric = spec->scheme == CPL_QUANT_SYMMETRIC;
    int most = symmetric ? (1 << (spec->bits - 1)) - 1 : (1 << spec->bits) - 1, least = symmetric ? -most : 0;
    volatile float lo = 0, hi = 0, span, z = 0;
    for (int64_t i = 0; i < n; i++) {
        lo = w[i] < lo ? w[i] : lo;
        hi = w[i] > hi ? w[i] : hi;
    }
    span = symmetric ? (-lo > hi ? -lo : hi) : hi - lo;
    volatile float s = span / (float)most;
    if (spec->scale_dtype == CPL_F16) {
        s = cpl_f16_to_f32(cpl_f16_from_f32(s));
    }
    *scale = s;
    if (span > 0 && (s == 0 || isinf(s))) {
        return false;
    }
    if (!symmetric && span > 0) {
        volatile float quotient = -lo / s;
        z = nearbyintf(quotient);
        z = z > (float)most ? (float)most : z;
    }
    *zero = (uint8_t)z;
    for (int64_t i = 0; i < n; i++) {
        volatile float quotient = s == 0 ? 0 : w[i] / s;
        double q = nearbyint((double)quotient) + (double)z;
        q = q < least ? least : q > most ? most : q;
        volatile float value = (float)(q - (double)z) * s;
        codes[i] = (uint8_t)(q - least);
        w_hat[i] = value;
    }
    return true;
}

typedef struct {
    uint8_t *codes, *zeros;
    float *scales, *w_hat;
    cpl_quant_error error;
    int64_t refused;
} result;
static result result_create(void) {
    return (result){.codes = test_array(N, 1), .zeros = test_array(N, 1), .scales = test_array(N, 4), .w_hat = test_array(N, 4)};
}
static void result_destroy(result *r) {
    test_release(&r->codes);
    test_release(&r->zeros);
    test_release(&r->scales);
    test_release(&r->w_hat);
}
static void run(cpl_device *dev, const cpl_quant_spec *spec, const float *w, result *r) {
    assert_ok(CPL_OPS(dev, quantize, spec, w, ROWS, COLS, r->codes, r->scales, r->zeros, r->w_hat, &r->error, &r->refused));
}

/* All groups by the oracle; returns how many it refuses. Error figures in long double. */
static int64_t run_oracle(const cpl_quant_spec *spec, const float *w, result *r) {
    int64_t groups = 0, refused = 0, group = spec->group;
    long double sum_sq_error = 0, sum_sq = 0, noise = 0;
    for (int64_t at = 0, n; at < N; at += n) {
        int64_t left = group == N ? N : COLS - at % COLS;
        n = left < group ? left : group;
        float scale;
        uint8_t zero = 0;
        refused += !oracle(spec, w + at, n, r->codes + at, &scale, &zero, r->w_hat + at);
        noise += (long double)n * scale * scale / 12;
        r->scales[groups] = scale;
        r->zeros[groups++] = spec->scheme == CPL_QUANT_ASYMMETRIC ? zero : 0;
    }
    for (int64_t i = 0; i < N; i++) {
        long double d = (long double)w[i] - r->w_hat[i];
        sum_sq_error += d * d;
        sum_sq += (long double)w[i] * w[i];
        r->error.max_error = fmax(r->error.max_error, (double)fabsl(d));
        r->error.code_count[r->codes[i]]++;
    }
    r->error.sum_sq_error = (double)sum_sq_error;
    r->error.sum_sq = (double)sum_sq;
    r->error.sum_noise = (double)noise;
    return refused;
}

static void near(double a, double b) {
    assert_true(fabs(a - b) <= 1e-10 * fabs(b));
}

static cpl_device *devices[10]; /* owned by the program: every instruction set, with 1 (even index) and 2 threads; ends with NULL */

static void compare(const cpl_quant_spec *spec, const float *w) {
    result want = result_create();
    int64_t refused = run_oracle(spec, w, &want);
    int stride = spec->bits == 5 ? 1 : 2; /* 2 threads at one width only: beside other programs they wait for one another long */
    for (int i = 0; devices[i] != NULL; i += stride) {
        result got = result_create();
        run(devices[i], spec, w, &got);
        assert_int_equal(got.refused, refused);
        if (refused == 0) {
            test_same_bits("scales", got.scales, want.scales, N * sizeof(float)); /* also: nothing beyond the last */
            test_same_bits("zeros", got.zeros, want.zeros, N);
            test_same_bits("codes", got.codes, want.codes, N);
            test_same_bits("w_hat", got.w_hat, want.w_hat, N * sizeof(float));
            near(got.error.sum_sq_error, want.error.sum_sq_error);
            near(got.error.sum_sq, want.error.sum_sq);
            near(got.error.sum_noise, want.error.sum_noise);
            assert_true(got.error.max_error == want.error.max_error);
            assert_memory_equal(got.error.code_count, want.error.code_count, sizeof want.error.code_count);
        }
        result_destroy(&got);
    }
    result_destroy(&want);
}

static const int64_t group_sizes[] = {N, COLS, 64, 7, 1};
static void all_specs(const float *w, int first, int step) {
    for (int bits = first; bits <= 8; bits += step) {
        for (int k = 0; k < 20; k++) {
            cpl_quant_spec spec = {.scheme = k % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC,
                                   .bits = bits,
                                   .group = group_sizes[k / 4],
                                   .scale_dtype = k / 2 % 2 ? CPL_F16 : CPL_F32};
            if (spec.group == 1 && bits != 3) {
                continue; /* once is enough of so many groups */
            }
            compare(&spec, w);
        }
    }
}

static void normals(void) {
    float *w = test_normals(1, N, 0.05f);
    all_specs(w, 2, 1);
    test_release(&w);
}
static void test_every_width_scheme_and_granularity_matches_the_oracle_bit_for_bit(void **unused) {
    (void)unused;
    normals();
}

/* Values on the halves of a power-of-two scale: each rounding is a tie, and goes to even. */
static void halves(void) {
    float *w = test_array(N, sizeof *w);
    for (int64_t i = 0; i < N; i++) {
        uint32_t r[4];
        cpl_rng_block(3, CPL_RNG_TEST, 0, (uint64_t)i, r);
        w[i] = ((float)(r[0] % 255) - 127) / 2 * 0.25f;
        w[i] = i % COLS == 0 ? 127 * 0.25f : w[i]; /* symmetric 8 bits: scale 1/4 exactly */
    }
    all_specs(w, 2, 1);
    test_release(&w);
}
static void test_ties_go_to_even(void **unused) {
    (void)unused;
    halves();
}

static void constants(void) {
    const float values[] = {0.0f, -0.0f, 0.3f, -0.3f};
    float *w = test_array(N, sizeof *w);
    for (int k = 0; k < 4; k++) {
        for (int64_t i = 0; i < N; i++) {
            w[i] = i / 13 % 3 == 0 ? values[k] : (k == 1 ? 0.0f : values[k]);
        }
        all_specs(w, 2, 2);
    }
    float *mixed = test_normals(2, N, 1.0f);
    memset(mixed, 0, 5 * COLS * sizeof *mixed); /* groups of zeros among others */
    all_specs(mixed, 2, 2);
    const cpl_quant_spec spec = {CPL_QUANT_SYMMETRIC, 4, COLS, CPL_F32};
    result r = result_create();
    run(devices[0], &spec, mixed, &r);
    assert_true(r.scales[4] == 0 && r.w_hat[5 * COLS - 1] == 0 && r.codes[0] == 7);
    result_destroy(&r);
    test_release(&w);
    test_release(&mixed);
}
static void test_constant_groups_and_zeros_are_exact(void **unused) {
    (void)unused;
    constants();
}

/* From subnormal to the largest floats; f16 scales overflow or vanish in some and are refused exactly there. One-sided ranges too.
 */
static void ranges(void) {
    const float sizes[] = {1e-44f, 1e-40f, 1e-30f, 1e-7f, 3e-6f, 1e-5f, 1e3f, 1e6f, 2e7f, 1e30f, 6e37f};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        float *w = test_normals(4, N, 1.0f);
        for (int64_t i = 0; i < N; i++) {
            w[i] *= sizes[k];
            w[i] = i / COLS % 3 == 0 ? fabsf(w[i]) : i / COLS % 3 == 1 ? -fabsf(w[i]) : w[i];
        }
        for (int bits = 2; bits <= 8; bits += 2) {
            for (int m = 0; m < 8; m++) {
                cpl_quant_spec spec = {m % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC, bits, m / 4 ? 100 : N,
                                       m / 2 % 2 ? CPL_F16 : CPL_F32};
                compare(&spec, w);
            }
        }
        test_release(&w);
    }
}
static void test_huge_and_tiny_ranges_match_the_oracle_or_are_refused(void **unused) {
    (void)unused;
    ranges();
}

static void refuses(cpl_device *dev) {
    const float bad[] = {NAN, -NAN, INFINITY, -INFINITY};
    for (int k = 0; k < 16; k++) {
        cpl_quant_spec spec = {k % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC, 4, k / 8 ? 64 : N, CPL_F32};
        float *w = test_normals(5, N, 1.0f), *kept = test_normals(5, N, 1.0f);
        w[3] = w[N - 1] = w[15000] = bad[k / 2 % 4];
        kept[3] = kept[N - 1] = kept[15000] = bad[k / 2 % 4];
        result r = result_create();
        r.refused = 100;
        assert_ok(CPL_OPS(dev, quantize, &spec, w, ROWS, COLS, r.codes, r.scales, r.zeros, w, &r.error, &r.refused));
        assert_int_equal(r.refused, 103);
        if (!test_on_gpu()) { /* there nothing but `refused` is meaningful then */
            test_same_bits("weights in place", w, kept, N * sizeof *w);
            assert_true(r.error.sum_sq == 0 && r.error.code_count[0] == 0);
        }
        result_destroy(&r);
        test_release(&w);
        test_release(&kept);
    }
    float wide[4] = {3e38f, -3e38f, 1, 2}, scale[2], w_hat[4]; /* hi - lo is no f32; max|w| is */
    int64_t refused = 0;
    cpl_quant_spec spec = {CPL_QUANT_ASYMMETRIC, 8, 2, CPL_F32};
    assert_ok(CPL_OPS(dev, quantize, &spec, wide, 2, 2, NULL, scale, NULL, w_hat, NULL, &refused));
    assert_int_equal(refused, 1);
    spec.scheme = CPL_QUANT_SYMMETRIC;
    refused = 0;
    assert_ok(CPL_OPS(dev, quantize, &spec, wide, 2, 2, NULL, scale, NULL, w_hat, NULL, &refused));
    assert_int_equal(refused, 0);
    const cpl_quant_spec wrong[] = {{CPL_QUANT_SYMMETRIC, 1, 2, CPL_F32},
                                    {CPL_QUANT_SYMMETRIC, 9, 2, CPL_F32},
                                    {CPL_QUANT_SYMMETRIC, 4, 3, CPL_F32},
                                    {CPL_QUANT_SYMMETRIC, 4, 0, CPL_F32},
                                    {CPL_QUANT_SYMMETRIC, 4, 2, CPL_BF16}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        assert_int_equal(CPL_OPS(dev, quantize, &wrong[i], wide, 2, 2, NULL, scale, NULL, w_hat, NULL, &refused), CPL_USAGE);
    }
}
static void test_nan_inf_and_scales_out_of_range_are_refused_and_nothing_is_written(void **unused) {
    (void)unused;
    test_on_devices(refuses);
}

static void outputs(cpl_device *dev) {
    for (int k = 0; k < 4; k++) {
        const cpl_quant_spec spec = {k % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC, 5, k / 2 ? 128 : N, CPL_F16};
        float *w = test_normals(6, N, 1.0f);
        result all = result_create(), some = result_create();
        run(dev, &spec, w, &all);
        assert_ok(CPL_OPS(dev, quantize, &spec, w, ROWS, COLS, some.codes, some.scales, NULL, NULL, NULL, &some.refused));
        test_same_bits("codes alone", some.codes, all.codes, N);
        test_same_bits("scales", some.scales, all.scales, N * 4);
        cpl_quant_error once = all.error;
        assert_ok(CPL_OPS(dev, quantize, &spec, w, ROWS, COLS, NULL, some.scales, NULL, w, &all.error, &some.refused));
        test_same_bits("in place", w, all.w_hat, N * 4);
        assert_true(all.error.sum_sq_error == 2 * once.sum_sq_error && all.error.max_error == once.max_error);
        assert_int_equal(all.error.code_count[7], 2 * once.code_count[7]);
        assert_int_equal(some.refused, 0);
        test_release(&w);
        result_destroy(&all);
        result_destroy(&some);
    }
    const cpl_quant_spec spec = {CPL_QUANT_SYMMETRIC, 4, 1, CPL_F32};
    int64_t refused = 0;
    assert_ok(CPL_OPS(dev, quantize, &spec, NULL, 0, COLS, NULL, NULL, NULL, NULL, NULL, &refused));
}
static void test_outputs_are_optional_in_place_and_errors_add_up(void **unused) {
    (void)unused;
    test_on_devices(outputs);
}

static void test_error_has_the_same_bits_on_every_thread_count_and_instruction_set(void **unused) {
    (void)unused;
    float *w = test_normals(7, N, 1.0f);
    const cpl_quant_spec spec = {CPL_QUANT_ASYMMETRIC, 4, 64, CPL_F16};
    cpl_quant_error first = {0};
    for (int k = 0; test_isas[k] != NULL; k++) {
        for (int threads = 1; threads <= 3; threads++) {
            cpl_device *dev = test_device(test_isas[k], threads);
            if (dev == NULL) {
                continue;
            }
            result r = result_create();
            run(dev, &spec, w, &r);
            first = first.sum_sq == 0 ? r.error : first;
            test_same_bits("error", &first, &r.error, sizeof first);
            result_destroy(&r);
            cpl_device_destroy(&dev);
        }
    }
    test_release(&w);
}

static void test_codes_survive_packing_at_every_width(void **unused) {
    (void)unused;
    for (int bits = 2; bits <= 8; bits++) {
        for (int64_t cols = 1; cols <= 19; cols++) {
            enum { PACK_ROWS = 5 };
            uint8_t codes[PACK_ROWS * 19], back[PACK_ROWS * 19], packed[PACK_ROWS * 19 + 1];
            int64_t bytes = cpl_pack_row_bytes(bits, cols);
            assert_int_equal(bytes, (bits * cols + 7) / 8);
            for (int64_t i = 0; i < PACK_ROWS * cols; i++) {
                codes[i] = (uint8_t)((i * 37 + i / 5) & ((1 << bits) - 1));
            }
            packed[PACK_ROWS * bytes] = 0xa5;
            cpl_pack_codes(bits, packed, codes, PACK_ROWS, cols);
            assert_int_equal(packed[PACK_ROWS * bytes], 0xa5);
            for (int64_t i = 0; i < PACK_ROWS * cols; i++) { /* bit by bit, lowest first */
                for (int b = 0; b < bits; b++) {
                    int64_t at = i % cols * bits + b;
                    assert_int_equal(packed[i / cols * bytes + at / 8] >> at % 8 & 1, codes[i] >> b & 1);
                }
            }
            cpl_unpack_codes(bits, back, packed, PACK_ROWS, cols);
            assert_memory_equal(back, codes, (size_t)(PACK_ROWS * cols));
        }
    }
}

static void test_packed_size_counts_codes_padding_scales_and_zero_points(void **unused) {
    (void)unused;
    const cpl_quant_spec tensor = {CPL_QUANT_SYMMETRIC, 3, 10 * 13, CPL_F32}, channel = {CPL_QUANT_ASYMMETRIC, 8, 13, CPL_F16};
    const cpl_quant_spec group = {CPL_QUANT_ASYMMETRIC, 4, 5, CPL_F32};
    assert_int_equal(cpl_quant_packed_bytes(&tensor, 10, 13), 10 * 5 + 4);
    assert_int_equal(cpl_quant_packed_bytes(&channel, 10, 13), 10 * 13 + 10 * (2 + 1));
    assert_int_equal(cpl_quant_packed_bytes(&group, 10, 13), 10 * 7 + 10 * 3 * (4 + 1));
    assert_int_equal(cpl_quant_packed_bytes(&group, 0, 13), 0);
    assert_int_equal(cpl_quant_packed_bytes(&group, INT64_MAX / 2, 13), -1);
    assert_int_equal(cpl_quant_packed_bytes(&tensor, 10, 12), -1);
    assert_non_null(strstr(cpl_status_message(), "a group of 130, expected 1 to 12, or 120 for the tensor"));
}

static void test_entropy_of_uniform_codes_is_their_width(void **unused) {
    (void)unused;
    int64_t count[256] = {0};
    assert_true(cpl_quant_entropy(count) == 0);
    count[9] = 5;
    assert_true(cpl_quant_entropy(count) == 0);
    for (int i = 0; i < 16; i++) {
        count[i] = 1000;
    }
    assert_true(fabs(cpl_quant_entropy(count) - 4) < 1e-14);
    memset(count, 0, sizeof count);
    count[0] = 3;
    count[1] = 1;
    assert_true(fabs(cpl_quant_entropy(count) - (2 - 0.75 * log2(3))) < 1e-14);
}

static int open_devices(void **unused) {
    (void)unused;
    int found = 0;
    for (int k = 0; test_isas[k] != NULL; k++) {
        for (int threads = 1; threads <= 2; threads++) {
            cpl_device *dev = test_device(test_isas[k], threads);
            if (dev != NULL) {
                devices[found++] = dev;
            }
        }
    }
    return found >= 2 ? 0 : -1;
}
static int close_devices(void **unused) {
    (void)unused;
    for (int i = 0; i < 8; i++) {
        cpl_device_destroy(&devices[i]);
    }
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_width_scheme_and_granularity_matches_the_oracle_bit_for_bit),
        cmocka_unit_test(test_ties_go_to_even),
        cmocka_unit_test(test_constant_groups_and_zeros_are_exact),
        cmocka_unit_test(test_huge_and_tiny_ranges_match_the_oracle_or_are_refused),
        cmocka_unit_test(test_nan_inf_and_scales_out_of_range_are_refused_and_nothing_is_written),
        cmocka_unit_test(test_outputs_are_optional_in_place_and_errors_add_up),
        cmocka_unit_test(test_error_has_the_same_bits_on_every_thread_count_and_instruction_set),
        cmocka_unit_test(test_codes_survive_packing_at_every_width),
        cmocka_unit_test(test_packed_size_counts_codes_padding_scales_and_zero_points),
        cmocka_unit_test(test_entropy_of_uniform_codes_is_their_width),
    };
    return test_main(tests, open_devices, close_devices);
}

/* Storage formats: the scalar definitions against arithmetic, every kernel variant against the scalar definitions, elementary
 * functions. Refuses samples where the whole space is small: all 65,536 codes of both 16-bit formats are tried. */
#include "kernels/cpu/elementary.h"
#include "tests/support/support.h"
#include <math.h>

typedef struct {
    cpl_dtype dt;
    uint16_t infinity;
} format;
static const format formats[] = {{CPL_BF16, 0x7f80}, {CPL_F16, 0x7c00}};

static uint16_t narrow(cpl_dtype dt, float x) {
    return dt == CPL_BF16 ? cpl_bf16_from_f32(x) : cpl_f16_from_f32(x);
}
static float widen(cpl_dtype dt, uint16_t h) {
    return dt == CPL_BF16 ? cpl_bf16_to_f32(h) : cpl_f16_to_f32(h);
}

static void test_widening_is_the_value_of_the_code(void **state) {
    for (uint32_t h = 0; h < 0x7c00; h++) {
        double fraction = h & 0x3ff;
        int exponent = (int)(h >> 10);
        double value = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
        assert_true(cpl_f16_to_f32((uint16_t)h) == (float)value);
        assert_true(cpl_f16_to_f32((uint16_t)(h | 0x8000)) == (float)-value);
    }
    assert_true(cpl_f16_to_f32(0x7c00) == INFINITY && cpl_f16_to_f32(0xfc00) == -INFINITY);
    assert_true(cpl_bf16_to_f32(0x3f80) == 1.0f && cpl_bf16_to_f32(0xff80) == -INFINITY && cpl_bf16_to_f32(1) == 0x1p-133f);
}

static void test_every_code_survives_a_round_trip(void **state) {
    for (int f = 0; f < 2; f++) {
        for (uint32_t h = 0; h < 65536; h++) {
            uint16_t back = narrow(formats[f].dt, widen(formats[f].dt, (uint16_t)h));
            bool nan = (h & 0x7fff) > formats[f].infinity;
            uint16_t quiet = formats[f].dt == CPL_BF16 ? 0x40 : 0x200;
            assert_int_equal(back, nan ? (h | quiet) : h);
        }
    }
}

static void test_rounding_is_to_nearest_with_ties_to_even(void **state) {
    for (int f = 0; f < 2; f++) {
        cpl_dtype dt = formats[f].dt;
        for (uint32_t h = 0; h < formats[f].infinity; h++) {
            double low = widen(dt, (uint16_t)h);
            double high = h + 1u == formats[f].infinity ? ldexp(1, dt == CPL_BF16 ? 128 : 16) : widen(dt, (uint16_t)(h + 1));
            float middle = (float)((low + high) / 2);
            uint16_t even = (uint16_t)(h + (h & 1));
            assert_int_equal(narrow(dt, middle), even);
            assert_int_equal(narrow(dt, nextafterf(middle, INFINITY)), h + 1);
            assert_int_equal(narrow(dt, nextafterf(middle, 0.0f)), h);
            assert_int_equal(narrow(dt, -middle), even | 0x8000);
        }
    }
}

static void test_f16_overflows_to_inf_and_keeps_nan(void **state) {
    assert_int_equal(cpl_f16_from_f32(65504.0f), 0x7bff);
    assert_int_equal(cpl_f16_from_f32(65519.99f), 0x7bff);
    assert_int_equal(cpl_f16_from_f32(65520.0f), 0x7c00);
    assert_int_equal(cpl_f16_from_f32(-3e38f), 0xfc00);
    assert_int_equal(cpl_f16_from_f32(0x1p-25f), 0);
    assert_int_equal(cpl_f16_from_f32(nextafterf(0x1p-25f, 1.0f)), 1);
    assert_true(isnan(cpl_f16_to_f32(cpl_f16_from_f32(NAN))));
    assert_true(isnan(cpl_bf16_to_f32(cpl_bf16_from_f32(cpl_f32_from_bits(0x7f800001u)))));
}

/* Every variant against the scalar definitions: all codes one way, a stride through all f32 bit patterns the other way, ragged
 * lengths. */
static void casts_are_the_scalar_definitions(cpl_device *dev) {
    enum { N = 1 << 18 };
    float *x = test_array(N, sizeof *x);
    uint16_t *h = test_array(N, sizeof *h);
    float *back = test_array(N, sizeof *back);
    for (int f = 0; f < 2; f++) {
        cpl_dtype dt = formats[f].dt;
        for (int64_t i = 0; i < N; i++) {
            x[i] = cpl_f32_from_bits((uint32_t)i * 16411u + (uint32_t)f);
        }
        for (int64_t n = N - 9; n <= N; n += 3) {
            assert_ok(dev->ops->cast_from_f32(dev, dt, h, x, n));
        }
        for (int64_t i = 0; i < N; i++) {
            bool loose = test_on_gpu() && isnan(x[i]); /* a GPU makes one NaN of all */
            assert_true(loose ? isnan(widen(dt, h[i])) : h[i] == narrow(dt, x[i]));
        }
        for (int64_t i = 0; i < 65536; i++) {
            h[i] = (uint16_t)i;
        }
        assert_ok(dev->ops->cast_to_f32(dev, dt, back, h, 65536));
        for (int64_t i = 0; i < 65536; i++) {
            float want = widen(dt, (uint16_t)i);
            bool loose = test_on_gpu() && isnan(want);
            assert_true(loose ? isnan(back[i]) : cpl_f32_bits(back[i]) == cpl_f32_bits(want));
        }
    }
    test_release(&x);
    test_release(&h);
    test_release(&back);
}

static void test_every_variant_casts_by_the_scalar_definitions(void **state) {
    test_on_devices(casts_are_the_scalar_definitions);
}

/* Units in the last place of the f32 nearest to `want`. */
static double ulps(float got, double want) {
    float nearest = (float)want;
    float next = nextafterf(fabsf(nearest), INFINITY);
    return fabs(got - want) / ((double)next - fabsf(nearest));
}

static void test_elementary_functions_are_within_two_ulps(void **state) {
    double worst_exp = 0;
    double worst_log = 0;
    double worst_tanh = 0;
    for (int64_t i = 0; i < 400000; i++) {
        float x = -104.0f + (float)i * 4.8e-4f;
        if (x < 88.72f) {
            worst_exp = fmax(worst_exp, ulps(cpl_expf(x), exp(x)));
        }
        float y = cpl_f32_from_bits(1u + (uint32_t)i * 5347u);
        worst_log = fmax(worst_log, ulps(cpl_logf(y), log(y)));
        float z = (float)(i - 200000) * 6e-5f;
        worst_tanh = fmax(worst_tanh, ulps(cpl_tanhf(z), tanh(z)));
    }
    assert_true(worst_exp <= 2.0);
    assert_true(worst_log <= 2.0);
    assert_true(worst_tanh <= 2.5);
}

static void test_elementary_functions_at_the_ends(void **state) {
    assert_true(cpl_expf(INFINITY) == INFINITY && cpl_expf(-INFINITY) == 0.0f && cpl_expf(0.0f) == 1.0f && isnan(cpl_expf(NAN)));
    assert_true(cpl_expf(88.73f) == INFINITY && cpl_expf(-104.0f) == 0.0f && cpl_expf(-3e38f) == 0.0f);
    assert_true(cpl_logf(0.0f) == -INFINITY && cpl_logf(INFINITY) == INFINITY && cpl_logf(1.0f) == 0.0f);
    assert_true(isnan(cpl_logf(-1.0f)) && isnan(cpl_logf(NAN)));
    assert_true(cpl_tanhf(INFINITY) == 1.0f && cpl_tanhf(-INFINITY) == -1.0f && cpl_tanhf(0.0f) == 0.0f && isnan(cpl_tanhf(NAN)));
    assert_true(cpl_tanhf(1e-30f) == 1e-30f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_widening_is_the_value_of_the_code),
        cmocka_unit_test(test_every_code_survives_a_round_trip),
        cmocka_unit_test(test_rounding_is_to_nearest_with_ties_to_even),
        cmocka_unit_test(test_f16_overflows_to_inf_and_keeps_nan),
        cmocka_unit_test(test_every_variant_casts_by_the_scalar_definitions),
        cmocka_unit_test(test_elementary_functions_are_within_two_ulps),
        cmocka_unit_test(test_elementary_functions_at_the_ends),
    };
    return test_main(tests, NULL, NULL);
}

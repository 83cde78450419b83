/* See support.h.
 * Refuses to go on after a failed allocation or device. */
#include "tests/support/support.h"
#include "io/base/rng.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const test_isas[] = {"base", "v3", "v4", NULL};

cpl_device *test_device(const char *isa, int threads) {
    cpl_device *dev = NULL;
    if (test_on_gpu()) {
        if (strcmp(isa, test_isas[0]) == 0) {
            assert_ok(cpl_device_create(&dev, "cuda", 0, threads));
        }
        return dev;
    }
    const char *outside = getenv("CUPEL_CPU");
    char kept[16];
    snprintf(kept, sizeof kept, "%s", outside != NULL ? outside : "");
    setenv("CUPEL_CPU", isa, 1);
    cpl_status st = cpl_device_create(&dev, "cpu", 0, threads);
    if (outside != NULL) {
        setenv("CUPEL_CPU", kept, 1);
    } else {
        unsetenv("CUPEL_CPU");
    }
    if (st != CPL_OK && st != CPL_UNSUPPORTED) {
        fail_msg("CPU device %s: %s", isa, cpl_status_message());
    }
    return dev;
}

void test_on_devices(void (*body)(cpl_device *dev)) {
    int found = 0;
    if (test_on_gpu()) {
        cpl_device *dev = test_device(test_isas[0], 1);
        body(dev);
        cpl_device_destroy(&dev);
        return;
    }
    for (int i = 0; test_isas[i] != NULL; i++) {
        for (int threads = 1; threads <= 2; threads++) {
            cpl_device *dev = test_device(test_isas[i], threads);
            if (dev != NULL) {
                found++;
                body(dev);
                cpl_device_destroy(&dev);
            }
        }
    }
    assert_true(found >= 2);
}

float *test_normals(uint32_t stream, int64_t n, float scale) {
    float *x = test_array(n, sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        x[i] = scale * cpl_rng_normal(20240607, CPL_RNG_TEST, stream, (uint64_t)i);
    }
    return x;
}

void *test_act(cpl_dtype dt, uint32_t stream, int64_t n, float scale, double **exact) {
    float *x = test_normals(stream, n, scale);
    void *y = test_array(n, cpl_dtype_size(dt));
    for (int64_t i = 0; i < n; i++) {
        cpl_act_set(dt, y, i, x[i]);
    }
    test_release(&x);
    if (exact != NULL) {
        *exact = test_widen(dt, y, n);
    }
    return y;
}

double *test_widen(cpl_dtype dt, const void *x, int64_t n) {
    double *y = test_array(n, sizeof *y);
    for (int64_t i = 0; i < n; i++) {
        y[i] = cpl_act_get(dt, x, i);
    }
    return y;
}

double test_roundoff(cpl_dtype dt) {
    static const double roundoff[] = {[CPL_F32] = 0x1p-24, [CPL_BF16] = 0x1p-8, [CPL_F16] = 0x1p-11, [CPL_TF32] = 0x1p-10};
    return roundoff[dt];
}

void test_close(const char *what, cpl_dtype dt, const void *got, const double *want, int64_t n, double absolute, double relative) {
    int64_t worst = -1;
    double worst_excess = 0;
    if (test_on_gpu() && (absolute > 0 || relative > 0)) {
        absolute = test_slack(absolute);
        relative += 256 * 0x1p-24;
    }
    for (int64_t i = 0; i < n; i++) {
        double g = cpl_act_get(dt, got, i);
        if (g == want[i] || (isnan(g) && isnan(want[i]))) {
            continue;
        }
        double excess = fabs(g - want[i]) / (absolute + relative * fabs(want[i]) + 1e-300);
        if (!(excess <= 1) && (worst < 0 || !(excess <= worst_excess))) {
            worst = i;
            worst_excess = excess;
        }
    }
    if (worst >= 0) {
        fail_msg("%s (%s): element %lld of %lld is %.9g, expected %.9g: %.2f times the tolerance", what, cpl_dtype_name(dt),
                 (long long)worst, (long long)n, cpl_act_get(dt, got, worst), want[worst], worst_excess);
    }
}

void test_same_bits(const char *what, const void *a, const void *b, size_t bytes) {
    const unsigned char *x = a;
    const unsigned char *y = b;
    for (size_t i = 0; i < bytes; i++) {
        if (x[i] != y[i]) {
            fail_msg("%s: byte %zu of %zu differs: %02x and %02x", what, i, bytes, x[i], y[i]);
        }
    }
}

double test_derivative(double (*loss)(void *context), void *context, double *x, double step) {
    double kept = *x;
    *x = kept + step;
    double above = loss(context);
    *x = kept - step;
    double below = loss(context);
    *x = kept;
    return (above - below) / (2 * step);
}

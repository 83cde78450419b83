/* See twin.h.
 * Refuses to compare what was not written: new buffers hold NaN. */
#include "tests/support/twin.h"
#include <stdio.h>
#include <string.h>

enum { GUARD = 256, GUARD_BYTE = 0xa5 };

cpl_device *test_on[2];

static test_twin make(const void *host, int fill, size_t bytes) {
    test_twin t = {.bytes = bytes};
    char *image = test_array((int64_t)(bytes + GUARD), 1);
    memset(image, fill, bytes);
    if (host != NULL) {
        memcpy(image, host, bytes);
    }
    memset(image + bytes, GUARD_BYTE, GUARD);
    for (int d = 0; d < 2; d++) {
        assert_ok(cpl_device_alloc(test_on[d], &t.on[d], bytes + GUARD, 1, "twin"));
        assert_ok(CPL_OPS(test_on[d], upload, t.on[d], image, bytes + GUARD));
    }
    cpl_free(&image);
    return t;
}

test_twin test_twin_of(void *host, size_t bytes) {
    test_twin t = make(host, 0, bytes);
    cpl_free(&host);
    return t;
}

test_twin test_twin_new(size_t bytes) {
    return make(NULL, 0xff, bytes);
}

test_twin test_twin_zero(size_t bytes) {
    return make(NULL, 0, bytes);
}

test_twin test_twin_act(cpl_dtype dt, uint32_t stream, int64_t n, float scale) {
    return test_twin_of(test_act(dt, stream, n, scale, NULL), (size_t)n * cpl_dtype_size(dt));
}

void test_twin_free(test_twin *t) {
    for (int d = 0; d < 2; d++) {
        unsigned char guard[GUARD];
        assert_ok(CPL_OPS(test_on[d], download, guard, (char *)t->on[d] + t->bytes, GUARD));
        for (int i = 0; i < GUARD; i++) {
            if (guard[i] != GUARD_BYTE) {
                fail_msg("%s wrote %d bytes behind a buffer of %zu", test_on[d]->kind, i + 1, t->bytes);
            }
        }
        cpl_device_free(test_on[d], &t->on[d]);
    }
}

void *test_twin_read(const test_twin *t, int device) {
    void *host = test_array((int64_t)t->bytes, 1);
    assert_ok(CPL_OPS(test_on[device], download, host, t->on[device], t->bytes));
    return host;
}

void test_twin_close(const char *what, cpl_dtype dt, const test_twin *t, int64_t n, double absolute, double relative) {
    void *cpu = test_twin_read(t, 0), *gpu = test_twin_read(t, 1);
    double *want = test_widen(dt, cpu, n);
    test_close(what, dt, gpu, want, n, absolute, relative);
    cpl_free(&want);
    cpl_free(&cpu);
    cpl_free(&gpu);
}

void test_twin_same(const char *what, const test_twin *t) {
    void *cpu = test_twin_read(t, 0), *gpu = test_twin_read(t, 1);
    test_same_bits(what, gpu, cpu, t->bytes);
    cpl_free(&cpu);
    cpl_free(&gpu);
}

int test_gpu_main(const struct CMUnitTest *tests, size_t count) {
    cpl_status st = cpl_device_create(&test_on[1], "cuda", 0, 0);
    if (st == CPL_UNSUPPORTED) {
        printf("SKIPPED: %s\n", cpl_status_message());
        return 77;
    }
    if (st != CPL_OK || cpl_device_create(&test_on[0], "cpu", 0, 0) != CPL_OK) {
        printf("%s\n", cpl_status_message());
        return 1;
    }
    int failed = _cmocka_run_group_tests("cuda", tests, count, NULL, NULL);
    cpl_device_destroy(&test_on[0]);
    cpl_device_destroy(&test_on[1]);
    return failed;
}

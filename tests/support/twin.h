/* One buffer on the CPU and on the GPU, for tests that run an operation on both and compare.
 * Refuses to pass where there is no GPU: such a program ends with 77, which ctest reports as skipped. */
#ifndef CPL_TESTS_TWIN_H
#define CPL_TESTS_TWIN_H

#include "tests/support/support.h"

/* [0] the CPU, [1] the GPU: for (int d = 0; d < 2; d++) assert_ok(CPL_OPS(test_on[d], gelu_fwd, dt, y.on[d], x.on[d], n)); */
extern cpl_device *test_on[2];
/* cmocka_run_group_tests, between opening and closing the two devices. */
int test_gpu_main(const struct CMUnitTest *tests, size_t count);

typedef struct {
    void *on[2]; /* owned; device memory of test_on, with a guard behind it */
    size_t bytes;
} test_twin;
/* Both get the bytes of `host`, which is freed (cpl_free). */
test_twin test_twin_of(void *host, size_t bytes);
/* Both are filled with bytes that read as NaN, so that an element that is not written shows. */
test_twin test_twin_new(size_t bytes);
test_twin test_twin_zero(size_t bytes);
/* [n] normals times scale in dt: test_act on both. */
test_twin test_twin_act(cpl_dtype dt, uint32_t stream, int64_t n, float scale);
/* Fails where something was written behind the buffer. */
void test_twin_free(test_twin *t);
/* A new host array with what one device holds. */
void *test_twin_read(const test_twin *t, int device);
/* |gpu - cpu| <= absolute + relative |cpu| for all n elements of dt. */
void test_twin_close(const char *what, cpl_dtype dt, const test_twin *t, int64_t n, double absolute, double relative);
void test_twin_same(const char *what, const test_twin *t);

#endif

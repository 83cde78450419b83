/* What the tests of several folders share: devices of every instruction set, Philox-filled arrays, tolerances, numerical
 * derivatives. Refuses hidden randomness: every array is a function of the stream number given. */
#ifndef CPL_TESTS_SUPPORT_H
#define CPL_TESTS_SUPPORT_H

#include "kernels/dtype.h"
#include "kernels/kernels.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdbool.h>
#include <cmocka.h>

/* Fails the test with the recorded message unless the call returned CPL_OK. */
#define assert_ok(call)                                                                                                            \
    do {                                                                                                                           \
        cpl_status assert_ok_status = (call);                                                                                      \
        if (assert_ok_status != CPL_OK) {                                                                                          \
            fail_msg("%s: %s", #call, cpl_status_message());                                                                       \
        }                                                                                                                          \
    } while (0)

/* Of programs whose bodies hand arrays of the host to operations: main returns test_main(tests, setup, teardown) (NULL: none), and
 * test_release frees. With CUPEL_DEVICE=cuda the same bodies run on the GPU: then arrays and the stack on which the tests run are
 * page-locked memory, which has the same address on both sides, and every operation is waited for (CUDA_LAUNCH_BLOCKING). What is
 * const and static is not the GPU's to read. Without a GPU the program ends with 77, which ctest reports as skipped. */
#define test_main(tests, setup, teardown) test_run((tests), sizeof(tests) / sizeof((tests)[0]), (setup), (teardown))
int test_run(const struct CMUnitTest *tests, size_t count, CMFixtureFunction setup, CMFixtureFunction teardown);
bool test_on_gpu(void);
/* A tolerance on a GPU, whose exponentials and order of sums are others: 16 times as much, at most 15 * 2^-14 more. */
double test_slack(double tolerance);
/* Ends the test as skipped on a GPU: what follows is defined for the CPU only. */
void test_cpu_only(void);

/* Runs body(dev) on a device of every instruction set that this machine has and with 1 and 2 threads; or once on the GPU. */
void test_on_devices(void (*body)(cpl_device *dev));
/* A CPU device of one instruction set ("base", "v3", "v4"), or NULL where the machine or the build lacks it. On a GPU: that for
 * "base", NULL for the others. */
cpl_device *test_device(const char *isa, int threads);
extern const char *const test_isas[]; /* NULL-terminated */

/* Arrays below are zeroed host memory that operations of test_device take as device memory; the test frees them with test_release,
 * which fails where something was written behind one that a GPU could reach. Out of memory fails the test. */
void *test_array(int64_t n, size_t size);
void test_release(void *array); /* a T **, set to NULL */
/* [n] normals times `scale`, element i of Philox stream `stream`. */
float *test_normals(uint32_t stream, int64_t n, float scale);
/* The same, rounded to dt and stored so; *exact (may be NULL) = a new f64 array of the rounded values. */
void *test_act(cpl_dtype dt, uint32_t stream, int64_t n, float scale, double **exact);
/* A new f64 array of the values of an act buffer, or of f32 with dt = CPL_F32. */
double *test_widen(cpl_dtype dt, const void *x, int64_t n);

/* Unit roundoff of dt, half a unit in the last place of 1: 2^-24, 2^-8 (bf16), 2^-11 (f16). Of tf32 a whole one, 2^-10: operands
 * may be cut to 10 bits of mantissa instead of rounded. */
double test_roundoff(cpl_dtype dt);
/* Fails, naming `what` and the worst index, unless |got[i] - want[i]| <= absolute + relative |want[i]| for all i (NaN matches NaN).
 * On a GPU absolute is taken with test_slack and relative with 256 roundoffs of f32 more; where both are 0 the values are the same
 * there too. */
void test_close(const char *what, cpl_dtype dt, const void *got, const double *want, int64_t n, double absolute, double relative);
/* Fails unless the n bytes are the same. */
void test_same_bits(const char *what, const void *a, const void *b, size_t bytes);

/* Central difference of the f64 function `loss(context)` over *x, in f64. step: about 1e-5 of the size of *x. */
double test_derivative(double (*loss)(void *context), void *context, double *x, double step);

#endif

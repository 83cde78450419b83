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
#include <cmocka.h>

/* Fails the test with the recorded message unless the call returned CPL_OK. */
#define assert_ok(call)                                                                                                            \
    do {                                                                                                                           \
        cpl_status assert_ok_status = (call);                                                                                      \
        if (assert_ok_status != CPL_OK) {                                                                                          \
            fail_msg("%s: %s", #call, cpl_status_message());                                                                       \
        }                                                                                                                          \
    } while (0)

/* Runs body(dev) on a device of every instruction set that this machine has and with 1 and 2 threads. */
void test_on_devices(void (*body)(cpl_device *dev));
/* A CPU device of one instruction set ("base", "v3", "v4"), or NULL where the machine or the build lacks it. */
cpl_device *test_device(const char *isa, int threads);
extern const char *const test_isas[]; /* NULL-terminated */

/* Arrays below are zeroed host memory, which is device memory of the CPU back end; the test frees them with cpl_free.
 * Out of memory fails the test. */
void *test_array(int64_t n, size_t size);
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
 */
void test_close(const char *what, cpl_dtype dt, const void *got, const double *want, int64_t n, double absolute, double relative);
/* Fails unless the n bytes are the same. */
void test_same_bits(const char *what, const void *a, const void *b, size_t bytes);

/* Central difference of the f64 function `loss(context)` over *x, in f64. step: about 1e-5 of the size of *x. */
double test_derivative(double (*loss)(void *context), void *context, double *x, double step);

#endif

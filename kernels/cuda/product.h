/* One matrix product on the GPU, and what follows it in the same pass.
 * Refuses to choose an algorithm by guess: each shape's are timed once. */
#ifndef CPL_KERNELS_CUDA_PRODUCT_H
#define CPL_KERNELS_CUDA_PRODUCT_H

#include "kernels/cuda/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    CPL_AFTER_NOTHING,
    CPL_AFTER_BIAS,     /* d += vector over columns; vector [m] of d's type */
    CPL_AFTER_GELU_GRAD /* d *= GELU'(aux); aux [m,n] of a's type */
} cpl_after;

/* d = op(a) op(b) [+ c], all column-major: a [m,k] or, transposed, [k,m]; b [k,n] or [n,k]; c, d [m,n] of one type; no gaps between
 * columns. */
typedef struct {
    int32_t dt;   /* cpl_dtype of a and b */
    int32_t wide; /* d is f32, whatever dt */
    int32_t transposed_a, transposed_b;
    int32_t accumulate;   /* d = c + op(a) op(b) */
    int32_t after;        /* cpl_after */
    int32_t alignment[4]; /* bytes: of a, b, d with c and of vector or aux; filled by cpl_cuda_product_find */
    int64_t m, n, k;
} cpl_product;

typedef struct {
    const void *a, *b;
    const void *c; /* where accumulated; may be d */
    void *d;
    void *vector;
    const void *aux;
} cpl_product_data;

typedef struct cpl_product_plan cpl_product_plan;

/* *out: the plan for this product over such pointers, timed on first use (not while a graph is recorded; d is left as a run of it
 * would leave it, or untouched where it is c). *ms: its time, INFINITY where cuBLASLt has none. Errors: CPL_DEVICE;
 * CPL_INTERNAL when it would have to be timed while a graph is recorded. */
cpl_status cpl_cuda_product_find(cpl_device *dev, const cpl_product *product, const cpl_product_data *data, cpl_product_plan **out,
                                 double *ms);
cpl_status cpl_cuda_product_run(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data);

/* *ms = time of `body`, once for the same name and size on this GPU: kept beside the plans. */
cpl_status cpl_cuda_timed_once(cpl_device *dev, const char *name, const int64_t size[4], cpl_status (*body)(void *context),
                               void *context, double *ms);

/* What a product does not do in the same pass.   dx, pre [n] act
 * y = sum + bias + residual: y, residual [R,N] act, sum [R,N] f32, bias [N] act; bias, residual: or NULL; y may be residual
 * sums += column sums of x [R,N] act, a row ld elements after the one before; sums [N] f32 */
cpl_status cpl_cuda_gelu_grad(cpl_device *dev, cpl_dtype dt, void *dx, const void *pre, int64_t n);
cpl_status cpl_cuda_add_apart(cpl_device *dev, cpl_dtype dt, void *y, const float *sum, const void *bias, const void *residual,
                              int64_t R, int64_t N);
cpl_status cpl_cuda_column_sums(cpl_device *dev, cpl_dtype dt, float *sums, const void *x, int64_t ld, int64_t R, int64_t N);

/* linear_gelu_fwd with a bias, and linear_bwd_input with GELU's derivative, by our own kernel
 * (product_gelu.cu). usable: sm_90, 16-bit types, rows and the pointers (those of the call, and pre) at multiples of 16 bytes. pre
 * NULL: not kept. */
bool cpl_cuda_product_gelu_usable(const cpl_device *dev, cpl_dtype dt, int64_t R, int64_t N, int64_t K, const void *x,
                                  const void *y, const void *w, const void *other);
cpl_status cpl_cuda_product_gelu_fwd(cpl_device *dev, cpl_dtype dt, void *y, void *pre, const void *x, const void *w,
                                     const void *bias, int64_t R, int64_t N, int64_t K);
cpl_status cpl_cuda_product_gelu_bwd(cpl_device *dev, cpl_dtype dt, void *dx, float *dbias, const void *dy, const void *w,
                                     const void *pre, int64_t R, int64_t N, int64_t K);

#ifdef __cplusplus
}
#endif
#endif

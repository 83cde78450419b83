/* Matrix products of the CPU back end through oneDNN, or CBLAS where it is missing.
 * Refuses to start threads: callers split the work in a fixed way, so that the bits do not depend on the number of threads. */
#ifndef CPL_KERNELS_CPU_GEMM_H
#define CPL_KERNELS_CPU_GEMM_H

#include "kernels/kernels.h"

/* One product c = a b + beta c, row-major; beta 0 (c is only written) or 1. a is [m,k] (stored [k,m] if a_trans), b [k,n] (stored
 * [n,k] if b_trans), c [m,n] f32. Leading dimensions in elements. a and b share one element type: CPL_F32, or CPL_BF16 where
 * cpl_gemm_has_bf16(). */
typedef struct {
    cpl_dtype dt;
    bool a_trans, b_trans;
    int64_t m, n, k;
    const void *a, *b; /* borrowed */
    int64_t lda, ldb;
    float *c; /* borrowed */
    int64_t ldc;
    float beta;
} cpl_gemm_call;

/* Call once at the start of every parallel region that multiplies, also one of a single thread: keeps the library on this thread.
 */
void cpl_gemm_enter(void);
/* 0, or the library's status. Thread-safe. */
int cpl_gemm(const cpl_gemm_call *call);
/* Makes CPL_INTERNAL of a status that cpl_gemm gave. */
cpl_status cpl_gemm_fail(int status);

/* True where the library multiplies bf16 natively into f32; CUPEL_CPU_BF16=off in the environment says no. */
bool cpl_gemm_has_bf16(void);
/* "oneDNN 2.6.3 (avx2)": name, version, what it generates code for. */
void cpl_gemm_library(char *text, size_t size);

/* The native bf16 path, kernels/cpu/gemm_bf16.c. */
int cpl_gemm_bf16(const cpl_gemm_call *call);

#endif

/* Single-threaded f32 products by dnnl_sgemm or cblas_sgemm, and what is known of the library.
 * Refuses to start threads. */
#include "kernels/cpu/gemm.h"
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef CPL_DNNL
#include <dnnl.h>

void cpl_gemm_enter(void) {
    omp_set_num_threads(1);
}

static int gemm_f32(const cpl_gemm_call *g) {
    return (int)dnnl_sgemm(g->a_trans ? 'T' : 'N', g->b_trans ? 'T' : 'N', g->m, g->n, g->k, 1.0f, g->a, g->lda, g->b, g->ldb,
                           g->beta, g->c, g->ldc);
}

bool cpl_gemm_has_bf16(void) {
    const char *wanted = getenv("CUPEL_CPU_BF16");
    /* The values of dnnl_cpu_isa_t grow by added feature bits: everything from avx512_core_bf16 on contains its bits. */
    unsigned bf16 = (unsigned)dnnl_cpu_isa_avx512_core_bf16;
    return (wanted == NULL || strcmp(wanted, "off") != 0) && ((unsigned)dnnl_get_effective_cpu_isa() & bf16) == bf16;
}

static const char *code_for(void) {
    unsigned isa = (unsigned)dnnl_get_effective_cpu_isa();
    const struct {
        unsigned bits;
        const char *name;
    } known[] = {
        {(unsigned)dnnl_cpu_isa_avx512_core_amx, "avx512_core_amx"},
        {(unsigned)dnnl_cpu_isa_avx512_core_bf16, "avx512_core_bf16"},
        {(unsigned)dnnl_cpu_isa_avx512_core, "avx512_core"},
        {(unsigned)dnnl_cpu_isa_avx2, "avx2"},
        {(unsigned)dnnl_cpu_isa_avx, "avx"},
        {(unsigned)dnnl_cpu_isa_sse41, "sse41"},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if ((isa & known[i].bits) == known[i].bits) {
            return known[i].name;
        }
    }
    return "generic code";
}

void cpl_gemm_library(char *text, size_t size) {
    const dnnl_version_t *v = dnnl_version();
    snprintf(text, size, "oneDNN %d.%d.%d (%s)", v->major, v->minor, v->patch, code_for());
}

#else
#include <cblas.h>

/* OpenBLAS's own; other CBLAS libraries take their thread count from the environment. */
extern void openblas_set_num_threads(int n) __attribute__((weak));
extern char *openblas_get_config(void) __attribute__((weak));

void cpl_gemm_enter(void) {
    omp_set_num_threads(1);
    if (openblas_set_num_threads != NULL) {
        static int once;
#pragma omp critical(cpl_gemm_threads)
        if (!once) {
            openblas_set_num_threads(1);
            once = 1;
        }
    }
}

static int gemm_f32(const cpl_gemm_call *g) {
    int64_t largest = g->m | g->n | g->k | g->lda | g->ldb | g->ldc;
    if (largest > 0x7fffffff) {
        return -1;
    }
    cblas_sgemm(CblasRowMajor, g->a_trans ? CblasTrans : CblasNoTrans, g->b_trans ? CblasTrans : CblasNoTrans, (int)g->m, (int)g->n,
                (int)g->k, 1.0f, g->a, (int)g->lda, g->b, (int)g->ldb, g->beta, g->c, (int)g->ldc);
    return 0;
}

int cpl_gemm_bf16(const cpl_gemm_call *call) {
    return -1;
}

bool cpl_gemm_has_bf16(void) {
    return false;
}

void cpl_gemm_library(char *text, size_t size) {
    snprintf(text, size, "CBLAS: %.120s", openblas_get_config != NULL ? openblas_get_config() : "not OpenBLAS");
}
#endif

int cpl_gemm(const cpl_gemm_call *call) {
    return call->dt == CPL_BF16 ? cpl_gemm_bf16(call) : gemm_f32(call);
}

cpl_status cpl_gemm_fail(int status) {
    cpl_status st = CPL_OK;
    char library[160];
    cpl_gemm_library(library, sizeof library);
    CPL_FAIL(CPL_INTERNAL, "%s refused a matrix product with status %d", library, status);
done:
    return st;
}

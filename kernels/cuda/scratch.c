/* What the operations take for themselves, foretold without a GPU: for cupel plan, and for what would fit.
 * Refuses to differ from what they take: tests/kernels/cuda/test_cuda_scratch.c compares. */
#include "kernels/cuda/cuda.h"
#include <stdlib.h>
#include <string.h>
#ifdef CPL_CUDNN
#include <cudnn.h>
#endif

/* Multiprocessors of an H100 or H200: what decides about a little of it, where no GPU can be asked. */
enum { USUAL_SM_COUNT = 132 };

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t pieces(int64_t n, int64_t each) {
    return (n + each - 1) / each;
}

/* Partial sums over rows: layernorm_bwd.cu, linear_after.cu (the widest layer has 4C columns), embed.cu with its sort. */
static int64_t rows_bytes(const cpl_pass *p, int64_t sm_count) {
    int64_t R = p->B * p->T, C = p->C;
    int64_t norm = pieces(R, 8) < 2 * sm_count ? pieces(R, 8) : 2 * sm_count;
    int64_t bias = pieces(R, 64) < 64 ? pieces(R, 64) : 64;
    int64_t sort = 8 * R + (1 << 16); /* keys and values once more, and counts */
    return larger(larger(3 * norm * C * 4, bias * 4 * C * 4), 2 * pieces(R, 64) * C * 4 + 12 * R + sort);
}

/* cuDNN's backward keeps ds; attention.c tries it wherever it can. */
static int64_t cudnn_bytes(const cpl_pass *p) {
#ifdef CPL_CUDNN
    const int64_t most = (int64_t)1 << 30; /* WORKSPACE_MAX of attention_cudnn.c */
    const char *said = getenv("CUPEL_ATTENTION");
    size_t version = cudnnGetVersion();
    int64_t D = p->C / p->H, bytes = 2 * p->B * p->H * p->T * p->T;
    bool usable = version >= 91002 && cpl_dtype_size(p->dt) == 2 && D % 8 == 0 && D <= 256 && p->T > 1 &&
                  (version > 91500 || p->T % 128 == 0) && bytes <= most;
    return usable && (said == NULL || strcmp(said, "own") != 0) ? bytes : 0;
#else
    return 0;
#endif
}

int64_t cpl_cuda_pass_bytes(const cpl_pass *p) {
    cpl_gpu *list = NULL;
    int64_t sm_count = USUAL_SM_COUNT, bytes = CPL_CUDA_PRODUCT_WORKSPACE;
    if (cpl_alloc(&list, CPL_GPUS_MAX, sizeof *list, "list of GPUs") == CPL_OK && cpl_cuda_gpus(list, CPL_GPUS_MAX) > 0) {
        sm_count = list[0].sm_count;
    }
    cpl_free(&list);
    if (p->B > 0) {
        bytes += 4 * p->B * p->H * p->T + (p->training ? cudnn_bytes(p) : 0);
        bytes += p->training ? rows_bytes(p, sm_count) + 2 * 4 * p->C * 4 : 0; /* and a layer's bias gradient twice */
    }
    int64_t chunks = pieces(larger(p->flat, p->B * p->T * p->C), CPL_SUM_CHUNK);
    return bytes + 8 * chunks;
}

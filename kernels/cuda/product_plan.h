/* What product.c and product_choice.c share: a product as cuBLASLt describes it.
 * Refuses other users: theirs is product.h. */
#ifndef CPL_KERNELS_CUDA_PRODUCT_PLAN_H
#define CPL_KERNELS_CUDA_PRODUCT_PLAN_H

#include "kernels/cuda/product.h"
#include "kernels/cuda/tuning.h"
#include <cublasLt.h>

struct cpl_product_plan {
    cpl_product product;
    cublasLtMatmulDesc_t desc;      /* owned */
    cublasLtMatrixLayout_t a, b, d; /* owned */
    cublasLtMatmulAlgo_t algo;
    double ms;
    cpl_product_plan *next; /* owned */
};

struct cpl_cuda_linear {
    cublasLtHandle_t handle;
    void *workspace;         /* owned, device */
    cpl_product_plan *plans; /* owned */
    cpl_tuning *tuning;      /* owned: what was timed before, and the file of it */
    bool contested;          /* the log has said that large products take a while */
};

static inline cpl_status cpl_lt_status(cublasStatus_t status, const char *file, int line, const char *doing) {
    return status == CUBLAS_STATUS_SUCCESS
               ? CPL_OK
               : cpl_fail(CPL_DEVICE, file, line, "%s: cuBLASLt: %s", doing, cublasLtGetStatusString(status));
}
#define CPL_LT(doing, call) CPL_TRY(cpl_lt_status((call), __FILE__, __LINE__, (doing)))

static inline cudaDataType_t cpl_product_type(int32_t dt) {
    return dt == CPL_BF16 ? CUDA_R_16BF : dt == CPL_F16 ? CUDA_R_16F : CUDA_R_32F;
}

/* By `algo`, not plan->algo. */
cublasStatus_t cpl_product_enqueue(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data,
                                   const cublasLtMatmulAlgo_t *algo);
/* plan->algo and plan->ms: the fastest of what cuBLASLt offers; ms stays as it is where it offers nothing. Writes d as a run would,
 * but where it is accumulated. Errors: CPL_DEVICE, CPL_NO_MEMORY; CPL_INTERNAL while a graph is recorded. */
cpl_status cpl_product_choose(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data);

#endif

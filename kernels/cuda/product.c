/* Matrix products through cuBLASLt: described once per shape, run by the algorithm that product_choice.c has chosen, which is kept
 * on disk. Refuses to choose while a graph is recorded. */
#include "kernels/cuda/product_plan.h"
#include <math.h>
#include <string.h>

enum { ALIGNMENT_MAX = 256 };

static int32_t alignment_of(const void *p) {
    uintptr_t at = (uintptr_t)p;
    int32_t alignment = 1;
    while (alignment < ALIGNMENT_MAX && at % (2 * (uintptr_t)alignment) == 0) {
        alignment *= 2;
    }
    return p == NULL ? ALIGNMENT_MAX : alignment;
}

/* --- descriptors --- */

static cublasLtEpilogue_t epilogue_of(const cpl_product *p) {
    static const cublasLtEpilogue_t epilogues[] = {[CPL_AFTER_NOTHING] = CUBLASLT_EPILOGUE_DEFAULT,
                                                   [CPL_AFTER_BIAS] = CUBLASLT_EPILOGUE_BIAS,
                                                   [CPL_AFTER_GELU_GRAD] = CUBLASLT_EPILOGUE_DGELU};
    return epilogues[p->after];
}

static bool has_aux(const cpl_product *p) {
    return p->after == CPL_AFTER_GELU_GRAD;
}
static bool has_vector(const cpl_product *p) {
    return p->after == CPL_AFTER_BIAS;
}

static cpl_status point(cpl_product_plan *plan, const cpl_product_data *data) {
    cpl_status st = CPL_OK;
    if (data->vector != NULL && has_vector(&plan->product)) {
        CPL_LT("bias of a product",
               cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &data->vector, sizeof data->vector));
    }
    if (data->aux != NULL && has_aux(&plan->product)) {
        CPL_LT("input of GELU",
               cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &data->aux, sizeof data->aux));
    }
done:
    return st;
}

static cpl_status describe(cpl_product_plan *plan) {
    cpl_status st = CPL_OK;
    const cpl_product *p = &plan->product;
    const cublasOperation_t ops[2] = {p->transposed_a ? CUBLAS_OP_T : CUBLAS_OP_N, p->transposed_b ? CUBLAS_OP_T : CUBLAS_OP_N};
    cublasLtEpilogue_t epilogue = epilogue_of(p);
    const char *doing = "describe a product";
    cudaDataType_t type = cpl_product_type(p->dt), d_type = p->wide ? CUDA_R_32F : type;
    cublasComputeType_t compute = p->dt == CPL_TF32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    CPL_LT(doing, cublasLtMatmulDescCreate(&plan->desc, compute, CUDA_R_32F));
    CPL_LT(doing, cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, &ops[0], sizeof ops[0]));
    CPL_LT(doing, cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_TRANSB, &ops[1], sizeof ops[1]));
    CPL_LT(doing, cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (has_aux(p)) {
        CPL_LT(doing, cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &p->m, sizeof p->m));
    }
    const int64_t a[2] = {p->transposed_a ? p->k : p->m, p->transposed_a ? p->m : p->k};
    const int64_t b[2] = {p->transposed_b ? p->n : p->k, p->transposed_b ? p->k : p->n};
    CPL_LT(doing, cublasLtMatrixLayoutCreate(&plan->a, type, (uint64_t)a[0], (uint64_t)a[1], a[0]));
    CPL_LT(doing, cublasLtMatrixLayoutCreate(&plan->b, type, (uint64_t)b[0], (uint64_t)b[1], b[0]));
    CPL_LT(doing, cublasLtMatrixLayoutCreate(&plan->d, d_type, (uint64_t)p->m, (uint64_t)p->n, p->m));
done:
    return st;
}

static void plan_destroy(cpl_product_plan *plan) {
    if (plan->desc != NULL) {
        cublasLtMatmulDescDestroy(plan->desc);
    }
    cublasLtMatrixLayout_t layouts[] = {plan->a, plan->b, plan->d};
    for (int i = 0; i < 3; i++) {
        if (layouts[i] != NULL) {
            cublasLtMatrixLayoutDestroy(layouts[i]);
        }
    }
    cpl_free(&plan);
}

cublasStatus_t cpl_product_enqueue(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data,
                                   const cublasLtMatmulAlgo_t *algo) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    const float one = 1.0f, beta = plan->product.accumulate ? 1.0f : 0.0f;
    return cublasLtMatmul(cuda->linear->handle, plan->desc, &one, data->a, plan->a, data->b, plan->b, &beta,
                          plan->product.accumulate ? data->c : data->d, plan->d, data->d, plan->d, algo, cuda->linear->workspace,
                          CPL_CUDA_PRODUCT_WORKSPACE, cuda->stream);
}

/* --- plans --- */

/* An earlier choice, if the library still takes the algorithm. */
static bool chosen_before(cpl_cuda_linear *linear, cpl_product_plan *plan) {
    cublasLtMatmulHeuristicResult_t check;
    plan->ms = INFINITY;
    return cpl_tuning_find(linear->tuning, "product", &plan->product, sizeof plan->product, &plan->ms, &plan->algo,
                           sizeof plan->algo) &&
           (!isfinite(plan->ms) || cublasLtMatmulAlgoCheck(linear->handle, plan->desc, plan->a, plan->b, plan->d, plan->d,
                                                           &plan->algo, &check) == CUBLAS_STATUS_SUCCESS);
}

/* From earlier choices, this process's or another's; else timed and added to them. */
static cpl_status settle(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data) {
    cpl_status st = CPL_OK;
    cpl_cuda_linear *linear = cpl_cuda_of(dev)->linear;
    CPL_TRY(describe(plan));
    CPL_TRY(point(plan, data));
    if (chosen_before(linear, plan)) {
        return CPL_OK;
    }
    CPL_TRY(cpl_tuning_claim(linear->tuning));
    if (!chosen_before(linear, plan)) {
        plan->ms = INFINITY;
        CPL_TRY(cpl_product_choose(dev, plan, data));
        CPL_TRY(cpl_tuning_keep(linear->tuning, "product", &plan->product, sizeof plan->product, plan->ms, &plan->algo,
                                sizeof plan->algo));
    }
done:
    cpl_tuning_release(linear->tuning);
    return st;
}

cpl_status cpl_cuda_product_find(cpl_device *dev, const cpl_product *product, const cpl_product_data *data, cpl_product_plan **out,
                                 double *ms) {
    cpl_status st = CPL_OK;
    cpl_cuda_linear *linear = cpl_cuda_of(dev)->linear;
    cpl_product_plan *plan = NULL;
    cpl_product wanted = *product;
    const void *const pointers[4] = {data->a, data->b, data->d, has_aux(product) ? data->aux : data->vector};
    for (int i = 0; i < 4; i++) {
        wanted.alignment[i] = alignment_of(pointers[i]);
    }
    if (product->accumulate) {
        const int32_t of_c = alignment_of(data->c);
        wanted.alignment[2] = of_c < wanted.alignment[2] ? of_c : wanted.alignment[2];
    }
    for (*out = linear->plans; *out != NULL; *out = (*out)->next) {
        if (memcmp(&(*out)->product, &wanted, sizeof wanted) == 0) {
            *ms = (*out)->ms;
            return CPL_OK;
        }
    }
    CPL_TRY(cpl_alloc(&plan, 1, sizeof *plan, "plan of a product"));
    plan->product = wanted;
    CPL_TRY(settle(dev, plan, data));
    plan->next = linear->plans;
    linear->plans = plan;
    *out = plan;
    *ms = plan->ms;
    plan = NULL;
done:
    if (plan != NULL) {
        plan_destroy(plan);
    }
    return st;
}

cpl_status cpl_cuda_product_run(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data) {
    cpl_status st = CPL_OK;
    const cpl_product *p = &plan->product;
    if (!isfinite(plan->ms)) {
        CPL_FAIL(CPL_UNSUPPORTED, "cuBLASLt has no product of %lld x %lld x %lld in %s", (long long)p->m, (long long)p->n,
                 (long long)p->k, cpl_dtype_name((cpl_dtype)p->dt));
    }
    CPL_TRY(point(plan, data));
    CPL_LT("matrix product", cpl_product_enqueue(dev, plan, data, &plan->algo));
    CPL_TRY(cpl_cuda_launched(dev, "matrix product"));
done:
    return st;
}

cpl_status cpl_cuda_timed_once(cpl_device *dev, const char *name, const int64_t size[4], cpl_status (*body)(void *context),
                               void *context, double *ms) {
    cpl_status st = CPL_OK;
    cpl_tuning *tuning = cpl_cuda_of(dev)->linear->tuning;
    const size_t bytes = 4 * sizeof *size;
    if (cpl_tuning_find(tuning, name, size, bytes, ms, NULL, 0)) {
        return CPL_OK;
    }
    if (cpl_cuda_of(dev)->recording) {
        CPL_FAIL(CPL_INTERNAL, "%s: expected to be timed before a graph is recorded", name);
    }
    CPL_TRY(cpl_tuning_claim(tuning));
    if (!cpl_tuning_find(tuning, name, size, bytes, ms, NULL, 0)) {
        CPL_TRY(body(context));
        CPL_TRY(cpl_tuning_time(dev, body, context, CPL_TUNING_ROUNDS, ms));
        CPL_TRY(cpl_tuning_keep(tuning, name, size, bytes, *ms, NULL, 0));
    }
done:
    cpl_tuning_release(tuning);
    return st;
}

cpl_status cpl_cuda_linear_open(cpl_device *dev) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    CPL_TRY(cpl_alloc(&cuda->linear, 1, sizeof *cuda->linear, "matrix library"));
    CPL_LT("open cuBLASLt", cublasLtCreate(&cuda->linear->handle));
    CPL_TRY(cpl_device_alloc(dev, &cuda->linear->workspace, CPL_CUDA_PRODUCT_WORKSPACE, 1, "workspace of cuBLASLt"));
    CPL_TRY(cpl_tuning_open(&cuda->linear->tuning, dev->name, (int64_t)cublasLtGetVersion()));
done:
    return st;
}

void cpl_cuda_linear_close(cpl_device *dev) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (cuda->linear == NULL) {
        return;
    }
    while (cuda->linear->plans != NULL) {
        cpl_product_plan *plan = cuda->linear->plans;
        cuda->linear->plans = plan->next;
        plan_destroy(plan);
    }
    cpl_device_free(dev, &cuda->linear->workspace);
    if (cuda->linear->handle != NULL) {
        cublasLtDestroy(cuda->linear->handle);
    }
    cpl_tuning_close(&cuda->linear->tuning);
    cpl_free(&cuda->linear);
}

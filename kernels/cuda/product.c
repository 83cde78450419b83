/* Matrix products through cuBLASLt: every algorithm that it offers for a shape is timed once, and the choice kept on disk.
 * Refuses algorithms that add up in place, for the order of their sums may change from run to run. */
#include "io/base/log.h"
#include "kernels/cuda/product.h"
#include "kernels/cuda/tuning.h"
#include <cublasLt.h>
#include <math.h>
#include <string.h>

enum { OFFERED_MAX = 64, FINALISTS = 6, ROUNDS = 7, WORKSPACE_BYTES = CPL_CUDA_PRODUCT_WORKSPACE, ALIGNMENT_MAX = 256 };
enum { SETTLE_MS = 200, LEAD_MS = 70, TURN_MS = 230, TURNS = 2 }; /* the clock follows the load within about 0.1 s */
static const double CLOSE = 1.06, HOPEFUL = 1.02;                 /* times the best: once, and at the limit */
static const double LONG = 1e10;                                  /* m n k; shorter products do not hold a GPU at its limit */

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
    bool contested;          /* people know that it takes a while */
};

static cpl_status lt_status(cublasStatus_t status, int line, const char *doing) {
    return status == CUBLAS_STATUS_SUCCESS
               ? CPL_OK
               : cpl_fail(CPL_DEVICE, __FILE__, line, "%s: cuBLASLt: %s", doing, cublasLtGetStatusString(status));
}
#define CPL_LT(doing, call) CPL_TRY(lt_status((call), __LINE__, (doing)))

static cudaDataType_t type_of(int32_t dt) {
    return dt == CPL_BF16 ? CUDA_R_16BF : dt == CPL_F16 ? CUDA_R_16F : CUDA_R_32F;
}

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
    cudaDataType_t type = type_of(p->dt), d_type = p->wide ? CUDA_R_32F : type;
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

static cpl_status limit(const cpl_product *p, cublasLtMatmulPreference_t preference) {
    cpl_status st = CPL_OK;
    const char *doing = "look for algorithms";
    const size_t workspace = WORKSPACE_BYTES;
    /* Parts of a sum are never rounded to 16 bits on the way. */
    const bool wide = p->wide || type_of(p->dt) == CUDA_R_32F;
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | (wide ? CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE : 0);
    const uint32_t align[3] = {(uint32_t)p->alignment[0], (uint32_t)p->alignment[1], (uint32_t)p->alignment[2]};
#define LIMIT(name, value)                                                                                                         \
    CPL_LT(doing, cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_##name, &(value), sizeof(value)))
    LIMIT(MAX_WORKSPACE_BYTES, workspace);
    LIMIT(REDUCTION_SCHEME_MASK, schemes);
    LIMIT(MIN_ALIGNMENT_A_BYTES, align[0]);
    LIMIT(MIN_ALIGNMENT_B_BYTES, align[1]);
    LIMIT(MIN_ALIGNMENT_C_BYTES, align[2]);
    LIMIT(MIN_ALIGNMENT_D_BYTES, align[2]);
#undef LIMIT
done:
    return st;
}

/* --- timing --- */

static cublasStatus_t enqueue(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data,
                              const cublasLtMatmulAlgo_t *algo) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    const float one = 1.0f, beta = plan->product.accumulate ? 1.0f : 0.0f;
    return cublasLtMatmul(cuda->linear->handle, plan->desc, &one, data->a, plan->a, data->b, plan->b, &beta, data->d, plan->d,
                          data->d, plan->d, algo, cuda->linear->workspace, WORKSPACE_BYTES, cuda->stream);
}

typedef struct {
    cpl_device *dev;
    cpl_product_plan *plan;
    const cpl_product_data *data;
    const cublasLtMatmulAlgo_t *algo;
} attempt;

static cpl_status run_attempt(void *context) {
    attempt *a = context;
    return lt_status(enqueue(a->dev, a->plan, a->data, a->algo), __LINE__, "try an algorithm");
}

typedef struct {
    attempt attempt;
    double ms, sustained; /* one run in between others; the mean where nothing else runs */
} finalist;

/* Which of those that are nearly as fast as the first is fastest where products follow each other without end, as in training:
 * there a GPU stands at its power limit, and what takes less energy runs at a higher clock. In turns, for the clock wanders. The
 * choice is moved to the front. */
static cpl_status contest(cpl_device *dev, finalist *all, int count) {
    cpl_status st = CPL_OK;
    const cpl_product *p = &all[0].attempt.plan->product;
    int close = 1, best = 0;
    while (close < count && all[close].ms <= CLOSE * all[0].ms) {
        close++;
    }
    if (close == 1 || (double)p->m * (double)p->n * (double)p->k < LONG) {
        return CPL_OK;
    }
    if (!cpl_cuda_of(dev)->linear->contested) {
        cpl_log_info("large matrix products are timed on this GPU, up to 4 s for a shape, once");
        cpl_cuda_of(dev)->linear->contested = true;
    }
    CPL_TRY(cpl_tuning_sustained(dev, run_attempt, &all[0].attempt, all[0].ms, SETTLE_MS, SETTLE_MS, &all[0].sustained));
    for (int turn = 0; turn < TURNS; turn++) {
        const double most = turn == 0 ? INFINITY : HOPEFUL * all[best].sustained;
        for (int i = 0; i < close; i++) {
            double ms = INFINITY; /* the slow ones are not run again */
            if (turn == 0 || all[i].sustained <= most) {
                CPL_TRY(cpl_tuning_sustained(dev, run_attempt, &all[i].attempt, all[i].ms, LEAD_MS, TURN_MS, &ms));
            }
            all[i].sustained = turn == 0 ? ms : all[i].sustained + ms;
        }
        for (int i = 0; i < close; i++) {
            best = all[i].sustained < all[best].sustained ? i : best;
        }
    }
    finalist chosen = all[best];
    all[best] = all[0];
    all[0] = chosen;
done:
    return st;
}

/* Fastest of the offered: all once, the best few again, then those that are close side by side. An algorithm that cannot run is
 * passed over. */
static cpl_status race(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data,
                       const cublasLtMatmulHeuristicResult_t *offered, int count) {
    cpl_status st = CPL_OK;
    double ms[OFFERED_MAX];
    finalist all[FINALISTS];
    int finalists = 0;
    for (int i = 0; i < count; i++) {
        attempt a = {.dev = dev, .plan = plan, .data = data, .algo = &offered[i].algo};
        ms[i] = INFINITY;
        if (offered[i].state == CUBLAS_STATUS_SUCCESS && enqueue(dev, plan, data, a.algo) == CUBLAS_STATUS_SUCCESS) {
            CPL_TRY(cpl_tuning_time(dev, run_attempt, &a, 1, &ms[i]));
        }
    }
    while (finalists < FINALISTS) {
        int best = -1, at = finalists;
        for (int i = 0; i < count; i++) {
            best = isfinite(ms[i]) && (best < 0 || ms[i] < ms[best]) ? i : best;
        }
        if (best < 0) {
            break;
        }
        finalist f = {.attempt = {.dev = dev, .plan = plan, .data = data, .algo = &offered[best].algo}};
        CPL_TRY(cpl_tuning_time(dev, run_attempt, &f.attempt, ROUNDS, &f.ms));
        for (; at > 0 && all[at - 1].ms > f.ms; at--) {
            all[at] = all[at - 1];
        }
        all[at] = f;
        finalists++;
        ms[best] = INFINITY;
    }
    if (finalists > 0) {
        CPL_TRY(contest(dev, all, finalists));
        plan->ms = all[0].ms;
        plan->algo = *all[0].attempt.algo;
    }
done:
    return st;
}

/* Accumulating products are timed on a d of their own. */
static cpl_status choose(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data) {
    cpl_status st = CPL_OK;
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t *offered = NULL;
    cpl_product_data there = *data;
    void *own = NULL;
    int count = 0;
    const cpl_product *p = &plan->product;
    if (cpl_cuda_of(dev)->recording) {
        CPL_FAIL(CPL_INTERNAL, "product %lld x %lld x %lld: expected to be timed before a graph is recorded", (long long)p->m,
                 (long long)p->n, (long long)p->k);
    }
    CPL_TRY(cpl_alloc(&offered, OFFERED_MAX, sizeof *offered, "algorithms of a product"));
    CPL_LT("look for algorithms", cublasLtMatmulPreferenceCreate(&preference));
    CPL_TRY(limit(p, preference));
    cublasStatus_t found = cublasLtMatmulAlgoGetHeuristic(cpl_cuda_of(dev)->linear->handle, plan->desc, plan->a, plan->b, plan->d,
                                                          plan->d, preference, OFFERED_MAX, offered, &count);
    if (found == CUBLAS_STATUS_NOT_SUPPORTED || count == 0) {
        goto done; /* ms stays infinite */
    }
    CPL_LT("look for algorithms", found);
    if (p->accumulate) {
        CPL_CUDA_TRY("time a product", cudaMalloc(&own, (size_t)p->m * (size_t)p->n * sizeof(float)));
        CPL_CUDA_TRY("time a product", cudaMemsetAsync(own, 0, (size_t)p->m * (size_t)p->n * sizeof(float), cpl_cuda_stream(dev)));
        there.d = own;
    }
    CPL_TRY(race(dev, plan, &there, offered, count));
done:
    if (own != NULL) {
        cudaStreamSynchronize(cpl_cuda_stream(dev));
        cudaFree(own);
    }
    if (preference != NULL) {
        cublasLtMatmulPreferenceDestroy(preference);
    }
    cpl_free(&offered);
    return st;
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
        CPL_TRY(choose(dev, plan, data));
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
    CPL_LT("matrix product", enqueue(dev, plan, data, &plan->algo));
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
        CPL_TRY(cpl_tuning_time(dev, body, context, ROUNDS, ms));
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
    CPL_TRY(cpl_device_alloc(dev, &cuda->linear->workspace, WORKSPACE_BYTES, 1, "workspace of cuBLASLt"));
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

/* Which of the algorithms that cuBLASLt offers for a product: each is timed once, the best few again, large ones at the power
 * limit. Refuses algorithms that add up in place, for the order of their sums may change from run to run. */
#include "io/base/log.h"
#include "kernels/cuda/product_plan.h"
#include <math.h>

enum { OFFERED_MAX = 64, FINALISTS = 6 };
enum { SETTLE_MS = 200, LEAD_MS = 70, TURN_MS = 230, TURNS = 2 }; /* the clock follows the load within about 0.1 s */
static const double CLOSE = 1.06, HOPEFUL = 1.02;                 /* times the best: once, and at the limit */
static const double LONG = 1e10;                                  /* m n k; shorter products do not hold a GPU at its limit */

static cpl_status limit(const cpl_product *p, cublasLtMatmulPreference_t preference) {
    cpl_status st = CPL_OK;
    const char *doing = "look for algorithms";
    const size_t workspace = CPL_CUDA_PRODUCT_WORKSPACE;
    /* Parts of a sum are never rounded to 16 bits on the way. */
    const bool wide = p->wide || cpl_product_type(p->dt) == CUDA_R_32F;
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

typedef struct {
    cpl_device *dev;
    cpl_product_plan *plan;
    const cpl_product_data *data;
    const cublasLtMatmulAlgo_t *algo;
} attempt;

static cpl_status run_attempt(void *context) {
    attempt *a = context;
    return cpl_lt_status(cpl_product_enqueue(a->dev, a->plan, a->data, a->algo), __FILE__, __LINE__, "try an algorithm");
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
        if (offered[i].state == CUBLAS_STATUS_SUCCESS && cpl_product_enqueue(dev, plan, data, a.algo) == CUBLAS_STATUS_SUCCESS) {
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
        CPL_TRY(cpl_tuning_time(dev, run_attempt, &f.attempt, CPL_TUNING_ROUNDS, &f.ms));
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

/* Where d is c, timed on a d of its own. */
cpl_status cpl_product_choose(cpl_device *dev, cpl_product_plan *plan, const cpl_product_data *data) {
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
    if (p->accumulate && data->c == data->d) {
        const size_t bytes = (size_t)p->m * (size_t)p->n * (p->wide ? sizeof(float) : cpl_dtype_size((cpl_dtype)p->dt));
        CPL_CUDA_TRY("time a product", cudaMalloc(&own, bytes));
        CPL_CUDA_TRY("time a product", cudaMemsetAsync(own, 0, bytes, cpl_cuda_stream(dev)));
        there.c = there.d = own;
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

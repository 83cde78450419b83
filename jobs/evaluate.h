/* Validation loss and latency of a model.
 * Refuses to give a loss that depends on how many ranks took part. */
#ifndef CPL_JOBS_EVALUATE_H
#define CPL_JOBS_EVALUATE_H

#include "comm/comm.h"
#include "io/corpus.h"
#include "jobs/model/model.h"

/* Collective. Token-weighted mean cross-entropy (nat/token) of the model over all windows of the split, stride = context;
 * perplexity is its exp. Batch b holds windows [bB, bB+B) and belongs to rank b mod ranks; the sums of the batches are added in
 * order, so the result has the same bits for every number of ranks. weights: device [total] of ws's element type. ws: made for B
 * sequences. */
cpl_status cpl_evaluate(cpl_comm *comm, cpl_device *dev, cpl_workspace *ws, const void *weights, const cpl_split *val, int64_t B,
                        double *loss);

typedef struct {
    double p50_ms, p99_ms, tokens_per_s;
} cpl_latency;
/* Wall time of one forward pass and loss of one sequence of the split's context, `runs` times after 2 unmeasured ones. Not
 * collective. */
cpl_status cpl_measure_latency(cpl_device *dev, const cpl_layout *layout, cpl_dtype dt, const void *weights, const cpl_split *val,
                               int64_t runs, cpl_latency *out);

#endif

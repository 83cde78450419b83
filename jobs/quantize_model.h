/* Quantization of a whole model: its tensors shared out over the ranks, weights replaced by what the codes stand for, and what that
 * cost. Refuses weights that are not finite, and scales that their storage cannot hold. */
#ifndef CPL_JOBS_QUANTIZE_MODEL_H
#define CPL_JOBS_QUANTIZE_MODEL_H

#include "io/record.h"
#include "jobs/options.h"
#include "jobs/store.h"

/* Of one tensor; NAN and the 16-bit size where it is not quantized. */
typedef struct {
    double sqnr_db; /* 10 log10 (sum w^2 / sum (w - w^)^2); +inf for no error */
    double mse;
    double max_error;
    double noise_ratio; /* mse over the uniform-noise model scale^2/12 */
    double entropy;     /* of the codes, bits a weight: an achievable rate */
    double bound_db;    /* SQNR a Gaussian source allows at that rate: 6.02 dB a bit (D(R) = sigma^2 2^-2R, Cover & Thomas,
                           theorem 10.3.2) */
    double bytes; /* stored payload with sparsity: codes or bitmask + remaining codes, scales, zero points; or 16-bit weights */
} cpl_tensor_quality;
enum { CPL_QUALITY_COLUMNS = sizeof(cpl_tensor_quality) / sizeof(double) };

typedef struct {
    cpl_tensor_quality *tensor; /* owned [layout->count] */
    double sqnr_db;             /* over all quantized weights */
    int64_t bytes;              /* of the whole model */
    int64_t quantized;          /* weights */
    /* The packed payload of this rank's tensors, where it was asked for: host memory, owned. */
    uint8_t *codes, *zeros;
    float *scales;
    int64_t code_bytes, groups;
} cpl_quantize_report;
void cpl_quantize_report_free(cpl_quantize_report *r);

static inline bool cpl_quantize_includes(const cpl_quantize_options *o, const cpl_param *p) {
    return o->bits <= 8 && (p->prunable || (o->weights == CPL_INCLUDE_ALL && !p->one_d));
}
/* Collective. weights: host [total], the same on all ranks; becomes w^ on all ranks. removed [layout->count]: weights pruned of
 * each tensor, or NULL. payload: keep this rank's packed codes (tensors are shared out in contiguous runs of the layout, so the
 * ranks' payloads follow one another). Errors: CPL_NUMERIC naming the tensor. */
cpl_status cpl_quantize_weights(cpl_comm *comm, cpl_device *dev, const cpl_layout *layout, const cpl_quantize_options *options,
                                float *weights, const int64_t *removed, bool payload, cpl_quantize_report *report);
/* Weights that a mask [total] removes of each tensor: removed [layout->count]. mask NULL: none. */
void cpl_mask_count(const cpl_layout *layout, const uint8_t *mask, int64_t *removed);

/* Figures by tensor and over all into a stage record. */
cpl_status cpl_quantize_record(cpl_record *rec, const cpl_layout *layout, const cpl_quantize_report *r);

#endif

/* Quantization of a whole model.
 * Refuses weights that are not finite, and scales that their storage cannot hold. */
#include "jobs/quantize_model.h"
#include "jobs/size.h"
#include "kernels/pack.h"
#include <math.h>
#include <string.h>

void cpl_quantize_report_free(cpl_quantize_report *r) {
    cpl_free(&r->tensor);
    cpl_free(&r->codes);
    cpl_free(&r->zeros);
    cpl_free(&r->scales);
}

void cpl_mask_count(const cpl_layout *layout, const uint8_t *mask, int64_t *removed) {
    for (int64_t i = 0; i < layout->count; i++) {
        removed[i] = 0;
        for (int64_t j = 0; mask != NULL && j < cpl_param_count(&layout->param[i]); j++) {
            removed[i] += mask[layout->param[i].offset + j] == 0;
        }
    }
}

typedef struct {
    cpl_device *dev;               /* borrowed */
    const cpl_layout *layout;      /* borrowed */
    const cpl_quantize_options *o; /* borrowed */
    const int64_t *removed;        /* borrowed */
    cpl_quantize_report *report;   /* borrowed */
    bool payload;
    double sum_sq, sum_sq_error;
    /* owned, device; sized for the largest tensor of this rank */
    float *w, *scales;
    uint8_t *codes, *zeros;
    cpl_quant_error *error;
    int64_t *refused;
    uint8_t *host_codes; /* owned, host */
} quantizer;

/* Tensors [first[r], first[r+1]) are rank r's: contiguous runs of about equal numbers of elements. */
static void share_out(const cpl_layout *l, int ranks, int64_t *first) {
    int64_t i = 0;
    for (int r = 0; r <= ranks; r++) {
        int64_t goal = (int64_t)((__int128)l->total * r / ranks);
        while (i < l->count && l->begin[i] < goal) {
            i++;
        }
        first[r] = r == ranks ? l->count : i;
    }
}

static cpl_status allocate(quantizer *q, int64_t first, int64_t last) {
    cpl_status st = CPL_OK;
    int64_t most = 0, most_groups = 0, code_bytes = 0, groups_all = 0;
    for (int64_t i = first; i < last; i++) {
        const cpl_param *p = &q->layout->param[i];
        cpl_quant_spec spec;
        int64_t groups = 0;
        if (!cpl_quantize_includes(q->o, p)) {
            continue;
        }
        CPL_TRY(cpl_quantize_spec(q->o, p->rows, p->cols, &spec));
        CPL_TRY(cpl_quant_groups(&spec, p->rows, p->cols, &groups));
        most = cpl_param_count(p) > most ? cpl_param_count(p) : most;
        most_groups = groups > most_groups ? groups : most_groups;
        code_bytes += cpl_pack_row_bytes(spec.bits, p->cols) * p->rows;
        groups_all += groups;
    }
    CPL_TRY(cpl_device_alloc(q->dev, &q->w, (size_t)most, sizeof(float), "weights to quantize"));
    CPL_TRY(cpl_device_alloc(q->dev, &q->codes, (size_t)most, 1, "codes"));
    CPL_TRY(cpl_device_alloc(q->dev, &q->scales, (size_t)most_groups, sizeof(float), "scales"));
    CPL_TRY(cpl_device_alloc(q->dev, &q->zeros, (size_t)most_groups, 1, "zero points"));
    CPL_TRY(cpl_device_alloc(q->dev, &q->error, 1, sizeof(cpl_quant_error), "quantization error"));
    CPL_TRY(cpl_device_alloc(q->dev, &q->refused, 1, sizeof(int64_t), "quantization error"));
    if (q->payload) {
        CPL_TRY(cpl_alloc(&q->host_codes, (size_t)most, 1, "codes"));
        CPL_TRY(cpl_alloc(&q->report->codes, (size_t)code_bytes, 1, "packed codes"));
        CPL_TRY(cpl_alloc(&q->report->scales, (size_t)groups_all, sizeof(float), "scales"));
        CPL_TRY(cpl_alloc(&q->report->zeros, (size_t)groups_all, 1, "zero points"));
    }
done:
    return st;
}

static void quantizer_free(quantizer *q) {
    cpl_device_free(q->dev, &q->w);
    cpl_device_free(q->dev, &q->codes);
    cpl_device_free(q->dev, &q->scales);
    cpl_device_free(q->dev, &q->zeros);
    cpl_device_free(q->dev, &q->error);
    cpl_device_free(q->dev, &q->refused);
    cpl_free(&q->host_codes);
}

static void judge(quantizer *q, int64_t i, const cpl_quant_spec *spec, const cpl_quant_error *e) {
    const cpl_param *p = &q->layout->param[i];
    double n = (double)cpl_param_count(p);
    cpl_tensor_quality *t = &q->report->tensor[i];
    t->mse = e->sum_sq_error / n;
    t->sqnr_db = e->sum_sq_error > 0 ? 10 * log10(e->sum_sq / e->sum_sq_error) : INFINITY;
    t->max_error = e->max_error;
    t->noise_ratio = e->sum_noise > 0 ? e->sum_sq_error / e->sum_noise : NAN;
    t->entropy = cpl_quant_entropy(e->code_count);
    t->bound_db = 20 * log10(2) * t->entropy;
    t->bytes = (double)cpl_quantized_bytes(spec, p, q->removed == NULL ? 0 : q->removed[i]);
    q->sum_sq += e->sum_sq;
    q->sum_sq_error += e->sum_sq_error;
    q->report->quantized += cpl_param_count(p);
}

static cpl_status keep_payload(quantizer *q, const cpl_param *p, const cpl_quant_spec *spec) {
    cpl_status st = CPL_OK;
    cpl_quantize_report *r = q->report;
    int64_t groups = 0;
    CPL_TRY(cpl_quant_groups(spec, p->rows, p->cols, &groups));
    CPL_TRY(CPL_OPS(q->dev, download, q->host_codes, q->codes, (size_t)cpl_param_count(p)));
    cpl_pack_codes(spec->bits, r->codes + r->code_bytes, q->host_codes, p->rows, p->cols);
    CPL_TRY(CPL_OPS(q->dev, download, r->scales + r->groups, q->scales, (size_t)groups * sizeof(float)));
    if (spec->scheme == CPL_QUANT_ASYMMETRIC) {
        CPL_TRY(CPL_OPS(q->dev, download, r->zeros + r->groups, q->zeros, (size_t)groups));
    }
    r->code_bytes += cpl_pack_row_bytes(spec->bits, p->cols) * p->rows;
    r->groups += groups;
done:
    return st;
}

static cpl_status quantize_tensor(quantizer *q, int64_t i, float *weights) {
    cpl_status st = CPL_OK;
    const cpl_param *p = &q->layout->param[i];
    cpl_quant_spec spec;
    cpl_quant_error error = {0};
    int64_t refused = 0;
    size_t bytes = (size_t)cpl_param_count(p) * sizeof(float);
    CPL_TRY(cpl_quantize_spec(q->o, p->rows, p->cols, &spec));
    CPL_TRY(CPL_OPS(q->dev, upload, q->w, weights + p->offset, bytes));
    CPL_TRY(CPL_OPS(q->dev, zero, q->error, sizeof error));
    CPL_TRY(CPL_OPS(q->dev, zero, q->refused, sizeof refused));
    CPL_TRY(CPL_OPS(q->dev, quantize, &spec, q->w, p->rows, p->cols, q->codes, q->scales, q->zeros, q->w, q->error, q->refused));
    CPL_TRY(CPL_OPS(q->dev, download, &refused, q->refused, sizeof refused));
    if (refused > 0) {
        CPL_FAIL(CPL_NUMERIC, "quantize: %s holds %lld weights that are not finite, or groups whose scale %s cannot hold", p->name,
                 (long long)refused, spec.scale_dtype == CPL_F16 ? "fp16 (scale_type: fp32 might)" : "fp32");
    }
    CPL_TRY(CPL_OPS(q->dev, download, &error, q->error, sizeof error));
    CPL_TRY(CPL_OPS(q->dev, download, weights + p->offset, q->w, bytes));
    judge(q, i, &spec, &error);
    if (q->payload) {
        CPL_TRY(keep_payload(q, p, &spec));
    }
done:
    return st;
}

static void keep_dense(quantizer *q, int64_t i) {
    double bytes = (double)cpl_tensor_bytes(&q->layout->param[i], q->removed == NULL ? 0 : q->removed[i]);
    q->report->tensor[i] = (cpl_tensor_quality){NAN, NAN, NAN, NAN, NAN, NAN, bytes};
}

/* All ranks get all tensors' figures and weights. */
static cpl_status exchange(quantizer *q, cpl_comm *comm, const int64_t *first, float *weights) {
    cpl_status st = CPL_OK;
    int ranks = cpl_comm_size(comm);
    float *all = NULL;
    int64_t *begin = NULL;
    double totals[3] = {q->sum_sq, q->sum_sq_error, (double)q->report->quantized};
    cpl_quantize_report *r = q->report;
    size_t bytes = (size_t)q->layout->total * sizeof(float);
    cpl_status local = cpl_alloc(&begin, (size_t)ranks + 1, sizeof *begin, "tensor table");
    local = local == CPL_OK ? cpl_device_alloc(q->dev, &all, (size_t)q->layout->total, sizeof(float), "quantized weights") : local;
    local = local == CPL_OK ? CPL_OPS(q->dev, upload, all, weights, bytes) : local;
    CPL_TRY(cpl_agree(comm, local));
    for (int i = 0; i <= ranks; i++) {
        begin[i] = q->layout->begin[first[i]];
    }
    CPL_TRY(cpl_comm_allgather(comm, q->dev, all, sizeof(float), begin));
    CPL_TRY(cpl_agree(comm, CPL_OPS(q->dev, download, weights, all, bytes)));
    CPL_TRY(cpl_comm_allreduce_f64(comm, (double *)r->tensor, (size_t)q->layout->count * CPL_QUALITY_COLUMNS, CPL_SUM));
    CPL_TRY(cpl_comm_allreduce_f64(comm, totals, 3, CPL_SUM));
    r->sqnr_db = totals[2] == 0 ? NAN : totals[1] > 0 ? 10 * log10(totals[0] / totals[1]) : INFINITY;
    r->quantized = (int64_t)totals[2];
    for (int64_t i = 0; i < q->layout->count; i++) {
        r->bytes += (int64_t)r->tensor[i].bytes;
    }
done:
    cpl_device_free(q->dev, &all);
    cpl_free(&begin);
    return st;
}

cpl_status cpl_quantize_weights(cpl_comm *comm, cpl_device *dev, const cpl_layout *layout, const cpl_quantize_options *options,
                                float *weights, const int64_t *removed, bool payload, cpl_quantize_report *report) {
    cpl_status st = CPL_OK;
    int64_t *first = NULL;
    int ranks = cpl_comm_size(comm), rank = cpl_comm_rank(comm);
    *report = (cpl_quantize_report){0};
    quantizer q = {.dev = dev, .layout = layout, .o = options, .removed = removed, .report = report, .payload = payload};
    cpl_status local = cpl_alloc(&report->tensor, (size_t)layout->count, sizeof *report->tensor, "report");
    local = local == CPL_OK ? cpl_alloc(&first, (size_t)ranks + 1, sizeof *first, "tensor table") : local;
    if (local == CPL_OK) {
        share_out(layout, ranks, first);
        local = allocate(&q, first[rank], first[rank + 1]);
    }
    for (int64_t i = local == CPL_OK ? first[rank] : 0; local == CPL_OK && i < first[rank + 1]; i++) {
        if (cpl_quantize_includes(options, &layout->param[i])) {
            local = quantize_tensor(&q, i, weights);
        } else {
            keep_dense(&q, i);
        }
    }
    CPL_TRY(cpl_agree(comm, local));
    CPL_TRY(exchange(&q, comm, first, weights));
done:
    quantizer_free(&q);
    cpl_free(&first);
    if (st != CPL_OK) {
        cpl_quantize_report_free(report);
    }
    return st;
}

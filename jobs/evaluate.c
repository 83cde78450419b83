/* Validation loss and latency.
 * Refuses to give a loss that depends on how many ranks took part. */
#include "jobs/evaluate.h"
#include "io/base/log.h"
#include <math.h>
#include <stdlib.h>

typedef struct {
    int32_t *host_tokens, *host_targets; /* owned, host [B*T] */
    int32_t *tokens, *targets;           /* owned, device [B*T] */
    float *losses;                       /* owned, device [B*T] */
    double *sum;                         /* owned, device [1] */
} eval_buffers;

static cpl_status buffers_create(eval_buffers *b, cpl_device *dev, int64_t rows) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_alloc(&b->host_tokens, (size_t)rows, sizeof(int32_t), "evaluation batch"));
    CPL_TRY(cpl_alloc(&b->host_targets, (size_t)rows, sizeof(int32_t), "evaluation batch"));
    CPL_TRY(cpl_device_alloc(dev, &b->tokens, (size_t)rows, sizeof(int32_t), "evaluation batch"));
    CPL_TRY(cpl_device_alloc(dev, &b->targets, (size_t)rows, sizeof(int32_t), "evaluation batch"));
    CPL_TRY(cpl_device_alloc(dev, &b->losses, (size_t)rows, sizeof(float), "evaluation losses"));
    CPL_TRY(cpl_device_alloc(dev, &b->sum, 1, sizeof(double), "evaluation losses"));
done:
    return st;
}

static void buffers_destroy(eval_buffers *b, cpl_device *dev) {
    cpl_free(&b->host_tokens);
    cpl_free(&b->host_targets);
    cpl_device_free(dev, &b->tokens);
    cpl_device_free(dev, &b->targets);
    cpl_device_free(dev, &b->losses);
    cpl_device_free(dev, &b->sum);
}

/* Sum of the losses of windows [first, first+B), those beyond the end ignored. */
static cpl_status batch_loss(cpl_device *dev, cpl_workspace *ws, const void *weights, const cpl_split *val, int64_t first,
                             int64_t B, eval_buffers *b, double *sum) {
    cpl_status st = CPL_OK;
    int64_t T = val->T, rows = B * T;
    for (int64_t s = 0; s < B; s++) {
        bool there = first + s < val->windows;
        CPL_TRY(cpl_split_window(val, there ? first + s : first, b->host_tokens + s * T, b->host_targets + s * T));
        for (int64_t t = 0; t < T && !there; t++) {
            b->host_targets[s * T + t] = -100;
        }
    }
    CPL_TRY(CPL_OPS(dev, upload, b->tokens, b->host_tokens, (size_t)rows * sizeof(int32_t)));
    CPL_TRY(CPL_OPS(dev, upload, b->targets, b->host_targets, (size_t)rows * sizeof(int32_t)));
    CPL_TRY(cpl_model_forward(ws, weights, b->tokens));
    CPL_TRY(cpl_model_losses(ws, weights, b->targets, b->losses));
    CPL_TRY(CPL_OPS(dev, zero, b->sum, sizeof(double)));
    CPL_TRY(CPL_OPS(dev, sum_f32, b->sum, b->losses, rows));
    CPL_TRY(CPL_OPS(dev, download, sum, b->sum, sizeof(double)));
done:
    return st;
}

cpl_status cpl_evaluate(cpl_comm *comm, cpl_device *dev, cpl_workspace *ws, const void *weights, const cpl_split *val, int64_t B,
                        double *loss) {
    cpl_status st = CPL_OK;
    eval_buffers b = {0};
    double *sums = NULL;
    int64_t batches = (val->windows + B - 1) / B;
    cpl_status local = cpl_alloc(&sums, (size_t)batches, sizeof *sums, "evaluation losses");
    if (local == CPL_OK) {
        local = buffers_create(&b, dev, B * val->T);
    }
    for (int64_t i = cpl_comm_rank(comm); i < batches && local == CPL_OK; i += cpl_comm_size(comm)) {
        local = batch_loss(dev, ws, weights, val, i * B, B, &b, &sums[i]);
        cpl_comm_progress(comm);
        cpl_watchdog_beat("evaluation");
    }
    CPL_TRY(cpl_agree(comm, local));
    CPL_TRY(cpl_comm_allreduce_f64(comm, sums, (size_t)batches, CPL_SUM));
    double total = 0;
    for (int64_t i = 0; i < batches; i++) {
        total += sums[i];
    }
    *loss = total / ((double)val->windows * (double)val->T);
done:
    buffers_destroy(&b, dev);
    cpl_free(&sums);
    return st;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

cpl_status cpl_measure_latency(cpl_device *dev, const cpl_layout *layout, cpl_dtype dt, const void *weights, const cpl_split *val,
                               int64_t runs, cpl_latency *out) {
    cpl_status st = CPL_OK;
    cpl_workspace *ws = NULL;
    eval_buffers b = {0};
    double *ms = NULL, sum;
    *out = (cpl_latency){NAN, NAN, NAN};
    if (runs == 0) {
        return CPL_OK;
    }
    CPL_TRY(cpl_alloc(&ms, (size_t)runs, sizeof *ms, "latencies"));
    CPL_TRY(buffers_create(&b, dev, val->T));
    CPL_TRY(cpl_workspace_create(&ws, dev, layout, dt, 1, false, CPL_RECOMPUTE_NONE, 0));
    for (int64_t i = -2; i < runs; i++) {
        double start = cpl_now();
        cpl_watchdog_beat("latency");
        CPL_TRY(batch_loss(dev, ws, weights, val, 0, 1, &b, &sum));
        if (i >= 0) {
            ms[i] = (cpl_now() - start) * 1e3;
        }
    }
    qsort(ms, (size_t)runs, sizeof *ms, by_value);
    out->p50_ms = runs % 2 ? ms[runs / 2] : 0.5 * (ms[runs / 2 - 1] + ms[runs / 2]);
    out->p99_ms = ms[(runs * 99 + 99) / 100 - 1]; /* nearest rank */
    out->tokens_per_s = (double)val->T / (out->p50_ms * 1e-3);
done:
    cpl_workspace_destroy(&ws);
    buffers_destroy(&b, dev);
    cpl_free(&ms);
    return st;
}

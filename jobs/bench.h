/* The pieces of cupel bench: a clock, the machine's limits, operations, a training step.
 * Refuses to compare with limits that were not measured in the same run. */
#ifndef CPL_JOBS_BENCH_H
#define CPL_JOBS_BENCH_H

#include "comm/comm.h"
#include "io/base/log.h"
#include "jobs/model/model.h"
#include "jobs/options.h"
#include "jobs/table.h"

#define CPL_BENCH_FIELDS(X)                                                                                                        \
    X(INT, layers, "6", 1, 1000, "blocks", "of the model")                                                                         \
    X(INT, heads, "6", 1, 1024, "heads", "attention heads; must divide width")                                                     \
    X(INT, width, "192", 1, 65536, "channels", "size of the hidden state")                                                         \
    X(INT, context, "256", 1, 1 << 20, "tokens", "length of a sequence")                                                           \
    X(INT, micro_batch, "8", 1, 1 << 20, "sequences", "of one forward and backward pass of a rank")                                \
    X(INT, vocab, "256", 2, 1 << 24, "tokens", "vocabulary")                                                                       \
    X(CHOICE, precision, "fp32", 0, 0, "fp32|bf16|fp16|tf32", "storage of weights and activations; tf32: as of train")             \
    X(INT, steps, "20", 1, 100000, "steps", "train: timed, after warm-up")                                                         \
    X(INT, warm_up, "4", 2, 100000, "steps", "train: before; at its power limit a GPU takes seconds to settle")                    \
    X(INT, accumulate, "1", 1, 65536, "micro-batches", "train: of a rank in one step")                                             \
    X(BOOL, profile, "no", 0, 0, "", "train: the step by operation as well")                                                       \
    X(BOOL, fusion, "no", 0, 0, "", "what fused operations save against separate ones; alone: nothing else")                       \
    X(REAL, millions, "124", 0.001, 100000, "million weights", "compress: fp32")                                                   \
    X(INT, tensors, "48", 1, 100000, "tensors", "compress: that the weights lie in")                                               \
    X(DECIMAL, sparsity, "0.5", 0, 1, "", "compress: fraction of the weights that is removed")                                     \
    X(INT, loss_rows, "8192", 1, 1 << 24, "tokens", "compress: of the distillation loss")                                          \
    X(INT, loss_vocab, "50304", 2, 1 << 24, "tokens", "compress: vocabulary of the distillation loss")                             \
    X(INT, largest, "512Mi", 4096, 1e12, "bytes", "comm: largest buffer")                                                          \
    X(CHOICE, device, "auto", 0, 0, "auto|cpu|cuda", "what to measure")                                                            \
    X(INT, threads, "0", 0, 4096, "threads", "CPU threads of a rank; 0: as many as it may run on")                                 \
    X(INT, ranks_per_gpu, "0", 0, 1024, "ranks", "that may share a GPU, by turns; 0: CUPEL_RANKS_PER_GPU, else 1")                 \
    X(REAL, seconds, "0.3", 0, 3600, "s", "spent on each measurement but train's; at least 5 repetitions are made")                \
    X(BOOL, json, "no", 0, 0, "", "one JSON object a line instead of the table")
typedef struct {
    CPL_BENCH_FIELDS(CPL_FIELD_MEMBER)
} cpl_bench_options;

/* One line of the result. Rates are this rank's: a median time, and what was done in it. 0 in what a line does not measure. */
typedef struct {
    char name[48], shape[56];
    double seconds, best, worst; /* median, least and greatest of the repetitions */
    int64_t repetitions;
    double flops, bytes; /* of one repetition: what is compared with a limit */
    double tokens;       /* of one repetition */
    double all;          /* flops or bytes per second, summed over the ranks */
    double bus;          /* bytes of one repetition over a rank's link, as NCCL's tests count them */
    double whole;        /* s: what this is a part of */
    double apart;        /* s: median of the separate operations */
    double unmoved;      /* bytes that the separate operations move besides */
    double held;         /* bytes of device memory */
    bool limit;          /* it is a limit itself */
} cpl_bench_row;

typedef struct {
    cpl_comm *world;    /* borrowed */
    cpl_device *dev;    /* borrowed */
    cpl_layout *layout; /* borrowed */
    const cpl_bench_options *o;
    cpl_dtype dt, product; /* storage; what linear layers multiply in */
    int64_t n_rows, room;
    cpl_bench_row *row;          /* owned */
    double products[CPL_DTYPES]; /* flop/s of the largest matrix products of each cpl_dtype; 0: not measured */
    double copy;                 /* byte/s, read and written */
    cpl_progress progress;       /* in rows */
} cpl_bench;

typedef cpl_status (*cpl_bench_call)(void *context);
/* Collective: all ranks start together and each repeats the call for its own o->seconds. Fills the times and repetitions of *row.
 */
cpl_status cpl_bench_time(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row);
/* Collective, for calls that are collective: all ranks repeat it equally often; the times are those of the slowest. */
cpl_status cpl_bench_time_together(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row);
/* n samples, sorted here, into the times of *row. */
void cpl_bench_summarize(double *samples, int64_t n, cpl_bench_row *row);
/* Collective: times the call and adds the row, rates summed over the ranks. */
cpl_status cpl_bench_add(cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row row);
/* Collective: the same for a row that is timed already. */
cpl_status cpl_bench_keep(cpl_bench *b, cpl_bench_row row);
/* Per second; 0: the row has no rate. */
static inline double cpl_bench_rate(const cpl_bench_row *r) {
    return r->seconds > 0 ? (r->flops > 0 ? r->flops : r->bytes) / r->seconds : 0;
}

/* Collective. The largest rate of matrix products of fp32 and of the precision asked, and of copying a buffer much larger than the
 * caches; called before and after everything else, of which the larger counts. */
cpl_status cpl_bench_limits(cpl_bench *b);
/* Rows that each of the following adds. */
enum { CPL_BENCH_LAYER_ROWS = 24, CPL_BENCH_FLAT_ROWS = 14, CPL_BENCH_COMPRESS_ROWS = 9, CPL_BENCH_FUSION_ROWS = 9 };
int64_t cpl_bench_training_rows(const cpl_bench *b); /* at least */
int64_t cpl_bench_comm_rows(const cpl_bench *b);
cpl_status cpl_bench_layers(cpl_bench *b);   /* collective: the layers' operations */
cpl_status cpl_bench_flat(cpl_bench *b);     /* collective: operations over flat buffers */
cpl_status cpl_bench_training(cpl_bench *b); /* collective: a forward pass, and the trainer's own steps */
cpl_status cpl_bench_compress(cpl_bench *b); /* collective, each rank for itself: selection, quantization, distillation loss */
cpl_status cpl_bench_comm(cpl_bench *b);     /* collective: the data plane, and decisions of all ranks */
cpl_status cpl_bench_fusion(cpl_bench *b);   /* collective: fused operations beside separate ones */

/* Device memory of n elements, normals times `scale` in dt, or f32 with dt CPL_F32. */
cpl_status cpl_bench_normals(const cpl_bench *b, cpl_dtype dt, int64_t n, float scale, uint32_t stream, void *out);

/* Rank 0 prints all rows as a table, or as a JSON object a line. */
cpl_status cpl_bench_print_table(const cpl_bench *b);
void cpl_bench_print_json(const cpl_bench *b);

#endif

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
    X(CHOICE, device, "auto", 0, 0, "auto|cpu|cuda", "what to measure")                                                            \
    X(INT, threads, "0", 0, 4096, "threads", "CPU threads of a rank; 0: as many as it may run on")                                 \
    X(INT, ranks_per_gpu, "0", 0, 1024, "ranks", "that may share a GPU, by turns; 0: CUPEL_RANKS_PER_GPU, else 1")                 \
    X(REAL, seconds, "0.3", 0, 3600, "s", "spent on each measurement; at least 5 repetitions are made")                            \
    X(BOOL, json, "no", 0, 0, "", "one JSON object a line instead of the table")
typedef struct {
    CPL_BENCH_FIELDS(CPL_FIELD_MEMBER)
} cpl_bench_options;

/* One line of the result. Rates are this rank's: a median time, and what was done in it. */
typedef struct {
    char name[48], shape[56];
    double seconds, best; /* median and least of the repetitions */
    int64_t repetitions;
    double flops, bytes; /* of one repetition; 0: that is not its measure */
    double tokens;       /* of one repetition; 0: it has none */
    double all;          /* flops or bytes per second, summed over the ranks */
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
/* Collective: all ranks start together and each repeats the call for its own o->seconds. Fills seconds, best, repetitions of *row.
 */
cpl_status cpl_bench_time(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row);
/* Collective: times the call and adds the row, rates summed over the ranks. */
cpl_status cpl_bench_add(cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row row);
/* Collective: the same for a row that is timed already. */
cpl_status cpl_bench_keep(cpl_bench *b, cpl_bench_row row);
static inline double cpl_bench_rate(const cpl_bench_row *r) {
    return (r->flops > 0 ? r->flops : r->bytes) / r->seconds;
}

/* Collective. The largest rate of matrix products of fp32 and of the precision asked, and of copying a buffer much larger than the
 * caches; called before and after everything else, of which the larger counts. */
cpl_status cpl_bench_limits(cpl_bench *b);
/* Rows that each of the following adds. */
enum { CPL_BENCH_LAYER_ROWS = 24, CPL_BENCH_FLAT_ROWS = 14, CPL_BENCH_TRAINING_ROWS = 3 };
cpl_status cpl_bench_layers(cpl_bench *b);   /* collective: the layers' operations */
cpl_status cpl_bench_flat(cpl_bench *b);     /* collective: operations over flat buffers */
cpl_status cpl_bench_training(cpl_bench *b); /* collective: a forward pass, and a training step with its reduction */

/* Device memory of n elements, normals times `scale` in dt, or f32 with dt CPL_F32. */
cpl_status cpl_bench_normals(const cpl_bench *b, cpl_dtype dt, int64_t n, float scale, uint32_t stream, void *out);

#endif

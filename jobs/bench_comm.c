/* The data plane over the ranks at several sizes, and the decisions that all ranks make together.
 * Refuses the clock of one rank alone: a time is that of the slowest. */
#include "jobs/bench.h"
#include "io/base/log.h"
#include <stdio.h>

static const int64_t sizes[] = {4 << 10,   32 << 10,  256 << 10,        2 << 20,         16 << 20,
                                128 << 20, 512 << 20, INT64_C(2) << 30, INT64_C(8) << 30};
enum { SIZES = sizeof sizes / sizeof sizes[0], DECISIONS = 3 };

typedef struct {
    cpl_comm *world; /* borrowed */
    cpl_device *dev; /* borrowed */
    float *x;        /* owned, device: zeros, whose sums stay so */
    uint32_t *flag;  /* owned, device */
    int64_t *begin;  /* owned [ranks+1] */
} exchange;

static cpl_status run_reduce_scatter(void *context) {
    const exchange *e = context;
    return cpl_comm_reduce_scatter(e->world, e->dev, e->x, e->begin);
}
static cpl_status run_allgather(void *context) {
    const exchange *e = context;
    return cpl_comm_allgather(e->world, e->dev, e->x, sizeof(float), e->begin);
}
static cpl_status run_or_flag(void *context) {
    const exchange *e = context;
    return cpl_comm_or_flag(e->world, e->dev, e->flag);
}
static cpl_status run_agree_word(void *context) {
    uint32_t word = 0;
    return cpl_comm_agree_word(((const exchange *)context)->world, &word);
}
static cpl_status run_barrier(void *context) {
    return cpl_comm_barrier(((const exchange *)context)->world);
}

/* How many of the sizes are at most `largest`. */
static int sizes_to(int64_t largest) {
    int n = 0;
    while (n < SIZES && sizes[n] <= largest) {
        n++;
    }
    return n;
}

int64_t cpl_bench_comm_rows(const cpl_bench *b) {
    return 3 * sizes_to(b->o->largest) + DECISIONS;
}

/* The largest buffer up to `count` sizes that all ranks have memory for; *count becomes what fits. */
static cpl_status allocate(cpl_bench *b, exchange *e, int *count) {
    cpl_status st = CPL_OK;
    cpl_status local = cpl_alloc(&e->begin, (size_t)cpl_comm_size(e->world) + 1, sizeof *e->begin, "bench");
    local = local == CPL_OK ? cpl_device_alloc(e->dev, &e->flag, 1, sizeof *e->flag, "bench") : local;
    CPL_TRY(cpl_agree(e->world, local));
    for (; *count > 0; (*count)--) {
        local = cpl_device_alloc(e->dev, &e->x, (size_t)sizes[*count - 1], 1, "bench");
        int64_t fits = local == CPL_OK;
        CPL_TRY(cpl_agree(e->world, local == CPL_NO_MEMORY ? CPL_OK : local));
        CPL_TRY(cpl_comm_allreduce_i64(e->world, &fits, 1, CPL_MIN));
        if (fits) {
            break;
        }
        cpl_log_info("bench: no memory for buffers of %lld MiB", (long long)(sizes[*count - 1] >> 20));
        cpl_device_free(e->dev, &e->x);
    }
done:
    return st;
}

/* Equal parts; or, as the shards of a model, but for `more` elements that the first one has and the second lacks. */
static void parts(exchange *e, int64_t elements, int64_t more) {
    int ranks = cpl_comm_size(e->world);
    for (int r = 0; r <= ranks; r++) {
        e->begin[r] = r == ranks ? elements : elements / ranks * r + (r == 1 ? more : 0);
    }
}

static cpl_status add(cpl_bench *b, exchange *e, const char *name, cpl_bench_call call, int64_t bytes) {
    cpl_status st = CPL_OK;
    double ranks = cpl_comm_size(e->world);
    cpl_bench_row row = {.bus = (double)bytes * (ranks - 1) / ranks};
    snprintf(row.name, sizeof row.name, "%s", name);
    if (bytes >= 1 << 20) {
        snprintf(row.shape, sizeof row.shape, "%lld MiB", (long long)(bytes >> 20));
    } else if (bytes > 0) {
        snprintf(row.shape, sizeof row.shape, "%lld KiB", (long long)(bytes >> 10));
    }
    CPL_TRY(cpl_bench_time_together(b, call, e, &row));
    CPL_TRY(cpl_bench_keep(b, row));
done:
    return st;
}

cpl_status cpl_bench_comm(cpl_bench *b) {
    cpl_status st = CPL_OK;
    exchange e = {.world = b->world, .dev = b->dev};
    int count = sizes_to(b->o->largest);
    CPL_TRY(allocate(b, &e, &count));
    for (int i = 0; i < count; i++) {
        int64_t elements = sizes[i] / (int64_t)sizeof(float);
        parts(&e, elements, 0);
        CPL_TRY(add(b, &e, "reduce-scatter fp32", run_reduce_scatter, sizes[i]));
        CPL_TRY(add(b, &e, "all-gather", run_allgather, sizes[i]));
        parts(&e, elements, 64);
        CPL_TRY(add(b, &e, "all-gather of unequal parts", run_allgather, sizes[i]));
    }
    CPL_TRY(add(b, &e, "overflow flag, or over the ranks", run_or_flag, 0));
    CPL_TRY(add(b, &e, "word of a step, or over the ranks", run_agree_word, 0));
    CPL_TRY(add(b, &e, "barrier", run_barrier, 0));
done:
    cpl_device_free(b->dev, &e.x);
    cpl_device_free(b->dev, &e.flag);
    cpl_free(&e.begin);
    return st;
}

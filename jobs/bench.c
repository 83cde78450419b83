/* The command bench: what this machine can do, and how much of it the operations get.
 * Refuses to compare with limits that were not measured in the same run. */
#include "jobs/bench.h"
#include "cupel_version.h"
#include "io/base/json.h"
#include "io/base/log.h"
#include "jobs/command_options.h"
#include "jobs/device.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CPL_FIELD_OWNER cpl_bench_options
static const cpl_field fields[] = {CPL_BENCH_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
static const cpl_options_table table = {fields, sizeof fields / sizeof fields[0]};

enum { SAMPLES_LEAST = 5, SAMPLES_MOST = 4096 };
static const double sample_least =
    20e-6; /* s: shorter calls are repeated within a sample, so that reading the clock does not show */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One sample of `calls` calls, seconds of one; by the device's clock where it has one. */
static cpl_status sample(const cpl_bench *b, cpl_bench_call call, void *context, int64_t calls, double *seconds) {
    cpl_status st = CPL_OK;
    double start = cpl_now(), ms = 0;
    CPL_TRY(cpl_device_mark(b->dev, 0));
    for (int64_t i = 0; i < calls; i++) {
        CPL_TRY(call(context));
    }
    CPL_TRY(cpl_device_mark(b->dev, 1));
    CPL_TRY(b->dev->ops->synchronize(b->dev));
    CPL_TRY(cpl_device_mark_ms(b->dev, 0, 1, &ms));
    *seconds = (ms > 0 ? ms * 1e-3 : cpl_now() - start) / (double)calls;
done:
    return st;
}

static cpl_status time_call(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    double samples[SAMPLES_MOST], once = 0, begin = 0;
    int64_t n = 0, calls = 1;
    CPL_TRY(sample(b, call, context, 1, &once));
    CPL_TRY(sample(b, call, context, 1, &once));
    calls = once < sample_least ? (int64_t)(sample_least / (once > 1e-9 ? once : 1e-9)) + 1 : 1;
    begin = cpl_now();
    while (n < SAMPLES_LEAST || (n < SAMPLES_MOST && cpl_now() - begin < b->o->seconds)) {
        CPL_TRY(sample(b, call, context, calls, &samples[n]));
        n++;
    }
    qsort(samples, (size_t)n, sizeof samples[0], by_value);
    row->seconds = n % 2 ? samples[n / 2] : 0.5 * (samples[n / 2 - 1] + samples[n / 2]);
    row->best = samples[0];
    row->repetitions = n * calls;
done:
    return st;
}

cpl_status cpl_bench_time(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_comm_barrier(b->world));
    CPL_TRY(cpl_agree(b->world, time_call(b, call, context, row)));
done:
    return st;
}

cpl_status cpl_bench_keep(cpl_bench *b, cpl_bench_row row) {
    cpl_status st = CPL_OK;
    cpl_bench_row *more = NULL;
    row.all = cpl_bench_rate(&row);
    CPL_TRY(cpl_comm_allreduce_f64(b->world, &row.all, 1, CPL_SUM));
    if (b->n_rows == b->room) {
        int64_t room = b->room == 0 ? 64 : 2 * b->room;
        CPL_TRY(cpl_alloc(&more, (size_t)room, sizeof *more, "bench"));
        if (b->n_rows > 0) {
            memcpy(more, b->row, (size_t)b->n_rows * sizeof *more);
        }
        cpl_free(&b->row);
        b->row = more;
        b->room = room;
    }
    b->row[b->n_rows++] = row;
    cpl_progress_step(&b->progress, b->n_rows, row.name);
done:
    return st;
}

cpl_status cpl_bench_add(cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row row) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_bench_time(b, call, context, &row));
    CPL_TRY(cpl_bench_keep(b, row));
done:
    return st;
}

/* --- printing: rank 0 --- */

static double share_of_limit(const cpl_bench *b, const cpl_bench_row *r) {
    return r->limit ? (double)NAN : 100 * cpl_bench_rate(r) / (r->flops > 0 ? b->products[b->product] : b->copy);
}

static cpl_status print_row(const cpl_bench *b, cpl_table *t, const cpl_bench_row *r) {
    cpl_status st = CPL_OK;
    double rate = cpl_bench_rate(r) * 1e-9, nan = (double)NAN;
    CPL_TRY(cpl_table_row(t, r->limit));
    CPL_TRY(cpl_table_cell(t, "%s", r->name));
    CPL_TRY(cpl_table_cell(t, "%s", r->shape));
    CPL_TRY(cpl_table_number(t, r->seconds < 1e-3 ? "%.4f" : "%.2f", r->seconds * 1e3));
    CPL_TRY(cpl_table_number(t, r->seconds < 1e-3 ? "%.4f" : "%.2f", r->best * 1e3));
    CPL_TRY(cpl_table_number(t, "%.1f", r->flops > 0 ? rate : nan));
    CPL_TRY(cpl_table_number(t, "%.2f", r->flops > 0 ? nan : rate));
    CPL_TRY(cpl_table_number(t, "%.0f", share_of_limit(b, r)));
    CPL_TRY(cpl_table_number(t, "%.0f", r->tokens > 0 ? r->tokens / r->seconds : nan));
    CPL_TRY(cpl_table_number(t, "%.1f", cpl_comm_size(b->world) > 1 ? r->all * 1e-9 : nan));
    CPL_TRY(cpl_table_cell(t, "%lld", (long long)r->repetitions));
done:
    return st;
}

static const cpl_column columns[] = {{"operation", "", CPL_COLUMN_LEFT, 0},        {"shape", "", CPL_COLUMN_WIDE, 3},
                                     {"time", "ms, median", CPL_COLUMN_RIGHT, 0},  {"best", "ms", CPL_COLUMN_RIGHT, 4},
                                     {"products", "GFLOP/s", CPL_COLUMN_RIGHT, 0}, {"memory", "GB/s", CPL_COLUMN_RIGHT, 0},
                                     {"of limit", "%", CPL_COLUMN_RIGHT, 0},       {"tokens", "per s", CPL_COLUMN_RIGHT, 1},
                                     {"all ranks", "G/s", CPL_COLUMN_RIGHT, 0},    {"runs", "", CPL_COLUMN_RIGHT, 2}};

static cpl_status print_table(const cpl_bench *b) {
    cpl_status st = CPL_OK;
    cpl_table *t = NULL;
    const cpl_model_shape *s = &b->layout->shape;
    int threads = cpl_device_threads(b->dev), ranks = cpl_comm_size(b->world);
    printf("\n %s, %d thread%s a rank, %d rank%s; model %lld layers, %lld heads, width %lld, context %lld, micro-batch %lld, "
           "vocabulary %lld, %s\n\n",
           b->dev->name, threads, threads == 1 ? "" : "s", ranks, ranks == 1 ? "" : "s", (long long)s->layers, (long long)s->heads,
           (long long)s->width, (long long)s->context, (long long)b->o->micro_batch, (long long)s->vocab,
           cpl_dtype_name(b->product));
    CPL_TRY(cpl_table_create(&t, columns, sizeof columns / sizeof columns[0]));
    for (int64_t i = 0; i < b->n_rows; i++) {
        CPL_TRY(print_row(b, t, &b->row[i]));
    }
    CPL_TRY(cpl_table_print(t, stdout));
    printf("\n products: multiplications and additions, attention its causal half, backward attention with the scores computed "
           "again (2.5 forward;\n"
           " in whole passes 2). memory: each operand read or written once. %% of limit: of the matrix products of %s, or of the "
           "copy, above.\n\n",
           cpl_dtype_name(b->product));
done:
    cpl_table_destroy(&t);
    return st;
}

static void print_json(const cpl_bench *b) {
    char line[512], members[1100], name[80], shape[80], device[200];
    cpl_json_quote(device, sizeof device, b->dev->name);
    const cpl_model_shape *s = &b->layout->shape;
    printf("{\"cupel\":\"%s\",\"revision\":\"%s\",\"device\":%s,\"threads\":%d,\"ranks\":%d,\"layers\":%lld,\"heads\":%lld,"
           "\"width\":%lld,"
           "\"context\":%lld,\"micro_batch\":%lld,\"vocab\":%lld,\"precision\":\"%s\"}\n",
           CUPEL_VERSION, CUPEL_GIT_REVISION, device, cpl_device_threads(b->dev), cpl_comm_size(b->world), (long long)s->layers,
           (long long)s->heads, (long long)s->width, (long long)s->context, (long long)b->o->micro_batch, (long long)s->vocab,
           cpl_dtype_name(b->product));
    for (int64_t i = 0; i < b->n_rows; i++) {
        const cpl_bench_row *r = &b->row[i];
        double nan = (double)NAN, rate = cpl_bench_rate(r);
        cpl_json_quote(name, sizeof name, r->name);
        cpl_json_quote(shape, sizeof shape, r->shape);
        snprintf(line, sizeof line,
                 "\"ms\":%.6g,\"ms_best\":%.6g,\"runs\":%lld,\"flop_per_s\":%.6g,\"byte_per_s\":%.6g,\"percent_of_limit\":%.6g,"
                 "\"tokens_per_s\":%.6g,\"all_ranks_per_s\":%.6g",
                 r->seconds * 1e3, r->best * 1e3, (long long)r->repetitions, r->flops > 0 ? rate : nan, r->flops > 0 ? nan : rate,
                 share_of_limit(b, r), r->tokens > 0 ? r->tokens / r->seconds : nan, r->all);
        cpl_json_members(members, line);
        printf("{\"operation\":%s,\"shape\":%s,%s}\n", name, shape, members);
    }
}

/* --- the command --- */

enum { OPS, MEMORY, TRAIN, ALL };
static const char *const whats[] = {[OPS] = "ops", [MEMORY] = "memory", [TRAIN] = "train", [ALL] = "all"};

static cpl_status parse_what(const cpl_command_arguments *a, int *what) {
    cpl_status st = CPL_OK;
    *what = ALL;
    if (a->count == 0) {
        return CPL_OK;
    }
    if (a->count > 1) {
        CPL_FAIL(CPL_USAGE, "bench: unexpected argument '%s'", a->argument[1]);
    }
    for (*what = 0; *what <= ALL && strcmp(a->argument[0], whats[*what]) != 0; (*what)++) {
    }
    if (*what > ALL) {
        const char *near = cpl_nearest_word(whats, ALL + 1, a->argument[0]);
        CPL_FAIL(CPL_USAGE, "bench: '%s'%s%s%s", a->argument[0], near ? ": did you mean '" : ": expected ops, memory, train or all",
                 near ? near : "", near ? "'?" : "");
    }
done:
    return st;
}

static cpl_status measure(cpl_bench *b, int what) {
    cpl_status st = CPL_OK;
    bool ops = what == OPS || what == ALL, memory = what == MEMORY || what == ALL, train = what == TRAIN || what == ALL;
    int64_t limits = b->product == CPL_F32 ? 2 : 3; /* measured again in the end */
    int64_t total =
        limits + (ops ? CPL_BENCH_LAYER_ROWS : 0) + (memory ? CPL_BENCH_FLAT_ROWS : 0) + (train ? CPL_BENCH_TRAINING_ROWS : 0);
    cpl_progress_begin(&b->progress, "bench", 0, total);
    CPL_TRY(cpl_bench_limits(b));
    if (ops) {
        CPL_TRY(cpl_bench_layers(b));
    }
    if (memory) {
        CPL_TRY(cpl_bench_flat(b));
    }
    if (train) {
        CPL_TRY(cpl_bench_training(b));
    }
    CPL_TRY(cpl_bench_limits(b));
    if (b->n_rows != total) {
        CPL_FAIL(CPL_INTERNAL, "bench: %lld rows, expected %lld", (long long)b->n_rows, (long long)total);
    }
done:
    cpl_progress_end(&b->progress, "");
    return st;
}

static cpl_status bench(cpl_comm *world, const cpl_bench_options *o, int what) {
    cpl_status st = CPL_OK;
    const cpl_model_shape shape = {o->layers, o->heads, o->width, o->context, o->vocab};
    cpl_dtype product = cpl_precision_dtype(o->precision);
    cpl_bench b = {.world = world, .o = o, .dt = cpl_dtype_storage(product), .product = product};
    CPL_TRY(cpl_job_device(world, o->device, o->threads, o->ranks_per_gpu, &b.dev));
    if (!cpl_device_has(b.dev, b.product)) {
        st = cpl_fail(CPL_USAGE, __FILE__, __LINE__, "bench: precision %s needs a GPU, and this device is %s",
                      cpl_dtype_name(b.product), b.dev->name);
    }
    CPL_TRY(cpl_agree(world, st));
    CPL_TRY(cpl_agree(world, cpl_layout_create(&b.layout, &shape)));
    CPL_TRY(measure(&b, what));
    if (cpl_comm_rank(world) == 0 && o->json) {
        print_json(&b);
    } else if (cpl_comm_rank(world) == 0) {
        st = print_table(&b);
    }
    CPL_TRY(cpl_agree(world, st));
done:
    cpl_free(&b.row);
    cpl_layout_destroy(&b.layout);
    cpl_device_destroy(&b.dev);
    return st;
}

cpl_status cpl_command_bench(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    cpl_bench_options options;
    cpl_command_arguments a;
    int what = ALL;
    cpl_status local = cpl_arena_create(&arena);
    local = local == CPL_OK ? cpl_command_options(self, &table, &options, &a, arena, argc, argv) : local;
    local = local == CPL_OK ? parse_what(&a, &what) : local;
    CPL_TRY(cpl_agree(world, local));
    if (a.help) {
        cpl_command_help(self, world, &table,
                         "WHAT: ops, the layers' operations; memory, operations over flat buffers; train, a training step; all.");
        goto done;
    }
    CPL_TRY(bench(world, &options, what));
done:
    cpl_arena_destroy(&arena);
    return st;
}

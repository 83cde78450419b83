/* The command bench: what this machine can do, and how much of it the operations get.
 * Refuses to compare with limits that were not measured in the same run. */
#include "jobs/bench.h"
#include "jobs/command_options.h"
#include "jobs/device.h"
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

void cpl_bench_summarize(double *samples, int64_t n, cpl_bench_row *row) {
    qsort(samples, (size_t)n, sizeof samples[0], by_value);
    row->seconds = n % 2 ? samples[n / 2] : 0.5 * (samples[n / 2 - 1] + samples[n / 2]);
    row->best = samples[0];
    row->worst = samples[n - 1];
    row->repetitions = n;
}

/* Calls of a sample, so that reading the clock does not show. */
static int64_t calls_of(double once) {
    return once < sample_least ? (int64_t)(sample_least / (once > 1e-9 ? once : 1e-9)) + 1 : 1;
}

static cpl_status time_call(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    double samples[SAMPLES_MOST], once = 0, begin = 0;
    int64_t n = 0, calls = 1;
    CPL_TRY(sample(b, call, context, 1, &once));
    CPL_TRY(sample(b, call, context, 1, &once));
    calls = calls_of(once);
    begin = cpl_now();
    while (n < SAMPLES_LEAST || (n < SAMPLES_MOST && cpl_now() - begin < b->o->seconds)) {
        CPL_TRY(sample(b, call, context, calls, &samples[n]));
        n++;
    }
    cpl_bench_summarize(samples, n, row);
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

cpl_status cpl_bench_time_together(const cpl_bench *b, cpl_bench_call call, void *context, cpl_bench_row *row) {
    cpl_status st = CPL_OK;
    double samples[SAMPLES_MOST], once = 0;
    for (int i = 0; i < 2; i++) {
        CPL_TRY(cpl_agree(b->world, sample(b, call, context, 1, &once)));
    }
    int64_t plan[2] = {calls_of(once), 0}; /* calls of a sample; samples */
    double fit = b->o->seconds / (once * (double)plan[0] + 1e-9);
    plan[1] = fit < SAMPLES_LEAST ? SAMPLES_LEAST : fit > SAMPLES_MOST ? SAMPLES_MOST : (int64_t)fit;
    CPL_TRY(cpl_comm_bcast(b->world, plan, sizeof plan, 0));
    for (int64_t i = 0; i < plan[1]; i++) {
        CPL_TRY(cpl_agree(b->world, sample(b, call, context, plan[0], &samples[i])));
    }
    cpl_bench_summarize(samples, plan[1], row);
    row->repetitions = plan[0] * plan[1];
    double slowest[3] = {row->seconds, row->best, row->worst};
    CPL_TRY(cpl_comm_allreduce_f64(b->world, slowest, 3, CPL_MAX));
    row->seconds = slowest[0];
    row->best = slowest[1];
    row->worst = slowest[2];
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

/* --- the command --- */

enum { OPS, MEMORY, TRAIN, COMPRESS, COMM, ALL, NOTHING };
static const char *const whats[] = {
    [OPS] = "ops", [MEMORY] = "memory", [TRAIN] = "train", [COMPRESS] = "compress", [COMM] = "comm", [ALL] = "all"};

static cpl_status parse_what(const cpl_command_arguments *a, const cpl_bench_options *o, int *what) {
    cpl_status st = CPL_OK;
    *what = o->fusion ? NOTHING : o->profile ? TRAIN : ALL;
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
        CPL_FAIL(CPL_USAGE, "bench: '%s'%s%s%s", a->argument[0],
                 near ? ": did you mean '" : ": expected ops, memory, train, compress, comm or all", near ? near : "",
                 near ? "'?" : "");
    }
    if (o->profile && *what != TRAIN && *what != ALL) {
        CPL_FAIL(CPL_USAGE, "bench: --profile is of a training step: bench train --profile");
    }
done:
    return st;
}

static cpl_status measure(cpl_bench *b, int what) {
    cpl_status st = CPL_OK;
    const struct {
        bool wanted;
        int64_t rows;
        cpl_status (*run)(cpl_bench *b);
    } parts[] = {{what == OPS || what == ALL, CPL_BENCH_LAYER_ROWS, cpl_bench_layers},
                 {what == MEMORY || what == ALL, CPL_BENCH_FLAT_ROWS, cpl_bench_flat},
                 {what == TRAIN || what == ALL, cpl_bench_training_rows(b), cpl_bench_training},
                 {what == COMPRESS || what == ALL, CPL_BENCH_COMPRESS_ROWS, cpl_bench_compress},
                 {what == COMM || what == ALL, cpl_bench_comm_rows(b), cpl_bench_comm},
                 {b->o->fusion, CPL_BENCH_FUSION_ROWS, cpl_bench_fusion}};
    enum { PARTS = sizeof parts / sizeof parts[0] };
    int64_t total = b->product == CPL_F32 ? 2 : 3; /* the limits, measured again in the end */
    for (int i = 0; i < PARTS; i++) {
        total += parts[i].wanted ? parts[i].rows : 0;
    }
    cpl_progress_begin(&b->progress, "bench", 0, total);
    CPL_TRY(cpl_bench_limits(b));
    for (int i = 0; i < PARTS; i++) {
        if (parts[i].wanted) {
            CPL_TRY(parts[i].run(b));
        }
    }
    CPL_TRY(cpl_bench_limits(b));
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
    CPL_TRY(cpl_comm_attach(world, b.dev));
    if (!cpl_device_has(b.dev, b.product)) {
        st = cpl_fail(CPL_USAGE, __FILE__, __LINE__, "bench: precision %s needs a GPU, and this device is %s",
                      cpl_dtype_name(b.product), b.dev->name);
    }
    CPL_TRY(cpl_agree(world, st));
    CPL_TRY(cpl_agree(world, cpl_layout_create(&b.layout, &shape)));
    CPL_TRY(measure(&b, what));
    if (cpl_comm_rank(world) == 0 && o->json) {
        cpl_bench_print_json(&b);
    } else if (cpl_comm_rank(world) == 0) {
        st = cpl_bench_print_table(&b);
    }
    CPL_TRY(cpl_agree(world, st));
done:
    cpl_free(&b.row);
    cpl_layout_destroy(&b.layout);
    cpl_job_device_close(world, &b.dev);
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
    local = local == CPL_OK ? parse_what(&a, &options, &what) : local;
    CPL_TRY(cpl_agree(world, local));
    if (a.help) {
        cpl_command_help(self, world, &table,
                         "WHAT: ops, the layers' operations; memory, operations over flat buffers; train, the trainer's steps;\n"
                         "compress, selection, quantization and the distillation loss; comm, the ranks' exchange; all.");
        goto done;
    }
    CPL_TRY(bench(world, &options, what));
done:
    cpl_arena_destroy(&arena);
    return st;
}

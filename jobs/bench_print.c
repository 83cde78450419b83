/* The rows of cupel bench as a table for people and as JSON for programs.
 * Refuses to print a figure that a row does not have. */
#include "cupel_version.h"
#include "io/base/json.h"
#include "jobs/bench.h"
#include <math.h>
#include <stdio.h>

/* The limit that a row is compared with, per second; 0: none. */
static double limit_of(const cpl_bench *b, const cpl_bench_row *r) {
    return r->limit ? 0 : r->flops > 0 ? b->products[b->product] : r->bytes > 0 ? b->copy : 0;
}

/* NaN where a or b is 0. */
static double ratio(double a, double b) {
    return a > 0 && b > 0 ? a / b : (double)NAN;
}

static double share_of_limit(const cpl_bench *b, const cpl_bench_row *r) {
    return 100 * ratio(cpl_bench_rate(r), limit_of(b, r));
}

/* Least time at the limit, s. */
static double floor_of(const cpl_bench *b, const cpl_bench_row *r) {
    return ratio(r->flops > 0 ? r->flops : r->bytes, limit_of(b, r));
}

/* Percent of what the row is a part of; a part of no time is 0 %. */
static double share_of_whole(const cpl_bench_row *r) {
    return r->whole > 0 ? 100 * r->seconds / r->whole : (double)NAN;
}

static double saved(const cpl_bench_row *r) {
    return r->apart > 0 ? r->apart - r->seconds : (double)NAN;
}

static bool has_time(const cpl_bench_row *r) {
    return r->repetitions > 0;
}

static cpl_status cell_ms(cpl_table *t, double seconds) {
    return cpl_table_number(t, fabs(seconds) < 1e-3 ? "%.4f" : "%.2f", seconds * 1e3);
}

static cpl_status print_row(const cpl_bench *b, cpl_table *t, const cpl_bench_row *r) {
    cpl_status st = CPL_OK;
    double rate = cpl_bench_rate(r), nan = (double)NAN;
    CPL_TRY(cpl_table_row(t, r->limit));
    CPL_TRY(cpl_table_cell(t, "%s", r->name));
    CPL_TRY(cpl_table_cell(t, "%s", r->shape));
    CPL_TRY(cell_ms(t, has_time(r) ? r->seconds : nan));
    CPL_TRY(cell_ms(t, r->best > 0 ? r->best : nan));
    CPL_TRY(cell_ms(t, r->worst > 0 ? r->worst : nan));
    CPL_TRY(cpl_table_number(t, "%.1f", r->flops > 0 ? rate * 1e-9 : nan));
    CPL_TRY(cpl_table_number(t, "%.2f", r->bytes > 0 ? rate * 1e-9 : nan));
    CPL_TRY(cell_ms(t, floor_of(b, r)));
    CPL_TRY(cpl_table_number(t, "%.0f", share_of_limit(b, r)));
    CPL_TRY(cpl_table_number(t, "%.0f", ratio(r->tokens, r->seconds)));
    CPL_TRY(cpl_table_number(t, "%.1f", cpl_comm_size(b->world) > 1 && r->all > 0 ? r->all * 1e-9 : nan));
    CPL_TRY(cpl_table_number(t, "%.2f", ratio(r->bus, r->seconds) * 1e-9));
    CPL_TRY(cpl_table_number(t, "%.2f", share_of_whole(r)));
    CPL_TRY(cell_ms(t, r->apart > 0 ? r->apart : nan));
    CPL_TRY(cell_ms(t, saved(r)));
    CPL_TRY(cpl_table_number(t, "%.1f", r->unmoved > 0 ? r->unmoved * 1e-6 : nan));
    CPL_TRY(cpl_table_number(t, "%.3f", r->held > 0 ? r->held / 0x1p30 : nan));
    if (has_time(r)) {
        CPL_TRY(cpl_table_cell(t, "%lld", (long long)r->repetitions));
    }
done:
    return st;
}

static const cpl_column columns[] = {{"operation", "", CPL_COLUMN_LEFT, 0},       {"shape", "", CPL_COLUMN_WIDE, 4},
                                     {"time", "ms, median", CPL_COLUMN_RIGHT, 0}, {"best", "ms", CPL_COLUMN_RIGHT, 5},
                                     {"worst", "ms", CPL_COLUMN_RIGHT, 6},        {"products", "GFLOP/s", CPL_COLUMN_RIGHT, 0},
                                     {"memory", "GB/s", CPL_COLUMN_RIGHT, 0},     {"floor", "ms", CPL_COLUMN_RIGHT, 3},
                                     {"of limit", "%", CPL_COLUMN_RIGHT, 0},      {"tokens", "per s", CPL_COLUMN_RIGHT, 1},
                                     {"all ranks", "G/s", CPL_COLUMN_RIGHT, 0},   {"bus", "GB/s", CPL_COLUMN_RIGHT, 0},
                                     {"of the step", "%", CPL_COLUMN_RIGHT, 0},   {"separate", "ms, median", CPL_COLUMN_RIGHT, 0},
                                     {"saves", "ms", CPL_COLUMN_RIGHT, 0},        {"not moved", "MB", CPL_COLUMN_RIGHT, 0},
                                     {"held", "GiB", CPL_COLUMN_RIGHT, 0},        {"runs", "", CPL_COLUMN_RIGHT, 2}};

/* What the columns mean, as far as rows have them. */
static void print_legend(const cpl_bench *b) {
    bool bus = false, whole = false, apart = false, held = false;
    for (int64_t i = 0; i < b->n_rows; i++) {
        bus = bus || b->row[i].bus > 0;
        whole = whole || b->row[i].whole > 0;
        apart = apart || b->row[i].apart > 0;
        held = held || b->row[i].held > 0;
    }
    printf(
        "\n time: the median of so many runs. products: multiplications and additions, attention its causal half, backward\n"
        " attention with the scores computed again (2.5 forward; in whole passes 2). memory: each operand read or written once.\n"
        " floor, %% of limit: by the matrix products of %s, or by the copy, above.\n",
        cpl_dtype_name(b->product));
    if (bus) {
        printf(" bus: bytes of the whole buffer x (ranks-1)/ranks over the time of the slowest rank.\n");
    }
    if (whole) {
        printf(" of the step: of the training step; of operations, of a step that is run one operation after another.\n");
    }
    if (held) {
        printf(" held: the most device memory in buffers at one time, without the libraries' own.\n");
    }
    if (apart) {
        printf(
            " separate: the same work as single operations. A sum or product of elements that is no operation of its own here is\n"
            " an addition or a copy of as many bytes, a transposition a copy. not moved: bytes that the separate ones move "
            "besides.\n");
    }
    printf("\n");
}

cpl_status cpl_bench_print_table(const cpl_bench *b) {
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
    print_legend(b);
done:
    cpl_table_destroy(&t);
    return st;
}

static void print_json_row(const cpl_bench *b, const cpl_bench_row *r) {
    char line[1024], members[2048], name[120], shape[140];
    double nan = (double)NAN, rate = cpl_bench_rate(r);
    cpl_json_quote(name, sizeof name, r->name);
    cpl_json_quote(shape, sizeof shape, r->shape);
    snprintf(line, sizeof line,
             "\"ms\":%.6g,\"ms_best\":%.6g,\"ms_worst\":%.6g,\"runs\":%lld,\"flop_per_s\":%.6g,\"byte_per_s\":%.6g,"
             "\"percent_of_limit\":%.6g,\"ms_floor\":%.6g,\"tokens_per_s\":%.6g,\"all_ranks_per_s\":%.6g,"
             "\"bus_byte_per_s\":%.6g,\"percent_of_step\":%.6g,\"ms_separate\":%.6g,\"ms_saved\":%.6g,\"bytes_not_moved\":%.6g,"
             "\"bytes_held\":%.17g",
             has_time(r) ? r->seconds * 1e3 : nan, r->best > 0 ? r->best * 1e3 : nan, r->worst > 0 ? r->worst * 1e3 : nan,
             (long long)r->repetitions, r->flops > 0 ? rate : nan, r->bytes > 0 ? rate : nan, share_of_limit(b, r),
             floor_of(b, r) * 1e3, ratio(r->tokens, r->seconds), r->all > 0 ? r->all : nan, ratio(r->bus, r->seconds),
             share_of_whole(r), r->apart > 0 ? r->apart * 1e3 : nan, saved(r) * 1e3, r->unmoved > 0 ? r->unmoved : nan,
             r->held > 0 ? r->held : nan);
    cpl_json_members(members, line);
    printf("{\"operation\":%s,\"shape\":%s,%s}\n", name, shape, members);
}

void cpl_bench_print_json(const cpl_bench *b) {
    char device[200];
    const cpl_model_shape *s = &b->layout->shape;
    cpl_json_quote(device, sizeof device, b->dev->name);
    printf("{\"cupel\":\"%s\",\"revision\":\"%s\",\"device\":%s,\"threads\":%d,\"ranks\":%d,\"layers\":%lld,\"heads\":%lld,"
           "\"width\":%lld,"
           "\"context\":%lld,\"micro_batch\":%lld,\"vocab\":%lld,\"precision\":\"%s\"}\n",
           CUPEL_VERSION, CUPEL_GIT_REVISION, device, cpl_device_threads(b->dev), cpl_comm_size(b->world), (long long)s->layers,
           (long long)s->heads, (long long)s->width, (long long)s->context, (long long)b->o->micro_batch, (long long)s->vocab,
           cpl_dtype_name(b->product));
    for (int64_t i = 0; i < b->n_rows; i++) {
        print_json_row(b, &b->row[i]);
    }
}

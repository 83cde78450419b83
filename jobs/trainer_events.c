/* Overflow events and gradient magnitudes.
 * Refuses to decide anything but the end of a run whose overflows do not end. */
#include "jobs/trainer_events.h"
#include "io/base/log.h"
#include <string.h>

/* The first tensor that the backward pass left non-finite on this rank: the projection of distillation, ln_f, then the blocks from
 * the last to the first, each from its end, then the embeddings. -1: none. */
static int64_t first_bad(const cpl_layout *l, const uint32_t *kinds) {
    int64_t best = -1;
    int64_t best_rank = INT64_MAX;
    for (int64_t i = 0; i < l->count; i++) {
        const cpl_param *p = &l->param[i];
        if (kinds[i] == 0) {
            continue;
        }
        int64_t place = p->layer >= 0                      ? (l->shape.layers - p->layer) * 1000
                        : p == cpl_layout_projection(l)    ? -1
                        : strncmp(p->name, "ln_f", 4) == 0 ? 0
                                                           : INT64_MAX - 1000;
        if (p->layer >= 0) {
            bool mlp = strstr(p->name, ".mlp.") != NULL || strstr(p->name, ".ln2.") != NULL || strstr(p->name, ".ln_2.") != NULL;
            place += mlp ? 0 : 500;
        }
        if (place < best_rank) {
            best_rank = place;
            best = i;
        }
    }
    return best;
}

cpl_status cpl_trainer_overflow(cpl_comm *comm, const cpl_layout *layout, const uint32_t *kinds, cpl_metrics *metrics, int64_t step,
                                const char *label, const cpl_step_state *state, float scale, int64_t limit) {
    cpl_status st = CPL_OK;
    int ranks = cpl_comm_size(comm), rank = cpl_comm_rank(comm);
    int64_t *seen = NULL; /* [ranks][2]: tensor + 1, kind */
    static const char *const names[] = {"", "inf", "nan", "inf and nan"};
    cpl_status local = cpl_alloc(&seen, 2 * (size_t)ranks, sizeof *seen, "overflow events");
    CPL_TRY(cpl_agree(comm, local));
    int64_t bad = first_bad(layout, kinds);
    if (bad >= 0) {
        seen[2 * rank] = bad + 1;
        seen[2 * rank + 1] = kinds[bad];
    }
    CPL_TRY(cpl_comm_allreduce_i64(comm, seen, 2 * (size_t)ranks, CPL_SUM));
    int first = -1;
    for (int r = 0; r < ranks; r++) {
        if (seen[2 * r] == 0) {
            continue;
        }
        first = first < 0 ? r : first;
        const double row[CPL_M_EVENT_COLUMNS] = {(double)step, (double)r, (double)(seen[2 * r] - 1), (double)seen[2 * r + 1]};
        local = local == CPL_OK ? cpl_series_add(&metrics->event, row) : local;
        cpl_log_event("overflow", "\"step\":%lld,\"rank\":%d,\"tensor\":\"%s\",\"kind\":\"%s\",\"loss_scale\":%.9g",
                      (long long)step, r, layout->param[seen[2 * r] - 1].name, names[seen[2 * r + 1] & 3], (double)scale);
    }
    CPL_TRY(cpl_agree(comm, local));
    if (state->stuck_steps >= limit) {
        int64_t tensor = first < 0 ? -1 : seen[2 * first] - 1;
        CPL_FAIL(CPL_NUMERIC,
                 "%s: step %lld: overflow on %d steps in a row at loss scale %g, the smallest allowed: rank %d, gradient of %s, %s",
                 label, (long long)step, state->stuck_steps, (double)scale, first,
                 tensor < 0 ? "the sum over ranks" : layout->param[tensor].name,
                 first < 0 ? "not finite" : names[seen[2 * first + 1] & 3]);
    }
done:
    cpl_free(&seen);
    return st;
}

/* All 2-D weights outside the blocks count with the embeddings. */
static int group_of(const cpl_param *p) {
    if (p->layer < 0) {
        return strncmp(p->name, "ln", 2) == 0 ? 3 : 0;
    }
    return strstr(p->name, ".attn.") != NULL ? 1 : strstr(p->name, ".mlp.") != NULL ? 2 : 3;
}

/* Counts of a stretch of the summed gradient into the device arrays. */
static cpl_status count_stretch(const cpl_optimizer *opt, const cpl_stretch *s, float factor, int64_t *counts, float *largest) {
    cpl_status st = CPL_OK;
    for (int64_t i = 0; i < opt->layout->count; i++) {
        const cpl_param *p = &opt->layout->param[i];
        int64_t from = p->offset > s->first ? p->offset : s->first;
        int64_t to = p->offset + cpl_param_count(p) < s->last ? p->offset + cpl_param_count(p) : s->last;
        if (from < to) {
            CPL_TRY(
                CPL_OPS(opt->dev, exponents, counts + group_of(p) * CPL_M_EXPONENTS, largest, opt->grad + from, to - from, factor));
        }
    }
done:
    return st;
}

static cpl_status count_own(const cpl_optimizer *opt, float factor, int64_t *counts, float *largest) {
    cpl_status st = CPL_OK;
    CPL_TRY(count_stretch(opt, &opt->own[0], factor, counts, largest));
    CPL_TRY(count_stretch(opt, &opt->own[1], factor, counts, largest));
done:
    return st;
}

cpl_status cpl_trainer_exponents(cpl_comm *comm, const cpl_optimizer *opt, cpl_metrics *metrics, int64_t step) {
    cpl_status st = CPL_OK;
    enum { CELLS = CPL_M_GROUPS * CPL_M_EXPONENTS };
    int64_t *device_counts = NULL, counts[CELLS];
    float *device_largest = NULL, largest = 0;
    double row[3 + CELLS], all = 0;
    if (metrics->step.rows == 0) {
        return CPL_OK;
    }
    double scale = cpl_series_at(&metrics->step, CPL_M_LOSS_SCALE, metrics->step.rows - 1);
    cpl_status local = cpl_device_alloc(opt->dev, &device_counts, CELLS, sizeof *device_counts, "gradient histogram");
    if (local == CPL_OK) {
        local = cpl_device_alloc(opt->dev, &device_largest, 1, sizeof *device_largest, "gradient histogram");
    }
    if (local == CPL_OK) {
        local = count_own(opt, (float)(opt->rules.inv_micro_batches / scale), device_counts, device_largest);
    }
    if (local == CPL_OK) {
        local = CPL_OPS(opt->dev, download, counts, device_counts, sizeof counts);
    }
    if (local == CPL_OK) {
        local = CPL_OPS(opt->dev, download, &largest, device_largest, sizeof largest);
    }
    CPL_TRY(cpl_agree(comm, local));
    CPL_TRY(cpl_comm_allreduce_i64(comm, counts, CELLS, CPL_SUM));
    all = largest;
    CPL_TRY(cpl_comm_allreduce_f64(comm, &all, 1, CPL_MAX));
    row[0] = (double)step;
    row[1] = scale;
    row[2] = all;
    for (int i = 0; i < CELLS; i++) {
        row[3 + i] = (double)counts[i];
    }
    CPL_TRY(cpl_agree(comm, cpl_series_add(&metrics->exponents, row)));
done:
    cpl_device_free(opt->dev, &device_counts);
    cpl_device_free(opt->dev, &device_largest);
    return st;
}

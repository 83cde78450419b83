/* Exact magnitude pruning over the ranks.
 * Refuses NaN, and to let any rank see another rank's weights. */
#include "jobs/select.h"
#include <string.h>

enum { BINS = 1 << 11, PASSES = 3 };
static const int pass_bits[PASSES] = {11, 10, 10};

typedef struct {
    cpl_comm *comm;             /* borrowed */
    cpl_device *dev;            /* borrowed */
    const cpl_layout *layout;   /* borrowed */
    const cpl_prune_options *o; /* borrowed */
    cpl_shard *shard;           /* borrowed */
    cpl_prune_report *report;   /* borrowed */
    float *w;                   /* owned, device [n] */
    uint8_t *mask;              /* owned, device [n] */
    int64_t *counts, *scratch;  /* owned, device [BINS], [2]: NaN; ties left */
} selection;

/* This rank's part of tensor p, relative to the shard. */
static int64_t part_of(const selection *s, const cpl_param *p, int64_t *from) {
    int64_t begin = s->shard->begin, end = begin + s->shard->n, stop = p->offset + cpl_param_count(p);
    int64_t first = p->offset > begin ? p->offset : begin, last = stop < end ? stop : end;
    *from = first - begin;
    return last > first ? last - first : 0;
}

/* The next stretch of this rank's shard that is population without a gap, from tensor *i on; returns its length and moves *i behind
 * it, 0 where there is none before tensor `last`. One operation over a stretch costs less than one a tensor. */
static int64_t next_stretch(const selection *s, int64_t *i, int64_t last, int64_t *from) {
    int64_t length = 0;
    for (; *i < last; (*i)++) {
        const cpl_param *p = &s->layout->param[*i];
        int64_t at, n = part_of(s, p, &at);
        if (length > 0 && (n == 0 || !cpl_prune_includes(s->o, p) || at != *from + length)) {
            break;
        }
        if (n > 0 && cpl_prune_includes(s->o, p)) {
            *from = length > 0 ? *from : at;
            length += n;
        }
    }
    return length;
}

/* Fails with the name of the first tensor that holds a NaN; one of [first, last) does. counts: overwritten. */
static cpl_status name_nan(selection *s, int64_t first, int64_t last) {
    cpl_status st = CPL_OK;
    for (int64_t i = first; i < last; i++) {
        int64_t from, nans = 0, n = part_of(s, &s->layout->param[i], &from);
        if (n == 0 || !cpl_prune_includes(s->o, &s->layout->param[i])) {
            continue;
        }
        CPL_TRY(CPL_OPS(s->dev, zero, s->scratch, sizeof nans));
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->scratch, s->w + from, n, 0, 0, pass_bits[0]));
        CPL_TRY(CPL_OPS(s->dev, download, &nans, s->scratch, sizeof nans));
        if (nans > 0) {
            CPL_FAIL(CPL_NUMERIC, "prune: %s holds %lld NaN", s->layout->param[i].name, (long long)nans);
        }
    }
done:
    return st;
}

/* This rank's counts of the population tensors [first, last) with this prefix. */
static cpl_status count(selection *s, int64_t first, int64_t last, uint32_t prefix, int prefix_bits, int bits, int64_t *local) {
    cpl_status st = CPL_OK;
    size_t bytes = sizeof(int64_t) << bits;
    int64_t from = 0, n, nans = 0;
    CPL_TRY(CPL_OPS(s->dev, zero, s->counts, bytes));
    CPL_TRY(CPL_OPS(s->dev, zero, s->scratch, sizeof nans));
    for (int64_t i = first; (n = next_stretch(s, &i, last, &from)) > 0;) {
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->scratch, s->w + from, n, prefix, prefix_bits, bits));
    }
    CPL_TRY(CPL_OPS(s->dev, download, local, s->counts, bytes));
    if (prefix_bits == 0) {
        CPL_TRY(CPL_OPS(s->dev, download, &nans, s->scratch, sizeof nans));
        CPL_TRY(nans > 0 ? name_nan(s, first, last) : CPL_OK);
    }
done:
    return st;
}

/* The same, and summed over ranks in `global`. */
static cpl_status histogram(selection *s, int64_t first, int64_t last, uint32_t prefix, int prefix_bits, int bits, int64_t *local,
                            int64_t *global) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(s->comm, count(s, first, last, prefix, prefix_bits, bits, local)));
    memcpy(global, local, sizeof(int64_t) << bits);
    CPL_TRY(cpl_comm_allreduce_i64(s->comm, global, (size_t)1 << bits, CPL_SUM));
done:
    return st;
}

static cpl_status fill_mask(selection *s, int64_t first, int64_t last, uint32_t key, int64_t ties) {
    cpl_status st = CPL_OK;
    int64_t from = 0, n;
    CPL_TRY(CPL_OPS(s->dev, upload, s->scratch + 1, &ties, sizeof ties));
    for (int64_t i = first; (n = next_stretch(s, &i, last, &from)) > 0;) {
        CPL_TRY(CPL_OPS(s->dev, select_mask, s->mask + from, s->w + from, n, key, s->scratch + 1));
    }
done:
    return st;
}

/* Removes exactly k of the population in tensors [first, last). */
static cpl_status remove_smallest(selection *s, int64_t first, int64_t last, int64_t k) {
    cpl_status st = CPL_OK;
    int64_t local[BINS], global[BINS];
    uint32_t prefix = 0;
    int prefix_bits = 0;
    int64_t left = k; /* the left-th smallest (from 1) of those with the prefix is the threshold */
    uint32_t bin = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        CPL_TRY(histogram(s, first, last, prefix, prefix_bits, pass_bits[pass], local, global));
        if (k == 0) {
            return CPL_OK; /* after the search for NaN */
        }
        for (bin = 0; left > global[bin]; bin++) {
            left -= global[bin];
        }
        prefix = (prefix << pass_bits[pass]) | bin;
        prefix_bits += pass_bits[pass];
    }
    int64_t before = 0;
    CPL_TRY(cpl_comm_exscan_i64(s->comm, local[bin], &before));
    int64_t ties = left - before < 0 ? 0 : left - before < local[bin] ? left - before : local[bin];
    CPL_TRY(cpl_agree(s->comm, fill_mask(s, first, last, prefix, ties)));
    float magnitude;
    memcpy(&magnitude, &prefix, sizeof magnitude);
    s->report->threshold = magnitude > s->report->threshold ? magnitude : s->report->threshold;
    s->report->ties = global[bin];
done:
    return st;
}

static int64_t fraction(int64_t n, cpl_decimal s) {
    return (int64_t)((__int128)n * s.num / s.den);
}

static int64_t population(const selection *s, int64_t first, int64_t last) {
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) {
        n += cpl_prune_includes(s->o, &s->layout->param[i]) ? cpl_param_count(&s->layout->param[i]) : 0;
    }
    return n;
}

static cpl_status allocate(selection *s) {
    cpl_status st = CPL_OK;
    size_t n = (size_t)s->shard->n;
    CPL_TRY(cpl_device_alloc(s->dev, &s->w, n, sizeof(float), "weights to prune"));
    CPL_TRY(cpl_device_alloc(s->dev, &s->mask, n, 1, "pruning mask"));
    CPL_TRY(cpl_device_alloc(s->dev, &s->counts, BINS, sizeof(int64_t), "histogram"));
    CPL_TRY(cpl_device_alloc(s->dev, &s->scratch, 2, sizeof(int64_t), "histogram"));
    CPL_TRY(cpl_alloc(&s->report->by_tensor, (size_t)s->layout->count, sizeof(int64_t), "report"));
    memset(s->shard->mask, 1, n);
    if (n > 0) {
        CPL_TRY(CPL_OPS(s->dev, upload, s->w, s->shard->param, n * sizeof(float)));
        CPL_TRY(CPL_OPS(s->dev, upload, s->mask, s->shard->mask, n));
    }
done:
    return st;
}

/* Masked weights back to the host, and what each tensor lost. */
static cpl_status finish(selection *s) {
    cpl_status st = CPL_OK;
    size_t n = (size_t)s->shard->n;
    if (n > 0) {
        CPL_TRY(CPL_OPS(s->dev, apply_mask, s->w, s->mask, s->shard->n));
        CPL_TRY(CPL_OPS(s->dev, download, s->shard->param, s->w, n * sizeof(float)));
        CPL_TRY(CPL_OPS(s->dev, download, s->shard->mask, s->mask, n));
    }
    for (int64_t i = 0; i < s->layout->count; i++) {
        int64_t from, count = part_of(s, &s->layout->param[i], &from);
        for (int64_t j = 0; j < count; j++) {
            s->report->by_tensor[i] += s->shard->mask[from + j] == 0;
        }
    }
done:
    return st;
}

void cpl_prune_report_free(cpl_prune_report *r) {
    cpl_free(&r->by_tensor);
}

cpl_status cpl_prune_weights(cpl_comm *comm, cpl_device *dev, const cpl_layout *layout, const cpl_prune_options *options,
                             cpl_shard *shard, cpl_prune_report *report) {
    cpl_status st = CPL_OK;
    *report = (cpl_prune_report){0};
    selection s = {.comm = comm, .dev = dev, .layout = layout, .o = options, .shard = shard, .report = report};
    CPL_TRY(cpl_agree(comm, allocate(&s)));
    report->population = population(&s, 0, layout->count);
    if (options->scope == CPL_SCOPE_GLOBAL) {
        CPL_TRY(remove_smallest(&s, 0, layout->count, fraction(report->population, options->sparsity)));
    }
    for (int64_t i = 0; options->scope == CPL_SCOPE_TENSOR && i < layout->count; i++) {
        CPL_TRY(remove_smallest(&s, i, i + 1, fraction(population(&s, i, i + 1), options->sparsity)));
    }
    CPL_TRY(cpl_agree(comm, finish(&s)));
    CPL_TRY(cpl_comm_allreduce_i64(comm, report->by_tensor, (size_t)layout->count, CPL_SUM));
    for (int64_t i = 0; i < layout->count; i++) {
        report->removed += report->by_tensor[i];
    }
done:
    cpl_device_free(dev, &s.w);
    cpl_device_free(dev, &s.mask);
    cpl_device_free(dev, &s.counts);
    cpl_device_free(dev, &s.scratch);
    if (st != CPL_OK) {
        cpl_prune_report_free(report);
    }
    return st;
}

/* Exact magnitude pruning over the ranks.
 * Refuses NaN, and to let any rank see another rank's weights. */
#include "jobs/select.h"
#include <string.h>

enum { BINS = 1 << 11, PASSES = 3, MARK = CPL_MARKS - 1 };
static const int pass_bits[PASSES] = {11, 10, 10};

/* counts[BINS], then NANS and TIES: one piece, so that a pass is one copy to the host. */
enum { NANS = BINS, TIES, COUNTS };

struct cpl_selection {
    cpl_comm *comm;             /* borrowed */
    cpl_device *dev;            /* borrowed */
    const cpl_layout *layout;   /* borrowed */
    const cpl_prune_options *o; /* borrowed */
    int64_t begin, n;           /* of the flat buffer */
    const float *w;             /* borrowed, device [n] */
    uint8_t *mask;              /* borrowed, device [n] */
    int64_t *counts;            /* owned, device [COUNTS] */
    int64_t *host;              /* owned, of cpl_device_host_alloc [COUNTS]: what is fetched, and the ties that are fed */
    cpl_prune_report *report;   /* borrowed */
};

/* This rank's part of tensor p, relative to the shard. */
static int64_t part_of(const cpl_selection *s, const cpl_param *p, int64_t *from) {
    int64_t end = s->begin + s->n, stop = p->offset + cpl_param_count(p);
    int64_t first = p->offset > s->begin ? p->offset : s->begin, last = stop < end ? stop : end;
    *from = first - s->begin;
    return last > first ? last - first : 0;
}

/* The next stretch of this rank's shard that is population without a gap, from tensor *i on; returns its length and moves *i behind
 * it, 0 where there is none before tensor `last`. One operation over a stretch costs less than one a tensor. */
static int64_t next_stretch(const cpl_selection *s, int64_t *i, int64_t last, int64_t *from) {
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

/* The first `count` of s->counts into s->host. */
static cpl_status fetch(cpl_selection *s, int64_t count) {
    cpl_status st = CPL_OK;
    CPL_TRY(CPL_OPS(s->dev, fetch, s->host, s->counts, (size_t)count * sizeof *s->host));
    CPL_TRY(cpl_device_mark(s->dev, MARK));
    CPL_TRY(cpl_device_wait(s->dev, MARK));
done:
    return st;
}

/* Fails with the name of the first tensor that holds a NaN; one of [first, last) does. counts: overwritten. */
static cpl_status name_nan(cpl_selection *s, int64_t first, int64_t last) {
    cpl_status st = CPL_OK;
    for (int64_t i = first; i < last; i++) {
        int64_t from, n = part_of(s, &s->layout->param[i], &from);
        if (n == 0 || !cpl_prune_includes(s->o, &s->layout->param[i])) {
            continue;
        }
        CPL_TRY(CPL_OPS(s->dev, zero, s->counts, COUNTS * sizeof *s->counts));
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->counts + NANS, s->w + from, n, 0, 0, pass_bits[0]));
        CPL_TRY(fetch(s, COUNTS));
        if (s->host[NANS] > 0) {
            CPL_FAIL(CPL_NUMERIC, "prune: %s holds %lld NaN", s->layout->param[i].name, (long long)s->host[NANS]);
        }
    }
done:
    return st;
}

/* This rank's counts of the population tensors [first, last) with this prefix. */
static cpl_status count(cpl_selection *s, int64_t first, int64_t last, uint32_t prefix, int prefix_bits, int bits, int64_t *local) {
    cpl_status st = CPL_OK;
    int64_t from = 0, n;
    CPL_TRY(CPL_OPS(s->dev, zero, s->counts, COUNTS * sizeof *s->counts));
    for (int64_t i = first; (n = next_stretch(s, &i, last, &from)) > 0;) {
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->counts + NANS, s->w + from, n, prefix, prefix_bits, bits));
    }
    CPL_TRY(fetch(s, COUNTS));
    memcpy(local, s->host, sizeof(int64_t) << bits);
    if (prefix_bits == 0 && s->host[NANS] > 0) {
        CPL_TRY(name_nan(s, first, last));
    }
done:
    return st;
}

/* The same, and summed over ranks in `global`. */
static cpl_status histogram(cpl_selection *s, int64_t first, int64_t last, uint32_t prefix, int prefix_bits, int bits,
                            int64_t *local, int64_t *global) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(s->comm, count(s, first, last, prefix, prefix_bits, bits, local)));
    memcpy(global, local, sizeof(int64_t) << bits);
    CPL_TRY(cpl_comm_allreduce_i64(s->comm, global, (size_t)1 << bits, CPL_SUM));
done:
    return st;
}

static cpl_status fill_mask(cpl_selection *s, int64_t first, int64_t last, uint32_t key, int64_t ties) {
    cpl_status st = CPL_OK;
    int64_t from = 0, n;
    s->host[TIES] = ties; /* the mark that counted it is over: nothing reads it but this */
    CPL_TRY(CPL_OPS(s->dev, feed, s->counts + TIES, s->host + TIES, sizeof ties));
    for (int64_t i = first; (n = next_stretch(s, &i, last, &from)) > 0;) {
        CPL_TRY(CPL_OPS(s->dev, select_mask, s->mask + from, s->w + from, n, key, s->counts + TIES));
    }
done:
    return st;
}

/* Removes exactly k of the population in tensors [first, last). */
static cpl_status remove_smallest(cpl_selection *s, int64_t first, int64_t last, int64_t k) {
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

static int64_t population(const cpl_selection *s, int64_t first, int64_t last) {
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) {
        n += cpl_prune_includes(s->o, &s->layout->param[i]) ? cpl_param_count(&s->layout->param[i]) : 0;
    }
    return n;
}

cpl_status cpl_selection_create(cpl_selection **out, cpl_comm *comm, cpl_device *dev, const cpl_layout *layout,
                                const cpl_prune_options *options, int64_t begin, int64_t n, const float *w, uint8_t *mask) {
    cpl_status st = CPL_OK;
    cpl_selection *s = NULL;
    CPL_TRY(cpl_alloc(&s, 1, sizeof *s, "selection"));
    *s = (cpl_selection){.comm = comm, .dev = dev, .layout = layout, .o = options, .begin = begin, .n = n, .w = w, .mask = mask};
    CPL_TRY(cpl_device_alloc(dev, &s->counts, COUNTS, sizeof *s->counts, "histogram"));
    CPL_TRY(cpl_device_host_alloc(dev, &s->host, COUNTS, sizeof *s->host, "histogram"));
    *out = s;
    s = NULL;
done:
    cpl_selection_destroy(&s);
    return st;
}

void cpl_selection_destroy(cpl_selection **selection) {
    cpl_selection *s = *selection;
    if (s == NULL) {
        return;
    }
    cpl_device_free(s->dev, &s->counts);
    cpl_device_host_free(s->dev, &s->host);
    cpl_free(selection);
}

cpl_status cpl_selection_run(cpl_selection *s, cpl_prune_report *report) {
    cpl_status st = CPL_OK;
    int64_t tensors = s->layout->count;
    s->report = report;
    report->threshold = 0;
    report->ties = 0;
    report->population = population(s, 0, tensors);
    if (s->o->scope == CPL_SCOPE_GLOBAL) {
        CPL_TRY(remove_smallest(s, 0, tensors, fraction(report->population, s->o->sparsity)));
    }
    for (int64_t i = 0; s->o->scope == CPL_SCOPE_TENSOR && i < tensors; i++) {
        CPL_TRY(remove_smallest(s, i, i + 1, fraction(population(s, i, i + 1), s->o->sparsity)));
    }
done:
    return st;
}

/* --- of host memory --- */

typedef struct {
    cpl_device *dev;          /* borrowed */
    const cpl_layout *layout; /* borrowed */
    cpl_shard *shard;         /* borrowed */
    float *w;                 /* owned, device [n] */
    uint8_t *mask;            /* owned, device [n] */
    cpl_selection *selection; /* owned */
    cpl_prune_report *report; /* borrowed */
} pruning;

static cpl_status begin(pruning *p, cpl_comm *comm, const cpl_prune_options *options) {
    cpl_status st = CPL_OK;
    size_t n = (size_t)p->shard->n;
    CPL_TRY(cpl_device_alloc(p->dev, &p->w, n, sizeof(float), "weights to prune"));
    CPL_TRY(cpl_device_alloc(p->dev, &p->mask, n, 1, "pruning mask"));
    CPL_TRY(cpl_alloc(&p->report->by_tensor, (size_t)p->layout->count, sizeof(int64_t), "report"));
    memset(p->shard->mask, 1, n);
    if (n > 0) {
        CPL_TRY(CPL_OPS(p->dev, upload, p->w, p->shard->param, n * sizeof(float)));
        CPL_TRY(CPL_OPS(p->dev, upload, p->mask, p->shard->mask, n));
    }
    CPL_TRY(cpl_selection_create(&p->selection, comm, p->dev, p->layout, options, p->shard->begin, p->shard->n, p->w, p->mask));
done:
    return st;
}

/* Masked weights back to the host, and what each tensor lost. */
static cpl_status finish(pruning *p) {
    cpl_status st = CPL_OK;
    size_t n = (size_t)p->shard->n;
    if (n > 0) {
        CPL_TRY(CPL_OPS(p->dev, apply_mask, p->w, p->mask, p->shard->n));
        CPL_TRY(CPL_OPS(p->dev, download, p->shard->param, p->w, n * sizeof(float)));
        CPL_TRY(CPL_OPS(p->dev, download, p->shard->mask, p->mask, n));
    }
    for (int64_t i = 0; i < p->layout->count; i++) {
        int64_t from, count = part_of(p->selection, &p->layout->param[i], &from);
        for (int64_t j = 0; j < count; j++) {
            p->report->by_tensor[i] += p->shard->mask[from + j] == 0;
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
    pruning p = {.dev = dev, .layout = layout, .shard = shard, .report = report};
    CPL_TRY(cpl_agree(comm, begin(&p, comm, options)));
    CPL_TRY(cpl_selection_run(p.selection, report));
    CPL_TRY(cpl_agree(comm, finish(&p)));
    CPL_TRY(cpl_comm_allreduce_i64(comm, report->by_tensor, (size_t)layout->count, CPL_SUM));
    for (int64_t i = 0; i < layout->count; i++) {
        report->removed += report->by_tensor[i];
    }
done:
    cpl_selection_destroy(&p.selection);
    cpl_device_free(dev, &p.w);
    cpl_device_free(dev, &p.mask);
    if (st != CPL_OK) {
        cpl_prune_report_free(report);
    }
    return st;
}

/* Exact magnitude pruning over the ranks.
 * Refuses NaN, and to let any rank see another rank's weights. */
#include "jobs/select.h"
#include <string.h>

enum { BINS = 1 << 11, PASSES = 3, MARK = CPL_MARKS - 1, KEY_BITS = 31, KEY_INF = 0x7f800000 };
static const int pass_bits[PASSES] = {11, 10, 10};

/* counts[BINS], then what else is counted: one piece, so that a pass is one copy to the host. */
enum { NANS = BINS, FOUND, BELOW, TIES, COUNTS };

/* About so many pieces make a sample. The window is the sample's k-th smallest, and MARGIN % of the sample on either side; where
 * that is more than MOST % of it, the list would save little. */
enum { SAMPLE_PIECES = 128, MARGIN = 2, MOST = 20, LIST_LEAST = 65536 };

/* One pass: of the weights whose keys begin with `prefix`, the next `bits` bits are counted, in one piece of `stride`. */
typedef struct {
    uint32_t prefix;
    int prefix_bits, bits;
    int64_t stride;
} digit;

struct cpl_selection {
    cpl_comm *comm;             /* borrowed */
    cpl_device *dev;            /* borrowed */
    const cpl_layout *layout;   /* borrowed */
    const cpl_prune_options *o; /* borrowed */
    int64_t begin, n;           /* of the flat buffer */
    const float *w;             /* borrowed, device [n] */
    uint8_t *mask;              /* borrowed, device [n] */
    float *list;                /* owned, device [capacity]: the weights of a window */
    int64_t capacity;
    int64_t listed;           /* of this rank, which the passes count instead of all; -1: all */
    int64_t *counts;          /* owned, device [COUNTS] */
    int64_t *host;            /* owned, of cpl_device_host_alloc [COUNTS]: what is fetched, and the ties that are fed */
    cpl_prune_report *report; /* borrowed */
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

/* s->counts from `first` on into s->host. */
static cpl_status fetch(cpl_selection *s, int first) {
    cpl_status st = CPL_OK;
    CPL_TRY(CPL_OPS(s->dev, fetch, s->host + first, s->counts + first, (size_t)(COUNTS - first) * sizeof *s->host));
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
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->counts + NANS, s->w + from, n, 1, 0, 0, pass_bits[0]));
        CPL_TRY(fetch(s, NANS));
        if (s->host[NANS] > 0) {
            CPL_FAIL(CPL_NUMERIC, "prune: %s holds %lld NaN", s->layout->param[i].name, (long long)s->host[NANS]);
        }
    }
done:
    return st;
}

/* This rank's counts of the population tensors [first, last), or of the list. */
static cpl_status count(cpl_selection *s, int64_t first, int64_t last, const digit *d, int64_t *local) {
    cpl_status st = CPL_OK;
    int64_t from = 0, n;
    CPL_TRY(CPL_OPS(s->dev, zero, s->counts, COUNTS * sizeof *s->counts));
    for (int64_t i = first; s->listed < 0 && (n = next_stretch(s, &i, last, &from)) > 0;) {
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->counts + NANS, s->w + from, n, d->stride, d->prefix, d->prefix_bits,
                        d->bits));
    }
    if (s->listed > 0) {
        CPL_TRY(CPL_OPS(s->dev, select_histogram, s->counts, s->counts + NANS, s->list, s->listed, 1, d->prefix, d->prefix_bits,
                        d->bits));
    }
    CPL_TRY(fetch(s, 0));
    memcpy(local, s->host, sizeof(int64_t) << d->bits);
    if (s->host[NANS] > 0 && d->prefix_bits == 0) {
        CPL_TRY(name_nan(s, first, last));
    }
done:
    return st;
}

/* The same, and summed over ranks in `global`. */
static cpl_status histogram(cpl_selection *s, int64_t first, int64_t last, const digit *d, int64_t *local, int64_t *global) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(s->comm, count(s, first, last, d, local)));
    memcpy(global, local, sizeof(int64_t) << d->bits);
    CPL_TRY(cpl_comm_allreduce_i64(s->comm, global, (size_t)1 << d->bits, CPL_SUM));
done:
    return st;
}

/* The keys between which the k-th smallest of n should be, whole bins of a sample. False where the sample says that they would be
 * too many. */
static bool window_of(const int64_t *sample, int64_t n, int64_t k, uint32_t *first_key, uint32_t *last_key) {
    const int shift = KEY_BITS - pass_bits[0];
    int64_t all = 0, before = 0;
    for (int i = 0; i < BINS; i++) {
        all += sample[i];
    }
    int64_t at = (int64_t)((__int128)all * k / n), margin = all / 100 * MARGIN + 1;
    uint32_t first = 0, last = 0;
    while (first < BINS - 1 && before + sample[first] < at - margin) {
        before += sample[first++];
    }
    int64_t behind = before + sample[first];
    for (last = first; last < BINS - 1 && behind < at + margin; behind += sample[last]) {
        last++;
    }
    *first_key = first << shift;
    *last_key = ((last + 1) << shift) - 1;
    *last_key = at + margin >= all || *last_key > KEY_INF ? KEY_INF : *last_key;
    return behind - before <= all / 100 * MOST;
}

/* The weights of the window into this rank's list. got: those found, those below, and 1 where the list is too short. */
static cpl_status list_window(cpl_selection *s, int64_t first, int64_t last, uint32_t first_key, uint32_t last_key, int64_t *got) {
    cpl_status st = CPL_OK;
    int64_t from = 0, n, *c = s->counts;
    CPL_TRY(CPL_OPS(s->dev, zero, c, COUNTS * sizeof *c));
    for (int64_t i = first; (n = next_stretch(s, &i, last, &from)) > 0;) {
        CPL_TRY(CPL_OPS(s->dev, select_window, s->list, s->capacity, c + FOUND, c + BELOW, c + NANS, s->w + from, n, first_key,
                        last_key));
    }
    CPL_TRY(fetch(s, NANS));
    if (s->host[NANS] > 0) {
        CPL_TRY(name_nan(s, first, last));
    }
    got[0] = s->host[FOUND];
    got[1] = s->host[BELOW];
    got[2] = s->host[FOUND] > s->capacity;
done:
    return st;
}

/* One piece of how many is in the sample of a population of n; 1: none is taken. */
static int64_t stride_for(int64_t n) {
    int64_t stride = n / CPL_SELECT_PIECE / SAMPLE_PIECES;
    return stride < 1 ? 1 : stride;
}

/* Lists a few of the n weights of tensors [first, last), among which is the k-th smallest: then it is the (k - *below)-th of them.
 * A sample says where to look; where it misleads, or nothing would be gained, nothing is listed, on all ranks. */
static cpl_status narrow(cpl_selection *s, int64_t first, int64_t last, int64_t n, int64_t k, int64_t *below) {
    cpl_status st = CPL_OK;
    int64_t local[BINS], global[BINS], got[3], all[3];
    uint32_t first_key, last_key;
    const digit d = {.bits = pass_bits[0], .stride = stride_for(n)};
    s->listed = -1;
    *below = 0;
    if (k == 0 || d.stride == 1) {
        goto done;
    }
    CPL_TRY(histogram(s, first, last, &d, local, global));
    if (!window_of(global, n, k, &first_key, &last_key)) {
        goto done;
    }
    CPL_TRY(cpl_agree(s->comm, list_window(s, first, last, first_key, last_key, got)));
    memcpy(all, got, sizeof all);
    CPL_TRY(cpl_comm_allreduce_i64(s->comm, all, 3, CPL_SUM));
    if (all[2] == 0 && all[1] < k && k <= all[0] + all[1]) {
        s->listed = got[0];
        *below = all[1];
        n = all[0];
    }
done:
    if (st == CPL_OK) {
        s->report->searched += n;
    }
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

/* Removes exactly k of the n weights of the population in tensors [first, last). */
static cpl_status remove_smallest(cpl_selection *s, int64_t first, int64_t last, int64_t n, int64_t k) {
    cpl_status st = CPL_OK;
    int64_t local[BINS], global[BINS], below;
    digit d = {.stride = 1};
    uint32_t bin = 0;
    CPL_TRY(narrow(s, first, last, n, k, &below));
    int64_t left = k - below; /* the left-th smallest (from 1) of those with the prefix is the threshold */
    for (int pass = 0; pass < PASSES; pass++) {
        d.bits = pass_bits[pass];
        CPL_TRY(histogram(s, first, last, &d, local, global));
        if (k == 0) {
            return CPL_OK; /* after the search for NaN */
        }
        for (bin = 0; left > global[bin]; bin++) {
            left -= global[bin];
        }
        d.prefix = (d.prefix << d.bits) | bin;
        d.prefix_bits += d.bits;
    }
    int64_t before = 0;
    CPL_TRY(cpl_comm_exscan_i64(s->comm, local[bin], &before));
    int64_t ties = left - before < 0 ? 0 : left - before < local[bin] ? left - before : local[bin];
    CPL_TRY(cpl_agree(s->comm, fill_mask(s, first, last, d.prefix, ties)));
    float magnitude;
    memcpy(&magnitude, &d.prefix, sizeof magnitude);
    s->report->threshold = magnitude > s->report->threshold ? magnitude : s->report->threshold;
    s->report->ties = global[bin];
done:
    return st;
}

static int64_t fraction(int64_t n, cpl_decimal s) {
    return (int64_t)((__int128)n * s.num / s.den);
}

static int64_t population(const cpl_layout *l, const cpl_prune_options *o, int64_t first, int64_t last) {
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) {
        n += cpl_prune_includes(o, &l->param[i]) ? cpl_param_count(&l->param[i]) : 0;
    }
    return n;
}

/* How much is listed of n elements: a quarter, and of few all; nothing where all populations are too small for a sample. */
static int64_t list_length(const cpl_layout *l, const cpl_prune_options *o, int64_t n) {
    int64_t most = o->scope == CPL_SCOPE_GLOBAL ? population(l, o, 0, l->count) : 0;
    for (int64_t i = 0; o->scope == CPL_SCOPE_TENSOR && i < l->count; i++) {
        int64_t one = population(l, o, i, i + 1);
        most = one > most ? one : most;
    }
    int64_t least = n < LIST_LEAST ? n : LIST_LEAST;
    return stride_for(most) == 1 ? 0 : n / 4 > least ? n / 4 : least;
}

int64_t cpl_selection_bytes(const cpl_layout *layout, const cpl_prune_options *options, int64_t n) {
    return list_length(layout, options, n) * (int64_t)sizeof(float) + COUNTS * (int64_t)sizeof(int64_t);
}

cpl_status cpl_selection_create(cpl_selection **out, cpl_comm *comm, cpl_device *dev, const cpl_layout *layout,
                                const cpl_prune_options *options, int64_t begin, int64_t n, const float *w, uint8_t *mask) {
    cpl_status st = CPL_OK;
    cpl_selection *s = NULL;
    CPL_TRY(cpl_alloc(&s, 1, sizeof *s, "selection"));
    *s = (cpl_selection){.comm = comm, .dev = dev, .layout = layout, .o = options, .begin = begin, .n = n, .w = w, .mask = mask};
    s->capacity = list_length(layout, options, n);
    CPL_TRY(cpl_device_alloc(dev, &s->list, (size_t)s->capacity, sizeof *s->list, "window of weights"));
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
    cpl_device_free(s->dev, &s->list);
    cpl_device_free(s->dev, &s->counts);
    cpl_device_host_free(s->dev, &s->host);
    cpl_free(selection);
}

cpl_status cpl_selection_run(cpl_selection *s, cpl_prune_report *report) {
    cpl_status st = CPL_OK;
    const cpl_layout *l = s->layout;
    s->report = report;
    report->threshold = 0;
    report->ties = 0;
    report->searched = 0;
    report->population = population(l, s->o, 0, l->count);
    if (s->o->scope == CPL_SCOPE_GLOBAL) {
        CPL_TRY(remove_smallest(s, 0, l->count, report->population, fraction(report->population, s->o->sparsity)));
    }
    for (int64_t i = 0; s->o->scope == CPL_SCOPE_TENSOR && i < l->count; i++) {
        int64_t n = population(l, s->o, i, i + 1);
        CPL_TRY(remove_smallest(s, i, i + 1, n, fraction(n, s->o->sparsity)));
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

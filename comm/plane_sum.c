/* Sums and collects flat device buffers where the group has a plane (NCCL): at once, or range by range beside other work.
 * Refuses ranges that do not cover the buffer once, and in a sum by tree any order but that of the rank numbers. */
#include "comm/internal.h"

/* Slices of the longest part, and f32 elements that come from all others at a time: 1 to 32 MiB. STAGES: one is added up while the
 * next arrives. */
enum { SLICES = 16, ARRIVING_LEAST = 1 << 18, ARRIVING_MOST = 1 << 23, STAGES = 2 };

int64_t cpl_plane_slice(int64_t longest, int ranks) {
    int64_t least = ARRIVING_LEAST / (ranks - 1), most = ARRIVING_MOST / (ranks - 1), slice = longest / SLICES;
    slice = slice < least ? least : slice > most ? most : slice;
    slice = (slice < longest ? slice : longest) / CPL_SUM_CHUNK * CPL_SUM_CHUNK;
    return slice > 0 ? slice : CPL_SUM_CHUNK;
}

int64_t cpl_reduction_bytes(int64_t longest, int ranks, bool exact) {
    int64_t board = ranks > 1 && ranks <= CPL_REACH_MOST ? CPL_SHARED_LEAST : 0;
    return board + (exact && ranks > 2 ? STAGES * (ranks - 1) * cpl_plane_slice(longest, ranks) * (int64_t)sizeof(float) : 0);
}

static int64_t longest_part(const int64_t *begin, int size) {
    int64_t longest = 0;
    for (int r = 0; r < size; r++) {
        int64_t n = begin[r + 1] - begin[r];
        longest = n > longest ? n : longest;
    }
    return longest;
}

/* The first time on all ranks at once: its size depends on the parts alone. */
static cpl_status stage_ensure(cpl_plane *p, int64_t elements) {
    cpl_status st = CPL_OK;
    if (p->stage_size >= (size_t)elements) {
        return CPL_OK;
    }
    cpl_device_free(p->dev, &p->stage);
    p->stage_size = 0;
    CPL_TRY(cpl_agree(
        p->comm, cpl_device_alloc(p->dev, &p->stage, (size_t)elements, sizeof *p->stage, "staging memory of a sum over ranks")));
    p->stage_size = (size_t)elements;
done:
    return st;
}

/* leaf[lo] = sum of leaf[lo .. hi-1], n elements each; the inner leaves are used up. */
static cpl_status tree_sum(cpl_device *dev, const cpl_piece *leaf, int lo, int hi, int64_t n) {
    cpl_status st = CPL_OK;
    if (hi - lo < 2) {
        return CPL_OK;
    }
    int middle = lo + (hi - lo) / 2;
    CPL_TRY(tree_sum(dev, leaf, lo, middle, n));
    CPL_TRY(tree_sum(dev, leaf, middle, hi, n));
    CPL_TRY(CPL_OPS(dev, add_f32, leaf[lo].data, leaf[middle].data, n));
done:
    return st;
}

/* Slice k of the own part: where each rank's values of it are, [size], and how many. */
static int64_t leaves(const cpl_plane *p, float *x, const int64_t *begin, int64_t k, int64_t slice, cpl_piece *leaf) {
    int rank = p->comm->rank, size = p->comm->size;
    float *stage = p->stage + k % STAGES * (size - 1) * slice;
    int64_t first = 0, n = cpl_parts_slice(begin, rank, k, slice, &first);
    for (int q = 0; q < size; q++) {
        leaf[q] = (cpl_piece){q == rank ? x + first : stage + slice * (q < rank ? q : q - 1), (size_t)n * sizeof(float)};
    }
    return n;
}

/* All ranks' values of slice k of their parts go to the owners. */
static cpl_status bring_slice(cpl_plane *p, float *x, const int64_t *begin, int64_t k, int64_t slice) {
    cpl_comm *c = p->comm;
    cpl_piece *to = c->pieces, *from = c->pieces + c->size;
    leaves(p, x, begin, k, slice, from);
    for (int q = 0; q < c->size; q++) {
        int64_t first = 0, n = cpl_parts_slice(begin, q, k, slice, &first);
        to[q] = (cpl_piece){x + first, (size_t)n * sizeof(float)};
    }
    return p->ops->exchange(p, to, from);
}

static cpl_status add_slice(cpl_plane *p, float *x, const int64_t *begin, int64_t k, int64_t slice) {
    cpl_status st = CPL_OK;
    cpl_piece *leaf = p->comm->pieces;
    int64_t n = leaves(p, x, begin, k, slice, leaf);
    const cpl_piece own = leaf[p->comm->rank];
    if (n == 0) {
        return CPL_OK;
    }
    CPL_TRY(tree_sum(p->dev, leaf, 0, p->comm->size, n));
    if (p->comm->rank != 0) {
        CPL_TRY(CPL_OPS(p->dev, copy, own.data, leaf[0].data, own.bytes));
    }
done:
    return st;
}

cpl_status cpl_plane_reduce(cpl_comm *c, float *x, const int64_t *begin, int64_t first, int64_t last) {
    int64_t sum = 0;
    for (int r = 0; r < c->size; r++) {
        int64_t from = begin[r] > first ? begin[r] : first, to = begin[r + 1] < last ? begin[r + 1] : last;
        c->first[r] = from;
        c->count[r] = to > from ? to - from : 0;
        sum += c->count[r];
    }
    return sum == 0 ? CPL_OK : c->plane->ops->reduce(c->plane, x, c->first, c->count);
}

/* The sum of two is the tree over two, whoever adds. */
cpl_status cpl_plane_reduce_scatter(cpl_comm *c, float *x, const int64_t *begin) {
    cpl_status st = CPL_OK;
    cpl_plane *p = c->plane;
    if (c->size <= 2) {
        CPL_TRY(p->ops->fork(p));
        CPL_TRY(cpl_plane_reduce(c, x, begin, begin[0], begin[c->size]));
        return p->ops->join(p);
    }
    int64_t slice = cpl_plane_slice(longest_part(begin, c->size), c->size), rounds = cpl_parts_rounds(c, begin, slice);
    CPL_TRY(stage_ensure(p, STAGES * (c->size - 1) * slice));
    for (int64_t k = 0; k <= rounds; k++) { /* what came before is added up beside the arrival of slice k */
        if (k < rounds) {
            CPL_TRY(p->ops->fork(p));
            CPL_TRY(bring_slice(p, x, begin, k, slice));
        }
        if (k > 0) {
            CPL_TRY(add_slice(p, x, begin, k - 1, slice));
        }
        if (k < rounds) {
            CPL_TRY(p->ops->join(p));
        }
    }
done:
    return st;
}

void cpl_comm_slice(int64_t begin, int64_t end, int k, int slices, int64_t *first, int64_t *last) {
    int64_t chunks = (end - begin + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK;
    *first = begin + chunks * k / slices * CPL_SUM_CHUNK;
    *last = k + 1 == slices ? end : begin + chunks * (k + 1) / slices * CPL_SUM_CHUNK;
}

cpl_status cpl_comm_allgather_slice(cpl_comm *c, cpl_device *dev, void *x, size_t element, const int64_t *begin, int k,
                                    int slices) {
    cpl_status st = CPL_OK;
    if (!cpl_by_plane(c, dev)) {
        return k + 1 == slices ? cpl_comm_allgather(c, dev, x, element, begin) : CPL_OK;
    }
    CPL_TRY(cpl_parts_check(c, begin, element));
    int64_t sum = 0;
    for (int r = 0; r < c->size; r++) {
        int64_t last = 0;
        cpl_comm_slice(begin[r], begin[r + 1], k, slices, &c->first[r], &last);
        c->count[r] = (last - c->first[r]) * (int64_t)element;
        c->first[r] *= (int64_t)element;
        sum += c->count[r];
    }
    CPL_TRY(c->plane->ops->fork(c->plane));
    if (sum > 0) {
        CPL_TRY(c->plane->ops->gather(c->plane, x, c->first, c->count));
    }
    if (k + 1 == slices) {
        CPL_TRY(c->plane->ops->join(c->plane));
    }
done:
    return st;
}

/* --- range by range --- */

void cpl_reduction_begin(cpl_reduction *r, cpl_comm *comm, cpl_device *dev, float *x, const int64_t *begin, bool exact) {
    *r = (cpl_reduction){.comm = comm, .dev = dev, .x = x, .begin = begin, .exact = exact};
}

/* Whether ranges go on their way before the end. */
static bool runs_beside(const cpl_reduction *r) {
    return cpl_by_plane(r->comm, r->dev) && (!r->exact || r->comm->size <= 2);
}

/* What is announced goes on its way. */
static cpl_status flush(cpl_reduction *r) {
    cpl_status st = CPL_OK;
    if (r->last > r->first) {
        CPL_TRY(r->comm->plane->ops->fork(r->comm->plane));
        CPL_TRY(cpl_plane_reduce(r->comm, r->x, r->begin, r->first, r->last));
    }
    r->first = r->last = 0;
done:
    return st;
}

cpl_status cpl_reduction_add(cpl_reduction *r, int64_t first, int64_t last) {
    cpl_status st = CPL_OK;
    if (first > last || first < r->begin[0] || last > r->begin[r->comm->size]) {
        CPL_FAIL(CPL_INTERNAL, "a sum over ranks: elements %lld to %lld are not in the buffer", (long long)first, (long long)last);
    }
    r->covered += last - first;
    if (!runs_beside(r)) {
        return CPL_OK;
    }
    if (r->last > r->first && first != r->last && last != r->first) {
        CPL_TRY(flush(r));
    }
    if (r->last == r->first) {
        r->first = first;
        r->last = last;
    } else {
        r->first = first < r->first ? first : r->first;
        r->last = last > r->last ? last : r->last;
    }
    if (r->last - r->first >= CPL_BUCKET) {
        CPL_TRY(flush(r));
    }
done:
    return st;
}

cpl_status cpl_reduction_end(cpl_reduction *r) {
    cpl_status st = CPL_OK;
    int64_t total = r->begin[r->comm->size] - r->begin[0];
    if (r->covered != total) {
        CPL_FAIL(CPL_INTERNAL, "a sum over ranks: %lld of %lld elements were announced", (long long)r->covered, (long long)total);
    }
    if (!runs_beside(r)) {
        return cpl_comm_reduce_scatter(r->comm, r->dev, r->x, r->begin);
    }
    CPL_TRY(flush(r));
    CPL_TRY(r->comm->plane->ops->join(r->comm->plane));
done:
    return st;
}

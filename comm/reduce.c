/* The data plane through host memory: sums and collects flat device buffers over the ranks, in slices, with a bounded amount of
 * extra memory. Where the group has a plane of its own (comm/plane_sum.c) that does it. Refuses to let the sum depend on anything
 * but the values and their rank numbers. */
#include "comm/internal.h"
#include <string.h>

enum { TREE_BLOCK = 2048 }; /* elements; the tree of a block stays in the first cache */

cpl_status cpl_parts_check(const cpl_comm *c, const int64_t *begin, size_t element) {
    cpl_status st = CPL_OK;
    bool rising = begin[0] >= 0;
    for (int r = 0; r < c->size; r++) {
        rising = rising && begin[r] <= begin[r + 1];
    }
    if (!rising) {
        CPL_FAIL(CPL_INTERNAL, "parts of a flat buffer must begin at 0 or later and not overlap");
    }
    int64_t bytes = 0;
    if (element > INT32_MAX || !cpl_mul_i64(begin[c->size], (int64_t)element, &bytes)) {
        CPL_FAIL(CPL_INTERNAL, "a flat buffer of %lld elements of %zu bytes is too large", (long long)begin[c->size], element);
    }
done:
    return st;
}

/* At least `bytes` of staging memory. Collective when it grows, which it does on all ranks at once: its size depends on c alone. */
static cpl_status stage_ensure(cpl_comm *c, size_t bytes) {
    cpl_status st = CPL_OK;
    if (c->stage_size >= bytes) {
        return CPL_OK;
    }
    cpl_free(&c->stage);
    c->stage_size = 0;
    CPL_TRY(cpl_agree(c, cpl_alloc(&c->stage, bytes, 1, "staging memory of a sum over ranks")));
    c->stage_size = bytes;
done:
    if (st != CPL_OK) {
        cpl_free(&c->stage);
    }
    return st;
}

/* Bytes of a slice when `size` of them fill the stage: a multiple of `element`. */
static size_t slice_bytes(const cpl_comm *c, size_t element) {
    size_t bytes = c->stage_limit / (size_t)c->size;
    if (bytes < CPL_STAGE_PIECE) {
        bytes = CPL_STAGE_PIECE;
    }
    return bytes < element ? element : bytes / element * element;
}

int64_t cpl_parts_slice(const int64_t *begin, int r, int64_t k, int64_t slice, int64_t *first) {
    int64_t left = begin[r + 1] - begin[r] - k * slice;
    if (left <= 0) {
        *first = begin[r + 1];
        return 0;
    }
    *first = begin[r] + k * slice;
    return left < slice ? left : slice;
}

int64_t cpl_parts_rounds(const cpl_comm *c, const int64_t *begin, int64_t slice) {
    int64_t longest = 0;
    for (int r = 0; r < c->size; r++) {
        int64_t n = begin[r + 1] - begin[r];
        longest = n > longest ? n : longest;
    }
    return longest / slice + (longest % slice != 0);
}

/* leaf[lo] = sum of leaf[lo .. hi-1] over elements [first, first+n); the inner leaves are used up. */
static void tree_block(const cpl_piece *leaf, int lo, int hi, int64_t first, int64_t n) {
    if (hi - lo < 2) {
        return;
    }
    int middle = lo + (hi - lo) / 2;
    tree_block(leaf, lo, middle, first, n);
    tree_block(leaf, middle, hi, first, n);
    float *restrict left = (float *)leaf[lo].data + first;
    const float *restrict right = (const float *)leaf[middle].data + first;
    for (int64_t i = 0; i < n; i++) {
        left[i] += right[i];
    }
}

static void tree_sum(const cpl_piece *leaf, int ranks, int64_t n) {
    for (int64_t first = 0; first < n; first += TREE_BLOCK) {
        tree_block(leaf, 0, ranks, first, n - first < TREE_BLOCK ? n - first : TREE_BLOCK);
    }
}

/* One slice of every part. *local: a failure of this rank's device, which does not end the exchange. */
static cpl_status reduce_slice(cpl_comm *c, cpl_device *dev, float *x, const int64_t *begin, int64_t k, int64_t slice,
                               cpl_status *local) {
    cpl_status st = CPL_OK;
    bool host = cpl_on_host(dev);
    cpl_piece *to = c->pieces, *from = c->pieces + c->size;
    int64_t first = 0, own_first = 0;
    int64_t own = cpl_parts_slice(begin, c->rank, k, slice, &own_first);
    size_t step = (size_t)slice * sizeof(float), own_bytes = (size_t)own * sizeof(float);
    char *received = c->stage, *sent = c->stage + step * (size_t)c->size;
    for (int q = 0; q < c->size; q++) {
        int64_t n = cpl_parts_slice(begin, q, k, slice, &first);
        void *copy = q == c->rank ? received + step * (size_t)q : sent + step * (size_t)q;
        to[q] = (cpl_piece){host ? (void *)(x + first) : copy, (size_t)n * sizeof(float)};
        from[q] = (cpl_piece){q == c->rank ? to[q].data : received + step * (size_t)q, own_bytes};
        if (!host && n > 0 && *local == CPL_OK) {
            *local = CPL_OPS(dev, download, copy, x + first, to[q].bytes);
        }
    }
    CPL_TRY(c->ops->exchange(c, to, from));
    tree_sum(from, c->size, own);
    if (own > 0 && host && c->rank != 0) {
        memcpy(x + own_first, from[0].data, own_bytes);
    } else if (own > 0 && !host && *local == CPL_OK) {
        *local = CPL_OPS(dev, upload, x + own_first, from[0].data, own_bytes);
    }
done:
    return st;
}

cpl_status cpl_comm_reduce_scatter(cpl_comm *c, cpl_device *dev, float *x, const int64_t *begin) {
    cpl_status st = CPL_OK, local = CPL_OK;
    CPL_TRY(cpl_parts_check(c, begin, sizeof(float)));
    if (cpl_by_plane(c, dev)) {
        return cpl_plane_reduce_scatter(c, x, begin);
    }
    if (c->size == 1) {
        goto done;
    }
    size_t bytes = slice_bytes(c, sizeof(float));
    CPL_TRY(stage_ensure(c, bytes * (size_t)c->size * (cpl_on_host(dev) ? 1 : 2)));
    int64_t slice = (int64_t)(bytes / sizeof(float)), rounds = cpl_parts_rounds(c, begin, slice);
    for (int64_t k = 0; k < rounds; k++) {
        CPL_TRY(reduce_slice(c, dev, x, begin, k, slice, &local));
    }
    if (!cpl_on_host(dev)) {
        CPL_TRY(cpl_agree(c, local));
    }
done:
    return st;
}

/* Slice k of every part by way of the stage, where the slices stand one after another. *local as above. */
static cpl_status gather_slice(cpl_comm *c, cpl_device *dev, char *x, size_t element, const int64_t *begin, int64_t k,
                               int64_t slice, cpl_status *local) {
    cpl_status st = CPL_OK;
    bool host = cpl_on_host(dev);
    int64_t first = 0;
    c->offset[0] = 0;
    for (int q = 0; q < c->size; q++) {
        c->offset[q + 1] = c->offset[q] + cpl_parts_slice(begin, q, k, slice, &first) * (int64_t)element;
    }
    size_t own = (size_t)(c->offset[c->rank + 1] - c->offset[c->rank]);
    cpl_parts_slice(begin, c->rank, k, slice, &first);
    char *from = x + (size_t)first * element, *stage = c->stage + c->offset[c->rank];
    if (own > 0 && host) {
        memcpy(stage, from, own);
    } else if (own > 0 && *local == CPL_OK) {
        *local = CPL_OPS(dev, download, stage, from, own);
    }
    CPL_TRY(c->ops->allgather(c, c->stage, c->offset));
    for (int q = 0; q < c->size; q++) {
        size_t bytes = (size_t)cpl_parts_slice(begin, q, k, slice, &first) * element;
        if (q == c->rank || bytes == 0) {
            continue;
        }
        char *to = x + (size_t)first * element;
        if (host) {
            memcpy(to, c->stage + c->offset[q], bytes);
        } else if (*local == CPL_OK) {
            *local = CPL_OPS(dev, upload, to, c->stage + c->offset[q], bytes);
        }
    }
done:
    return st;
}

cpl_status cpl_comm_allgather(cpl_comm *c, cpl_device *dev, void *x, size_t element, const int64_t *begin) {
    cpl_status st = CPL_OK, local = CPL_OK;
    CPL_TRY(cpl_parts_check(c, begin, element));
    if (cpl_by_plane(c, dev)) {
        return cpl_comm_allgather_slice(c, dev, x, element, begin, 0, 1);
    }
    if (c->size == 1 || element == 0) {
        goto done;
    }
    size_t total = (size_t)(begin[c->size] - begin[0]) * element;
    if (cpl_on_host(dev) && total <= c->direct_limit) {
        for (int r = 0; r <= c->size; r++) {
            c->offset[r] = (begin[r] - begin[0]) * (int64_t)element;
        }
        CPL_TRY(c->ops->allgather(c, (char *)x + (size_t)begin[0] * element, c->offset));
        goto done;
    }
    size_t bytes = slice_bytes(c, element);
    size_t stage = 0;
    if (!cpl_mul_size(bytes, (size_t)c->size, &stage) || stage > INT32_MAX) {
        CPL_FAIL(CPL_INTERNAL, "an allgather of elements of %zu bytes over %d ranks does not fit one message", element, c->size);
    }
    CPL_TRY(stage_ensure(c, stage));
    int64_t slice = (int64_t)(bytes / element), rounds = cpl_parts_rounds(c, begin, slice);
    for (int64_t k = 0; k < rounds; k++) {
        CPL_TRY(gather_slice(c, dev, x, element, begin, k, slice, &local));
    }
    if (!cpl_on_host(dev)) {
        CPL_TRY(cpl_agree(c, local));
    }
done:
    return st;
}

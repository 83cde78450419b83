/* The optimizer where the ranks' devices reach each other's memory: who sums and updates what, how gradients come there, and how
 * what is updated here and what is stored here become one another.
 * Refuses to hold up the backward pass: copy engines carry what is final beside it. Only the embeddings, which are final last, are
 * left to be read over the links; hence every rank owns a part of them and a part of the rest. */
#include "jobs/optim/internal.h"

/* Where the embeddings end, at a chunk. */
static int64_t embeddings_end(const cpl_layout *l) {
    int64_t first = 0, last = 0;
    cpl_layout_range(l, cpl_layout_ranges(l) - 1, &first, &last);
    int64_t end = (l->begin[last] + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK * CPL_SUM_CHUNK;
    return end < l->total ? end : l->total;
}

/* The longest part of what is behind them: the first one. */
static int64_t longest_part(const cpl_layout *l, int ranks) {
    int64_t middle = embeddings_end(l);
    return cpl_part_begin(middle, l->total, ranks, 1) - middle;
}

static cpl_stretch part_of(int64_t first, int64_t last, int ranks, int rank) {
    return (cpl_stretch){.first = cpl_part_begin(first, last, ranks, rank), .last = cpl_part_begin(first, last, ranks, rank + 1)};
}

void cpl_reach_divide(const cpl_layout *l, int ranks, int rank, cpl_stretch *own) {
    int64_t middle = embeddings_end(l);
    own[0] = part_of(0, middle, ranks, rank);
    own[1] = part_of(middle, l->total, ranks, rank);
    own[1].at = cpl_stretch_count(&own[0]);
}

size_t cpl_reach_received_bytes(const cpl_layout *l, int ranks) {
    return (size_t)(ranks - 1) * (size_t)longest_part(l, ranks) * sizeof(float);
}

cpl_reach cpl_reach_part(const cpl_optimizer *o, const void *part) {
    return cpl_reach_at(&o->shared, (size_t)((const char *)part - o->block));
}

/* --- the step --- */

/* Where a rank's `received` holds what another sent. */
static float *place_of(const cpl_optimizer *o, float *received, int rank, int from) {
    return received + (from < rank ? from : from - 1) * longest_part(o->layout, o->shared.count);
}

cpl_status cpl_reach_send(cpl_optimizer *o, int64_t first, int64_t last) {
    cpl_status st = CPL_OK;
    const cpl_reach received = cpl_reach_part(o, o->received);
    for (int k = 1; k < received.count; k++) {
        int rank = (received.own + k) % received.count;
        cpl_stretch theirs[2];
        cpl_reach_divide(o->layout, received.count, rank, theirs);
        int64_t from = first > theirs[1].first ? first : theirs[1].first, to = last < theirs[1].last ? last : theirs[1].last;
        if (from < to) {
            float *there = place_of(o, received.at[rank], rank, received.own) + (from - theirs[1].first);
            CPL_TRY(cpl_device_copy_beside(o->dev, there, o->grad + from, (size_t)(to - from) * sizeof(float)));
        }
    }
done:
    return st;
}

/* Those of the embeddings where they are, the rest where it was sent to. */
static void parts_to_sum(const cpl_optimizer *o, cpl_sum_part part[2]) {
    for (int p = 0; p < 2; p++) {
        part[p] = (cpl_sum_part){cpl_reach_part(o, o->grad + o->own[p].first), o->own[p].first, o->own[p].last};
    }
    cpl_reach *rest = &part[1].grad;
    for (int r = 0; r < rest->count; r++) {
        if (r != rest->own) {
            rest->at[r] = place_of(o, o->received, rest->own, r);
        }
    }
}

cpl_status cpl_reach_sum(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    cpl_sum_part part[2];
    const cpl_reach kinds = cpl_reach_part(o, o->kinds), chunk_sums = cpl_reach_part(o, o->chunk_sums);
    parts_to_sum(o, part);
    if (!o->sent) {
        CPL_TRY(cpl_reach_send(o, 0, o->layout->total));
    }
    o->sent = false;
    CPL_TRY(cpl_device_join(o->dev));
    CPL_TRY(cpl_comm_meet(o->comm, NULL)); /* all gradients are final, all kinds cleared, all that was sent is there */
    CPL_TRY(CPL_OPS(o->dev, grad_sum, part, &kinds, &chunk_sums, o->overflow, o->layout->begin, o->layout->count));
done:
    return st;
}

/* --- between steps --- */

/* What is enqueued here is over on all ranks, or failed on one. */
static cpl_status settle(cpl_optimizer *o, cpl_status local) {
    return cpl_agree(o->comm, local == CPL_OK ? o->dev->ops->synchronize(o->dev) : local);
}

/* Own stretches of buffer from the gradients of the ranks whose shards they are in, or to these. */
static cpl_status carry(cpl_optimizer *o, void *buffer, size_t element, bool there) {
    cpl_status st = CPL_OK;
    const cpl_reach grad = cpl_reach_part(o, o->grad);
    for (int p = 0; p < 2; p++) {
        const cpl_stretch *own = &o->own[p];
        for (int r = 0; r < grad.count; r++) {
            int64_t from = own->first > o->shard[r] ? own->first : o->shard[r];
            int64_t to = own->last < o->shard[r + 1] ? own->last : o->shard[r + 1];
            if (from < to) {
                char *mine = cpl_stretch_in(o, buffer, own, element) + (size_t)(from - own->first) * element;
                char *theirs = (char *)grad.at[r] + (size_t)from * element;
                CPL_TRY(CPL_OPS(o->dev, copy, there ? theirs : mine, there ? mine : theirs, (size_t)(to - from) * element));
            }
        }
    }
done:
    return st;
}

static cpl_status clear_gradient(cpl_optimizer *o) {
    return settle(o, CPL_OPS(o->dev, zero, o->grad, (size_t)o->layout->total * sizeof(float)));
}

cpl_status cpl_reach_scatter(cpl_optimizer *o, void *buffer, const void *host, size_t element) {
    cpl_status st = CPL_OK;
    char *shard = (char *)o->grad + (size_t)o->begin * element;
    CPL_TRY(settle(o, o->n == 0 ? CPL_OK : CPL_OPS(o->dev, upload, shard, host, (size_t)o->n * element)));
    CPL_TRY(settle(o, carry(o, buffer, element, false)));
    CPL_TRY(clear_gradient(o));
done:
    return st;
}

cpl_status cpl_reach_gather(cpl_optimizer *o, void *host, void *buffer, size_t element) {
    cpl_status st = CPL_OK;
    const char *shard = (const char *)o->grad + (size_t)o->begin * element;
    CPL_TRY(settle(o, CPL_OK)); /* nobody's device is in a step */
    CPL_TRY(settle(o, carry(o, buffer, element, true)));
    CPL_TRY(settle(o, o->n == 0 ? CPL_OK : CPL_OPS(o->dev, download, host, shard, (size_t)o->n * element)));
    CPL_TRY(clear_gradient(o));
done:
    return st;
}

static cpl_status weights_to_all(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    size_t element = cpl_dtype_size(o->dtype);
    for (int p = 0; p < 2; p++) {
        char *mine = (char *)o->work + (size_t)o->own[p].first * element;
        const cpl_reach work = cpl_reach_part(o, mine);
        for (int r = 0; r < work.count && o->own[p].first < o->own[p].last; r++) {
            if (r != work.own) {
                CPL_TRY(CPL_OPS(o->dev, copy, work.at[r], mine, (size_t)cpl_stretch_count(&o->own[p]) * element));
            }
        }
    }
done:
    return st;
}

cpl_status cpl_reach_weights(cpl_optimizer *o) {
    return settle(o, weights_to_all(o));
}

/* The optimizer's flat buffers and the end of a step.
 * Refuses to touch a parameter before all ranks have agreed on overflow. */
#include "jobs/optim/internal.h"
#include <string.h>

enum { UPDATE_SLICES = 4 };

cpl_step_rules cpl_step_rules_of(const cpl_training *t, int64_t micro_batches) {
    bool dynamic =
        t->loss_scaling == CPL_SCALING_DYNAMIC || (t->loss_scaling == CPL_SCALING_AUTO && t->precision == CPL_PRECISION_FP16);
    cpl_step_rules r = {.dynamic = dynamic,
                        .growth = (float)t->scale_growth,
                        .backoff = (float)t->scale_backoff,
                        .growth_interval = (int32_t)t->scale_interval,
                        .hysteresis = (int32_t)t->hysteresis,
                        .min_scale = (float)t->min_scale,
                        .max_scale = (float)t->max_scale,
                        .clip = (float)t->clip,
                        .beta1 = (float)t->beta1,
                        .beta2 = (float)t->beta2,
                        .eps = (float)t->eps,
                        .inv_micro_batches = (float)(1.0 / (double)micro_batches)};
    return r;
}

static float first_scale(const cpl_training *t) {
    bool one = t->loss_scaling == CPL_SCALING_AUTO && t->precision != CPL_PRECISION_FP16;
    return one ? 1 : (float)t->loss_scale;
}

static int64_t chunks_of(const cpl_layout *l) {
    return (l->total + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK;
}

/* Shards in elements and in chunks, and what this rank updates. */
static cpl_status divide(cpl_optimizer *o, const cpl_training *t) {
    cpl_status st = CPL_OK;
    int ranks = cpl_comm_size(o->comm), rank = cpl_comm_rank(o->comm);
    CPL_TRY(cpl_alloc(&o->shard, (size_t)ranks + 1, sizeof *o->shard, "shard table"));
    CPL_TRY(cpl_alloc(&o->chunk, (size_t)ranks + 1, sizeof *o->chunk, "shard table"));
    cpl_layout_shards(o->layout, ranks, o->shard);
    for (int r = 0; r <= ranks; r++) {
        o->chunk[r] = (o->shard[r] + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK;
    }
    o->begin = o->shard[rank];
    o->n = o->shard[rank + 1] - o->begin;
    o->sharded = t->optimizer == CPL_OPTIMIZER_SHARDED;
    o->own[0] = (cpl_stretch){.first = o->begin, .last = o->shard[rank + 1], .at = o->sharded ? 0 : o->begin};
    if (cpl_optimizer_reaches(o)) {
        cpl_reach_divide(o->layout, ranks, rank, o->own);
    }
    o->count = o->sharded ? cpl_stretch_count(&o->own[0]) + cpl_stretch_count(&o->own[1]) : o->layout->total;
done:
    return st;
}

static cpl_status hand_on(void *to, int64_t first, int64_t last);

/* Bytes of the block up to each of its parts, and in all: a multiple of 256 for every part. */
typedef struct {
    size_t work, grad, chunk_sums, kinds, received, bytes;
} block_parts;

/* sharers: ranks whose devices reach each other's memory, or 1. */
static block_parts parts_of(const cpl_layout *l, cpl_dtype dt, int sharers) {
    enum { MULTIPLE = 256, PARTS = 5 };
    size_t total = (size_t)l->total, tensors = (size_t)l->count;
    const size_t bytes[PARTS] = {total * cpl_dtype_size(dt), total * sizeof(float), (size_t)chunks_of(l) * sizeof(double),
                                 (tensors + 1) * sizeof(uint32_t), cpl_reach_received_bytes(l, sharers)};
    size_t at[PARTS + 1] = {0};
    for (int i = 0; i < PARTS; i++) {
        at[i + 1] = at[i] + (bytes[i] + MULTIPLE - 1) / MULTIPLE * MULTIPLE;
    }
    bool short_of = sharers > 1 && at[PARTS] < CPL_SHARED_LEAST;
    return (block_parts){at[0], at[1], at[2], at[3], at[4], short_of ? CPL_SHARED_LEAST : at[PARTS]};
}

static cpl_status allocate(cpl_optimizer *o, bool masked) {
    cpl_status st = CPL_OK;
    size_t count = (size_t)o->count;
    block_parts part = parts_of(o->layout, o->dtype, cpl_optimizer_reaches(o) ? cpl_comm_size(o->comm) : 1);
    CPL_TRY(cpl_device_alloc(o->dev, &o->block, part.bytes, 1, "working weights and gradients"));
    o->work = o->block + part.work;
    o->grad = (float *)(o->block + part.grad);
    o->chunk_sums = (double *)(o->block + part.chunk_sums);
    o->kinds = (uint32_t *)(o->block + part.kinds);
    o->overflow = o->kinds + o->layout->count;
    o->received = (float *)(o->block + part.received);
    if (o->dtype == CPL_F32) {
        o->param = o->work;
    } else {
        CPL_TRY(cpl_device_alloc(o->dev, &o->param, count, sizeof(float), "master weights"));
    }
    CPL_TRY(cpl_device_alloc(o->dev, &o->m, count, sizeof(float), "AdamW first moments"));
    CPL_TRY(cpl_device_alloc(o->dev, &o->v, count, sizeof(float), "AdamW second moments"));
    if (masked) {
        CPL_TRY(cpl_device_alloc(o->dev, &o->mask, count, 1, "pruning mask"));
    }
    CPL_TRY(cpl_device_alloc(o->dev, &o->state, 1, sizeof(cpl_step_state), "step state"));
done:
    return st;
}

/* Shards on the hosts into a buffer that holds what is updated here. */
static cpl_status place(cpl_optimizer *o, void *buffer, const void *host, size_t element) {
    cpl_status st = CPL_OK;
    if (cpl_optimizer_reaches(o)) {
        return cpl_reach_scatter(o, buffer, host, element);
    }
    char *to = cpl_stretch_in(o, buffer, &o->own[0], element);
    cpl_status local = o->n == 0 ? CPL_OK : CPL_OPS(o->dev, upload, to, host, (size_t)o->n * element);
    CPL_TRY(cpl_agree(o->comm, local));
    if (!o->sharded) {
        CPL_TRY(cpl_comm_allgather(o->comm, o->dev, buffer, element, o->shard));
    }
done:
    return st;
}

static cpl_status cast_own(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    for (int p = 0; p < 2 && o->dtype != CPL_F32; p++) {
        const cpl_stretch *own = &o->own[p];
        char *work = cpl_stretch_in(o, o->work, own, cpl_dtype_size(o->dtype));
        CPL_TRY(CPL_OPS(o->dev, cast_from_f32, o->dtype, work, o->param + own->at, cpl_stretch_count(own)));
    }
done:
    return st;
}

/* work from the master weights: what is this rank's cast, then handed round. */
static cpl_status spread_weights(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(o->comm, cast_own(o)));
    if (cpl_optimizer_reaches(o)) {
        return cpl_reach_weights(o);
    }
    CPL_TRY(cpl_comm_allgather(o->comm, o->dev, o->work, cpl_dtype_size(o->dtype), o->shard));
done:
    return st;
}

/* A sum in each other's memory is one by tree: replicated weights get the bits of sharded ones, though NCCL sums for them. */
static bool sums_by_tree(const cpl_training *t, bool reaches) {
    return t->reduction == CPL_REDUCTION_TREE || reaches;
}

cpl_status cpl_optimizer_create(cpl_optimizer **out, cpl_comm *comm, cpl_device *dev, const cpl_layout *layout,
                                const cpl_training *t, const float *initial, const uint8_t *mask) {
    cpl_status st = CPL_OK;
    cpl_optimizer *o = NULL;
    cpl_status local = cpl_alloc(&o, 1, sizeof *o, "optimizer");
    if (local == CPL_OK) {
        o->comm = comm;
        o->dev = dev;
        o->layout = layout;
        o->dtype = cpl_dtype_storage(cpl_precision_dtype(t->precision));
        o->weight_decay = (float)t->weight_decay;
        o->rules = cpl_step_rules_of(t, t->global_batch / t->micro_batch);
        o->ready = (cpl_grad_ready){hand_on, o};
        local = divide(o, t);
    }
    if (local == CPL_OK) {
        local = cpl_alloc(&o->relative, (size_t)layout->count + 1, sizeof *o->relative, "offsets of gradients");
    }
    if (local == CPL_OK) {
        local = allocate(o, mask != NULL);
    }
    if (local == CPL_OK) {
        cpl_reduction_begin(&o->reduction, comm, dev, o->grad, o->shard, sums_by_tree(t, cpl_comm_reaches(comm)));
    }
    CPL_TRY(cpl_agree(comm, local));
    if (cpl_optimizer_reaches(o)) {
        CPL_TRY(cpl_comm_share(comm, dev, o->block, &o->shared));
    }
    cpl_step_state state = {.loss_scale = first_scale(t), .hysteresis_left = (int32_t)t->hysteresis};
    CPL_TRY(cpl_agree(comm, CPL_OPS(dev, upload, o->state, &state, sizeof state)));
    if (mask != NULL) {
        CPL_TRY(place(o, o->mask, mask, 1));
    }
    CPL_TRY(place(o, o->param, initial, sizeof(float)));
    CPL_TRY(spread_weights(o));
    *out = o;
    o = NULL;
done:
    cpl_optimizer_destroy(&o);
    return st;
}

void cpl_optimizer_destroy(cpl_optimizer **opt) {
    cpl_optimizer *o = *opt;
    if (o == NULL) {
        return;
    }
    if (o->dtype != CPL_F32) {
        cpl_device_free(o->dev, &o->param);
    }
    cpl_comm_unshare(o->comm, o->dev, &o->shared);
    cpl_device_free(o->dev, &o->block);
    cpl_device_free(o->dev, &o->m);
    cpl_device_free(o->dev, &o->v);
    cpl_device_free(o->dev, &o->mask);
    cpl_device_free(o->dev, &o->state);
    cpl_free(&o->relative);
    cpl_free(&o->shard);
    cpl_free(&o->chunk);
    cpl_free(opt);
}

int64_t cpl_optimizer_bytes(const cpl_layout *layout, const cpl_training *t, int ranks, int rank, bool masked, bool nccl) {
    int64_t begin = 0, end = layout->total, longest = cpl_part_begin(0, end, ranks, 1);
    bool sharded = t->optimizer == CPL_OPTIMIZER_SHARDED, reaches = nccl && ranks > 1 && ranks <= CPL_REACH_MOST,
         shares = sharded && reaches;
    cpl_stretch own[2];
    cpl_reach_divide(layout, ranks, rank, own);
    if (sharded) {
        begin = cpl_part_begin(0, layout->total, ranks, rank);
        end = cpl_part_begin(0, layout->total, ranks, rank + 1);
    }
    int64_t count = shares ? cpl_stretch_count(&own[0]) + cpl_stretch_count(&own[1]) : end - begin,
            element = (int64_t)cpl_dtype_size(cpl_precision_dtype(t->precision));
    int64_t master = element == 4 ? 0 : 4; /* the working weights are the master weights where they are f32 */
    int64_t block = (int64_t)parts_of(layout, cpl_dtype_storage(cpl_precision_dtype(t->precision)), shares ? ranks : 1).bytes;
    return block + count * (master + 8 + masked) + (int64_t)sizeof(cpl_step_state) +
           (nccl && !shares ? cpl_reduction_bytes(longest, ranks, sums_by_tree(t, reaches)) : 0);
}

/* --- the step --- */

static void sum_anew(cpl_optimizer *o) {
    const cpl_reduction *r = &o->reduction;
    cpl_reduction_begin(&o->reduction, r->comm, r->dev, r->x, r->begin, r->exact);
}

/* Whether the scan makes the norm's partial sums in the same pass: nothing is summed over ranks between. */
static bool scan_makes_sums(const cpl_optimizer *o) {
    return cpl_comm_size(o->comm) == 1 && !cpl_comm_overlaps(o->comm);
}

/* This rank's own gradient of tensors [first, last): the sum over ranks would change it. */
static cpl_status scan_range(cpl_optimizer *o, int64_t first, int64_t last) {
    double *chunk_sums = scan_makes_sums(o) ? o->chunk_sums : NULL; /* then the range is everything */
    const int64_t *begin = o->layout->begin;
    for (int64_t i = first; i <= last; i++) {
        o->relative[i - first] = begin[i] - begin[first];
    }
    return CPL_OPS(o->dev, grad_scan, o->kinds + first, o->overflow, chunk_sums, o->grad + begin[first], o->relative, last - first);
}

/* The gradients of tensors [first, last) are final. */
static cpl_status hand_on(void *to, int64_t first, int64_t last) {
    cpl_status st = CPL_OK;
    cpl_optimizer *o = to;
    if (cpl_optimizer_reaches(o)) {
        return cpl_reach_send(o, o->layout->begin[first], o->layout->begin[last]);
    }
    CPL_TRY(scan_range(o, first, last));
    CPL_TRY(cpl_reduction_add(&o->reduction, o->layout->begin[first], o->layout->begin[last]));
done:
    return st;
}

/* Range by range, as the backward pass announces them. */
static bool sums_early(const cpl_optimizer *o) {
    return cpl_comm_sums_early(o->comm) && !o->reduction.exact;
}

bool cpl_optimizer_overlaps(const cpl_optimizer *o) {
    return cpl_optimizer_reaches(o) || sums_early(o);
}

static cpl_status clear_kinds(cpl_optimizer *o) {
    return CPL_OPS(o->dev, zero, o->kinds, (size_t)(o->layout->count + 1) * sizeof *o->kinds); /* overflow too */
}

cpl_status cpl_optimizer_overlap(cpl_optimizer *o, const cpl_grad_ready **ready) {
    *ready = &o->ready;
    o->sent = cpl_optimizer_reaches(o);
    if (o->sent) {
        return clear_kinds(o);
    }
    sum_anew(o);
    return CPL_OPS(o->dev, zero, o->overflow, sizeof *o->overflow);
}

/* By the same ranges where another run overlaps: what a graph uses must have been used before. */
cpl_status cpl_optimizer_scan(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    int64_t ranges = sums_early(o) ? cpl_layout_ranges(o->layout) : 1, first = 0, last = o->layout->count;
    if (cpl_optimizer_reaches(o)) {
        return clear_kinds(o);
    }
    sum_anew(o);
    CPL_TRY(CPL_OPS(o->dev, zero, o->overflow, sizeof *o->overflow));
    for (int64_t k = 0; k < ranges; k++) {
        if (ranges > 1) {
            cpl_layout_range(o->layout, k, &first, &last);
        }
        CPL_TRY(scan_range(o, first, last));
    }
done:
    return st;
}

/* All at once; or, where a recorded step overlaps, what no backward pass has announced, in its order, so that the same pieces are
 * summed: over more than 2 ranks the bits may depend on them. */
static cpl_status sum_over_ranks(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    int64_t first = 0, last = 0;
    if (!sums_early(o)) {
        CPL_TRY(cpl_reduction_add(&o->reduction, 0, o->layout->total));
    }
    for (int64_t k = 0; o->reduction.covered < o->layout->total && k < cpl_layout_ranges(o->layout); k++) {
        cpl_layout_range(o->layout, k, &first, &last);
        CPL_TRY(cpl_reduction_add(&o->reduction, o->layout->begin[first], o->layout->begin[last]));
    }
    CPL_TRY(cpl_reduction_end(&o->reduction));
done:
    return st;
}

/* AdamW over a stretch of what is updated here: decayed tensors come first in the flat order. */
static cpl_status update(cpl_optimizer *o, const cpl_stretch *s) {
    cpl_status st = CPL_OK;
    int64_t end = o->layout->decayed_end, middle = end < s->first ? s->first : end > s->last ? s->last : end;
    const int64_t from[3] = {s->first, middle, s->last};
    for (int part = 0; part < 2; part++) {
        const cpl_stretch some = {from[part], from[part + 1], s->at + (from[part] - s->first)};
        if (cpl_stretch_count(&some) == 0) {
            continue;
        }
        char *work = cpl_stretch_in(o, o->work, &some, cpl_dtype_size(o->dtype));
        float *param = (float *)cpl_stretch_in(o, o->param, &some, sizeof *param);
        const cpl_reach everywhere = cpl_reach_part(o, work);
        CPL_TRY(CPL_OPS(o->dev, adamw, o->dtype, param, work, &everywhere, o->m + some.at, o->v + some.at, o->grad + some.first,
                        o->mask == NULL ? NULL : o->mask + some.at, cpl_stretch_count(&some), part == 0 ? o->weight_decay : 0,
                        o->state, &o->rules));
    }
done:
    return st;
}

/* ZeRO-1: the own shard in slices, each handed round while the next is updated. The largest shard is rank 0's. */
static cpl_status update_and_hand_round(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    if (cpl_optimizer_reaches(o)) {
        CPL_TRY(update(o, &o->own[0]));
        CPL_TRY(update(o, &o->own[1]));
        return cpl_comm_meet(o->comm, NULL); /* all have all weights */
    }
    int slices = cpl_comm_overlaps(o->comm) && o->shard[1] - o->shard[0] >= UPDATE_SLICES * CPL_BUCKET ? UPDATE_SLICES : 1;
    for (int k = 0; k < slices; k++) {
        cpl_stretch slice = {0};
        cpl_comm_slice(o->begin, o->begin + o->n, k, slices, &slice.first, &slice.last);
        slice.at = slice.first - o->begin;
        CPL_TRY(cpl_agree(o->comm, update(o, &slice)));
        CPL_TRY(cpl_comm_allgather_slice(o->comm, o->dev, o->work, cpl_dtype_size(o->dtype), o->shard, k, slices));
    }
done:
    return st;
}

/* Every rank gets the same bits, for one partial sum per chunk is gathered, not added
 * up on the way. */
cpl_status cpl_optimizer_decide(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    int rank = cpl_comm_rank(o->comm);
    CPL_TRY(cpl_comm_or_flag(o->comm, o->dev, o->overflow)); /* by reach all chunk_sums are here then */
    if (!scan_makes_sums(o) && !cpl_optimizer_reaches(o)) {
        CPL_TRY(cpl_agree(o->comm, CPL_OPS(o->dev, sum_squares, o->chunk_sums + o->chunk[rank], o->grad + o->begin, o->n)));
        CPL_TRY(cpl_comm_allgather(o->comm, o->dev, o->chunk_sums, sizeof(double), o->chunk));
    }
    CPL_TRY(CPL_OPS(o->dev, step_control, o->state, &o->rules, o->overflow, o->chunk_sums, chunks_of(o->layout)));
done:
    return st;
}

cpl_status cpl_optimizer_feed_lr(cpl_optimizer *o, const float *lr) {
    return CPL_OPS(o->dev, feed, (char *)o->state + offsetof(cpl_step_state, lr), lr, sizeof *lr);
}

static cpl_status end_of_step(cpl_optimizer *o) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_optimizer_reaches(o) ? cpl_reach_sum(o) : sum_over_ranks(o));
    if (!o->sharded) {
        CPL_TRY(cpl_comm_allgather(o->comm, o->dev, o->grad, sizeof(float), o->shard));
    }
    CPL_TRY(cpl_optimizer_decide(o));
    if (o->sharded) {
        CPL_TRY(update_and_hand_round(o));
    } else {
        CPL_TRY(cpl_agree(o->comm, update(o, &(cpl_stretch){.first = 0, .last = o->layout->total})));
    }
done:
    return st;
}

/* Where devices meet, one that does not come leaves the others waiting. */
cpl_status cpl_optimizer_step(cpl_optimizer *o) {
    cpl_status st = end_of_step(o);
    return cpl_optimizer_reaches(o) ? cpl_comm_enqueued(o->comm, st, "end of a training step") : st;
}

/* This rank's shard of a buffer that holds what is updated here. */
static cpl_status take_shard(cpl_optimizer *o, float *host, float *buffer) {
    if (cpl_optimizer_reaches(o)) {
        return cpl_reach_gather(o, host, buffer, sizeof *host);
    }
    const char *from = cpl_stretch_in(o, buffer, &o->own[0], sizeof *host);
    return cpl_agree(o->comm, o->n == 0 ? CPL_OK : CPL_OPS(o->dev, download, host, from, (size_t)o->n * sizeof *host));
}

cpl_status cpl_optimizer_download(cpl_optimizer *o, float *param, float *m, float *v, cpl_step_state *state) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(o->comm, CPL_OPS(o->dev, download, state, o->state, sizeof *state)));
    CPL_TRY(take_shard(o, param, o->param));
    CPL_TRY(take_shard(o, m, o->m));
    CPL_TRY(take_shard(o, v, o->v));
done:
    return st;
}

cpl_status cpl_optimizer_restore(cpl_optimizer *o, const float *param, const float *m, const float *v,
                                 const cpl_step_state *state) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(o->comm, CPL_OPS(o->dev, upload, o->state, state, sizeof *state)));
    CPL_TRY(place(o, o->param, param, sizeof(float)));
    CPL_TRY(place(o, o->m, m, sizeof(float)));
    CPL_TRY(place(o, o->v, v, sizeof(float)));
    CPL_TRY(spread_weights(o));
done:
    return st;
}

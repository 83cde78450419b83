/* What the files of the optimizer share: where devices reach each other's memory (jobs/optim/reach.c).
 * Refuses to be included from outside jobs/optim. */
#ifndef CPL_JOBS_OPTIM_INTERNAL_H
#define CPL_JOBS_OPTIM_INTERNAL_H

#include "jobs/optim/optimizer.h"

/* Where a stretch begins in a buffer that holds what is updated here, or in the working weights (fp32: these are the master
 * weights, and whole). */
static inline char *cpl_stretch_in(const cpl_optimizer *o, void *buffer, const cpl_stretch *s, size_t element) {
    return (char *)buffer + (size_t)(buffer == o->work ? s->first : s->at) * element;
}
static inline int64_t cpl_stretch_count(const cpl_stretch *s) {
    return s->last - s->first;
}

/* Whether gradients are summed, and new weights handed round, from device to device. All below is for such optimizers. */
static inline bool cpl_optimizer_reaches(const cpl_optimizer *o) {
    return o->sharded && cpl_comm_reaches(o->comm);
}
/* *own [2] of a rank, in elements: its part of the embeddings, and of what is behind them. Both begin at multiples of
 * CPL_SUM_CHUNK. */
void cpl_reach_divide(const cpl_layout *layout, int ranks, int rank, cpl_stretch *own);
/* Bytes of `received` on each rank; 0 for one rank. */
size_t cpl_reach_received_bytes(const cpl_layout *layout, int ranks);
/* A part of the block, of all ranks. */
cpl_reach cpl_reach_part(const cpl_optimizer *o, const void *part);

/* This rank's gradient of elements [first, last) is final: enqueues copies of what others sum of it, beside what follows. Errors:
 * CPL_DEVICE. */
cpl_status cpl_reach_send(cpl_optimizer *o, int64_t first, int64_t last);
/* This rank's part of all gradients, out of the memory of all; enqueued. Errors: CPL_DEVICE, CPL_COMM; then the others' devices
 * wait. */
cpl_status cpl_reach_sum(cpl_optimizer *o);

/* Collective, between steps. Shards on the hosts into the devices' own stretches of buffer (scatter), and back (gather); by way of
 * the gradient, which is zero afterwards. element: bytes, at most 4. weights: own stretches of work to all. Errors: CPL_DEVICE,
 * CPL_COMM, agreed. */
cpl_status cpl_reach_scatter(cpl_optimizer *o, void *buffer, const void *host, size_t element);
cpl_status cpl_reach_gather(cpl_optimizer *o, void *host, void *buffer, size_t element);
cpl_status cpl_reach_weights(cpl_optimizer *o);

#endif

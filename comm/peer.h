/* The other rank of a pair whose GPUs reach each other's memory: its mailbox is written by copy engines, over NVLink or PCIe, and
 * no multiprocessor is taken from what computes. Refuses groups of any other size, and ranks on several hosts. */
#ifndef CPL_COMM_PEER_H
#define CPL_COMM_PEER_H

#include "comm/internal.h"
#include <cuda_runtime_api.h>

typedef struct cpl_peer cpl_peer;

/* Collective. *out stays NULL where it cannot be: why says so, the same on both ranks. beside: the stream that what follows is
 * enqueued on, borrowed. Errors: CPL_COMM, CPL_NO_MEMORY, agreed. */
cpl_status cpl_peer_open(cpl_peer **out, cpl_comm *c, cpl_device *dev, cudaStream_t beside, char *why, size_t size);
/* Collective, after all work of both. */
void cpl_peer_close(cpl_peer **peer);

/* The calls below enqueue the same on both ranks, in the same order. Errors: CPL_DEVICE; then the other rank's GPU may wait. */

/* Elements [first, first + count) of x, of the other rank's part in parts begin [3], go their way. Collective where parts are
 * longer than any before; that may not be recorded. */
cpl_status cpl_peer_give(cpl_peer *p, const float *x, const int64_t *begin, int64_t first, int64_t count);
/* After the whole of both parts was given: what follows on the device finds the sum in this rank's part of x. */
cpl_status cpl_peer_add(cpl_peer *p, float *x, const int64_t *begin);

#endif

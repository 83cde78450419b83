/* The device a rank computes on: a GPU of its own where the host has them, else a fair share of the host's cores.
 * Refuses to let the ranks of a host start more threads together than it has cores for them, or share GPUs unasked. */
#ifndef CPL_JOBS_DEVICE_H
#define CPL_JOBS_DEVICE_H

#include "comm/comm.h"

/* Collective over world. choice: index into auto|cpu|cuda; auto: what CUPEL_DEVICE says, else GPUs where any rank sees one, and
 * then all must. threads 0: OMP_NUM_THREADS where it is set, else the cores this rank may run on, divided among the ranks of the
 * host that may run on the same ones. Ranks that see one GPU each (Slurm --gpus-per-task) take it; of those that see the same ones
 * the n-th of the host takes the n-th; up to ranks_per_gpu (0: CUPEL_RANKS_PER_GPU, else 1) share one, in blocks of neighbours.
 * Errors: as cpl_device_create; CPL_USAGE naming host, ranks and GPUs where there are more ranks than may be; agreed. */
cpl_status cpl_job_device(cpl_comm *world, int choice, int64_t threads, int64_t ranks_per_gpu, cpl_device **dev);

/* Host and anything else in one number, equal for ranks that share both. */
int64_t cpl_identity(const char *host, const void *what, size_t bytes);

/* Collective: the ranks' way of exchanging its memory ends before it does. Accepts NULL inside. */
void cpl_job_device_close(cpl_comm *world, cpl_device **dev);

#endif

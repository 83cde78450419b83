/* The device a rank computes on, with a fair share of the host's cores.
 * Refuses to let the ranks of a host start more threads together than it has cores for them. */
#ifndef CPL_JOBS_DEVICE_H
#define CPL_JOBS_DEVICE_H

#include "comm/comm.h"

/* Collective over world. choice: index into auto|cpu|cuda. threads 0: OMP_NUM_THREADS where it is set, else the cores this rank may
 * run on, divided among the ranks of the host that may run on the same ones. Errors: as cpl_device_create, agreed. */
cpl_status cpl_job_device(cpl_comm *world, int choice, int64_t threads, cpl_device **dev);

/* Collective: the ranks' way of exchanging its memory ends before it does. Accepts NULL inside. */
void cpl_job_device_close(cpl_comm *world, cpl_device **dev);

#endif

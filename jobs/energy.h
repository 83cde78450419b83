/* What a phase of work drew: GPUs and processor packages read before and after, each counted once however many ranks share it.
 * Refuses to give a part for the whole: where one rank's meter is missing there is no figure. */
#ifndef CPL_JOBS_ENERGY_H
#define CPL_JOBS_ENERGY_H

#include "comm/comm.h"

/* A phase on one rank; its device has nothing left to do when it begins and when it ends. */
typedef struct {
    cpl_energy start;
} cpl_energy_phase;
void cpl_energy_begin(cpl_energy_phase *phase, cpl_device *dev);

typedef struct {
    double joules;      /* NAN: not known */
    const char *source; /* static: "NVML", "RAPL", "NVML,RAPL"; "" where it is not known */
} cpl_energy_drawn;
/* Collective. Of all ranks of comm together. */
cpl_status cpl_energy_end(const cpl_energy_phase *phase, cpl_comm *comm, cpl_device *dev, cpl_energy_drawn *drawn);

/* Collective over world; the same on all ranks of it. Whether every rank has a meter, and none is shared by ranks of different
 * groups: then what a group draws is its own. group: this rank's. */
typedef enum { CPL_METERS_OWN, CPL_METERS_SHARED, CPL_METERS_MISSING } cpl_meters;
cpl_status cpl_energy_meters(cpl_comm *world, cpl_comm *group, cpl_device *dev, cpl_meters *meters);

#endif

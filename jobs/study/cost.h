/* What a stage took, over all ranks: time, device memory, energy.
 * Refuses a figure that was not measured: its attribute is absent. */
#ifndef CPL_JOBS_STUDY_COST_H
#define CPL_JOBS_STUDY_COST_H

#include "io/record.h"
#include "jobs/energy.h"

typedef struct {
    double started;
    cpl_energy_phase phase;
    double wall_s;
    int64_t bytes_peak, bytes_used; /* the most of a rank; used 0: not known */
    cpl_energy_drawn energy;
} cpl_stage_cost;

/* Gives back what earlier stages left on the device for themselves, so that the peak is this one's own. */
void cpl_stage_cost_begin(cpl_stage_cost *cost, cpl_device *dev);
/* Collective. */
cpl_status cpl_stage_cost_end(cpl_stage_cost *cost, cpl_comm *world, cpl_device *dev);
/* Attributes wall_s, device_bytes_peak, device_bytes_used, energy_j, energy_source. */
cpl_status cpl_stage_cost_record(cpl_record *rec, const cpl_stage_cost *cost);

#endif

/* What would fit, told when a stage has run out of device memory.
 * Refuses to promise what the plan does not say. */
#ifndef CPL_JOBS_STUDY_FIT_H
#define CPL_JOBS_STUDY_FIT_H

#include "jobs/study/study.h"

/* Collective over comm, whose ranks had the stage, or a trial of it, to do, after they all have given their memory back. Adds to
 * the message of its CPL_NO_MEMORY the largest micro_batch that the plan sees fit, for each recompute that takes less; returns
 * `failure`. Adds nothing where the room is not known (the CPU without CUPEL_DEVICE_BYTES) or no option of the stage could help;
 * for a sweep, whose options are for all its trials, also where it takes more than another micro_batch. */
cpl_status cpl_stage_fit(cpl_context *ctx, const cpl_stage *stage, cpl_comm *comm, cpl_status failure);

#endif

/* What would fit, told when a stage has run out of device memory.
 * Refuses to promise what the plan does not say. */
#ifndef CPL_JOBS_STUDY_FIT_H
#define CPL_JOBS_STUDY_FIT_H

#include "jobs/study/study.h"

/* Collective, after the stage has given its memory back on all ranks. Adds to the message of its CPL_NO_MEMORY the largest
 * micro_batch that the plan sees fit, for each recompute that takes less; returns `failure`. Adds nothing where the room is not
 * known (the CPU without CUPEL_DEVICE_BYTES) or no option of the stage could help; for a sweep, where not all its trials would fit.
 */
cpl_status cpl_stage_fit(cpl_context *ctx, const cpl_stage *stage, cpl_status failure);

#endif

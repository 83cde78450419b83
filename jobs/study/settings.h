/* --set PATH=VALUE put over the tree of a job file, and the job written out again with every option.
 * Refuses paths that lead nowhere. */
#ifndef CPL_JOBS_STUDY_SETTINGS_H
#define CPL_JOBS_STUDY_SETTINGS_H

#include "jobs/study/job.h"

/* stage.option, stage.prune.option, corpus.option, run.option, seed, name. The value is YAML: 0.5, [1, 2], text. Errors: CPL_USAGE
 * naming the setting and the nearest stage. */
cpl_status cpl_settings_apply(cpl_node *root, const cpl_setting *settings, size_t n, cpl_arena *arena);
/* The same for a job of one stage: a path without a dot is the stage's own (but for seed). */
cpl_status cpl_settings_apply_single(cpl_node *root, const cpl_setting *settings, size_t n, cpl_arena *arena);

#endif

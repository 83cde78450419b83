/* From the files of a sweep's trials to the labelled arrays, the front, the score and the table of its record.
 * Refuses to fill a gap: what did not run or failed is NaN. */
#ifndef CPL_JOBS_STUDY_SWEEP_RECORD_H
#define CPL_JOBS_STUDY_SWEEP_RECORD_H

#include "jobs/study/trial.h"

typedef struct {
    char (*key)[CPL_SHA256_HEX]; /* owned [trials+1]: row t+1 is trial t, row 0 the unchanged first model */
    int64_t *missing;            /* owned [trials+1]: trials (-1: the reference) that had no file when the stage began */
    int64_t n_missing;
} cpl_sweep_plan;

/* Keys of all trials, and which must run: of equal keys the first, where no file has it; only rank 0 looks for files. Needs the
 * study's keys. */
cpl_status cpl_sweep_plan_trials(const cpl_context *ctx, const cpl_stage *stage, cpl_sweep_plan *plan);
void cpl_sweep_plan_free(cpl_sweep_plan *plan);
/* Rank 0. Arrays over the grid's axes (figures, compression, score, pareto; with the tensors as last axis sqnr and sparsity),
 * `trials` with a row a trial, the reference's figures as attributes. */
cpl_status cpl_sweep_record(cpl_context *ctx, const cpl_stage *stage, const cpl_sweep_plan *plan, cpl_record *record);
/* Name of a figure's array: its own; sparsity_exact where the sweep has an axis `sparsity` (the requested one). */
const char *cpl_sweep_array_name(const cpl_grid *g, const char *figure);

#endif

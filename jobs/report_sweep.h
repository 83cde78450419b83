/* A sweep's trials in the report.
 * Refuses to compute anything: it shows what is stored. */
#ifndef CPL_JOBS_REPORT_SWEEP_H
#define CPL_JOBS_REPORT_SWEEP_H

#include "io/base/arena.h"
#include <stdio.h>

enum { CPL_REPORT_ROWS = 40 };
/* The table of trials of stages/NAME: the Pareto-optimal ones by bytes, then the others by score, at most `rows` (0: all), then the
 * failed ones with their reason. Nothing where the stage has no trials. */
cpl_status cpl_report_sweep(const char *path, const char *name, int64_t rows, FILE *to, cpl_arena *arena);
/* cpl_report_terminal with another number of rows a sweep. */
cpl_status cpl_report_rows(const char *results_path, const char *folder, FILE *to, int64_t rows);

#endif

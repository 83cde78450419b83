/* What results.h5 says, as a table on the terminal.
 * Refuses to compute anything: it shows what is stored. */
#ifndef CPL_JOBS_REPORT_H
#define CPL_JOBS_REPORT_H

#include "io/base/status.h"
#include <stdio.h>

/* Stages and sweep trials of a results file: validation loss, perplexity, bytes, compression, sparsity, latency, which are
 * Pareto-optimal. folder: the study's, for the hint where the results are. One process. */
cpl_status cpl_report_terminal(const char *results_path, const char *folder, FILE *to);

#endif

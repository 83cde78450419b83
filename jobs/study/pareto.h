/* Which trials no other beats, and their score (numerics: choosing).
 * Refuses to judge trials with a figure that is not a number: they are neither optimal nor in the way of others. */
#ifndef CPL_JOBS_STUDY_PARETO_H
#define CPL_JOBS_STUDY_PARETO_H

#include <stdint.h>

/* value [axes][n], all to be minimised; optimal [n] becomes 1, 0, or NAN where an axis is NaN. a dominates b if it is no worse on
 * all axes and better on one; of exact duplicates the first stays. O(n^2 axes). */
void cpl_pareto(int64_t n, int axes, const double *const *value, double *optimal);
/* loss/loss0 + latency_weight latency/latency0 + memory_weight bytes/bytes0; terms of weight 0 do not count, even where they are
 * NaN. */
double cpl_score(double loss, double loss0, double latency, double latency0, double latency_weight, double bytes, double bytes0,
                 double memory_weight);

#endif

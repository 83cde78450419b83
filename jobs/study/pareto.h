/* Which trials no other beats, and their score (numerics: choosing).
 * Refuses to judge trials with a figure that is not a number: they are neither optimal nor in the way of others. */
#ifndef CPL_JOBS_STUDY_PARETO_H
#define CPL_JOBS_STUDY_PARETO_H

#include <stdint.h>

/* value [axes][n], all to be minimised; optimal [n] becomes 1, 0, or NAN where an axis is NaN. a dominates b if it is no worse on
 * all axes and better on one; of exact duplicates the first stays. O(n^2 axes). */
void cpl_pareto(int64_t n, int axes, const double *const *value, double *optimal);
/* A figure beside the loss, of a trial and of the unchanged model. */
typedef struct {
    double value, reference, weight;
} cpl_score_term;
/* loss/loss0 + sum of weight value/reference; terms of weight 0 do not count, even where they are NaN. */
double cpl_score(double loss, double loss0, const cpl_score_term *terms, int count);

#endif

/* Pareto front and score.
 * Refuses to judge trials with a figure that is not a number. */
#include "jobs/study/pareto.h"
#include <math.h>
#include <stdbool.h>

static bool complete(int axes, const double *const *value, int64_t i) {
    for (int a = 0; a < axes; a++) {
        if (isnan(value[a][i])) {
            return false;
        }
    }
    return true;
}

/* i is no worse than j everywhere, and better somewhere or an earlier duplicate. */
static bool beats(int axes, const double *const *value, int64_t i, int64_t j) {
    bool better = i < j;
    for (int a = 0; a < axes; a++) {
        if (value[a][i] > value[a][j]) {
            return false;
        }
        better = better || value[a][i] < value[a][j];
    }
    return better;
}

void cpl_pareto(int64_t n, int axes, const double *const *value, double *optimal) {
    for (int64_t j = 0; j < n; j++) {
        optimal[j] = complete(axes, value, j) ? 1 : NAN;
        for (int64_t i = 0; i < n && optimal[j] == 1; i++) {
            if (i != j && complete(axes, value, i) && beats(axes, value, i, j)) {
                optimal[j] = 0;
            }
        }
    }
}

double cpl_score(double loss, double loss0, const cpl_score_term *terms, int count) {
    double score = loss / loss0;
    for (int i = 0; i < count; i++) {
        score += terms[i].weight > 0 ? terms[i].weight * terms[i].value / terms[i].reference : 0;
    }
    return score;
}

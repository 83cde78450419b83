/* What a training run has to say, step by step: series that grow, go into the checkpoint, and end in the stage's record.
 * Refuses to hold anything but the run's own past: derived figures are computed when the record is made. */
#ifndef CPL_JOBS_METRICS_H
#define CPL_JOBS_METRICS_H

#include "io/checkpoint.h"
#include "io/record.h"
#include "jobs/options.h"

/* One column of a series. */
typedef enum {
    CPL_M_LOSS,
    CPL_M_HARD_LOSS,
    CPL_M_HIDDEN_LOSS, /* NaN where the run has none */
    CPL_M_LR,
    CPL_M_GRAD_NORM,
    CPL_M_LOSS_SCALE,
    CPL_M_OVERFLOW,
    CPL_M_STEP_MS, /* one value a step */
    CPL_M_STEP_COLUMNS
} cpl_step_column;
typedef enum { CPL_M_EVAL_STEP, CPL_M_VAL_LOSS, CPL_M_EVAL_COLUMNS } cpl_eval_column;
typedef enum { CPL_M_EVENT_STEP, CPL_M_EVENT_RANK, CPL_M_EVENT_TENSOR, CPL_M_EVENT_KIND, CPL_M_EVENT_COLUMNS } cpl_event_column;
enum { CPL_M_GROUPS = 4, CPL_M_EXPONENTS = 256 }; /* embedding, attention, mlp, norm */

typedef struct {
    int columns;
    int64_t rows, room;
    double *value; /* owned [columns][room] */
} cpl_series;

typedef struct {
    cpl_series step, eval, event;
    cpl_series exponents; /* columns: eval step, loss scale, max |g|, then CPL_M_GROUPS * CPL_M_EXPONENTS counts */
} cpl_metrics;

cpl_status cpl_metrics_create(cpl_metrics **out);
void cpl_metrics_destroy(cpl_metrics **m);
/* Appends one row of s->columns values. */
cpl_status cpl_series_add(cpl_series *s, const double *row);
static inline double cpl_series_at(const cpl_series *s, int column, int64_t row) {
    return s->value[(size_t)column * (size_t)s->room + (size_t)row];
}
/* Room for and the number of rows set to `rows`, values undefined: for reading a checkpoint. */
cpl_status cpl_series_resize(cpl_series *s, int64_t rows);

/* Series as arrays of a checkpoint: names metrics_<series>, [columns * rows] f64, column after column; packed into `flat` buffers
 * that the caller frees. The times of steps stand in an array of their own, metrics_step_ms, so that all others are bit-identical
 * between runs. */
enum { CPL_METRICS_ARRAYS = 5 };
cpl_status cpl_metrics_pack(const cpl_metrics *m, double *flat[CPL_METRICS_ARRAYS], cpl_ckpt_array arrays[CPL_METRICS_ARRAYS],
                            bool root);
/* Reads them back from a checkpoint file. */
cpl_status cpl_metrics_read(cpl_metrics *m, const char *path);

/* Series and derived figures (numerics: overflow_rate, average_scale, scale_variance, scale_stability, recommended_scale) into a
 * record. layout: names of tensors for the events. exponents, hidden: with what only some runs have. */
cpl_status cpl_metrics_record(const cpl_metrics *m, cpl_record *rec, const cpl_layout *layout, int64_t tokens_per_step,
                              bool exponents, bool hidden);

#endif

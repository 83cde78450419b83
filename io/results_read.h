/* Reading results.h5: which groups there are, their attributes, arrays and tables.
 * Refuses to guess at what is not there: it is NaN, or no text. */
#ifndef CPL_IO_RESULTS_READ_H
#define CPL_IO_RESULTS_READ_H

#include "io/checkpoint.h"

/* Everything is owned by the arena. One process. Errors: CPL_NOT_FOUND (no such file), CPL_DAMAGED. */

/* Names of the groups inside `group` ("/stages"), in the order of creation; none where there is no such group. */
cpl_status cpl_results_groups(const char *path, const char *group, char ***names, size_t *n, cpl_arena *arena);
/* Fills type and value of the attributes named in attrs [n]. One that is not there becomes an F64 of NaN without text; integers and
 * reals are in f as well. */
cpl_status cpl_results_attributes(const char *path, const char *group, cpl_ckpt_attr *attrs, size_t n, cpl_arena *arena);
/* A numeric data set ("stages/teacher/loss_scale") as f64, flattened. *n = 0 where it is not there. */
cpl_status cpl_results_array(const char *path, const char *name, double **out, int64_t *n, cpl_arena *arena);

typedef struct {
    char *name;
    double *number; /* [rows], or NULL: text */
    char **text;    /* [rows], or NULL: number */
} cpl_results_column;
typedef struct {
    int64_t rows;
    size_t n_columns;
    cpl_results_column *column;
} cpl_results_table;
/* A table of cpl_record_table_column ("stages/grid/trials"): its columns in order. No columns where it is not there. */
cpl_status cpl_results_table_read(const char *path, const char *name, cpl_results_table *out, cpl_arena *arena);
/* NULL if there is none. */
const cpl_results_column *cpl_results_column_find(const cpl_results_table *t, const char *name);

#endif

/* Stage records: what a stage has to say (attributes, arrays with named dimensions and units), built in memory and written as one
 * HDF5 file each; and results.h5, which is put together from them. Refuses to touch results.h5 in place: it is always written
 * beside and renamed, so that a kill cannot lose a finished result. */
#ifndef CPL_IO_RECORD_H
#define CPL_IO_RECORD_H

#include "io/checkpoint.h"

typedef struct cpl_record cpl_record;
cpl_status cpl_record_create(cpl_record **out);
void cpl_record_destroy(cpl_record **rec);

/* All copy what they are given. Text attributes are variable-length UTF-8. Setting a name again replaces it. */
cpl_status cpl_record_text(cpl_record *rec, const char *name, const char *value);
cpl_status cpl_record_i64(cpl_record *rec, const char *name, int64_t value);
cpl_status cpl_record_f64(cpl_record *rec, const char *name, double value);
/* A data set. dims[i] elements along the dimension called dim_names[i]. A data set whose own name is its only dimension is that
 * dimension's scale (coordinate); a dimension without one gets a scale without values, as in netCDF-4, so that its name is kept.
 * data: dims product elements, CPL_T_TEXT: array of char *, stored as UTF-8 of fixed length. units "" for none. ndim 0 to 8; a
 * dimension of 0 elements is allowed. Errors: CPL_INTERNAL if a dimension's length contradicts an earlier data set. */
cpl_status cpl_record_array(cpl_record *rec, const char *name, cpl_type type, int ndim, const int64_t *dims,
                            const char *const *dim_names, const void *data, const char *units, const char *help);
/* A table for pandas: one compound row per trial, along the dimension TABLE_row. Columns are added one after another, all of the
 * same length. */
cpl_status cpl_record_table_column(cpl_record *rec, const char *table, const char *column, cpl_type type, int64_t rows,
                                   const void *data);

/* Writes the record as the root group of a file, atomically. Layout: creation order tracked, scales attached (H5DS), attributes
 * units and long_name, Fletcher32 on every data set (a scalar, which HDF5 cannot chunk, lies under its header's checksum),
 * H5F_LIBVER_V110; behind the HDF5 file a line with the SHA-256 of all of it, because variable-length attributes have no checksum.
 * One process only. */
cpl_status cpl_record_write(const cpl_record *rec, const char *path);
/* A text attribute of a written record's root; CPL_NOT_FOUND without file or attribute. */
cpl_status cpl_record_read_text(const char *path, const char *name, char **out, cpl_arena *arena);
cpl_status cpl_record_read_f64(const char *path, const char *name, double *out); /* also of an integer attribute */
/* A numeric data set as f64, flattened; *n its elements. Text data sets: cpl_record_read_texts. Memory from the arena. */
cpl_status cpl_record_read_array(const char *path, const char *name, double **out, int64_t *n, cpl_arena *arena);
cpl_status cpl_record_read_texts(const char *path, const char *name, char ***out, int64_t *n, cpl_arena *arena);

typedef struct {
    const char *group; /* "corpus" or "stages/teacher" */
    const char *path;  /* of its record */
} cpl_results_part;
/* results.h5 = the root attributes of `root` + each part copied into its group; written beside, fsynced, renamed. Rank 0 only. */
cpl_status cpl_results_assemble(const char *path, const cpl_record *root, const cpl_results_part *parts, size_t n_parts);
/* Which variant of HDF5 this is: "1.10.8, parallel". */
void cpl_h5_library(char *out, size_t size);
bool cpl_h5_is_parallel(void);

#endif

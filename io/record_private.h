/* A stage record in memory, shared by the files that build, write and read it.
 * Refuses to be included outside this folder. */
#ifndef CPL_IO_RECORD_PRIVATE_H
#define CPL_IO_RECORD_PRIVATE_H

#include "io/h5.h"
#include "io/record.h"

enum { CPL_RECORD_DIMS_MAX = 8 };

typedef struct {
    char *name, *units, *help;
    cpl_type type;
    int ndim;
    int64_t dims[CPL_RECORD_DIMS_MAX];
    char *dim_names[CPL_RECORD_DIMS_MAX];
    void *data; /* TEXT: char ** */
} cpl_record_set;

typedef struct {
    char *name;
    cpl_type type;
    void *data;
} cpl_record_column;

typedef struct {
    char *name;
    int64_t rows;
    size_t n;
    cpl_record_column *column;
} cpl_record_table;

/* Everything is owned by the arena. */
struct cpl_record {
    cpl_arena *arena; /* owned */
    size_t n_attrs, n_sets, n_tables;
    cpl_ckpt_attr *attr;
    cpl_record_set *set;
    cpl_record_table *table;
};

/* Attributes, data sets, tables and scales of a record into an open group. */
cpl_status cpl_record_fill(const cpl_record *rec, hid_t group, const char *path, cpl_arena *arena);
/* Makes scales of the record's coordinates, adds those of dimensions without one, and attaches them all. */
cpl_status cpl_record_attach(const cpl_record *rec, hid_t group, const char *path);
/* Chunked with Fletcher32, creation order tracked; a scalar compact, within the checksum of its header. */
cpl_status cpl_record_creation(const char *path, int ndim, const hsize_t *dims, hid_t *plist);

/* A whole file, written beside and renamed: `content` fills it after its creation. */
typedef cpl_status (*cpl_record_content)(hid_t file, const char *path, const void *context, cpl_arena *arena);
cpl_status cpl_record_write_file(const char *path, cpl_record_content content, const void *context);
/* Opens it again. Errors: as cpl_h5_open; CPL_DAMAGED too where the line behind the file says that it was another. */
cpl_status cpl_record_open(const char *path, hid_t *file);

#endif

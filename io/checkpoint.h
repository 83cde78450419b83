/* Checkpoints and models as HDF5: flat arrays of which every rank writes and reads its own part, and attributes.
 * Refuses to leave a half-written file under its final name, and to read one whose checksums do not hold.
 *
 * File: root attributes (format "cupel-checkpoint", version, what the caller gives), one 1-D data set per array, chunked,
 * Fletcher32, created with H5F_LIBVER_V110 bounds. Written beside as NAME.part, fsynced, renamed, folder fsynced. With parallel
 * HDF5 all ranks write collectively, else one rank after another. */
#ifndef CPL_IO_CHECKPOINT_H
#define CPL_IO_CHECKPOINT_H

#include "io/base/arena.h"
#include "io/ranks.h"
#include <stdint.h>

typedef enum { CPL_T_F32, CPL_T_F64, CPL_T_I64, CPL_T_I32, CPL_T_U8, CPL_T_U32, CPL_T_TEXT } cpl_type; /* TEXT: char *, UTF-8 */
size_t cpl_type_size(cpl_type t);

typedef struct {
    const char *name; /* borrowed */
    cpl_type type;    /* not TEXT */
    int64_t total;    /* elements of the whole array */
    int64_t begin, n; /* this rank's part */
    void *data;       /* borrowed: n elements, written from or read into */
    const char *help; /* borrowed; attribute long_name; may be NULL */
} cpl_ckpt_array;

typedef struct {
    const char *name; /* borrowed */
    cpl_type type;    /* TEXT, I64 or F64 */
    const char *text; /* owned by the arena after reading */
    int64_t i;
    double f;
} cpl_ckpt_attr;

/* Collective over ranks. Arrays and attributes are the same on all ranks but for begin, n, data; every element is in exactly one
 * rank's part. Errors (same on all ranks): CPL_IO (disk full and the like; any older file of that name is untouched), CPL_HDF5. */
cpl_status cpl_checkpoint_write(const char *path, const cpl_io_ranks *ranks, const cpl_ckpt_array *arrays, size_t n_arrays,
                                const cpl_ckpt_attr *attrs, size_t n_attrs);
/* Collective where ranks is not NULL (each rank opens the file for reading on its own). Reads this rank's parts and the attributes
 * named; type and total must match the file. An attribute that is not there: CPL_DAMAGED naming it. Errors: CPL_NOT_FOUND,
 * CPL_DAMAGED (not HDF5, truncated, checksum, missing or misshapen array; names file and array). */
cpl_status cpl_checkpoint_read(const char *path, const cpl_io_ranks *ranks, cpl_ckpt_array *arrays, size_t n_arrays,
                               cpl_ckpt_attr *attrs, size_t n_attrs, cpl_arena *arena);
/* Length and type of one array, without reading it. Not collective. */
cpl_status cpl_checkpoint_array_info(const char *path, const char *name, cpl_type *type, int64_t *total);
/* Reads every array of the file once, checking all checksums. Not collective. */
cpl_status cpl_checkpoint_verify(const char *path);
/* The newest step-N.h5 in folder that verifies; damaged ones are named in a warning and passed over. *step = -1 and CPL_OK if there
 * is none. Not collective: rank 0 calls it and broadcasts. path: size bytes. */
cpl_status cpl_checkpoint_newest(const char *folder, char *path, size_t size, int64_t *step);
/* Keeps the newest `keep` step-N.h5 in folder, removes older ones and stale .part files. Rank 0 only. */
cpl_status cpl_checkpoint_prune(const char *folder, int keep);

#endif

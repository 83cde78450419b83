/* HDF5 for the files of this folder: handles that close themselves, and the library's error stack as one line of cpl_status.
 * Refuses to let HDF5 print by itself, and to be used by two threads at once: Debian's HDF5 is not thread-safe. */
#ifndef CPL_IO_H5_H
#define CPL_IO_H5_H

#include "io/checkpoint.h"
#include <hdf5.h>

/* Closes *id, whatever it is, if it is open, and forgets it; what fails then is lost, so files that were written are closed by
 * cpl_h5_close. */
void cpl_h5_release(hid_t *id);
/* A handle closed at the end of its scope. Declared at the top of a function, before any goto, as H5I_INVALID_HID. */
#define CPL_H5_HANDLE __attribute__((cleanup(cpl_h5_release))) hid_t

/* Opens the library (once) with automatic printing off. Every public function of this folder that uses HDF5 calls it first. */
cpl_status cpl_h5_begin(void);
/* cpl_fail with ": " and the deepest entry of HDF5's error stack behind the text. An entry with an errno becomes CPL_IO and its
 * text, memory that ran out CPL_NO_MEMORY; anything else `code`. */
cpl_status cpl_h5_fail(cpl_status code, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5), cold));
/* For the HDF5 calls that return a negative number on failure. The text says what was being done to which file. */
#define CPL_H5(code, call, ...)                                                                                                    \
    do {                                                                                                                           \
        if ((call) < 0) {                                                                                                          \
            st = cpl_h5_fail((code), __FILE__, __LINE__, __VA_ARGS__);                                                             \
            goto done;                                                                                                             \
        }                                                                                                                          \
    } while (0)

/* CPL_IO if a write into this file has failed so far. HDF5 itself is not told of it (h5_driver.c) and goes on; not with MPI. */
cpl_status cpl_h5_written(hid_t file, const char *path);
/* Closes a file that was written, and everything in it; any failed write of it is an error here at the latest. */
cpl_status cpl_h5_close(hid_t *file, const char *path);
/* Opens a regular file for reading. Errors: CPL_NOT_FOUND, CPL_IO (permission and the like), CPL_DAMAGED. */
cpl_status cpl_h5_open(const char *path, hid_t *file);
/* A file access list for writing, with format bounds H5F_LIBVER_V110, in which all metadata but the heap of variable-length data
 * carries checksums (superblock 3). mpi_comm: MPI_Comm * or NULL; where it is given, HDF5 is the parallel build; else the driver of
 * h5_driver.c. */
cpl_status cpl_h5_access(hid_t *fapl, const void *mpi_comm);
/* Open MPI 4 opens files of one name on a host one after another, by a semaphore that stays taken where a process was killed: all
 * who come later would wait for ever. On every rank, before any of them creates path with mpi_comm. */
void cpl_h5_forget_opening(const char *path);
/* Creates (truncates) a file whose root group tracks creation order and no times. */
cpl_status cpl_h5_create(const char *path, hid_t fapl, hid_t *file);

hid_t cpl_h5_memory_type(cpl_type t); /* borrowed from the library; not for TEXT */
hid_t cpl_h5_file_type(cpl_type t);   /* the same, little-endian */
/* False if it is none of ours; text of any kind is CPL_T_TEXT. */
bool cpl_h5_type_of(hid_t type, cpl_type *out);
/* UTF-8 text of a fixed number of bytes (at least 1), padded with zeros; H5T_VARIABLE for as long as it is. */
cpl_status cpl_h5_text_type(size_t bytes, hid_t *out);

/* Scalar attributes of an open object. Fixed text has its bytes under the checksum of the object header; variable text reads as str
 * in h5py, but its bytes are in a heap without checksum. An old one of that name is replaced. */
cpl_status cpl_h5_put_text(hid_t object, const char *path, const char *name, const char *text, bool fixed);
cpl_status cpl_h5_put_i64(hid_t object, const char *path, const char *name, int64_t value);
cpl_status cpl_h5_put_f64(hid_t object, const char *path, const char *name, double value);
/* CPL_DAMAGED "path: attribute "name": ..." where it cannot be read, CPL_NOT_FOUND where it is not there. *type: TEXT, I64 (any
 * integer) or F64. */
cpl_status cpl_h5_get(hid_t object, const char *path, const char *name, cpl_ckpt_attr *out, cpl_arena *arena);
/* Calls visit with the name of each attribute (or of each link of a group), in the order of creation where the file tracks it. */
typedef cpl_status (*cpl_h5_visit)(hid_t object, const char *name, void *context);
cpl_status cpl_h5_each_attribute(hid_t object, const char *path, cpl_h5_visit visit, void *context);
cpl_status cpl_h5_each_link(hid_t group, const char *path, cpl_h5_visit visit, void *context);

/* --- files that appear whole or not at all (no HDF5 in these) --- */
/* path + ".part". */
cpl_status cpl_part_name(const char *path, char **out, cpl_arena *arena);
cpl_status cpl_file_sync(const char *path);
/* Appends a line with the SHA-256 of all bytes before it. HDF5 files may have something behind their end; whoever opens one for
 * writing cuts it off. */
cpl_status cpl_file_seal(const char *path);
/* CPL_DAMAGED if the file ends with such a line and its bytes have another hash. A file without one passes. CPL_NOT_FOUND, CPL_IO.
 */
cpl_status cpl_file_check_seal(const char *path);
/* Reserves `bytes` of disk for a file, created if it is not there, its size unchanged, so that a full disk is noticed before HDF5
 * writes. Where the file system cannot reserve, the free space it reports must suffice. Errors: CPL_IO with the numbers. */
cpl_status cpl_file_reserve(const char *path, int64_t bytes);
/* Renames part to path and makes the rename durable: fsync of the folder. The content was synced before. */
cpl_status cpl_file_commit(const char *part, const char *path);

#endif

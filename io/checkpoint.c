/* Writes checkpoints: one rank after another, or all together where HDF5 is parallel.
 * Refuses to rename a file that is not whole on disk, and to let one rank's failure leave the others waiting in a collective call.
 */
#include "io/checkpoint.h"
#include "io/base/log.h"
#include "io/checkpoint_private.h"
#include "io/h5.h"
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Elements of one collective write: the filters keep a copy of what a rank writes at once (64 MiB of f32), and MPI counts bytes in
 * an int. */
enum { SLAB = 256 * CPL_CKPT_CHUNK };

typedef struct {
    const char *path;             /* borrowed */
    char *part;                   /* owned by the caller's arena */
    const cpl_io_ranks *ranks;    /* borrowed; NULL: one process */
    const cpl_ckpt_array *arrays; /* borrowed */
    size_t n_arrays;
    const cpl_ckpt_attr *attrs; /* borrowed */
    size_t n_attrs;
} writing;

static cpl_status agree(const writing *w, cpl_status st) {
    return w->ranks != NULL && w->ranks->agree != NULL ? w->ranks->agree(w->ranks->comm, st) : st;
}

static int rank_of(const writing *w) {
    return w->ranks != NULL ? w->ranks->rank : 0;
}

static bool good_name(const char *name) {
    return name != NULL && name[0] != '\0' && strchr(name, '/') == NULL && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

static cpl_status check_array(const writing *w, size_t i) {
    cpl_status st = CPL_OK;
    const cpl_ckpt_array *a = &w->arrays[i];
    int64_t end = 0;
    int64_t bytes = 0;
    if (!good_name(a->name)) {
        CPL_FAIL(CPL_INTERNAL, "%s: \"%s\" is no name for an array", w->path, a->name == NULL ? "(none)" : a->name);
    }
    if (cpl_h5_memory_type(a->type) < 0) {
        CPL_FAIL(CPL_INTERNAL, "%s: array \"%s\" is not of numbers", w->path, a->name);
    }
    if (a->begin < 0 || a->n < 0 || !cpl_add_i64(a->begin, a->n, &end) || end > a->total ||
        !cpl_mul_i64(a->total, (int64_t)cpl_type_size(a->type), &bytes) || (a->n > 0 && a->data == NULL)) {
        CPL_FAIL(CPL_INTERNAL, "%s: array \"%s\": %lld elements from %lld on are no part of %lld", w->path, a->name,
                 (long long)a->n, (long long)a->begin, (long long)a->total);
    }
    for (size_t j = 0; j < i; j++) {
        if (strcmp(a->name, w->arrays[j].name) == 0) {
            CPL_FAIL(CPL_INTERNAL, "%s: two arrays are called \"%s\"", w->path, a->name);
        }
    }
done:
    return st;
}

static cpl_status check(const writing *w) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < w->n_arrays; i++) {
        CPL_TRY(check_array(w, i));
    }
    for (size_t i = 0; i < w->n_attrs; i++) {
        const cpl_ckpt_attr *a = &w->attrs[i];
        bool typed = a->type == CPL_T_I64 || a->type == CPL_T_F64 || (a->type == CPL_T_TEXT && a->text != NULL);
        if (!good_name(a->name) || strcmp(a->name, "format") == 0 || strcmp(a->name, "version") == 0 || !typed) {
            CPL_FAIL(CPL_INTERNAL, "%s: attribute \"%s\" cannot be written", w->path, a->name == NULL ? "(none)" : a->name);
        }
    }
    CPL_TRY(cpl_h5_begin());
    if (H5Zfilter_avail(H5Z_FILTER_DEFLATE) <= 0 || H5Zfilter_avail(H5Z_FILTER_FLETCHER32) <= 0) {
        CPL_FAIL(CPL_UNSUPPORTED, "%s: this HDF5 library lacks the filters deflate and fletcher32", w->path);
    }
done:
    return st;
}

/* What the file will take at most: filters add 4 bytes and less than one in a thousand to a chunk, indices less than 64 bytes. */
static int64_t bytes_needed(const writing *w) {
    double bytes = 65536;
    for (size_t i = 0; i < w->n_arrays; i++) {
        const cpl_ckpt_array *a = &w->arrays[i];
        int64_t chunks = a->total / CPL_CKPT_CHUNK + 1;
        double chunk = (double)(a->total < CPL_CKPT_CHUNK ? a->total : CPL_CKPT_CHUNK) * (double)cpl_type_size(a->type);
        bytes += (double)chunks * (chunk * 1.001 + 128) + 4096 + (a->help != NULL ? 2.0 * (double)strlen(a->help) : 0);
    }
    for (size_t i = 0; i < w->n_attrs; i++) {
        bytes += 1024 + (w->attrs[i].type == CPL_T_TEXT ? 2.0 * (double)strlen(w->attrs[i].text) : 0);
    }
    return bytes < 9e18 ? (int64_t)bytes : INT64_MAX;
}

/* Deflate at level 0 compresses nothing, but wraps each chunk with a header and an Adler-32. Fletcher32 alone takes a chunk of
 * zeros, its checksum zeroed too, for whole (RFC 1146: its sum of nothing is 0), and 0xFFFF for 0x0000; blocks of zeros are what a
 * lost disk write leaves behind. */
static cpl_status define_array(hid_t file, const writing *w, const cpl_ckpt_array *a) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE dcpl = H5I_INVALID_HID;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    const hsize_t total = (hsize_t)a->total;
    const hsize_t chunk = total == 0 ? 1 : total < CPL_CKPT_CHUNK ? total : CPL_CKPT_CHUNK;
    CPL_H5(CPL_HDF5, dcpl = H5Pcreate(H5P_DATASET_CREATE), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, H5Pset_obj_track_times(dcpl, 0), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, H5Pset_chunk(dcpl, 1, &chunk), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, H5Pset_deflate(dcpl, 0), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, H5Pset_fletcher32(dcpl), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, space = H5Screate_simple(1, &total, NULL), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, set = H5Dcreate2(file, a->name, cpl_h5_file_type(a->type), space, H5P_DEFAULT, dcpl, H5P_DEFAULT),
           "%s: array \"%s\"", w->part, a->name);
    if (a->help != NULL) {
        CPL_TRY(cpl_h5_put_text(set, w->part, "long_name", a->help, true));
    }
done:
    return st;
}

/* The root attributes and the data sets, still without values. */
static cpl_status define(hid_t file, const writing *w) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_h5_put_text(file, w->part, "format", CPL_CKPT_FORMAT, true));
    CPL_TRY(cpl_h5_put_i64(file, w->part, "version", CPL_CKPT_VERSION));
    for (size_t i = 0; i < w->n_attrs; i++) {
        const cpl_ckpt_attr *a = &w->attrs[i];
        if (a->type == CPL_T_TEXT) {
            CPL_TRY(cpl_h5_put_text(file, w->part, a->name, a->text, true));
        } else if (a->type == CPL_T_I64) {
            CPL_TRY(cpl_h5_put_i64(file, w->part, a->name, a->i));
        } else {
            CPL_TRY(cpl_h5_put_f64(file, w->part, a->name, a->f));
        }
    }
    for (size_t i = 0; i < w->n_arrays; i++) {
        CPL_TRY(define_array(file, w, &w->arrays[i]));
    }
done:
    return st;
}

/* Elements [first, first + n) of the array, which are in this rank's part; n = 0 takes part in a collective write with nothing. */
static cpl_status write_elements(hid_t set, const writing *w, const cpl_ckpt_array *a, int64_t first, int64_t n, hid_t transfer) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE memory = H5I_INVALID_HID;
    const hsize_t start = (hsize_t)first;
    const hsize_t count = n > 0 ? (hsize_t)n : 1;
    const char nothing = 0;
    const void *data = &nothing;
    CPL_H5(CPL_HDF5, space = H5Dget_space(set), "%s: array \"%s\"", w->part, a->name);
    CPL_H5(CPL_HDF5, memory = H5Screate_simple(1, &count, NULL), "%s: array \"%s\"", w->part, a->name);
    if (n > 0) {
        CPL_H5(CPL_HDF5, H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &count, NULL), "%s: array \"%s\"", w->part,
               a->name);
        data = (const char *)a->data + (size_t)(first - a->begin) * cpl_type_size(a->type);
    } else {
        CPL_H5(CPL_HDF5, H5Sselect_none(space), "%s: array \"%s\"", w->part, a->name);
        CPL_H5(CPL_HDF5, H5Sselect_none(memory), "%s: array \"%s\"", w->part, a->name);
    }
    CPL_H5(CPL_HDF5, H5Dwrite(set, cpl_h5_memory_type(a->type), memory, space, transfer, data),
           "%s: array \"%s\", elements %lld to %lld", w->part, a->name, (long long)first, (long long)(first + n));
done:
    return st;
}

/* --- one rank after another --- */

static cpl_status write_my_part(const writing *w) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE fapl = H5I_INVALID_HID;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    CPL_TRY(cpl_h5_access(&fapl, NULL));
    if (rank_of(w) == 0) {
        CPL_TRY(cpl_file_reserve(w->part, bytes_needed(w)));
        CPL_TRY(cpl_h5_create(w->part, fapl, &file));
        CPL_TRY(cpl_file_reserve(w->part, bytes_needed(w))); /* creating gave back what was reserved */
        CPL_TRY(define(file, w));
    } else {
        CPL_H5(CPL_HDF5, file = H5Fopen(w->part, H5F_ACC_RDWR, fapl), "%s: cannot be opened on this rank", w->part);
    }
    for (size_t i = 0; i < w->n_arrays; i++) {
        const cpl_ckpt_array *a = &w->arrays[i];
        if (a->n > 0) {
            cpl_h5_release(&set);
            CPL_H5(CPL_HDF5, set = H5Dopen2(file, a->name, H5P_DEFAULT), "%s: array \"%s\"", w->part, a->name);
            CPL_TRY(write_elements(set, w, a, a->begin, a->n, H5P_DEFAULT));
            CPL_TRY(cpl_h5_written(file, w->part));
        }
    }
    cpl_h5_release(&set);
    CPL_TRY(cpl_h5_close(&file, w->part));
    CPL_TRY(cpl_file_sync(w->part));
done:
    cpl_h5_release(&set);
    if (st != CPL_OK && file > 0 && cpl_h5_close(&file, w->part) == CPL_IO) {
        st = CPL_IO; /* the failed write is the cause of what came after it */
    }
    return st;
}

static cpl_status write_in_turn(const writing *w) {
    cpl_status st = CPL_OK;
    const int size = w->ranks != NULL ? w->ranks->size : 1;
    for (int turn = 0; turn < size; turn++) {
        CPL_TRY(agree(w, turn == rank_of(w) ? write_my_part(w) : CPL_OK));
    }
done:
    return st;
}

/* --- all together --- */

#ifdef H5_HAVE_PARALLEL
/* A rank's part is written in rounds that end at multiples of SLAB from the chunk it begins in, so that a chunk is filtered once by
 * each rank that has elements of it. */
static int64_t rounds_of(const cpl_ckpt_array *a) {
    return a->n == 0 ? 0 : (a->begin % CPL_CKPT_CHUNK + a->n - 1) / SLAB + 1;
}

static cpl_status write_round(hid_t set, const writing *w, const cpl_ckpt_array *a, int64_t round, hid_t transfer) {
    if (round >= rounds_of(a)) {
        return write_elements(set, w, a, 0, 0, transfer);
    }
    int64_t first = a->begin - a->begin % CPL_CKPT_CHUNK + round * SLAB;
    int64_t end = first + SLAB;
    first = first < a->begin ? a->begin : first;
    end = end > a->begin + a->n ? a->begin + a->n : end;
    return write_elements(set, w, a, first, end - first, transfer);
}

/* A write that HDF5 broke into independent ones is right but slow. */
static cpl_status warn_if_independent(const writing *w, const cpl_ckpt_array *a, hid_t transfer) {
    cpl_status st = CPL_OK;
    uint32_t local = 0;
    uint32_t global = 0;
    CPL_H5(CPL_HDF5, H5Pget_mpio_no_collective_cause(transfer, &local, &global), "%s: array \"%s\"", w->part, a->name);
    if (global != 0) {
        cpl_log_warn("%s: array \"%s\" was not written collectively (H5Pget_mpio_no_collective_cause 0x%x)", w->path, a->name,
                     (unsigned)global);
    }
done:
    return st;
}

static cpl_status write_array_together(hid_t file, const writing *w, const cpl_ckpt_array *a, int64_t rounds, hid_t transfer) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE set = H5Dopen2(file, a->name, H5P_DEFAULT);
    if (set < 0) {
        st = cpl_h5_fail(CPL_HDF5, __FILE__, __LINE__, "%s: array \"%s\"", w->part, a->name);
    }
    CPL_TRY(agree(w, st));
    for (int64_t round = 0; round < rounds; round++) {
        CPL_TRY(agree(w, write_round(set, w, a, round, transfer)));
        CPL_TRY(agree(w, warn_if_independent(w, a, transfer)));
    }
done:
    return st;
}

static cpl_status transfer_together(const writing *w, hid_t *transfer) {
    cpl_status st = CPL_OK;
    CPL_H5(CPL_HDF5, *transfer = H5Pcreate(H5P_DATASET_XFER), "%s: transfer list", w->part);
    CPL_H5(CPL_HDF5, H5Pset_dxpl_mpio(*transfer, H5FD_MPIO_COLLECTIVE), "%s: transfer list", w->part);
    CPL_H5(CPL_HDF5, H5Pset_dxpl_mpio_chunk_opt(*transfer, H5FD_MPIO_CHUNK_ONE_IO), "%s: transfer list", w->part);
done:
    return st;
}

/* rounds [n_arrays]: the largest number of rounds of any rank. */
static cpl_status most_rounds(const writing *w, int64_t *rounds) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < w->n_arrays; i++) {
        rounds[i] = rounds_of(&w->arrays[i]);
    }
    if (MPI_Allreduce(MPI_IN_PLACE, rounds, (int)w->n_arrays, MPI_INT64_T, MPI_MAX, *(const MPI_Comm *)w->ranks->mpi_comm) !=
        MPI_SUCCESS) {
        CPL_FAIL(CPL_COMM, "%s: the ranks cannot agree on the rounds of writing", w->path);
    }
done:
    return st;
}

static cpl_status write_together(const writing *w) {
    cpl_status st = CPL_OK;
    int64_t *rounds = NULL;
    CPL_H5_HANDLE fapl = H5I_INVALID_HID;
    CPL_H5_HANDLE transfer = H5I_INVALID_HID;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_TRY(agree(w, cpl_alloc(&rounds, w->n_arrays + 1, sizeof *rounds, "rounds of a checkpoint")));
    CPL_TRY(agree(w, transfer_together(w, &transfer)));
    CPL_TRY(agree(w, most_rounds(w, rounds)));
    cpl_h5_forget_opening(w->part);
    CPL_TRY(agree(w, cpl_h5_access(&fapl, w->ranks->mpi_comm)));
    CPL_TRY(agree(w, rank_of(w) == 0 ? cpl_file_reserve(w->part, bytes_needed(w)) : CPL_OK));
    CPL_TRY(agree(w, cpl_h5_create(w->part, fapl, &file)));
    CPL_TRY(agree(w, rank_of(w) == 0 ? cpl_file_reserve(w->part, bytes_needed(w)) : CPL_OK));
    CPL_TRY(agree(w, define(file, w)));
    for (size_t i = 0; i < w->n_arrays; i++) {
        CPL_TRY(write_array_together(file, w, &w->arrays[i], rounds[i], transfer));
    }
    CPL_TRY(agree(w, cpl_h5_close(&file, w->part)));
    CPL_TRY(agree(w, cpl_file_sync(w->part)));
done:
    cpl_free(&rounds);
    return st;
}
#endif

/* --- both --- */

/* Every chunk of every array is there: the parts of the ranks covered it. */
static cpl_status check_whole(const writing *w) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_TRY(cpl_h5_open(w->part, &file));
    for (size_t i = 0; i < w->n_arrays; i++) {
        const cpl_ckpt_array *a = &w->arrays[i];
        hsize_t chunks = 0;
        cpl_h5_release(&set);
        cpl_h5_release(&space);
        CPL_H5(CPL_HDF5, set = H5Dopen2(file, a->name, H5P_DEFAULT), "%s: array \"%s\"", w->part, a->name);
        CPL_H5(CPL_HDF5, space = H5Dget_space(set), "%s: array \"%s\"", w->part, a->name);
        CPL_H5(CPL_HDF5, H5Dget_num_chunks(set, space, &chunks), "%s: array \"%s\"", w->part, a->name);
        if (chunks != (hsize_t)((a->total + CPL_CKPT_CHUNK - 1) / CPL_CKPT_CHUNK)) {
            CPL_FAIL(CPL_INTERNAL, "%s: the parts of the ranks leave out elements of array \"%s\"", w->path, a->name);
        }
    }
done:
    return st;
}

/* Rank 0. Gives back what was reserved too much, and gives the file its name. */
static cpl_status finish(const writing *w) {
    cpl_status st = CPL_OK;
    struct stat about;
    CPL_TRY(check_whole(w));
    if (stat(w->part, &about) != 0 || truncate(w->part, about.st_size) != 0) {
        CPL_FAIL(CPL_IO, "%s: %s", w->part, strerror(errno));
    }
    CPL_TRY(cpl_file_commit(w->part, w->path));
done:
    return st;
}

cpl_status cpl_checkpoint_write(const char *path, const cpl_io_ranks *ranks, const cpl_ckpt_array *arrays, size_t n_arrays,
                                const cpl_ckpt_attr *attrs, size_t n_attrs) {
    writing w = {path, NULL, ranks, arrays, n_arrays, attrs, n_attrs};
    cpl_arena *arena = NULL;
    cpl_status st = cpl_arena_create(&arena);
    if (st == CPL_OK) {
        st = cpl_part_name(path, &w.part, arena);
    }
    if (st == CPL_OK) {
        st = check(&w);
    }
    CPL_TRY(agree(&w, st));
#ifdef H5_HAVE_PARALLEL
    st = ranks != NULL && ranks->mpi_comm != NULL ? write_together(&w) : write_in_turn(&w);
#else
    st = write_in_turn(&w);
#endif
    CPL_TRY(st);
    CPL_TRY(agree(&w, rank_of(&w) == 0 ? finish(&w) : CPL_OK));
done:
    if (st != CPL_OK && w.part != NULL && rank_of(&w) == 0) {
        (void)unlink(w.part); /* the failure itself is what is reported */
    }
    cpl_arena_destroy(&arena);
    return st;
}

/* Reads checkpoints: parts of arrays, attributes, or everything once to see that it is whole.
 * Refuses values whose checksums do not hold: HDF5 checks Fletcher32 and Adler-32 of every chunk and its own sums of all metadata.
 */
#include "io/checkpoint_private.h"
#include "io/h5.h"
#include <string.h>

static const char *name_of(cpl_type t) {
    static const char *const names[] = {"f32", "f64", "i64", "i32", "u8", "u32", "text"};
    return names[t];
}

static cpl_status open_checkpoint(const char *path, hid_t *file) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    cpl_ckpt_attr found;
    CPL_TRY(cpl_h5_begin());
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_h5_open(path, file));
    st = cpl_h5_get(*file, path, "format", &found, arena);
    if (st == CPL_NOT_FOUND || (st == CPL_OK && (found.type != CPL_T_TEXT || strcmp(found.text, CPL_CKPT_FORMAT) != 0))) {
        CPL_FAIL(CPL_DAMAGED, "%s: expected a checkpoint of cupel, attribute \"format\" does not say so", path);
    }
    CPL_TRY(st);
    st = cpl_h5_get(*file, path, "version", &found, arena);
    if (st == CPL_NOT_FOUND || (st == CPL_OK && (found.type != CPL_T_I64 || found.i != CPL_CKPT_VERSION))) {
        CPL_FAIL(CPL_DAMAGED, "%s: expected a checkpoint of version %d", path, (int)CPL_CKPT_VERSION);
    }
done:
    cpl_arena_destroy(&arena);
    return st;
}

/* A 1-D data set of numbers. */
static cpl_status open_array(hid_t file, const char *path, const char *name, hid_t *set, cpl_type *type, int64_t *total) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE kind = H5I_INVALID_HID;
    htri_t there = -1;
    hsize_t length = 0;
    CPL_H5(CPL_DAMAGED, there = H5Lexists(file, name, H5P_DEFAULT), "%s: array \"%s\"", path, name);
    if (there == 0) {
        CPL_FAIL(CPL_DAMAGED, "%s: array \"%s\" is not there", path, name);
    }
    CPL_H5(CPL_DAMAGED, *set = H5Dopen2(file, name, H5P_DEFAULT), "%s: array \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, space = H5Dget_space(*set), "%s: array \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, kind = H5Dget_type(*set), "%s: array \"%s\"", path, name);
    if (H5Sget_simple_extent_ndims(space) != 1 || H5Sget_simple_extent_dims(space, &length, NULL) != 1 || length > INT64_MAX) {
        CPL_FAIL(CPL_DAMAGED, "%s: array \"%s\": expected one dimension", path, name);
    }
    if (!cpl_h5_type_of(kind, type) || *type == CPL_T_TEXT) {
        CPL_FAIL(CPL_DAMAGED, "%s: array \"%s\": expected little-endian numbers of a type that cupel writes", path, name);
    }
    *total = (int64_t)length;
done:
    return st;
}

/* Elements [first, first + n) into data. */
static cpl_status read_elements(hid_t set, const char *path, const char *name, cpl_type type, int64_t first, int64_t n,
                                void *data) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE memory = H5I_INVALID_HID;
    const hsize_t start = (hsize_t)first;
    const hsize_t count = (hsize_t)n;
    CPL_H5(CPL_DAMAGED, space = H5Dget_space(set), "%s: array \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, memory = H5Screate_simple(1, &count, NULL), "%s: array \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &count, NULL), "%s: array \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, H5Dread(set, cpl_h5_memory_type(type), memory, space, H5P_DEFAULT, data),
           "%s: array \"%s\", elements %lld to %lld", path, name, (long long)first, (long long)(first + n));
done:
    return st;
}

static cpl_status read_array(hid_t file, const char *path, const cpl_ckpt_array *a) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    cpl_type type = a->type;
    int64_t total = 0;
    CPL_TRY(open_array(file, path, a->name, &set, &type, &total));
    if (type != a->type || total != a->total) {
        CPL_FAIL(CPL_DAMAGED, "%s: array \"%s\" has %lld elements %s, expected %lld elements %s", path, a->name, (long long)total,
                 name_of(type), (long long)a->total, name_of(a->type));
    }
    if (a->begin < 0 || a->n < 0 || a->begin > total || a->n > total - a->begin) {
        CPL_FAIL(CPL_INTERNAL, "%s: array \"%s\": %lld elements from %lld on are no part of %lld", path, a->name, (long long)a->n,
                 (long long)a->begin, (long long)total);
    }
    if (a->n > 0) {
        CPL_TRY(read_elements(set, path, a->name, type, a->begin, a->n, a->data));
    }
done:
    return st;
}

static cpl_status read_attr(hid_t file, const char *path, cpl_ckpt_attr *a, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_ckpt_attr found;
    st = cpl_h5_get(file, path, a->name, &found, arena);
    if (st == CPL_NOT_FOUND) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\" is not there", path, a->name);
    }
    CPL_TRY(st);
    if (found.type != a->type) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\" is %s, expected %s", path, a->name, name_of(found.type), name_of(a->type));
    }
    *a = found;
done:
    return st;
}

static cpl_status read_here(const char *path, const cpl_ckpt_array *arrays, size_t n_arrays, cpl_ckpt_attr *attrs, size_t n_attrs,
                            cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_TRY(open_checkpoint(path, &file));
    for (size_t i = 0; i < n_attrs; i++) {
        CPL_TRY(read_attr(file, path, &attrs[i], arena));
    }
    for (size_t i = 0; i < n_arrays; i++) {
        CPL_TRY(read_array(file, path, &arrays[i]));
    }
done:
    return st;
}

cpl_status cpl_checkpoint_read(const char *path, const cpl_io_ranks *ranks, cpl_ckpt_array *arrays, size_t n_arrays,
                               cpl_ckpt_attr *attrs, size_t n_attrs, cpl_arena *arena) {
    cpl_status st = read_here(path, arrays, n_arrays, attrs, n_attrs, arena);
    return ranks != NULL && ranks->agree != NULL ? ranks->agree(ranks->comm, st) : st;
}

cpl_status cpl_checkpoint_array_info(const char *path, const char *name, cpl_type *type, int64_t *total) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    CPL_TRY(open_checkpoint(path, &file));
    CPL_TRY(open_array(file, path, name, &set, type, total));
done:
    return st;
}

enum { VERIFY_ELEMENTS = 8 * CPL_CKPT_CHUNK };

typedef struct {
    const char *path; /* borrowed */
    void *buffer;     /* owned; VERIFY_ELEMENTS of the widest type */
} verifying;

static cpl_status verify_attribute(hid_t object, const char *name, void *context) {
    const verifying *v = context;
    cpl_arena *arena = NULL;
    cpl_ckpt_attr found;
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_h5_get(object, v->path, name, &found, arena));
done:
    cpl_arena_destroy(&arena);
    return st;
}

static cpl_status verify_array(hid_t file, const char *name, void *context) {
    cpl_status st = CPL_OK;
    const verifying *v = context;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    cpl_type type;
    int64_t total = 0;
    CPL_TRY(open_array(file, v->path, name, &set, &type, &total));
    CPL_TRY(cpl_h5_each_attribute(set, v->path, verify_attribute, context));
    for (int64_t first = 0; first < total; first += VERIFY_ELEMENTS) {
        int64_t n = total - first < VERIFY_ELEMENTS ? total - first : VERIFY_ELEMENTS;
        CPL_TRY(read_elements(set, v->path, name, type, first, n, v->buffer));
    }
done:
    return st;
}

cpl_status cpl_checkpoint_verify(const char *path) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    verifying v = {.path = path, .buffer = NULL};
    CPL_TRY(open_checkpoint(path, &file));
    CPL_TRY(cpl_alloc(&v.buffer, VERIFY_ELEMENTS, sizeof(double), "buffer to verify a checkpoint"));
    CPL_TRY(cpl_h5_each_attribute(file, path, verify_attribute, &v));
    CPL_TRY(cpl_h5_each_link(file, path, verify_array, &v));
done:
    cpl_free(&v.buffer);
    return st;
}

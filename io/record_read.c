/* Single values and arrays of written records.
 * Refuses to guess at what is not there. */
#include "io/record_private.h"

static cpl_status attribute(const char *path, const char *name, cpl_ckpt_attr *out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_TRY(cpl_record_open(path, &file));
    CPL_TRY(cpl_h5_get(file, path, name, out, arena));
done:
    return st;
}

cpl_status cpl_record_read_text(const char *path, const char *name, char **out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_ckpt_attr a = {0};
    CPL_TRY(attribute(path, name, &a, arena));
    if (a.type != CPL_T_TEXT) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute %s is no text", path, name);
    }
    CPL_TRY(cpl_arena_strdup(arena, out, a.text));
done:
    return st;
}

cpl_status cpl_record_read_f64(const char *path, const char *name, double *out) {
    cpl_status st = CPL_OK;
    cpl_ckpt_attr a = {0};
    cpl_arena *arena = NULL;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(attribute(path, name, &a, arena));
    if (a.type == CPL_T_TEXT) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute %s is no number", path, name);
    }
    *out = a.type == CPL_T_I64 ? (double)a.i : a.f;
done:
    cpl_arena_destroy(&arena);
    return st;
}

/* Opens a data set; its elements in *n, its type in *type. */
static cpl_status open_set(const char *path, const char *name, hid_t *file, hid_t *set, cpl_type *type, int64_t *n) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID, stored = H5I_INVALID_HID;
    CPL_TRY(cpl_record_open(path, file));
    if (H5Lexists(*file, name, H5P_DEFAULT) <= 0) {
        CPL_FAIL(CPL_NOT_FOUND, "%s: no data set %s", path, name);
    }
    CPL_H5(CPL_DAMAGED, *set = H5Dopen2(*file, name, H5P_DEFAULT), "%s: opening %s", path, name);
    CPL_H5(CPL_DAMAGED, space = H5Dget_space(*set), "%s: %s", path, name);
    CPL_H5(CPL_DAMAGED, stored = H5Dget_type(*set), "%s: %s", path, name);
    *n = (int64_t)H5Sget_simple_extent_npoints(space);
    if (*n < 0 || !cpl_h5_type_of(stored, type)) {
        CPL_FAIL(CPL_DAMAGED, "%s: %s has a type or shape that no record has", path, name);
    }
done:
    return st;
}

cpl_status cpl_record_read_array(const char *path, const char *name, double **out, int64_t *n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID, set = H5I_INVALID_HID;
    cpl_type type;
    CPL_TRY(open_set(path, name, &file, &set, &type, n));
    if (type == CPL_T_TEXT) {
        CPL_FAIL(CPL_DAMAGED, "%s: %s is text", path, name);
    }
    CPL_TRY(cpl_arena_alloc(arena, out, (size_t)*n + 1, sizeof **out));
    if (*n > 0) {
        CPL_H5(CPL_DAMAGED, H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, *out), "%s: reading %s", path, name);
    }
done:
    return st;
}

cpl_status cpl_record_read_texts(const char *path, const char *name, char ***out, int64_t *n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID, set = H5I_INVALID_HID, stored = H5I_INVALID_HID;
    cpl_type type;
    char *cells = NULL;
    CPL_TRY(open_set(path, name, &file, &set, &type, n));
    CPL_H5(CPL_DAMAGED, stored = H5Dget_type(set), "%s: %s", path, name);
    if (type != CPL_T_TEXT || H5Tis_variable_str(stored) > 0) {
        CPL_FAIL(CPL_DAMAGED, "%s: %s is no text of fixed length", path, name);
    }
    size_t size = H5Tget_size(stored);
    CPL_TRY(cpl_arena_alloc(arena, out, (size_t)*n + 1, sizeof **out));
    CPL_TRY(cpl_arena_alloc(arena, &cells, (size_t)*n + 1, size));
    if (*n > 0) {
        CPL_H5(CPL_DAMAGED, H5Dread(set, stored, H5S_ALL, H5S_ALL, H5P_DEFAULT, cells), "%s: reading %s", path, name);
    }
    for (int64_t i = 0; i < *n; i++) {
        CPL_TRY(cpl_arena_printf(arena, &(*out)[i], "%.*s", (int)size, cells + (size_t)i * size));
    }
done:
    return st;
}

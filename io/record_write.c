/* Records to HDF5 files: attributes, data sets and tables; written beside, sealed, synced and renamed.
 * Refuses data sets without a checksum: text is stored in fixed length, for variable text lies in a heap that has none. */
#include "io/record_private.h"
#include <string.h>
#include <unistd.h>

enum { CHUNK_MAX = 65536 }; /* elements; chunks are split along the slowest dimensions */

cpl_status cpl_record_creation(const char *path, int ndim, const hsize_t *dims, hid_t *plist) {
    cpl_status st = CPL_OK;
    hsize_t chunk[CPL_RECORD_DIMS_MAX];
    hsize_t left = CHUNK_MAX;
    CPL_H5(CPL_HDF5, *plist = H5Pcreate(H5P_DATASET_CREATE), "%s: creating a property list", path);
    CPL_H5(CPL_HDF5, H5Pset_obj_track_times(*plist, false), "%s: setting a property", path);
    CPL_H5(CPL_HDF5, H5Pset_attr_creation_order(*plist, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED), "%s: setting a property",
           path);
    if (ndim == 0) {
        CPL_H5(CPL_HDF5, H5Pset_layout(*plist, H5D_COMPACT), "%s: setting a property", path);
        goto done;
    }
    for (int d = ndim - 1; d >= 0; d--) {
        hsize_t n = dims[d] == 0 ? 1 : dims[d];
        chunk[d] = n < left ? n : left;
        left = left / chunk[d] > 0 ? left / chunk[d] : 1;
    }
    CPL_H5(CPL_HDF5, H5Pset_chunk(*plist, ndim, chunk), "%s: setting a chunk", path);
    CPL_H5(CPL_HDF5, H5Pset_fletcher32(*plist), "%s: setting the checksum", path);
done:
    return st;
}

/* At least 2: xarray takes texts of one byte for characters along one more dimension. */
static size_t longest(char *const *texts, int64_t n) {
    size_t most = 2;
    for (int64_t i = 0; i < n; i++) {
        most = strlen(texts[i]) > most ? strlen(texts[i]) : most;
    }
    return most;
}

/* Texts into cells that begin every `stride` bytes, which are zeros still. */
static void cells_of(char *cells, size_t stride, char *const *texts, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        memcpy(cells + (size_t)i * stride, texts[i], strlen(texts[i]));
    }
}

static cpl_status describe(hid_t set, const char *path, const cpl_record_set *s) {
    cpl_status st = CPL_OK;
    if (s->units[0] != '\0') {
        CPL_TRY(cpl_h5_put_text(set, path, "units", s->units, false));
    }
    if (s->help[0] != '\0') {
        CPL_TRY(cpl_h5_put_text(set, path, "long_name", s->help, false));
    }
    if (s->type == CPL_T_TEXT) { /* by it xarray gives str and not bytes */
        CPL_TRY(cpl_h5_put_text(set, path, "_Encoding", "utf-8", false));
    }
done:
    return st;
}

static cpl_status write_set(hid_t group, const char *path, const cpl_record_set *s, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE plist = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    CPL_H5_HANDLE text = H5I_INVALID_HID;
    hsize_t dims[CPL_RECORD_DIMS_MAX];
    int64_t n = 1;
    const void *data = s->data;
    for (int d = 0; d < s->ndim; d++) {
        dims[d] = (hsize_t)s->dims[d];
        n *= s->dims[d];
    }
    if (s->type == CPL_T_TEXT) {
        size_t size = longest(s->data, n);
        char *cells = NULL;
        CPL_TRY(cpl_h5_text_type(size, &text));
        CPL_TRY(cpl_arena_alloc(arena, &cells, (size_t)n + 1, size));
        cells_of(cells, size, s->data, n);
        data = cells;
    }
    CPL_TRY(cpl_record_creation(path, s->ndim, dims, &plist));
    CPL_H5(CPL_HDF5, space = s->ndim == 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(s->ndim, dims, NULL), "%s: %s", path, s->name);
    CPL_H5(CPL_HDF5,
           set = H5Dcreate2(group, s->name, text > 0 ? text : cpl_h5_file_type(s->type), space, H5P_DEFAULT, plist, H5P_DEFAULT),
           "%s: creating %s", path, s->name);
    if (n > 0) {
        CPL_H5(CPL_HDF5, H5Dwrite(set, text > 0 ? text : cpl_h5_memory_type(s->type), H5S_ALL, H5S_ALL, H5P_DEFAULT, data),
               "%s: writing %s", path, s->name);
    }
    CPL_TRY(describe(set, path, s));
done:
    return st;
}

/* Row type and rows of a table. */
static cpl_status pack_table(const char *path, const cpl_record_table *t, hid_t *type, char **rows, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    size_t size = 0, at = 0, bytes = 0;
    for (size_t c = 0; c < t->n; c++) {
        size += t->column[c].type == CPL_T_TEXT ? longest(t->column[c].data, t->rows) : cpl_type_size(t->column[c].type);
    }
    CPL_H5(CPL_HDF5, *type = H5Tcreate(H5T_COMPOUND, size), "%s: row type of %s", path, t->name);
    if (!cpl_mul_size(size, (size_t)t->rows + 1, &bytes)) {
        CPL_FAIL(CPL_NO_MEMORY, "%s: table %s is too large", path, t->name);
    }
    CPL_TRY(cpl_arena_alloc(arena, rows, bytes, 1));
    for (size_t c = 0; c < t->n; c++) {
        const cpl_record_column *col = &t->column[c];
        CPL_H5_HANDLE text = H5I_INVALID_HID;
        size_t width = cpl_type_size(col->type == CPL_T_TEXT ? CPL_T_U8 : col->type);
        if (col->type == CPL_T_TEXT) {
            width = longest(col->data, t->rows);
            CPL_TRY(cpl_h5_text_type(width, &text));
            cells_of(*rows + at, size, col->data, t->rows);
        }
        for (int64_t r = 0; col->type != CPL_T_TEXT && r < t->rows; r++) {
            memcpy(*rows + (size_t)r * size + at, (const char *)col->data + (size_t)r * width, width);
        }
        hid_t member = col->type == CPL_T_TEXT ? text : cpl_h5_memory_type(col->type);
        CPL_H5(CPL_HDF5, H5Tinsert(*type, col->name, at, member), "%s: column %s of %s", path, col->name, t->name);
        at += width;
    }
done:
    return st;
}

static cpl_status write_table(hid_t group, const char *path, const cpl_record_table *t, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE type = H5I_INVALID_HID;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE plist = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    hsize_t dims[1] = {(hsize_t)t->rows};
    char *rows = NULL;
    CPL_TRY(pack_table(path, t, &type, &rows, arena));
    CPL_TRY(cpl_record_creation(path, 1, dims, &plist));
    CPL_H5(CPL_HDF5, space = H5Screate_simple(1, dims, NULL), "%s: %s", path, t->name);
    CPL_H5(CPL_HDF5, set = H5Dcreate2(group, t->name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT), "%s: creating %s", path,
           t->name);
    if (t->rows > 0) {
        CPL_H5(CPL_HDF5, H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, rows), "%s: writing %s", path, t->name);
    }
done:
    return st;
}

cpl_status cpl_record_fill(const cpl_record *rec, hid_t group, const char *path, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < rec->n_attrs; i++) {
        const cpl_ckpt_attr *a = &rec->attr[i];
        switch (a->type) {
        case CPL_T_TEXT:
            CPL_TRY(cpl_h5_put_text(group, path, a->name, a->text, false));
            break;
        case CPL_T_I64:
            CPL_TRY(cpl_h5_put_i64(group, path, a->name, a->i));
            break;
        default:
            CPL_TRY(cpl_h5_put_f64(group, path, a->name, a->f));
        }
    }
    for (size_t i = 0; i < rec->n_sets; i++) {
        CPL_TRY(write_set(group, path, &rec->set[i], arena));
    }
    for (size_t i = 0; i < rec->n_tables; i++) {
        CPL_TRY(write_table(group, path, &rec->table[i], arena));
    }
    CPL_TRY(cpl_record_attach(rec, group, path));
done:
    return st;
}

/* --- files --- */

cpl_status cpl_record_write_file(const char *path, cpl_record_content content, const void *context) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    char *part = NULL;
    CPL_H5_HANDLE fapl = H5I_INVALID_HID;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_TRY(cpl_h5_begin());
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_part_name(path, &part, arena));
    CPL_TRY(cpl_h5_access(&fapl, NULL));
    CPL_TRY(cpl_h5_create(part, fapl, &file));
    CPL_TRY(content(file, part, context, arena));
    CPL_TRY(cpl_h5_close(&file, part));
    CPL_TRY(cpl_file_seal(part));
    CPL_TRY(cpl_file_sync(part));
    CPL_TRY(cpl_file_commit(part, path));
done:
    if (st != CPL_OK && file > 0 && cpl_h5_close(&file, part) == CPL_IO) {
        st = CPL_IO; /* the failed write is the cause of what came after it */
    }
    if (st != CPL_OK && part != NULL) {
        (void)unlink(part); /* the failure itself is what is reported */
    }
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_record_open(const char *path, hid_t *file) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_h5_begin());
    CPL_TRY(cpl_file_check_seal(path));
    CPL_TRY(cpl_h5_open(path, file));
done:
    return st;
}

static cpl_status fill_record(hid_t file, const char *path, const void *context, cpl_arena *arena) {
    return cpl_record_fill(context, file, path, arena);
}

cpl_status cpl_record_write(const cpl_record *rec, const char *path) {
    return cpl_record_write_file(path, fill_record, rec);
}

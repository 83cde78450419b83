/* HDF5 attributes of one value, and the lists of attributes and links.
 * Refuses an attribute of several values: cupel writes none. */
#include "io/h5.h"
#include <string.h>

static cpl_status put(hid_t object, const char *path, const char *name, hid_t file_type, hid_t memory_type, const void *value) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE attribute = H5I_INVALID_HID;
    htri_t there = -1;
    CPL_H5(CPL_HDF5, there = H5Aexists(object, name), "%s: attribute \"%s\"", path, name);
    if (there > 0) {
        CPL_H5(CPL_HDF5, H5Adelete(object, name), "%s: attribute \"%s\"", path, name);
    }
    CPL_H5(CPL_HDF5, space = H5Screate(H5S_SCALAR), "%s: attribute \"%s\"", path, name);
    CPL_H5(CPL_HDF5, attribute = H5Acreate2(object, name, file_type, space, H5P_DEFAULT, H5P_DEFAULT), "%s: attribute \"%s\"", path,
           name);
    CPL_H5(CPL_HDF5, H5Awrite(attribute, memory_type, value), "%s: attribute \"%s\"", path, name);
done:
    return st;
}

cpl_status cpl_h5_put_text(hid_t object, const char *path, const char *name, const char *text, bool fixed) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE type = H5I_INVALID_HID;
    CPL_TRY(cpl_h5_text_type(fixed ? strlen(text) : H5T_VARIABLE, &type));
    CPL_TRY(put(object, path, name, type, type, fixed ? (const void *)text : (const void *)&text));
done:
    return st;
}

cpl_status cpl_h5_put_i64(hid_t object, const char *path, const char *name, int64_t value) {
    return put(object, path, name, H5T_STD_I64LE, H5T_NATIVE_INT64, &value);
}

cpl_status cpl_h5_put_f64(hid_t object, const char *path, const char *name, double value) {
    return put(object, path, name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &value);
}

static cpl_status get_text(hid_t attribute, hid_t type, const char *path, cpl_ckpt_attr *out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *text = NULL;
    char *heap = NULL;
    CPL_H5_HANDLE memory = H5I_INVALID_HID;
    htri_t variable = -1;
    CPL_H5(CPL_DAMAGED, variable = H5Tis_variable_str(type), "%s: attribute \"%s\"", path, out->name);
    if (variable > 0) {
        CPL_TRY(cpl_h5_text_type(H5T_VARIABLE, &memory));
        CPL_H5(CPL_DAMAGED, H5Tset_cset(memory, H5Tget_cset(type)), "%s: attribute \"%s\"", path, out->name);
        CPL_H5(CPL_DAMAGED, H5Aread(attribute, memory, &heap), "%s: attribute \"%s\"", path, out->name);
        CPL_TRY(cpl_arena_strdup(arena, &text, heap == NULL ? "" : heap));
    } else {
        size_t bytes = 0; /* one more than it has: the end stays 0 */
        if (!cpl_add_size(H5Tget_size(type), 1, &bytes)) {
            CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\" has an impossible size", path, out->name);
        }
        CPL_TRY(cpl_arena_alloc(arena, &text, bytes, 1));
        CPL_H5(CPL_DAMAGED, H5Aread(attribute, type, text), "%s: attribute \"%s\"", path, out->name);
    }
    out->text = text;
done:
    if (heap != NULL) {
        (void)H5free_memory(heap);
    }
    return st;
}

cpl_status cpl_h5_get(hid_t object, const char *path, const char *name, cpl_ckpt_attr *out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE attribute = H5I_INVALID_HID;
    CPL_H5_HANDLE type = H5I_INVALID_HID;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    *out = (cpl_ckpt_attr){.name = name};
    htri_t there = -1;
    CPL_H5(CPL_DAMAGED, there = H5Aexists(object, name), "%s: attribute \"%s\"", path, name);
    if (there == 0) {
        CPL_FAIL(CPL_NOT_FOUND, "%s: attribute \"%s\" is not there", path, name);
    }
    CPL_H5(CPL_DAMAGED, attribute = H5Aopen(object, name, H5P_DEFAULT), "%s: attribute \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, type = H5Aget_type(attribute), "%s: attribute \"%s\"", path, name);
    CPL_H5(CPL_DAMAGED, space = H5Aget_space(attribute), "%s: attribute \"%s\"", path, name);
    if (H5Sget_simple_extent_npoints(space) != 1) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\": expected one value", path, name);
    }
    switch (H5Tget_class(type)) {
    case H5T_STRING:
        out->type = CPL_T_TEXT;
        CPL_TRY(get_text(attribute, type, path, out, arena));
        break;
    case H5T_INTEGER:
        out->type = CPL_T_I64;
        CPL_H5(CPL_DAMAGED, H5Aread(attribute, H5T_NATIVE_INT64, &out->i), "%s: attribute \"%s\"", path, name);
        out->f = (double)out->i;
        break;
    case H5T_FLOAT:
        out->type = CPL_T_F64;
        CPL_H5(CPL_DAMAGED, H5Aread(attribute, H5T_NATIVE_DOUBLE, &out->f), "%s: attribute \"%s\"", path, name);
        break;
    default:
        CPL_FAIL(CPL_DAMAGED, "%s: attribute \"%s\": expected text, an integer or a real number", path, name);
    }
done:
    return st;
}

typedef struct {
    cpl_h5_visit visit;
    void *context;
    cpl_status st;
    size_t visited;
} attribute_walk;

static herr_t one_attribute(hid_t object, const char *name, const H5A_info_t *info, void *context) {
    attribute_walk *walk = context;
    (void)info;
    walk->visited++;
    walk->st = walk->visit(object, name, walk->context);
    return walk->st == CPL_OK ? 0 : -1;
}

cpl_status cpl_h5_each_attribute(hid_t object, const char *path, cpl_h5_visit visit, void *context) {
    cpl_status st = CPL_OK;
    attribute_walk walk = {.visit = visit, .context = context, .st = CPL_OK};
    hsize_t at = 0;
    herr_t rc = H5Aiterate2(object, H5_INDEX_CRT_ORDER, H5_ITER_INC, &at, one_attribute, &walk);
    if (rc < 0 && walk.visited == 0) { /* a file that does not track the order */
        at = 0;
        rc = H5Aiterate2(object, H5_INDEX_NAME, H5_ITER_INC, &at, one_attribute, &walk);
    }
    CPL_TRY(walk.st);
    CPL_H5(CPL_DAMAGED, rc, "%s: attributes", path);
done:
    return st;
}

cpl_status cpl_h5_each_link(hid_t group, const char *path, cpl_h5_visit visit, void *context) {
    cpl_status st = CPL_OK;
    char *name = NULL;
    H5G_info_t about;
    CPL_H5(CPL_DAMAGED, H5Gget_info(group, &about), "%s: members", path);
    for (hsize_t i = 0; i < about.nlinks; i++) {
        H5_index_t order = H5_INDEX_CRT_ORDER;
        ssize_t length = H5Lget_name_by_idx(group, ".", order, H5_ITER_INC, i, NULL, 0, H5P_DEFAULT);
        if (length < 0) { /* a file that does not track the order */
            order = H5_INDEX_NAME;
            CPL_H5(CPL_DAMAGED, length = H5Lget_name_by_idx(group, ".", order, H5_ITER_INC, i, NULL, 0, H5P_DEFAULT),
                   "%s: member %llu", path, (unsigned long long)i);
        }
        cpl_free(&name);
        CPL_TRY(cpl_alloc(&name, (size_t)length + 1, 1, "name of a member"));
        CPL_H5(CPL_DAMAGED, H5Lget_name_by_idx(group, ".", order, H5_ITER_INC, i, name, (size_t)length + 1, H5P_DEFAULT),
               "%s: member %llu", path, (unsigned long long)i);
        CPL_TRY(visit(group, name, context));
    }
done:
    cpl_free(&name);
    return st;
}

/* results.h5, put together from the records of the stages.
 * Refuses to touch an older results.h5 in place, and to copy references, which would point into the record. */
#include "io/record_private.h"
#include <hdf5_hl.h>
#include <stdio.h>
#include <string.h>

typedef struct {
    hid_t to;         /* borrowed; the group copied into */
    const char *path; /* borrowed; the file written */
    const char *from; /* borrowed; the record's */
    cpl_arena *arena; /* borrowed */
} copying;

static cpl_status copy_attribute(hid_t object, const char *name, void *context) {
    copying *c = context;
    cpl_ckpt_attr a;
    cpl_status st = cpl_h5_get(object, c->from, name, &a, c->arena);
    if (st != CPL_OK) {
        return st;
    }
    return a.type == CPL_T_TEXT  ? cpl_h5_put_text(c->to, c->path, name, a.text, false)
           : a.type == CPL_T_I64 ? cpl_h5_put_i64(c->to, c->path, name, a.i)
                                 : cpl_h5_put_f64(c->to, c->path, name, a.f);
}

/* The attributes of H5DS hold references and are made anew by attach_set. */
static cpl_status copy_set_attribute(hid_t set, const char *name, void *context) {
    static const char *const scales[] = {"CLASS", "NAME", "REFERENCE_LIST", "DIMENSION_LIST"};
    for (size_t i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        if (strcmp(name, scales[i]) == 0) {
            return CPL_OK;
        }
    }
    return copy_attribute(set, name, context);
}

static cpl_status copy_set(hid_t group, const char *name, void *context) {
    cpl_status st = CPL_OK;
    copying *c = context;
    CPL_H5_HANDLE plist = H5I_INVALID_HID;
    CPL_H5_HANDLE from = H5I_INVALID_HID;
    CPL_H5_HANDLE to = H5I_INVALID_HID;
    CPL_H5(CPL_HDF5, plist = H5Pcreate(H5P_OBJECT_COPY), "%s: copying %s", c->path, name);
    CPL_H5(CPL_HDF5, H5Pset_copy_object(plist, H5O_COPY_WITHOUT_ATTR_FLAG), "%s: copying %s", c->path, name);
    CPL_H5(CPL_DAMAGED, from = H5Dopen2(group, name, H5P_DEFAULT), "%s: data set %s", c->from, name);
    CPL_H5(CPL_DAMAGED, H5Ocopy(group, name, c->to, name, plist, H5P_DEFAULT), "%s: data set %s", c->from, name);
    CPL_H5(CPL_HDF5, to = H5Dopen2(c->to, name, H5P_DEFAULT), "%s: %s", c->path, name);
    copying attributes = {to, c->path, c->from, c->arena};
    CPL_TRY(cpl_h5_each_attribute(from, c->from, copy_set_attribute, &attributes));
    if (H5DSis_scale(from) > 0) {
        char scale[80] = ""; /* a coordinate's own name, or what netCDF-4 calls a dimension without one */
        CPL_H5(CPL_DAMAGED, H5DSget_scale_name(from, scale, sizeof scale), "%s: data set %s", c->from, name);
        CPL_H5(CPL_HDF5, H5DSset_scale(to, scale), "%s: dimension %s", c->path, name);
    }
done:
    return st;
}

/* Leaves the name of the scale, which is in the root of a record, in *(char (*)[256])context. */
static herr_t scale_name(hid_t set, unsigned dim, hid_t scale, void *context) {
    char *name = context;
    (void)set;
    (void)dim;
    return H5Iget_name(scale, name, 256) > 0 ? 1 : -1;
}

static cpl_status attach_set(hid_t group, const char *name, void *context) {
    cpl_status st = CPL_OK;
    copying *c = context;
    CPL_H5_HANDLE from = H5I_INVALID_HID;
    CPL_H5_HANDLE to = H5I_INVALID_HID;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5(CPL_DAMAGED, from = H5Dopen2(group, name, H5P_DEFAULT), "%s: data set %s", c->from, name);
    CPL_H5(CPL_DAMAGED, space = H5Dget_space(from), "%s: data set %s", c->from, name);
    CPL_H5(CPL_HDF5, to = H5Dopen2(c->to, name, H5P_DEFAULT), "%s: %s", c->path, name);
    int ndim = H5Sget_simple_extent_ndims(space);
    for (int d = 0; d < ndim; d++) {
        char found[256] = "";
        CPL_H5_HANDLE scale = H5I_INVALID_HID;
        int scales = H5DSget_num_scales(from, (unsigned)d); /* 0 for scales and tables */
        if (scales <= 0) {
            continue;
        }
        CPL_H5(CPL_DAMAGED, H5DSiterate_scales(from, (unsigned)d, NULL, scale_name, found), "%s: dimensions of %s", c->from, name);
        const char *dim = strrchr(found, '/');
        dim = dim != NULL ? dim + 1 : found;
        CPL_H5(CPL_HDF5, scale = H5Dopen2(c->to, dim, H5P_DEFAULT), "%s: dimension %s", c->path, dim);
        CPL_H5(CPL_HDF5, H5DSattach_scale(to, scale, (unsigned)d), "%s: dimension %s of %s", c->path, dim, name);
    }
done:
    return st;
}

/* Groups of groups that are not there yet are made on the way, tracked in the order of their creation like all others. */
static cpl_status make_group(hid_t file, const char *path, const char *name, hid_t *group, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE plist = H5I_INVALID_HID;
    const unsigned order = H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED;
    char *prefix = NULL;
    CPL_TRY(cpl_arena_strdup(arena, &prefix, name));
    CPL_H5(CPL_HDF5, plist = H5Pcreate(H5P_GROUP_CREATE), "%s: group %s", path, name);
    CPL_H5(CPL_HDF5, H5Pset_link_creation_order(plist, order), "%s: group %s", path, name);
    CPL_H5(CPL_HDF5, H5Pset_attr_creation_order(plist, order), "%s: group %s", path, name);
    CPL_H5(CPL_HDF5, H5Pset_obj_track_times(plist, 0), "%s: group %s", path, name);
    for (char *slash = strchr(prefix, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        CPL_H5_HANDLE outer = H5I_INVALID_HID;
        *slash = '\0';
        if (H5Lexists(file, prefix, H5P_DEFAULT) == 0) {
            CPL_H5(CPL_HDF5, outer = H5Gcreate2(file, prefix, H5P_DEFAULT, plist, H5P_DEFAULT), "%s: group %s", path, prefix);
        }
        *slash = '/';
    }
    CPL_H5(CPL_HDF5, *group = H5Gcreate2(file, name, H5P_DEFAULT, plist, H5P_DEFAULT), "%s: group %s", path, name);
done:
    return st;
}

static cpl_status copy_part(hid_t file, const char *path, const cpl_results_part *part, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE from = H5I_INVALID_HID;
    CPL_H5_HANDLE to = H5I_INVALID_HID;
    CPL_TRY(cpl_record_open(part->path, &from));
    CPL_TRY(make_group(file, path, part->group, &to, arena));
    copying c = {to, path, part->path, arena};
    CPL_TRY(cpl_h5_each_attribute(from, part->path, copy_attribute, &c));
    CPL_TRY(cpl_h5_each_link(from, part->path, copy_set, &c));
    CPL_TRY(cpl_h5_each_link(from, part->path, attach_set, &c));
done:
    return st;
}

typedef struct {
    const cpl_record *root;        /* borrowed */
    const cpl_results_part *parts; /* borrowed */
    size_t n;
} assembly;

static cpl_status fill_results(hid_t file, const char *path, const void *context, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    const assembly *a = context;
    CPL_TRY(cpl_record_fill(a->root, file, path, arena));
    for (size_t i = 0; i < a->n; i++) {
        CPL_TRY(copy_part(file, path, &a->parts[i], arena));
    }
done:
    return st;
}

cpl_status cpl_results_assemble(const char *path, const cpl_record *root, const cpl_results_part *parts, size_t n_parts) {
    const assembly a = {root, parts, n_parts};
    return cpl_record_write_file(path, fill_results, &a);
}

void cpl_h5_library(char *out, size_t size) {
    unsigned major = 0;
    unsigned minor = 0;
    unsigned release = 0;
    (void)H5get_libversion(&major, &minor, &release);
    snprintf(out, size, "%u.%u.%u, %s", major, minor, release, cpl_h5_is_parallel() ? "parallel" : "serial");
}

bool cpl_h5_is_parallel(void) {
#ifdef H5_HAVE_PARALLEL
    return true;
#else
    return false;
#endif
}

/* The dimension scales of a record, as netCDF-4 has them, so that h5netcdf and xarray find every dimension by its name.
 * Refuses a dimension whose name is that of a data set of another shape. */
#include "io/record_private.h"
#include <hdf5_hl.h>
#include <stdio.h>
#include <string.h>

static const cpl_record_set *find(const cpl_record *rec, const char *name) {
    for (size_t i = 0; i < rec->n_sets; i++) {
        if (strcmp(rec->set[i].name, name) == 0) {
            return &rec->set[i];
        }
    }
    return NULL;
}

static bool is_coordinate(const cpl_record_set *s) {
    return s->ndim == 1 && strcmp(s->dim_names[0], s->name) == 0;
}

/* A scale without values: a data set of which nothing is stored, named as netCDF-4 names a dimension that is no variable (its
 * length in 10 places; NC_DIM_WITHOUT_VARIABLE of netCDF's nc4internal.h). */
static cpl_status add_empty_scale(hid_t group, const char *path, const char *dim, int64_t length) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE plist = H5I_INVALID_HID;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    const hsize_t dims = (hsize_t)length;
    char name[80];
    snprintf(name, sizeof name, "This is a netCDF dimension but not a netCDF variable.%10lld", (long long)length);
    CPL_TRY(cpl_record_creation(path, 1, &dims, &plist));
    CPL_H5(CPL_HDF5, space = H5Screate_simple(1, &dims, NULL), "%s: dimension %s", path, dim);
    CPL_H5(CPL_HDF5, set = H5Dcreate2(group, dim, H5T_IEEE_F32LE, space, H5P_DEFAULT, plist, H5P_DEFAULT), "%s: dimension %s", path,
           dim);
    CPL_H5(CPL_HDF5, H5DSset_scale(set, name), "%s: dimension %s", path, dim);
done:
    return st;
}

/* The scale of one dimension, if it is not there yet. */
static cpl_status make_scale(const cpl_record *rec, hid_t group, const char *path, const char *dim, int64_t length) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    const cpl_record_set *s = find(rec, dim);
    htri_t there = -1;
    if (s != NULL && !is_coordinate(s)) {
        CPL_FAIL(CPL_INTERNAL, "%s: dimension %s has the name of a data set that is not its coordinate", path, dim);
    }
    CPL_H5(CPL_HDF5, there = H5Lexists(group, dim, H5P_DEFAULT), "%s: dimension %s", path, dim);
    if (there == 0) {
        CPL_TRY(add_empty_scale(group, path, dim, length));
        goto done;
    }
    CPL_H5(CPL_HDF5, set = H5Dopen2(group, dim, H5P_DEFAULT), "%s: dimension %s", path, dim);
    if (H5DSis_scale(set) == 0) {
        CPL_H5(CPL_HDF5, H5DSset_scale(set, dim), "%s: dimension %s", path, dim);
    }
done:
    return st;
}

/* The rows of a table are a dimension of their own, TABLE_row; else h5netcdf takes another one of that length for them. */
static cpl_status attach_rows(hid_t group, const char *path, const cpl_record_table *t) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    char *dim = NULL;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    CPL_H5_HANDLE scale = H5I_INVALID_HID;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_arena_printf(arena, &dim, "%s_row", t->name));
    CPL_TRY(add_empty_scale(group, path, dim, t->rows));
    CPL_H5(CPL_HDF5, set = H5Dopen2(group, t->name, H5P_DEFAULT), "%s: %s", path, t->name);
    CPL_H5(CPL_HDF5, scale = H5Dopen2(group, dim, H5P_DEFAULT), "%s: dimension %s", path, dim);
    CPL_H5(CPL_HDF5, H5DSattach_scale(set, scale, 0), "%s: dimension %s of %s", path, dim, t->name);
done:
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_record_attach(const cpl_record *rec, hid_t group, const char *path) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < rec->n_sets; i++) {
        for (int d = 0; d < rec->set[i].ndim; d++) {
            CPL_TRY(make_scale(rec, group, path, rec->set[i].dim_names[d], rec->set[i].dims[d]));
        }
    }
    for (size_t i = 0; i < rec->n_sets; i++) {
        const cpl_record_set *s = &rec->set[i];
        CPL_H5_HANDLE set = H5I_INVALID_HID;
        CPL_H5(CPL_HDF5, set = H5Dopen2(group, s->name, H5P_DEFAULT), "%s: %s", path, s->name);
        for (int d = 0; d < s->ndim && !is_coordinate(s); d++) {
            CPL_H5_HANDLE scale = H5I_INVALID_HID;
            CPL_H5(CPL_HDF5, scale = H5Dopen2(group, s->dim_names[d], H5P_DEFAULT), "%s: dimension %s", path, s->dim_names[d]);
            CPL_H5(CPL_HDF5, H5DSattach_scale(set, scale, (unsigned)d), "%s: dimension %s of %s", path, s->dim_names[d], s->name);
        }
    }
    for (size_t i = 0; i < rec->n_tables; i++) {
        CPL_TRY(attach_rows(group, path, &rec->table[i]));
    }
done:
    return st;
}

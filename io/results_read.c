/* Groups, attributes, arrays and tables of a results file.
 * Refuses to guess at what is not there. */
#include "io/results_read.h"
#include "io/record_private.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Whether every link of a/b/c is there; H5Lexists fails where an inner one is missing. */
static cpl_status link_exists(hid_t file, const char *path, const char *name, bool *there) {
    cpl_status st = CPL_OK;
    char part[1024];
    *there = false;
    size_t length = strlen(name);
    if (length >= sizeof part) {
        return CPL_OK;
    }
    *there = true;
    for (size_t i = 1; i <= length && *there; i++) {
        if (name[i] == '/' || name[i] == '\0') {
            memcpy(part, name, i);
            part[i] = '\0';
            htri_t found = H5Lexists(file, part, H5P_DEFAULT);
            CPL_H5(CPL_DAMAGED, found, "%s: %s", path, part);
            *there = found > 0;
        }
    }
done:
    return st;
}

typedef struct {
    const char *path; /* borrowed */
    char **names;     /* owned by the arena */
    size_t n, room;
    cpl_arena *arena; /* borrowed */
} listing;

static cpl_status list_group(hid_t parent, const char *name, void *context) {
    cpl_status st = CPL_OK;
    listing *l = context;
    CPL_H5_HANDLE object = H5I_INVALID_HID;
    char **more = NULL;
    CPL_H5(CPL_DAMAGED, object = H5Oopen(parent, name, H5P_DEFAULT), "%s: %s", l->path, name);
    if (H5Iget_type(object) != H5I_GROUP) {
        return CPL_OK;
    }
    if (l->n == l->room) {
        l->room = l->room == 0 ? 16 : 2 * l->room;
        CPL_TRY(cpl_arena_alloc(l->arena, &more, l->room, sizeof *more));
        for (size_t i = 0; i < l->n; i++) {
            more[i] = l->names[i];
        }
        l->names = more;
    }
    CPL_TRY(cpl_arena_strdup(l->arena, &l->names[l->n], name));
    l->n++;
done:
    return st;
}

cpl_status cpl_results_groups(const char *path, const char *group, char ***names, size_t *n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE parent = H5I_INVALID_HID;
    listing l = {.path = path, .arena = arena};
    bool there = false;
    CPL_TRY(cpl_record_open(path, &file));
    CPL_TRY(link_exists(file, path, group, &there));
    if (there) {
        CPL_H5(CPL_DAMAGED, parent = H5Gopen2(file, group, H5P_DEFAULT), "%s: group %s", path, group);
        CPL_TRY(cpl_h5_each_link(parent, path, list_group, &l));
    }
    *names = l.names;
    *n = l.n;
done:
    return st;
}

cpl_status cpl_results_attributes(const char *path, const char *group, cpl_ckpt_attr *attrs, size_t n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE object = H5I_INVALID_HID;
    CPL_TRY(cpl_record_open(path, &file));
    CPL_H5(CPL_DAMAGED, object = H5Gopen2(file, group, H5P_DEFAULT), "%s: group %s", path, group);
    for (size_t i = 0; i < n; i++) {
        const char *name = attrs[i].name;
        htri_t there = -1;
        CPL_H5(CPL_DAMAGED, there = H5Aexists(object, name), "%s: %s: attribute \"%s\"", path, group, name);
        if (there > 0) {
            CPL_TRY(cpl_h5_get(object, path, name, &attrs[i], arena));
        } else {
            attrs[i] = (cpl_ckpt_attr){.name = name, .type = CPL_T_F64, .f = NAN};
        }
    }
done:
    return st;
}

/* Opens a data set of one dimension or more; *rows: all its elements. *there false: it is not there. */
static cpl_status open_set(hid_t file, const char *path, const char *name, hid_t *set, int64_t *rows, bool *there) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE space = H5I_INVALID_HID;
    *rows = 0;
    CPL_TRY(link_exists(file, path, name, there));
    if (*there) {
        CPL_H5(CPL_DAMAGED, *set = H5Dopen2(file, name, H5P_DEFAULT), "%s: %s", path, name);
        CPL_H5(CPL_DAMAGED, space = H5Dget_space(*set), "%s: %s", path, name);
        CPL_H5(CPL_DAMAGED, *rows = (int64_t)H5Sget_simple_extent_npoints(space), "%s: %s", path, name);
    }
done:
    return st;
}

cpl_status cpl_results_array(const char *path, const char *name, double **out, int64_t *n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    bool there = false;
    *out = NULL;
    CPL_TRY(cpl_record_open(path, &file));
    CPL_TRY(open_set(file, path, name, &set, n, &there));
    if (*n > 0) {
        CPL_TRY(cpl_arena_alloc(arena, out, (size_t)*n, sizeof **out));
        CPL_H5(CPL_DAMAGED, H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, *out), "%s: %s", path, name);
    }
done:
    return st;
}

/* One member of the compound rows, read alone: HDF5 picks members by name. */
static cpl_status read_member(hid_t set, hid_t member, const char *path, int64_t rows, cpl_results_column *c, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE value = H5I_INVALID_HID;
    CPL_H5_HANDLE compound = H5I_INVALID_HID;
    bool text = H5Tget_class(member) == H5T_STRING;
    bool variable = text && H5Tis_variable_str(member) > 0;
    size_t size = text && !variable ? H5Tget_size(member) : 0, bytes = 0;
    char *fixed = NULL;
    if (!cpl_mul_size(size, (size_t)rows, &bytes)) {
        CPL_FAIL(CPL_DAMAGED, "%s: column %s has an impossible size", path, c->name);
    }
    CPL_H5(CPL_DAMAGED, value = text ? H5Tcopy(member) : H5Tcopy(H5T_NATIVE_DOUBLE), "%s: column %s", path, c->name);
    CPL_H5(CPL_DAMAGED, compound = H5Tcreate(H5T_COMPOUND, H5Tget_size(value)), "%s: column %s", path, c->name);
    CPL_H5(CPL_DAMAGED, H5Tinsert(compound, c->name, 0, value), "%s: column %s", path, c->name);
    if (!text) {
        CPL_TRY(cpl_arena_alloc(arena, &c->number, (size_t)rows, sizeof *c->number));
        CPL_H5(CPL_DAMAGED, H5Dread(set, compound, H5S_ALL, H5S_ALL, H5P_DEFAULT, c->number), "%s: column %s", path, c->name);
        return CPL_OK;
    }
    CPL_TRY(cpl_arena_alloc(arena, &c->text, (size_t)rows, sizeof *c->text));
    if (variable) {
        CPL_H5(CPL_DAMAGED, H5Dread(set, compound, H5S_ALL, H5S_ALL, H5P_DEFAULT, c->text), "%s: column %s", path, c->name);
        for (int64_t i = 0; i < rows; i++) {
            char *heap = c->text[i];
            c->text[i] = NULL;
            cpl_status copied = cpl_arena_strdup(arena, &c->text[i], heap == NULL ? "" : heap);
            st = st == CPL_OK ? copied : st;
            (void)H5free_memory(heap);
        }
        return st;
    }
    CPL_TRY(cpl_alloc(&fixed, bytes, 1, "column of text"));
    CPL_H5(CPL_DAMAGED, H5Dread(set, compound, H5S_ALL, H5S_ALL, H5P_DEFAULT, fixed), "%s: column %s", path, c->name);
    for (int64_t i = 0; i < rows; i++) {
        CPL_TRY(cpl_arena_printf(arena, &c->text[i], "%.*s", (int)size, fixed + (size_t)i * size));
    }
done:
    cpl_free(&fixed);
    return st;
}

cpl_status cpl_results_table_read(const char *path, const char *name, cpl_results_table *out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE file = H5I_INVALID_HID;
    CPL_H5_HANDLE set = H5I_INVALID_HID;
    CPL_H5_HANDLE type = H5I_INVALID_HID;
    bool there = false;
    *out = (cpl_results_table){0};
    CPL_TRY(cpl_record_open(path, &file));
    CPL_TRY(open_set(file, path, name, &set, &out->rows, &there));
    if (!there) {
        return CPL_OK;
    }
    CPL_H5(CPL_DAMAGED, type = H5Dget_type(set), "%s: %s", path, name);
    int members = H5Tget_class(type) == H5T_COMPOUND ? H5Tget_nmembers(type) : -1;
    if (members < 0) {
        CPL_FAIL(CPL_DAMAGED, "%s: %s: expected a table", path, name);
    }
    CPL_TRY(cpl_arena_alloc(arena, &out->column, (size_t)members, sizeof *out->column));
    for (int i = 0; i < members; i++) {
        CPL_H5_HANDLE member = H5Tget_member_type(type, (unsigned)i);
        char *heap = H5Tget_member_name(type, (unsigned)i);
        cpl_status copied = cpl_arena_strdup(arena, &out->column[i].name, heap == NULL ? "" : heap);
        (void)H5free_memory(heap);
        CPL_TRY(copied);
        CPL_TRY(read_member(set, member, path, out->rows, &out->column[i], arena));
        out->n_columns++;
    }
done:
    return st;
}

const cpl_results_column *cpl_results_column_find(const cpl_results_table *t, const char *name) {
    for (size_t i = 0; i < t->n_columns; i++) {
        if (strcmp(t->column[i].name, name) == 0) {
            return &t->column[i];
        }
    }
    return NULL;
}

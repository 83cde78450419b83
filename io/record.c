/* Stage records in memory: attributes, arrays and tables, copied as they are given.
 * Refuses dimensions that contradict one another. */
#include "io/record_private.h"
#include <string.h>

cpl_status cpl_record_create(cpl_record **out) {
    cpl_status st = CPL_OK;
    cpl_record *rec = NULL;
    CPL_TRY(cpl_alloc(&rec, 1, sizeof *rec, "record"));
    CPL_TRY(cpl_arena_create(&rec->arena));
    *out = rec;
    rec = NULL;
done:
    cpl_record_destroy(&rec);
    return st;
}

void cpl_record_destroy(cpl_record **rec) {
    if (rec != NULL && *rec != NULL) {
        cpl_arena_destroy(&(*rec)->arena);
        cpl_free(rec);
    }
}

/* Room for one more member of a list that lives in the arena; doubles at powers of two. */
static cpl_status grow(cpl_arena *arena, void *list, size_t n, size_t size) {
    cpl_status st = CPL_OK;
    void *more = NULL;
    if (n == 0 || (n & (n - 1)) == 0) {
        CPL_TRY(cpl_arena_alloc(arena, &more, n == 0 ? 1 : 2 * n, size));
        if (n > 0) {
            memcpy(more, *(void **)list, n * size);
        }
        *(void **)list = more;
    }
done:
    return st;
}

static cpl_status put(cpl_record *rec, const char *name, cpl_ckpt_attr value) {
    cpl_status st = CPL_OK;
    size_t i = 0;
    char *copy = NULL;
    while (i < rec->n_attrs && strcmp(rec->attr[i].name, name) != 0) {
        i++;
    }
    CPL_TRY(cpl_arena_strdup(rec->arena, &copy, name));
    value.name = copy;
    if (i == rec->n_attrs) {
        CPL_TRY(grow(rec->arena, &rec->attr, rec->n_attrs, sizeof *rec->attr));
        rec->n_attrs++;
    }
    rec->attr[i] = value;
done:
    return st;
}

cpl_status cpl_record_text(cpl_record *rec, const char *name, const char *value) {
    char *copy = NULL;
    cpl_status st = cpl_arena_strdup(rec->arena, &copy, value);
    return st == CPL_OK ? put(rec, name, (cpl_ckpt_attr){.type = CPL_T_TEXT, .text = copy}) : st;
}

cpl_status cpl_record_i64(cpl_record *rec, const char *name, int64_t value) {
    return put(rec, name, (cpl_ckpt_attr){.type = CPL_T_I64, .i = value});
}

cpl_status cpl_record_f64(cpl_record *rec, const char *name, double value) {
    return put(rec, name, (cpl_ckpt_attr){.type = CPL_T_F64, .f = value});
}

/* Elements of one type into the arena. */
static cpl_status copy_data(cpl_arena *arena, cpl_type type, int64_t n, const void *data, void **out) {
    cpl_status st = CPL_OK;
    size_t size = type == CPL_T_TEXT ? sizeof(char *) : cpl_type_size(type);
    CPL_TRY(cpl_arena_alloc(arena, out, n > 0 ? (size_t)n : 1, size));
    if (type != CPL_T_TEXT && n > 0) {
        memcpy(*out, data, (size_t)n * size);
    }
    for (int64_t i = 0; type == CPL_T_TEXT && i < n; i++) {
        CPL_TRY(cpl_arena_strdup(arena, &((char **)*out)[i], ((const char *const *)data)[i]));
    }
done:
    return st;
}

/* The length a dimension has by the other sets that are there already, or -1. */
static int64_t known_length(const cpl_record *rec, size_t but, const char *dim) {
    for (size_t i = 0; i < rec->n_sets; i++) {
        for (int d = 0; i != but && d < rec->set[i].ndim; d++) {
            if (strcmp(rec->set[i].dim_names[d], dim) == 0) {
                return rec->set[i].dims[d];
            }
        }
    }
    return -1;
}

cpl_status cpl_record_array(cpl_record *rec, const char *name, cpl_type type, int ndim, const int64_t *dims,
                            const char *const *dim_names, const void *data, const char *units, const char *help) {
    cpl_status st = CPL_OK;
    cpl_record_set set = {.type = type, .ndim = ndim};
    int64_t n = 1;
    size_t at = 0;
    if (ndim < 0 || ndim > CPL_RECORD_DIMS_MAX) {
        CPL_FAIL(CPL_INTERNAL, "record: %s has %d dimensions", name, ndim);
    }
    while (at < rec->n_sets && strcmp(rec->set[at].name, name) != 0) {
        at++;
    }
    CPL_TRY(cpl_arena_strdup(rec->arena, &set.name, name));
    CPL_TRY(cpl_arena_strdup(rec->arena, &set.units, units != NULL ? units : ""));
    CPL_TRY(cpl_arena_strdup(rec->arena, &set.help, help != NULL ? help : ""));
    for (int d = 0; d < ndim; d++) {
        int64_t known = known_length(rec, at, dim_names[d]);
        if (dims[d] < 0 || (known >= 0 && known != dims[d]) || !cpl_mul_i64(n, dims[d], &n)) {
            CPL_FAIL(CPL_INTERNAL, "record: %s has %lld elements along %s, other data sets %lld", name, (long long)dims[d],
                     dim_names[d], (long long)known);
        }
        set.dims[d] = dims[d];
        CPL_TRY(cpl_arena_strdup(rec->arena, &set.dim_names[d], dim_names[d]));
    }
    CPL_TRY(copy_data(rec->arena, type, n, data, &set.data));
    if (at == rec->n_sets) {
        CPL_TRY(grow(rec->arena, &rec->set, rec->n_sets, sizeof *rec->set));
        rec->n_sets++;
    }
    rec->set[at] = set;
done:
    return st;
}

cpl_status cpl_record_table_column(cpl_record *rec, const char *table, const char *column, cpl_type type, int64_t rows,
                                   const void *data) {
    cpl_status st = CPL_OK;
    cpl_record_column c = {.type = type};
    size_t i = 0;
    while (i < rec->n_tables && strcmp(rec->table[i].name, table) != 0) {
        i++;
    }
    if (i == rec->n_tables) {
        cpl_record_table t = {.rows = rows};
        CPL_TRY(cpl_arena_strdup(rec->arena, &t.name, table));
        CPL_TRY(grow(rec->arena, &rec->table, rec->n_tables, sizeof *rec->table));
        rec->table[rec->n_tables++] = t;
    }
    cpl_record_table *t = &rec->table[i];
    if (t->rows != rows) {
        CPL_FAIL(CPL_INTERNAL, "record: column %s of %s has %lld rows, others %lld", column, table, (long long)rows,
                 (long long)t->rows);
    }
    size_t at = 0;
    while (at < t->n && strcmp(t->column[at].name, column) != 0) {
        at++;
    }
    CPL_TRY(cpl_arena_strdup(rec->arena, &c.name, column));
    CPL_TRY(copy_data(rec->arena, type, rows, data, &c.data));
    if (at == t->n) {
        CPL_TRY(grow(rec->arena, &t->column, t->n, sizeof *t->column));
        t->n++;
    }
    t->column[at] = c;
done:
    return st;
}

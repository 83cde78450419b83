/* Option tables: one X-macro line an option gives the struct member, the parser, --help, the job-file check, the hash and the HDF5
 * attribute. Refuses a value out of its range, and says what was expected. */
#ifndef CPL_IO_BASE_FIELDS_H
#define CPL_IO_BASE_FIELDS_H

#include "io/base/arena.h"
#include "io/base/hash.h"
#include "io/base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* s = num / den exactly, as written ("0.7" is 7/10, "1e-3" 1/1000, "50%" 1/2). den > 0, lowest terms. */
typedef struct {
    int64_t num, den;
} cpl_decimal;
typedef struct {
    size_t count;
    int64_t *value; /* borrowed from the arena */
} cpl_int_list;
typedef struct {
    size_t count;
    char **value; /* borrowed from the arena */
} cpl_text_list;

typedef enum {
    CPL_FIELD_INT,     /* int64_t; suffixes k M G (powers of 1000) and Ki Mi Gi allowed */
    CPL_FIELD_REAL,    /* double, finite */
    CPL_FIELD_BOOL,    /* bool: true false yes no on off */
    CPL_FIELD_TEXT,    /* char *, never NULL */
    CPL_FIELD_CHOICE,  /* int: index into `choices`, "a|b|c" */
    CPL_FIELD_DECIMAL, /* cpl_decimal */
    CPL_FIELD_INTS,    /* cpl_int_list; "1,2,3" on the command line, a sequence in YAML */
    CPL_FIELD_TEXTS    /* cpl_text_list */
} cpl_field_type;

typedef struct {
    const char *name;
    cpl_field_type type;
    size_t offset;       /* in the options struct */
    const char *initial; /* default as text; NULL: must be given */
    double min, max;     /* inclusive, for INT, REAL, DECIMAL and members of INTS */
    const char *unit;    /* "" if none; for CHOICE the choices */
    const char *help;    /* one line */
} cpl_field;

/* An options struct and its table from one list of X(TYPE, name, default, min, max, unit or choices, help):
 *   typedef struct { CPL_TRAIN_FIELDS(CPL_FIELD_MEMBER) } cpl_train_options;
 *   static const cpl_field train_fields[] = { CPL_FIELD_TABLE(cpl_train_options, CPL_TRAIN_FIELDS) };
 * with #define CPL_FIELD_OWNER cpl_train_options around the expansion of CPL_FIELD_ROW. */
#define CPL_FIELD_C_INT                                             int64_t
#define CPL_FIELD_C_REAL                                            double
#define CPL_FIELD_C_BOOL                                            bool
#define CPL_FIELD_C_TEXT                                            char *
#define CPL_FIELD_C_CHOICE                                          int
#define CPL_FIELD_C_DECIMAL                                         cpl_decimal
#define CPL_FIELD_C_INTS                                            cpl_int_list
#define CPL_FIELD_C_TEXTS                                           cpl_text_list
#define CPL_FIELD_MEMBER(type, name, initial, min, max, unit, help) CPL_FIELD_C_##type name;
#define CPL_FIELD_ROW(type, name, initial, min, max, unit, help)                                                                   \
    {#name, CPL_FIELD_##type, offsetof(CPL_FIELD_OWNER, name), initial, min, max, unit, help},

/* Every field of `options` to its default; text and lists live in the arena. Fields without a default become 0 / "". */
cpl_status cpl_fields_default(const cpl_field *fields, size_t count, void *options, cpl_arena *arena);
/* Sets one field from text. Errors: CPL_USAGE "expected an integer from 1 to 1000, got 'x'" (the caller adds where). For INTS and
 * TEXTS `text` is split at commas. */
cpl_status cpl_field_set(const cpl_field *field, void *options, const char *text, cpl_arena *arena);
/* The same for a list already in parts (a YAML sequence). Errors as above, also when the field is no list. */
cpl_status cpl_field_set_list(const cpl_field *field, void *options, const char *const *texts, size_t count, cpl_arena *arena);
/* The canonical text of a field's value: cpl_field_set of it gives the same value back, bit for bit. Owned by the arena. */
cpl_status cpl_field_text(const cpl_field *field, const void *options, char **out, cpl_arena *arena);
/* NULL if there is none of that name. '-' and '_' are the same. */
const cpl_field *cpl_field_find(const cpl_field *fields, size_t count, const char *name);
/* The field name nearest to `name` by edit distance, or NULL if none is near (distance > 1/2 of its length). */
const char *cpl_field_nearest(const cpl_field *fields, size_t count, const char *name);
/* The same over any list of words. */
const char *cpl_nearest_word(const char *const *words, size_t count, const char *name);
/* Adds name=value of every field to the hash. Options that change no result (how often to save, say) stand in a table of their own.
 */
cpl_status cpl_fields_hash(const cpl_field *fields, size_t count, const void *options, cpl_sha256 *hash);
/* Rows "  --name UNIT   help (default)" to stdout. */
void cpl_fields_help(const cpl_field *fields, size_t count);

#endif

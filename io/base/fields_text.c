/* Option tables: defaults, canonical text, look-up by name and by nearness, hash.
 * Refuses to call a name near that shares less than half of its letters. */
#include "io/base/fields.h"
#include "io/base/number.h"
#include <ctype.h>
#include <stdio.h>
#include <string.h>

static void clear(const cpl_field *f, void *at) {
    static const size_t size[] = {
        [CPL_FIELD_INT] = sizeof(int64_t),       [CPL_FIELD_REAL] = sizeof(double),
        [CPL_FIELD_BOOL] = sizeof(bool),         [CPL_FIELD_TEXT] = sizeof(char *),
        [CPL_FIELD_CHOICE] = sizeof(int),        [CPL_FIELD_DECIMAL] = sizeof(cpl_decimal),
        [CPL_FIELD_INTS] = sizeof(cpl_int_list), [CPL_FIELD_TEXTS] = sizeof(cpl_text_list),
    };
    memset(at, 0, size[f->type]);
    if (f->type == CPL_FIELD_DECIMAL) {
        ((cpl_decimal *)at)->den = 1;
    }
}

cpl_status cpl_fields_default(const cpl_field *fields, size_t count, void *options, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < count; i++) {
        const cpl_field *f = &fields[i];
        void *at = (char *)options + f->offset;
        clear(f, at);
        if (f->initial == NULL && f->type == CPL_FIELD_TEXT) {
            CPL_TRY(cpl_arena_strdup(arena, (char **)at, ""));
        } else if (f->initial != NULL && cpl_field_set(f, options, f->initial, arena) != CPL_OK) {
            CPL_FAIL(CPL_INTERNAL, "default of option %s: %s", f->name, cpl_status_message());
        }
    }
done:
    return st;
}

static cpl_status ints_text(const cpl_int_list *list, char **out, cpl_arena *arena) {
    enum { LONGEST = 21 }; /* "-9223372036854775808," */
    cpl_status st = CPL_OK;
    size_t size, used = 0;
    if (!cpl_mul_size(list->count, LONGEST, &size) || !cpl_add_size(size, 1, &size)) {
        CPL_FAIL(CPL_NO_MEMORY, "no memory for the text of a list of %zu integers", list->count);
    }
    CPL_TRY(cpl_arena_alloc(arena, out, size, 1));
    for (size_t i = 0; i < list->count; i++) {
        used += (size_t)snprintf(*out + used, size - used, "%s%lld", i > 0 ? "," : "", (long long)list->value[i]);
    }
done:
    return st;
}

static cpl_status texts_text(const cpl_text_list *list, char **out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    size_t size = 1;
    for (size_t i = 0; i < list->count; i++) {
        size_t most;
        if (!cpl_mul_size(strlen(list->value[i]), 2, &most) || !cpl_add_size(size, most, &size) || !cpl_add_size(size, 1, &size)) {
            CPL_FAIL(CPL_NO_MEMORY, "no memory for the text of a list of %zu texts", list->count);
        }
    }
    CPL_TRY(cpl_arena_alloc(arena, out, size, 1));
    char *to = *out;
    for (size_t i = 0; i < list->count; i++) {
        if (i > 0) {
            *to++ = ',';
        }
        for (const char *p = list->value[i]; *p != '\0'; p++) {
            if (*p == ',' || *p == '\\') {
                *to++ = '\\';
            }
            *to++ = *p;
        }
    }
done:
    return st;
}

static cpl_status choice_text(const cpl_field *f, int index, char **out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    const char *choice = index < 0 ? NULL : f->unit;
    for (int i = 0; i < index && choice != NULL; i++) {
        choice = strchr(choice, '|');
        choice = choice == NULL ? NULL : choice + 1;
    }
    if (choice == NULL) {
        CPL_FAIL(CPL_INTERNAL, "option %s holds choice %d, which is none of %s", f->name, index, f->unit);
    }
    CPL_TRY(cpl_arena_printf(arena, out, "%.*s", (int)strcspn(choice, "|"), choice));
done:
    return st;
}

cpl_status cpl_field_text(const cpl_field *field, const void *options, char **out, cpl_arena *arena) {
    const void *at = (const char *)options + field->offset;
    char number[CPL_NUMBER_TEXT];
    *out = NULL;
    switch (field->type) {
    case CPL_FIELD_INT:
        return cpl_arena_printf(arena, out, "%lld", (long long)*(const int64_t *)at);
    case CPL_FIELD_REAL:
        cpl_number_real_text(*(const double *)at, number);
        return cpl_arena_strdup(arena, out, number);
    case CPL_FIELD_BOOL:
        return cpl_arena_strdup(arena, out, *(const bool *)at ? "true" : "false");
    case CPL_FIELD_TEXT:
        return cpl_arena_strdup(arena, out, *(char *const *)at);
    case CPL_FIELD_CHOICE:
        return choice_text(field, *(const int *)at, out, arena);
    case CPL_FIELD_DECIMAL:
        cpl_number_decimal_text(*(const cpl_decimal *)at, number);
        return cpl_arena_strdup(arena, out, number);
    case CPL_FIELD_INTS:
        return ints_text(at, out, arena);
    case CPL_FIELD_TEXTS:
        return texts_text(at, out, arena);
    }
    return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "option %s has no type", field->name);
}

static char plain(char c) {
    return c == '-' ? '_' : c;
}

const cpl_field *cpl_field_find(const cpl_field *fields, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++) {
        size_t k = 0;
        while (name[k] != '\0' && plain(name[k]) == plain(fields[i].name[k])) {
            k++;
        }
        if (name[k] == '\0' && fields[i].name[k] == '\0') {
            return &fields[i];
        }
    }
    return NULL;
}

enum { NEAR_MAX = 64 }; /* longer words have no neighbours */

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Insertions, deletions, replacements and swaps of neighbours that make b of a (restricted Damerau-Levenshtein distance). */
static size_t edit_distance(const char *a, size_t la, const char *b, size_t lb) {
    size_t row[3][NEAR_MAX + 1];
    for (size_t j = 0; j <= lb; j++) {
        row[0][j] = j;
    }
    for (size_t i = 1; i <= la; i++) {
        size_t *now = row[i % 3], *above = row[(i + 2) % 3], *second = row[(i + 1) % 3];
        now[0] = i;
        for (size_t j = 1; j <= lb; j++) {
            char x = plain((char)tolower((unsigned char)a[i - 1])), y = plain((char)tolower((unsigned char)b[j - 1]));
            now[j] = least(least(above[j], now[j - 1]) + 1, above[j - 1] + (x != y));
            if (i > 1 && j > 1 && x == plain((char)tolower((unsigned char)b[j - 2])) &&
                y == plain((char)tolower((unsigned char)a[i - 2]))) {
                now[j] = least(now[j], second[j - 2] + 1);
            }
        }
    }
    return row[la % 3][lb];
}

/* The word when it is nearer than *best, which is then lowered. */
static const char *nearer(const char *word, const char *name, size_t *best) {
    size_t lw = strlen(word), ln = strlen(name);
    if (lw > NEAR_MAX || ln > NEAR_MAX || ln == 0) {
        return NULL;
    }
    size_t distance = edit_distance(name, ln, word, lw);
    if (2 * distance > ln || distance >= *best) {
        return NULL;
    }
    *best = distance;
    return word;
}

const char *cpl_field_nearest(const cpl_field *fields, size_t count, const char *name) {
    const char *found = NULL;
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < count; i++) {
        const char *word = nearer(fields[i].name, name, &best);
        found = word != NULL ? word : found;
    }
    return found;
}

const char *cpl_nearest_word(const char *const *words, size_t count, const char *name) {
    const char *found = NULL;
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < count; i++) {
        const char *word = nearer(words[i], name, &best);
        found = word != NULL ? word : found;
    }
    return found;
}

cpl_status cpl_fields_hash(const cpl_field *fields, size_t count, const void *options, cpl_sha256 *hash) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    CPL_TRY(cpl_arena_create(&arena));
    for (size_t i = 0; i < count; i++) {
        char *value, *line;
        CPL_TRY(cpl_field_text(&fields[i], options, &value, arena));
        CPL_TRY(cpl_arena_printf(arena, &line, "%s=%s", fields[i].name, value));
        cpl_sha256_add_text(hash, line);
    }
done:
    cpl_arena_destroy(&arena);
    return st;
}

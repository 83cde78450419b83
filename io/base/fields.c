/* Option tables: values from text, text from values, defaults, hashes.
 * Refuses a value that is not exactly what the table asks for, and leaves the option as it was. */
#include "io/base/fields.h"
#include "io/base/number.h"
#include <stdio.h>
#include <string.h>
#include <strings.h>

/* Bounds beyond these say "any" in a table. */
static bool bounded_below(const cpl_field *f) {
    return f->min > (f->type == CPL_FIELD_REAL ? -1e300 : -9e18);
}
static bool bounded_above(const cpl_field *f) {
    return f->max < (f->type == CPL_FIELD_REAL ? 1e300 : 9e18);
}

/* 1000000, 0.5, 1e18 */
static void describe_bound(double bound, char out[CPL_NUMBER_TEXT]) {
    snprintf(out, CPL_NUMBER_TEXT, "%.15g", bound);
    char *plus = strstr(out, "e+");
    if (plus != NULL) {
        memmove(plus + 1, plus + 2, strlen(plus + 2) + 1);
    }
}

static void describe_range(const cpl_field *f, char *out, size_t size) {
    char min[CPL_NUMBER_TEXT], max[CPL_NUMBER_TEXT];
    describe_bound(f->min, min);
    describe_bound(f->max, max);
    if (bounded_below(f) && bounded_above(f)) {
        snprintf(out, size, " from %s to %s", min, max);
    } else if (bounded_below(f)) {
        snprintf(out, size, " of at least %s", min);
    } else if (bounded_above(f)) {
        snprintf(out, size, " of at most %s", max);
    } else {
        out[0] = '\0';
    }
}

/* "a|b|c" as "a, b, c", cut to size. */
static void describe_choices(const char *choices, char *out, size_t size) {
    size_t n = 0;
    for (; *choices != '\0' && n + 3 < size; choices++) {
        out[n++] = *choices == '|' ? ',' : *choices;
        if (*choices == '|') {
            out[n++] = ' ';
        }
    }
    out[n] = '\0';
}

/* Choice number i of "a|b|c" with its length; NULL past the last. */
static const char *choice_at(const char *choices, int i, size_t *length) {
    for (; i > 0; i--) {
        choices = strchr(choices, '|');
        if (choices == NULL) {
            return NULL;
        }
        choices++;
    }
    *length = strcspn(choices, "|");
    return choices;
}

static int choice_find(const char *choices, const char *text) {
    size_t length;
    const char *choice;
    for (int i = 0; (choice = choice_at(choices, i, &length)) != NULL; i++) {
        if (strlen(text) == length && memcmp(choice, text, length) == 0) {
            return i;
        }
    }
    return -1;
}

/* "'x'", cut at 60 bytes and there between characters; NULL: "a list". */
static void describe_got(const char *text, char out[72]) {
    enum { MOST = 60 };
    size_t n = text == NULL ? 0 : strlen(text);
    bool cut = n > MOST;
    for (n = cut ? MOST : n; cut && n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80; n--) {
    }
    if (text == NULL) {
        snprintf(out, 72, "a list");
    } else {
        snprintf(out, 72, "'%.*s%s'", (int)n, text, cut ? "..." : "");
    }
}

static cpl_status fail_choice(const cpl_field *field, const char *text, const char *got) {
    enum { MOST = 64, LONGEST = 48 };
    char list[600], copy[MOST][LONGEST];
    const char *words[MOST], *choice;
    size_t n = 0, length;
    for (int i = 0; n < MOST && (choice = choice_at(field->unit, i, &length)) != NULL; i++) {
        snprintf(copy[n], LONGEST, "%.*s", (int)length, choice);
        words[n] = copy[n];
        n++;
    }
    describe_choices(field->unit, list, sizeof list);
    const char *near = text == NULL ? NULL : cpl_nearest_word(words, n, text);
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "expected one of %s, got %s%s%s%s", list, got, near ? "; did you mean '" : "",
                    near ? near : "", near ? "'?" : "");
}

/* What a field wants, then what it got; text NULL: a list. */
static cpl_status fail_value(const cpl_field *field, const char *text) {
    static const struct {
        const char *noun;
        bool bounded;
        const char *example;
    } want[] = {
        [CPL_FIELD_INT] = {"an integer", true, ""},
        [CPL_FIELD_REAL] = {"a number", true, ""},
        [CPL_FIELD_BOOL] = {"true or false", false, ""},
        [CPL_FIELD_TEXT] = {"a text", false, ""},
        [CPL_FIELD_CHOICE] = {"a word", false, ""},
        [CPL_FIELD_DECIMAL] = {"a fraction", true, " (such as 0.7, 70% or 7/10)"},
        [CPL_FIELD_INTS] = {"a list of integers", true, ""},
        [CPL_FIELD_TEXTS] = {"a list of texts, none of them empty", false, ""},
    };
    char got[72], range[2 * CPL_NUMBER_TEXT + 16] = "";
    describe_got(text, got);
    if (field->type == CPL_FIELD_CHOICE) {
        return fail_choice(field, text, got);
    }
    if (want[field->type].bounded) {
        describe_range(field, range, sizeof range);
    }
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "expected %s%s%s, got %s", want[field->type].noun, range,
                    want[field->type].example, got);
}

/* min and max are doubles; an integer is compared without rounding it. */
static bool integer_in_range(const cpl_field *f, int64_t v) {
    return (long double)v >= f->min && (long double)v <= f->max;
}

static bool boolean(const char *text, bool *out) {
    *out = strcasecmp(text, "true") == 0 || strcasecmp(text, "yes") == 0 || strcasecmp(text, "on") == 0;
    return *out || strcasecmp(text, "false") == 0 || strcasecmp(text, "no") == 0 || strcasecmp(text, "off") == 0;
}

/* Splits at commas; in texts "\," is a comma and "\\" a backslash. "" is the empty list. */
static cpl_status split(const char *text, bool escapes, char ***parts, size_t *count, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *copy = NULL;
    size_t most = 1;
    for (const char *p = text; *p != '\0'; p++) {
        most += *p == ',';
    }
    *count = 0;
    CPL_TRY(cpl_arena_alloc(arena, parts, most, sizeof **parts));
    if (*text == '\0') {
        goto done;
    }
    CPL_TRY(cpl_arena_strdup(arena, &copy, text));
    char *to = copy;
    (*parts)[(*count)++] = to;
    for (const char *p = text; *p != '\0'; p++) {
        if (escapes && *p == '\\' && (p[1] == ',' || p[1] == '\\')) {
            *to++ = *++p;
        } else if (*p == ',') {
            *to++ = '\0';
            (*parts)[(*count)++] = to;
        } else {
            *to++ = *p;
        }
    }
    *to = '\0';
done:
    return st;
}

cpl_status cpl_field_set_list(const cpl_field *field, void *options, const char *const *texts, size_t count, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    void *at = (char *)options + field->offset;
    if (field->type == CPL_FIELD_INTS) {
        cpl_int_list list = {.count = count};
        CPL_TRY(cpl_arena_alloc(arena, &list.value, count, sizeof *list.value));
        for (size_t i = 0; i < count; i++) {
            char trimmed[64];
            const char *from = texts[i] + strspn(texts[i], " ");
            snprintf(trimmed, sizeof trimmed, "%.*s", (int)strcspn(from, " "), from);
            if (strlen(from) >= sizeof trimmed || from[strcspn(from, " ") + strspn(from + strcspn(from, " "), " ")] != '\0' ||
                !cpl_number_integer(trimmed, &list.value[i]) || !integer_in_range(field, list.value[i])) {
                st = fail_value(field, texts[i]);
                goto done;
            }
        }
        *(cpl_int_list *)at = list;
    } else if (field->type == CPL_FIELD_TEXTS) {
        cpl_text_list list = {.count = count};
        CPL_TRY(cpl_arena_alloc(arena, &list.value, count, sizeof *list.value));
        for (size_t i = 0; i < count; i++) {
            if (texts[i][0] == '\0') {
                st = fail_value(field, texts[i]);
                goto done;
            }
            CPL_TRY(cpl_arena_strdup(arena, &list.value[i], texts[i]));
        }
        *(cpl_text_list *)at = list;
    } else {
        st = fail_value(field, NULL);
    }
done:
    return st;
}

cpl_status cpl_field_set(const cpl_field *field, void *options, const char *text, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    void *at = (char *)options + field->offset;
    bool good = true;
    switch (field->type) {
    case CPL_FIELD_INT: {
        int64_t v;
        good = cpl_number_integer(text, &v) && integer_in_range(field, v);
        if (good) {
            *(int64_t *)at = v;
        }
        break;
    }
    case CPL_FIELD_REAL: {
        double v;
        good = cpl_number_real(text, &v) && v >= field->min && v <= field->max;
        if (good) {
            *(double *)at = v;
        }
        break;
    }
    case CPL_FIELD_DECIMAL: {
        cpl_decimal v;
        good = cpl_number_decimal(text, &v) && (double)v.num / (double)v.den >= field->min &&
               (double)v.num / (double)v.den <= field->max;
        if (good) {
            *(cpl_decimal *)at = v;
        }
        break;
    }
    case CPL_FIELD_BOOL: {
        bool v;
        good = boolean(text, &v);
        if (good) {
            *(bool *)at = v;
        }
        break;
    }
    case CPL_FIELD_CHOICE: {
        int v = choice_find(field->unit, text);
        good = v >= 0;
        if (good) {
            *(int *)at = v;
        }
        break;
    }
    case CPL_FIELD_TEXT: {
        char *v;
        CPL_TRY(cpl_arena_strdup(arena, &v, text));
        *(char **)at = v;
        break;
    }
    case CPL_FIELD_INTS:
    case CPL_FIELD_TEXTS: {
        char **parts;
        size_t count;
        CPL_TRY(split(text, field->type == CPL_FIELD_TEXTS, &parts, &count, arena));
        CPL_TRY(cpl_field_set_list(field, options, (const char *const *)parts, count, arena));
        break;
    }
    }
    if (!good) {
        st = fail_value(field, text);
    }
done:
    return st;
}

/* Option tables as --help shows them: two columns on 100 characters.
 * Refuses to state what the table does not say. */
#include "io/base/fields.h"
#include <ctype.h>
#include <stdio.h>
#include <string.h>

enum { HELP_WIDTH = 100, LEFT_MAX = 38, CHOICES_LEFT = 22 };

/* What stands after the name: the unit, the choices where they are short, or the kind of value. */
static void placeholder(const cpl_field *f, char *out, size_t size) {
    static const char *const kind[] = {
        [CPL_FIELD_INT] = "N",       [CPL_FIELD_REAL] = "X",           [CPL_FIELD_BOOL] = "yes|no",  [CPL_FIELD_TEXT] = "TEXT",
        [CPL_FIELD_CHOICE] = "WORD", [CPL_FIELD_DECIMAL] = "FRACTION", [CPL_FIELD_INTS] = "N,N,...", [CPL_FIELD_TEXTS] = "TEXT,...",
    };
    if (f->type == CPL_FIELD_CHOICE && strlen(f->unit) <= CHOICES_LEFT) {
        snprintf(out, size, "%s", f->unit);
    } else if (f->type == CPL_FIELD_CHOICE || f->type == CPL_FIELD_BOOL || f->unit == NULL || f->unit[0] == '\0') {
        snprintf(out, size, "%s", kind[f->type]);
    } else {
        snprintf(out, size, "%s%s", f->unit, f->type == CPL_FIELD_INTS || f->type == CPL_FIELD_TEXTS ? ",..." : "");
        for (char *p = out; *p != '\0'; p++) {
            *p = *p == ' ' ? '-' : (char)toupper((unsigned char)*p);
        }
    }
}

static void left_column(const cpl_field *f, char *out, size_t size) {
    char value[64];
    placeholder(f, value, sizeof value);
    int n = snprintf(out, size, "  --%s %s", f->name, value);
    for (int i = 4; i < n && out[i] != ' '; i++) {
        out[i] = out[i] == '_' ? '-' : out[i];
    }
}

/* "(0 to 1; default 0.7)": bounds only where a reader would choose otherwise than by them. */
static void notes(const cpl_field *f, char *out, size_t size) {
    char range[64] = "", first[80] = "";
    bool number =
        f->type == CPL_FIELD_INT || f->type == CPL_FIELD_REAL || f->type == CPL_FIELD_DECIMAL || f->type == CPL_FIELD_INTS;
    if (number && f->min > -1e9 && f->max < 1e9) {
        snprintf(range, sizeof range, "%.10g to %.10g", f->min, f->max);
    } else if (number && f->min > 0 && f->min < 1e9) {
        snprintf(range, sizeof range, "at least %.10g", f->min);
    }
    if (f->initial == NULL) {
        snprintf(first, sizeof first, "required");
    } else if (f->initial[0] != '\0') {
        snprintf(first, sizeof first, "default %s", f->initial);
    }
    snprintf(out, size, "%s%s%s", range, range[0] != '\0' && first[0] != '\0' ? "; " : "", first);
}

static void print_wrapped(const char *text, int column, int at) {
    for (text += strspn(text, " "); *text != '\0'; text += strspn(text, " ")) {
        int word = (int)strcspn(text, " ");
        if (at > column && at + 1 + word > HELP_WIDTH) {
            printf("\n%*s", column, "");
            at = column;
        }
        at += printf("%s%.*s", at > column ? " " : "", word, text);
        text += word;
    }
    putchar('\n');
}

void cpl_fields_help(const cpl_field *fields, size_t count) {
    int column = 0;
    for (size_t i = 0; i < count; i++) {
        char left[128];
        left_column(&fields[i], left, sizeof left);
        int n = (int)strlen(left);
        column = n > column && n <= LEFT_MAX ? n : column;
    }
    column += 2;
    for (size_t i = 0; i < count; i++) {
        const cpl_field *f = &fields[i];
        char left[128], note[160], right[1024], choices[400] = "";
        left_column(f, left, sizeof left);
        notes(f, note, sizeof note);
        if (f->type == CPL_FIELD_CHOICE && strlen(f->unit) > CHOICES_LEFT) {
            size_t n = (size_t)snprintf(choices, sizeof choices, ": ");
            for (const char *p = f->unit; *p != '\0' && n + 3 < sizeof choices; p++) {
                n += (size_t)snprintf(choices + n, sizeof choices - n, *p == '|' ? ", " : "%c", *p);
            }
        }
        snprintf(right, sizeof right, "%s%s%s%s%s", f->help, choices, note[0] != '\0' ? " (" : "", note,
                 note[0] != '\0' ? ")" : "");
        int at = printf("%-*s", column, left);
        if (at > column) {
            printf("\n%*s", column, "");
        }
        print_wrapped(right, column, column);
    }
}

/* Aligned columns on a terminal or in a file.
 * Refuses to print columns in which nothing stands. */
#include "jobs/table.h"
#include "io/base/arena.h"
#include "io/base/number.h"
#include "io/base/utf8.h"
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { GAP = 2, WIDE_LEAST = 32, WIDE_MUST = 12, COLUMNS_MOST = 100000 };

typedef struct {
    char **cell; /* owned by the arena, [columns], NULL: empty */
    int filled;
    bool strong;
} row;

struct cpl_table {
    cpl_arena *arena;          /* owned; holds the cells */
    const cpl_column *columns; /* borrowed */
    int n;
    row *rows; /* owned */
    size_t count, room;
};

cpl_status cpl_table_create(cpl_table **out, const cpl_column *columns, int n) {
    cpl_status st = CPL_OK;
    cpl_table *t = NULL;
    CPL_TRY(cpl_alloc(&t, 1, sizeof *t, "table"));
    CPL_TRY(cpl_arena_create(&t->arena));
    t->columns = columns;
    t->n = n;
    *out = t;
    t = NULL;
done:
    cpl_table_destroy(&t);
    return st;
}

void cpl_table_destroy(cpl_table **t) {
    if (*t == NULL) {
        return;
    }
    cpl_arena_destroy(&(*t)->arena);
    cpl_free(&(*t)->rows);
    cpl_free(t);
}

cpl_status cpl_table_row(cpl_table *t, bool strong) {
    cpl_status st = CPL_OK;
    row *more = NULL;
    if (t->count == t->room) {
        size_t room = t->room == 0 ? 32 : 2 * t->room;
        CPL_TRY(cpl_alloc(&more, room, sizeof *more, "table"));
        if (t->count > 0) {
            memcpy(more, t->rows, t->count * sizeof *more);
        }
        cpl_free(&t->rows);
        t->rows = more;
        t->room = room;
    }
    row *r = &t->rows[t->count];
    *r = (row){.strong = strong};
    CPL_TRY(cpl_arena_alloc(t->arena, &r->cell, (size_t)t->n, sizeof *r->cell));
    t->count++;
done:
    return st;
}

cpl_status cpl_table_cell(cpl_table *t, const char *format, ...) {
    cpl_status st = CPL_OK;
    char text[1024], *kept = NULL;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    row *r = t->count > 0 ? &t->rows[t->count - 1] : NULL;
    if (r == NULL || r->filled == t->n) {
        CPL_FAIL(CPL_INTERNAL, "table: a cell beyond its %d columns", t->n);
    }
    for (char *p = text; *p != '\0'; p++) {
        *p = (unsigned char)*p < ' ' ? ' ' : *p;
    }
    if (text[0] != '\0') {
        CPL_TRY(cpl_arena_strdup(t->arena, &kept, text));
    }
    r->cell[r->filled++] = kept;
done:
    return st;
}

cpl_status cpl_table_number(cpl_table *t, const char *format, double value) {
    char text[64] = "";
    if (!isnan(value)) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(text, sizeof text, format, value);
#pragma GCC diagnostic pop
    }
    return cpl_table_cell(t, "%s", text);
}

/* Bytes of the first `most` characters; *shown: how many there are. Bytes that are no UTF-8 count one each. */
static int characters(const char *text, int most, int *shown) {
    int at = 0, n = 0;
    while (text[at] != '\0' && n < most) {
        size_t length = cpl_utf8_length((const unsigned char *)text + at);
        at += length == 0 ? 1 : (int)length;
        n++;
    }
    *shown = n;
    return at;
}

static int width_of(const char *text) {
    int n = 0;
    (void)characters(text, 1 << 20, &n);
    return n;
}

static void natural_widths(const cpl_table *t, int *width) {
    for (int c = 0; c < t->n; c++) {
        int widest = 0;
        for (size_t r = 0; r < t->count; r++) {
            int w = t->rows[r].cell[c] == NULL ? 0 : width_of(t->rows[r].cell[c]);
            widest = w > widest ? w : widest;
        }
        if (widest > 0) {
            int title = width_of(t->columns[c].title), unit = width_of(t->columns[c].unit);
            widest = title > widest ? title : widest;
            widest = unit > widest ? unit : widest;
        }
        width[c] = widest;
    }
}

static int line_width(const cpl_table *t, const int *width) {
    int line = 1 - GAP;
    for (int c = 0; c < t->n; c++) {
        line += width[c] > 0 ? width[c] + GAP : 0;
    }
    return line;
}

/* First the wide column gives way, then what can be done without, then the wide column as far as it must. */
static void fit_widths(const cpl_table *t, int *width, int terminal) {
    int wide = -1, natural = 0;
    for (int c = 0; c < t->n; c++) {
        wide = t->columns[c].kind == CPL_COLUMN_WIDE && width[c] > 0 ? c : wide;
    }
    natural = wide < 0 ? 0 : width[wide];
    if (natural > WIDE_LEAST) {
        width[wide] = WIDE_LEAST;
    }
    for (int go = 9; go > 0; go--) {
        for (int c = 0; c < t->n && line_width(t, width) > terminal; c++) {
            width[c] = t->columns[c].dispensable == go ? 0 : width[c];
        }
    }
    int over = line_width(t, width) - terminal;
    if (wide >= 0) {
        int most = width[wide] - over; /* over < 0: room is left */
        width[wide] = most > natural                            ? natural
                      : most < WIDE_MUST && natural > WIDE_MUST ? WIDE_MUST
                      : most < natural && most > 0              ? most
                                                                : width[wide];
    }
}

/* Spaces are kept back until something follows them, so that no line ends in one. */
typedef struct {
    FILE *to; /* borrowed */
    int spaces;
} line;

static void print_cell(line *l, const char *text, int width, bool left) {
    int shown = 0, all = width_of(text);
    int bytes = characters(text, all > width ? width - 1 : width, &shown);
    int pad = all > width ? 0 : width - shown;
    l->spaces += left ? 0 : pad;
    if (bytes > 0 && strspn(text, " ") < (size_t)bytes) {
        fprintf(l->to, "%*s%.*s%s", l->spaces, "", bytes, text, all > width ? "~" : "");
        l->spaces = 0;
    } else {
        l->spaces += shown;
    }
    l->spaces += (left ? pad : 0) + GAP;
}

static void print_line(const cpl_table *t, FILE *to, const int *width, const char *const *cell, const char *empty) {
    line l = {.to = to, .spaces = 1};
    for (int c = 0; c < t->n; c++) {
        if (width[c] > 0) {
            const char *none = t->columns[c].title[0] == '\0' ? "" : empty;
            print_cell(&l, cell[c] == NULL ? none : cell[c], width[c], t->columns[c].kind != CPL_COLUMN_RIGHT);
        }
    }
}

static void print_left_out(const cpl_table *t, FILE *to, const int *natural, const int *width) {
    const char *before = " left out for want of width: ";
    for (int c = 0; c < t->n; c++) {
        if (natural[c] > 0 && width[c] == 0 && t->columns[c].title[0] != '\0') {
            fprintf(to, "%s%s", before, t->columns[c].title);
            before = ", ";
        }
    }
    fputs(before[0] == ',' ? "\n" : "", to);
}

static cpl_status print_headings(const cpl_table *t, FILE *to, const int *width, bool styled) {
    cpl_status st = CPL_OK;
    const char **text = NULL;
    bool units = false;
    CPL_TRY(cpl_alloc(&text, (size_t)t->n, sizeof *text, "table"));
    for (int pass = 0; pass < 2; pass++) {
        for (int c = 0; c < t->n; c++) {
            text[c] = pass == 0 ? t->columns[c].title : t->columns[c].unit;
            units = units || (width[c] > 0 && t->columns[c].unit[0] != '\0');
        }
        if (pass == 0 || units) {
            fputs(styled ? pass == 0 ? "\033[1m" : "\033[2m" : "", to);
            print_line(t, to, width, text, "");
            fputs(styled ? "\033[0m\n" : "\n", to);
        }
    }
    fputc(' ', to);
    for (int i = 1; i < line_width(t, width); i++) {
        fputc('-', to);
    }
    fputc('\n', to);
done:
    cpl_free(&text);
    return st;
}

cpl_status cpl_table_print(const cpl_table *t, FILE *to) {
    cpl_status st = CPL_OK;
    int *width = NULL, *natural = NULL, terminal = cpl_terminal_width(to);
    bool styled = cpl_terminal_styled(to);
    CPL_TRY(cpl_alloc(&width, (size_t)t->n, sizeof *width, "table"));
    CPL_TRY(cpl_alloc(&natural, (size_t)t->n, sizeof *natural, "table"));
    natural_widths(t, natural);
    memcpy(width, natural, (size_t)t->n * sizeof *width);
    if (terminal > 0 && line_width(t, width) > terminal) {
        fit_widths(t, width, terminal);
    }
    CPL_TRY(print_headings(t, to, width, styled));
    for (size_t r = 0; r < t->count; r++) {
        bool strong = styled && t->rows[r].strong;
        fputs(strong ? "\033[1m" : "", to);
        print_line(t, to, width, (const char *const *)t->rows[r].cell, "-");
        fputs(strong ? "\033[0m\n" : "\n", to);
    }
    print_left_out(t, to, natural, width);
done:
    cpl_free(&natural);
    cpl_free(&width);
    return st;
}

/* 0 where there is no terminal. mpirun gives rank 0 one without a size, whatever its own output goes to: that is none. */
static int columns_of(FILE *to) {
    struct winsize size;
    return isatty(fileno(to)) && ioctl(fileno(to), TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

int cpl_terminal_width(FILE *to) {
    const char *columns = getenv("COLUMNS");
    int64_t given = 0;
    bool usable = columns != NULL && cpl_number_integer(columns, &given) && given > 0 && given <= COLUMNS_MOST;
    return usable ? (int)given : columns_of(to);
}

bool cpl_terminal_styled(FILE *to) {
    const char *term = getenv("TERM"), *none = getenv("NO_COLOR");
    return columns_of(to) > 0 && (none == NULL || none[0] == '\0') && term != NULL && strcmp(term, "dumb") != 0;
}

void cpl_amount_text(double value, const char *unit, char out[CPL_AMOUNT_TEXT]) {
    static const char *const prefix[] = {"", "k", "M", "G", "T", "P"};
    size_t p = 0;
    out[0] = '\0';
    if (isnan(value)) {
        return;
    }
    while (fabs(value) >= 999.5 && p + 1 < sizeof prefix / sizeof prefix[0]) {
        value /= 1000;
        p++;
    }
    int digits = p == 0 && value == floor(value) ? 0 : fabs(value) < 9.995 ? 2 : fabs(value) < 99.95 ? 1 : 0;
    snprintf(out, CPL_AMOUNT_TEXT, "%.*f %s%s", digits, value, prefix[p], unit);
}

/* Tables for people: aligned columns with their units, as wide as the terminal.
 * Refuses to print columns in which nothing stands. */
#ifndef CPL_JOBS_TABLE_H
#define CPL_JOBS_TABLE_H

#include "io/base/status.h"
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef enum {
    CPL_COLUMN_RIGHT,
    CPL_COLUMN_LEFT,
    CPL_COLUMN_WIDE /* left, and shortened where the line is too long */
} cpl_column_kind;
typedef struct {
    const char *title, *unit; /* borrowed; "" for none */
    cpl_column_kind kind;
    int dispensable; /* where the line is too long for the terminal the columns with the largest number go first; 0: never */
} cpl_column;

typedef struct cpl_table cpl_table;
/* columns: borrowed, n of them. */
cpl_status cpl_table_create(cpl_table **out, const cpl_column *columns, int n);
void cpl_table_destroy(cpl_table **t);
/* Begins a row; strong: shown bold on a terminal. Its cells follow in order; those not given are empty. */
cpl_status cpl_table_row(cpl_table *t, bool strong);
cpl_status cpl_table_cell(cpl_table *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same with `format` of one double, empty for NaN. */
cpl_status cpl_table_number(cpl_table *t, const char *format, double value);
/* Two lines of headings, a rule, the rows; columns that are empty in all rows are left out, an empty cell of others is "-". Text is
 * counted in characters of UTF-8. */
cpl_status cpl_table_print(const cpl_table *t, FILE *to);

/* Columns of the terminal behind `to`, or of the variable COLUMNS; 0: not known, lines may be of any length. */
int cpl_terminal_width(FILE *to);
/* Whether bold and colours may be used: a terminal, and no NO_COLOR. */
bool cpl_terminal_styled(FILE *to);

enum { CPL_AMOUNT_TEXT = 32 };
/* 1234567, "B" -> "1.23 MB": three digits, powers of 1000; "" for NaN. */
void cpl_amount_text(double value, const char *unit, char out[CPL_AMOUNT_TEXT]);

#endif

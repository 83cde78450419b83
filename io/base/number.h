/* Exact numbers from text: what stands on a command line or in a job file is taken as written, never through a rounded double.
 * Refuses anything that is not wholly a number, and numbers whose exact value has no room. */
#ifndef CPL_IO_BASE_NUMBER_H
#define CPL_IO_BASE_NUMBER_H

#include "io/base/fields.h"
#include <stdbool.h>

/* "12", "-3", "64k", "4Ki", "1e6", "1.5M": exact integers only. False if it is none or does not fit. */
bool cpl_number_integer(const char *text, int64_t *out);
/* "0.7", "70%", "1e-3", "7/10". False if it is none, or numerator or denominator in lowest terms passes 2^63 - 1. */
bool cpl_number_decimal(const char *text, cpl_decimal *out);
/* Decimal notation of a finite double. False for hexadecimal, inf, nan, overflow, and for a nonzero number that would become 0. */
bool cpl_number_real(const char *text, double *out);

enum { CPL_NUMBER_TEXT = 48 };
/* The shortest text that cpl_number_real (cpl_number_decimal) reads back to the same value. */
void cpl_number_real_text(double value, char out[CPL_NUMBER_TEXT]);
void cpl_number_decimal_text(cpl_decimal value, char out[CPL_NUMBER_TEXT]);

#endif

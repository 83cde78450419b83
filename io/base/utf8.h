/* Well-formed UTF-8 (Unicode 15, table 3-7).
 * Refuses overlong forms, surrogates and values beyond U+10FFFF. */
#ifndef CPL_IO_BASE_UTF8_H
#define CPL_IO_BASE_UTF8_H

#include <stddef.h>

/* Bytes of the character at p, 0 if it is none. The text ends with a 0, which is no character here: nothing beyond it is read. */
size_t cpl_utf8_length(const unsigned char *p);

#endif

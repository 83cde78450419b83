/* Well-formed UTF-8 (Unicode 15, table 3-7).
 * Refuses overlong forms, surrogates and values beyond U+10FFFF. */
#include "io/base/utf8.h"

size_t cpl_utf8_length(const unsigned char *p) {
    static const struct {
        unsigned char first, last, second_min, second_max, bytes;
    } row[] = {{0x01, 0x7F, 0, 0, 1},       {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
               {0xE1, 0xEC, 0x80, 0xBF, 3}, {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
               {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        if (*p < row[i].first || *p > row[i].last) {
            continue;
        }
        if (row[i].bytes > 1 && (p[1] < row[i].second_min || p[1] > row[i].second_max)) {
            return 0;
        }
        for (size_t k = 2; k < row[i].bytes; k++) {
            if ((p[k] & 0xC0) != 0x80) { /* a final 0 stops here too */
                return 0;
            }
        }
        return row[i].bytes;
    }
    return 0;
}

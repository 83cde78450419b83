/* JSON strings, and numbers that JSON does not have.
 * Refuses to pass on invalid UTF-8: it becomes U+FFFD. */
#include "io/base/json.h"
#include "io/base/log.h"
#include "io/base/utf8.h"
#include <stdio.h>
#include <string.h>
#include <strings.h>

void cpl_json_quote(char *out, size_t size, const char *text) {
    if (size < 3) {
        if (size > 0) {
            out[0] = '\0';
        }
        return;
    }
    size_t used = 0;
    out[used++] = '"';
    for (const unsigned char *p = (const unsigned char *)text; *p != '\0';) {
        char piece[8];
        size_t bytes = cpl_utf8_length(p), length;
        if (bytes == 0) {
            length = (size_t)snprintf(piece, sizeof piece, "\xEF\xBF\xBD");
            bytes = 1;
        } else if (*p == '"' || *p == '\\') {
            length = (size_t)snprintf(piece, sizeof piece, "\\%c", *p);
        } else if (*p == '\n' || *p == '\t') {
            length = (size_t)snprintf(piece, sizeof piece, "\\%c", *p == '\n' ? 'n' : 't');
        } else if (*p < 0x20 || *p == 0x7F) {
            length = (size_t)snprintf(piece, sizeof piece, "\\u%04x", *p);
        } else {
            length = bytes;
            memcpy(piece, p, bytes);
        }
        if (used + length + 2 > size) {
            break;
        }
        memcpy(out + used, piece, length);
        used += length;
        p += bytes;
    }
    out[used++] = '"';
    out[used] = '\0';
}

void cpl_json_members(char *out, const char *text) {
    bool inside = false;
    for (const char *p = text; *p != '\0';) {
        const char *word = p + (*p == '-');
        if (!inside && (strncasecmp(word, "nan", 3) == 0 || strncasecmp(word, "inf", 3) == 0)) {
            memcpy(out, "null", 4);
            out += 4;
            p = word + 3;
            continue;
        }
        if (inside && *p == '\\' && p[1] != '\0') {
            *out++ = *p++;
        } else if (*p == '"') {
            inside = !inside;
        }
        *out++ = (unsigned char)*p < 0x20 ? ' ' : *p;
        p++;
    }
    *out = '\0';
}

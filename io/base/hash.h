/* SHA-256 (FIPS 180-4), streaming.
 * Refuses nothing: it is a function of the bytes alone. */
#ifndef CPL_IO_BASE_HASH_H
#define CPL_IO_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
} cpl_sha256;

enum { CPL_SHA256_HEX = 65 }; /* 64 hexadecimal digits and the final 0 */

void cpl_sha256_init(cpl_sha256 *h);
void cpl_sha256_add(cpl_sha256 *h, const void *data, size_t bytes);
/* Text with its terminating 0, so that ("ab","c") and ("a","bc") differ. */
void cpl_sha256_add_text(cpl_sha256 *h, const char *text);
void cpl_sha256_end(cpl_sha256 *h, char hex[CPL_SHA256_HEX]);

#endif

/* The compression function of SHA-256 in its two forms, side by side so that a test can compare them.
 * Refuses to be used outside hash.c: everyone else adds bytes through hash.h. */
#ifndef CPL_IO_BASE_HASH_COMPRESS_H
#define CPL_IO_BASE_HASH_COMPRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* First 32 bits of the fractional parts of the cube roots of the first 64 primes (FIPS 180-4, 4.2.2). */
extern const uint32_t cpl_sha256_k[64];

/* state [8] after `blocks` blocks of 64 bytes at p. */
void cpl_sha256_compress_portable(uint32_t state[8], const unsigned char *p, size_t blocks);
/* The same with the SHA instructions of x86; only where cpl_sha256_has_x86() says so. */
void cpl_sha256_compress_x86(uint32_t state[8], const unsigned char *p, size_t blocks);
bool cpl_sha256_has_x86(void);

#endif

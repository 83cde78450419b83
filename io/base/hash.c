/* SHA-256, FIPS 180-4.
 * Refuses nothing: it is a function of the bytes alone. */
#include "io/base/hash.h"
#include "io/base/hash_compress.h"
#include <pthread.h>
#include <string.h>

const uint32_t cpl_sha256_k[64] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
                                   0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
                                   0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
                                   0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
                                   0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
                                   0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
                                   0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
                                   0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static inline uint32_t rotate(uint32_t x, unsigned n) {
    return x >> n | x << (32 - n);
}

static inline uint32_t load_be(const unsigned char *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | (uint32_t)p[3];
}

/* Names of variables as in FIPS 180-4, 6.2.2. */
void cpl_sha256_compress_portable(uint32_t state[8], const unsigned char *p, size_t blocks) {
    for (; blocks > 0; blocks--, p += 64) {
        uint32_t w[64];
        for (int t = 0; t < 16; t++) {
            w[t] = load_be(p + 4 * t);
        }
        for (int t = 16; t < 64; t++) {
            uint32_t s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
            uint32_t s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;
            w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 64; t++) {
            uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + cpl_sha256_k[t] + w[t];
            uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

static void (*chosen)(uint32_t state[8], const unsigned char *p, size_t blocks);
static pthread_once_t choose_once = PTHREAD_ONCE_INIT;

static void choose(void) {
    chosen = cpl_sha256_has_x86() ? cpl_sha256_compress_x86 : cpl_sha256_compress_portable;
}

static void compress(uint32_t state[8], const unsigned char *p, size_t blocks) {
    pthread_once(&choose_once, choose);
    chosen(state, p, blocks);
}

void cpl_sha256_init(cpl_sha256 *h) {
    *h = (cpl_sha256){.state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
}

void cpl_sha256_add(cpl_sha256 *h, const void *data, size_t bytes) {
    const unsigned char *p = data;
    size_t held = h->bytes % 64;
    h->bytes += bytes;
    if (held > 0) {
        size_t take = bytes < 64 - held ? bytes : 64 - held;
        if (take > 0) {
            memcpy(h->block + held, p, take);
        }
        if (held + take < 64) {
            return;
        }
        compress(h->state, h->block, 1);
        p += take;
        bytes -= take;
    }
    compress(h->state, p, bytes / 64);
    if (bytes % 64 > 0) {
        memcpy(h->block, p + (bytes - bytes % 64), bytes % 64);
    }
}

void cpl_sha256_add_text(cpl_sha256 *h, const char *text) {
    cpl_sha256_add(h, text, strlen(text) + 1);
}

void cpl_sha256_end(cpl_sha256 *h, char hex[CPL_SHA256_HEX]) {
    unsigned char tail[72] = {0x80};
    uint64_t bits = h->bytes * 8;
    size_t held = h->bytes % 64, pad = (held < 56 ? 56 : 120) - held;
    for (int i = 0; i < 8; i++) {
        tail[pad + (size_t)i] = (unsigned char)(bits >> (56 - 8 * i));
    }
    cpl_sha256_add(h, tail, pad + 8);
    for (int i = 0; i < 64; i++) {
        hex[i] = "0123456789abcdef"[h->state[i / 8] >> (28 - 4 * (i % 8)) & 15];
    }
    hex[64] = '\0';
}

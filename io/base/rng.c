/* Philox4x32-10 and what is drawn from it: Salmon et al. 2011, doi:10.1145/2063384.2063405; constants of table 2 there.
 * Refuses to keep state. */
#include "io/base/rng.h"
#include <math.h>

void cpl_rng_block(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t index, uint32_t out[4]) {
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = step, c3 = (uint32_t)purpose;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u; /* golden ratio */
        k1 += 0xBB67AE85u; /* sqrt(3) - 1 */
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* In double and rounded once: libraries whose log and cos differ in the last bit of a double almost always give the same float.
 * u1 lies in [2^-33, 1 - 2^-33], so the logarithm is finite and the result is at most 6.8. */
float cpl_rng_normal(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t index) {
    uint32_t word[4];
    cpl_rng_block(seed, purpose, step, index, word);
    double u1 = (word[0] + 0.5) * 0x1p-32, u2 = word[1] * 0x1p-32;
    return (float)(sqrt(-2.0 * log(u1)) * cos(6.283185307179586476925 * u2));
}

float cpl_rng_uniform(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t index) {
    uint32_t word[4];
    cpl_rng_block(seed, purpose, step, index, word);
    return (float)(word[0] >> 8) * 0x1p-24f;
}

/* Luby and Rackoff 1988 on 2*half bits, the smallest even number that holds n; values at or over n walk on along their cycle (Black
 * and Rogaway 2002), under 4 rounds of it expected. The counters have their top bit set: blocks drawn by small index never share
 * them. */
uint64_t cpl_rng_permute(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t n, uint64_t i) {
    if (n <= 1) {
        return 0;
    }
    unsigned half = 1;
    while (half < 32 && (n - 1) >> (2 * half) != 0) {
        half++;
    }
    const uint32_t mask = half == 32 ? UINT32_MAX : ((uint32_t)1 << half) - 1;
    do {
        uint32_t left = (uint32_t)(i >> half) & mask, right = (uint32_t)i & mask;
        for (uint32_t round = 0; round < 4; round++) {
            uint32_t word[4];
            cpl_rng_block(seed, purpose, step, (uint64_t)(0x80000000u | round) << 32 | right, word);
            uint32_t next = left ^ (word[0] & mask);
            left = right;
            right = next;
        }
        i = (uint64_t)left << half | right;
    } while (i >= n);
    return i;
}

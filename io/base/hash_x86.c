/* SHA-256 with the SHA extensions of x86 (Intel SDM, SHA256RNDS2, SHA256MSG1, SHA256MSG2), chosen at run time.
 * Refuses nothing; on other processors it is never chosen. */
#include "io/base/hash_compress.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

bool cpl_sha256_has_x86(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_SSSE3) == 0 || (c & bit_SSE4_1) == 0) {
        return false;
    }
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA) != 0;
}

/* Registers as the instructions want them: abef = {f, e, b, a}, cdgh = {h, g, d, c} from the lowest lane. w[i] holds four words of
 * the message schedule; group g computes W[4g .. 4g+3] in the place of W[4g-16 .. 4g-13]. */
__attribute__((target("sha,sse4.1,ssse3"))) void cpl_sha256_compress_x86(uint32_t state[8], const unsigned char *p, size_t blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
    __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(dcba, hgfe, 8), cdgh = _mm_blend_epi16(hgfe, dcba, 0xF0);
    for (; blocks > 0; blocks--, p += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
#pragma GCC unroll 16
        for (int g = 0; g < 16; g++) {
            __m128i now;
            if (g < 4) {
                now = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 16 * g)), big_endian);
            } else {
                __m128i last = w[(g + 3) & 3];
                now = _mm_add_epi32(_mm_sha256msg1_epu32(w[g & 3], w[(g + 1) & 3]), _mm_alignr_epi8(last, w[(g + 2) & 3], 4));
                now = _mm_sha256msg2_epu32(now, last);
            }
            w[g & 3] = now;
            now = _mm_add_epi32(now, _mm_loadu_si128((const __m128i *)(cpl_sha256_k + 4 * g)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, now);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(now, 0x0E));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

#else

bool cpl_sha256_has_x86(void) {
    return false;
}

void cpl_sha256_compress_x86(uint32_t state[8], const unsigned char *p, size_t blocks) {
    cpl_sha256_compress_portable(state, p, blocks);
}

#endif

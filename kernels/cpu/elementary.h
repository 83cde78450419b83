/* Elementary functions in f32, branch-free, for `#pragma omp simd` loops.
 * Refuses libm and its vector variants: built with -ffp-contract=off, an element has the same bits in a vector body and in a loop's
 * tail. */
#ifndef CPL_KERNELS_CPU_ELEMENTARY_H
#define CPL_KERNELS_CPU_ELEMENTARY_H

#include "kernels/dtype.h"

/* a*b + c, fused where the instruction set has it (constant for a variant; __builtin_fmaf alone would call libm in the base
 * variant). */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define CPL_FMA(a, b, c) __builtin_fmaf((a), (b), (c))
#else
#define CPL_FMA(a, b, c) ((a) * (b) + (c))
#endif

/* e^r for |r| <= ln(2)/2 (Cephes expf, Moshier 1989), in pairs: the chain of dependent steps is what such loops wait for. */
static inline float cpl_exp_reduced(float r) {
    float rr = r * r;
    float low = CPL_FMA(r, 1.6666665459e-1f, 5.0000001201e-1f);
    float middle = CPL_FMA(r, 8.3334519073e-3f, 4.1665795894e-2f);
    float high = CPL_FMA(r, 1.9875691500e-4f, 1.3981999507e-3f);
    float p = CPL_FMA(CPL_FMA(high, rr, middle), rr, low);
    return CPL_FMA(p, rr, r) + 1.0f;
}

/* e^x within 1 ulp (subnormal results: 1 unit of the last place); inf above 88.7229, 0 below -103.98, NaN stays.
 * Scaled by 2^n in two factors for the subnormals. */
static inline float cpl_expf(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, kept in the low bits */
    float c = x > 89.0f ? 89.0f : x;
    c = c < -105.0f ? -105.0f : c;
    float shifted = CPL_FMA(c, 1.44269504088896341f, magic);
    uint32_t n = cpl_f32_bits(shifted) - cpl_f32_bits(magic);
    float f = shifted - magic;
    float r = CPL_FMA(f, -0.693359375f, c);
    r = CPL_FMA(f, 2.12194440e-4f, r);
    float p = cpl_exp_reduced(r);
    uint32_t half = (uint32_t)((int32_t)n >> 1);
    float low = cpl_f32_from_bits((half + 127u) << 23);
    float high = cpl_f32_from_bits((n - half + 127u) << 23);
    return p * low * high;
}

/* 2^x for x < 128 within 1 ulp, 0 below -126.5, NaN stays. Coefficients of Cephes exp2f; scale 2^-127 is written as 0. */
static inline float cpl_exp2f_normal(float x) {
    const float magic = 12582912.0f;
    float c = x < -127.0f ? -127.0f : x;
    float shifted = c + magic;
    float r = c - (shifted - magic);
    float rr = r * r;
    float low = CPL_FMA(r, 2.402264791363012e-1f, 6.931472028550421e-1f);
    float middle = CPL_FMA(r, 9.618437357674640e-3f, 5.550332471162809e-2f);
    float high = CPL_FMA(r, 1.535336188319500e-4f, 1.339887440266574e-3f);
    float p = CPL_FMA(CPL_FMA(high, rr, middle), rr, low);
    p = CPL_FMA(p, r, 1.0f);
    uint32_t n = cpl_f32_bits(shifted) - cpl_f32_bits(magic) + 127u; /* unsigned, since a NaN's n is anything */
    return p * cpl_f32_from_bits(n << 23);
}

/* Natural logarithm within 1 ulp; log 0 = -inf, log of negatives = NaN. After Cephes logf. */
static inline float cpl_logf(float x) {
    float scaled = x < 0x1p-126f ? x * 0x1p23f : x;
    float bias = x < 0x1p-126f ? -149.0f : -126.0f;
    uint32_t u = cpl_f32_bits(scaled);
    float m = cpl_f32_from_bits((u & 0x007fffffu) | 0x3f000000u); /* [1/2, 1) */
    float e = (float)(int32_t)((u >> 23) & 0xffu) + bias;
    float small = m < 0.707106781186547524f ? 1.0f : 0.0f;
    e -= small;
    float r = (m - 1.0f) + small * m;
    float z = r * r;
    float p = 7.0376836292e-2f;
    p = CPL_FMA(p, r, -1.1514610310e-1f);
    p = CPL_FMA(p, r, 1.1676998740e-1f);
    p = CPL_FMA(p, r, -1.2420140846e-1f);
    p = CPL_FMA(p, r, 1.4249322787e-1f);
    p = CPL_FMA(p, r, -1.6668057665e-1f);
    p = CPL_FMA(p, r, 2.0000714765e-1f);
    p = CPL_FMA(p, r, -2.4999993993e-1f);
    p = CPL_FMA(p, r, 3.3333331174e-1f);
    p = p * r * z;
    p = CPL_FMA(e, -2.12194440e-4f, p);
    p = CPL_FMA(z, -0.5f, p);
    float y = CPL_FMA(e, 0.693359375f, r + p);
    y = x == 0.0f ? -__builtin_inff() : y;
    y = x < 0.0f ? __builtin_nanf("") : y;
    y = x == __builtin_inff() ? x : y;
    return x != x ? x : y;
}

/* Hyperbolic tangent within 2 ulp; odd polynomial below 0.625 (Cephes tanhf), 1 - 2/(e^2|x| + 1) above. */
static inline float cpl_tanhf(float x) {
    float a = __builtin_fabsf(x);
    float z = x * x;
    float p = -5.70498872745e-3f;
    p = CPL_FMA(p, z, 2.06390887954e-2f);
    p = CPL_FMA(p, z, -5.37397155531e-2f);
    p = CPL_FMA(p, z, 1.33314422036e-1f);
    p = CPL_FMA(p, z, -3.33332819422e-1f);
    float near = CPL_FMA(p * z, x, x);
    float far = 1.0f - 2.0f / (cpl_expf(2.0f * a) + 1.0f);
    far = x < 0.0f ? -far : far;
    return a < 0.625f ? near : far;
}

/* GELU(x) = x (1 + tanh u)/2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3). With 2u log2(e) = |x| (A + B x^2) the power is
 * at most 1 on both sides. */
#define CPL_GELU_A 2.302208198f
#define CPL_GELU_B 0.1029432397f
static inline float cpl_geluf(float x) {
    float e = cpl_exp2f_normal(-__builtin_fabsf(x * CPL_FMA(x * x, CPL_GELU_B, CPL_GELU_A)));
    return (x < 0.0f ? x * e : x) / (1.0f + e);
}
/* d GELU / dx = s + x 2u' s (1 - s), s = 1/(1 + e^-2u). Beyond |x| = 16 it is exactly 0 or 1; the clamp keeps x^3 finite. */
static inline float cpl_gelu_slope(float x) {
    float a = __builtin_fabsf(x);
    a = a > 16.0f ? 16.0f : a;
    float e = cpl_exp2f_normal(-(a * CPL_FMA(a * a, CPL_GELU_B, CPL_GELU_A)));
    float near = 1.0f / (1.0f + e);
    float far = e * near;
    float bend = a * CPL_FMA(a * a, 0.21406444881f, 1.59576912161f) * (near * far);
    return x < 0.0f ? far - bend : near + bend;
}

#endif

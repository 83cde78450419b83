/* Vector building blocks of the CPU operations: act <-> f32 conversion of blocks, sums in a fixed order.
 * Refuses contraction and reassociation by the compiler (files here are built with -ffp-contract=off): an element has the same bits
 * in a vector body and in a loop's tail, so no result depends on alignment or on how threads split the work. */
#ifndef CPL_KERNELS_CPU_VECTOR_H
#define CPL_KERNELS_CPU_VECTOR_H

#include "kernels/cpu/elementary.h"
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Native vector of f32. */
#if defined(__AVX512F__)
enum { CPL_LANES = 16 };
#elif defined(__AVX2__)
enum { CPL_LANES = 8 };
#else
enum { CPL_LANES = 4 };
#endif
typedef float cpl_vec __attribute__((vector_size(CPL_LANES * 4)));
typedef int32_t cpl_vec_int __attribute__((vector_size(CPL_LANES * 4)));
typedef uint32_t cpl_vec_uint __attribute__((vector_size(CPL_LANES * 4)));
typedef float cpl_vec_any __attribute__((vector_size(CPL_LANES * 4), aligned(4), may_alias)); /* at any address of a float */

static inline cpl_vec cpl_vec_load(const float *x) {
    return *(const cpl_vec_any *)x;
}
static inline void cpl_vec_store(float *x, cpl_vec v) {
    *(cpl_vec_any *)x = v;
}
static inline cpl_vec cpl_vec_all(float x) {
    return x - (cpl_vec){0};
}
/* a*b + c per lane, fused exactly where CPL_FMA is. */
static inline cpl_vec cpl_vec_fma(cpl_vec a, cpl_vec b, cpl_vec c) {
#if defined(__AVX512F__)
    return (cpl_vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (cpl_vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int l = 0; l < CPL_LANES; l++) {
        c[l] = CPL_FMA(a[l], b[l], c[l]);
    }
    return c;
#else
    return a * b + c;
#endif
}
/* Lane l of the result is lane l ^ d of v. */
#if defined(__AVX512F__)
#define CPL_VEC_SWAP(v, d)                                                                                                         \
    __builtin_shufflevector((v), (v), 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d), 8 ^ (d), 9 ^ (d),    \
                            10 ^ (d), 11 ^ (d), 12 ^ (d), 13 ^ (d), 14 ^ (d), 15 ^ (d))
#elif defined(__AVX2__)
#define CPL_VEC_SWAP(v, d) __builtin_shufflevector((v), (v), 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d))
#else
#define CPL_VEC_SWAP(v, d) __builtin_shufflevector((v), (v), 0 ^ (d), 1 ^ (d), 2 ^ (d), 3 ^ (d))
#endif
/* Sum of the lanes: halves onto halves. */
static inline float cpl_vec_sum(cpl_vec v) {
#if defined(__AVX512F__)
    v += CPL_VEC_SWAP(v, 8);
#endif
#if defined(__AVX2__)
    v += CPL_VEC_SWAP(v, 4);
#endif
    v += CPL_VEC_SWAP(v, 2);
    v += CPL_VEC_SWAP(v, 1);
    return v[0];
}

/* --- act <-> f32, n elements from index `at` of an act buffer --- */

static inline void cpl_load_act(cpl_dtype dt, float *restrict y, const void *restrict x, int64_t at, int64_t n) {
    if (dt == CPL_F32) {
        memcpy(y, (const float *)x + at, (size_t)n * sizeof *y);
        return;
    }
    const uint16_t *restrict h = (const uint16_t *)x + at;
    if (dt == CPL_BF16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            y[i] = cpl_bf16_to_f32(h[i]);
        }
        return;
    }
    int64_t whole = 0;
#ifdef __F16C__
    whole = n / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(h + i))));
    }
#endif
    for (int64_t i = whole; i < n; i++) {
        y[i] = cpl_f16_to_f32(h[i]);
    }
}

static inline void cpl_store_act(cpl_dtype dt, void *restrict y, int64_t at, const float *restrict x, int64_t n) {
    if (dt == CPL_F32) {
        memcpy((float *)y + at, x, (size_t)n * sizeof *x);
        return;
    }
    uint16_t *restrict h = (uint16_t *)y + at;
    if (dt == CPL_BF16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            h[i] = cpl_bf16_from_f32(x[i]);
        }
        return;
    }
    int64_t whole = 0;
#ifdef __F16C__
    whole = n / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        _mm_storeu_si128((__m128i *)(void *)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (int64_t i = whole; i < n; i++) {
        h[i] = cpl_f16_from_f32(x[i]);
    }
}

/* The same elements without a copy where dt is f32: the address inside x, else `buffer` [n] filled. */
static inline const float *cpl_view_act(cpl_dtype dt, float *buffer, const void *x, int64_t at, int64_t n) {
    if (dt == CPL_F32) {
        return (const float *)x + at;
    }
    cpl_load_act(dt, buffer, x, at, n);
    return buffer;
}

/* Where to write f32 results meant for y[at...]: y itself if dt is f32, else `buffer`, which cpl_commit_act then rounds into y. */
static inline float *cpl_target_act(cpl_dtype dt, float *buffer, void *y, int64_t at) {
    return dt == CPL_F32 ? (float *)y + at : buffer;
}
static inline void cpl_commit_act(cpl_dtype dt, void *y, int64_t at, const float *buffer, int64_t n) {
    if (dt != CPL_F32) {
        cpl_store_act(dt, y, at, buffer, n);
    }
}
/* x[i] = x[i] as it reads back from storage in dt. */
static inline void cpl_round_act(cpl_dtype dt, float *x, int64_t n) {
    if (dt == CPL_F32) {
        return;
    }
    if (dt == CPL_BF16) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            x[i] = cpl_bf16_to_f32(cpl_bf16_from_f32(x[i]));
        }
        return;
    }
    uint16_t h[64];
    for (int64_t i = 0; i < n; i += 64) {
        int64_t m = n - i < 64 ? n - i : 64;
        cpl_store_act(dt, h, 0, x + i, m);
        cpl_load_act(dt, x + i, h, 0, m);
    }
}

/* --- reductions in a fixed order: four native vectors of partial sums, then the tail --- */

static inline float cpl_sum(const float *x, int64_t n) {
    cpl_vec s[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * CPL_LANES <= n; i += 4 * CPL_LANES) {
        for (int k = 0; k < 4; k++) {
            s[k] += cpl_vec_load(x + i + k * CPL_LANES);
        }
    }
    for (; i + CPL_LANES <= n; i += CPL_LANES) {
        s[0] += cpl_vec_load(x + i);
    }
    float sum = cpl_vec_sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) {
        sum += x[i];
    }
    return sum;
}

static inline float cpl_dot(const float *x, const float *y, int64_t n) {
    cpl_vec s[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * CPL_LANES <= n; i += 4 * CPL_LANES) {
        for (int k = 0; k < 4; k++) {
            s[k] = cpl_vec_fma(cpl_vec_load(x + i + k * CPL_LANES), cpl_vec_load(y + i + k * CPL_LANES), s[k]);
        }
    }
    for (; i + CPL_LANES <= n; i += CPL_LANES) {
        s[0] = cpl_vec_fma(cpl_vec_load(x + i), cpl_vec_load(y + i), s[0]);
    }
    float sum = cpl_vec_sum((s[0] + s[1]) + (s[2] + s[3]));
    for (; i < n; i++) {
        sum = CPL_FMA(x[i], y[i], sum);
    }
    return sum;
}

/* Largest element, -inf for n = 0; NaNs are passed over. */
static inline float cpl_max(const float *x, int64_t n) {
    float top[4 * CPL_LANES];
    for (int l = 0; l < 4 * CPL_LANES; l++) {
        top[l] = -__builtin_inff();
    }
    int64_t i = 0;
    for (; i + 4 * CPL_LANES <= n; i += 4 * CPL_LANES) {
        for (int l = 0; l < 4 * CPL_LANES; l++) {
            top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
        }
    }
    for (; i < n; i++) {
        top[0] = x[i] > top[0] ? x[i] : top[0];
    }
    for (int l = 1; l < 4 * CPL_LANES; l++) {
        top[0] = top[l] > top[0] ? top[l] : top[0];
    }
    return top[0];
}

/* y[i] = e^(factor x[i] - shift), returns their sum. y may be x. */
static inline float cpl_exp_sum(float *y, const float *x, float factor, float shift, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        y[i] = cpl_expf(CPL_FMA(factor, x[i], -shift));
    }
    return cpl_sum(y, n);
}

#endif

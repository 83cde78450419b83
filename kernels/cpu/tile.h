/* Products of small f32 matrices held in cache, and the vector exponential: what attention is made of.
 * Refuses ragged shapes: rows come in groups of CPL_TILE_M, columns in whole vectors; callers pad. */
#ifndef CPL_KERNELS_CPU_TILE_H
#define CPL_KERNELS_CPU_TILE_H

#include "kernels/cpu/vector.h"

/* 6 rows x 2 vectors of sums: 12 registers, which hides the latency of two 4-cycle FMA units and leaves 4 for operands. */
enum { CPL_TILE_M = 6 };

/* c[m, 0..vectors) = (add ? c : 0) + sum over k of a[m*am + k*ak] * b[k, :].  c [6, vectors*CPL_LANES] ldc   b [K, ...] ldb */
static inline __attribute__((always_inline)) void cpl_tile_kernel(int vectors, bool add, int64_t K, const float *restrict a,
                                                                  int64_t am, int64_t ak, const float *restrict b, int64_t ldb,
                                                                  float *restrict c, int64_t ldc) {
    cpl_vec sum[CPL_TILE_M][2];
#pragma GCC unroll 6
    for (int m = 0; m < CPL_TILE_M; m++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            sum[m][v] = add ? cpl_vec_load(c + m * ldc + v * CPL_LANES) : (cpl_vec){0};
        }
    }
    /* Two pointers and one distance reach all six rows by scaled addressing; more would not fit the registers. */
    const float *restrict low = a;
    const float *restrict high = a + 3 * am;
    for (int64_t k = 0; k < K; k++, low += ak, high += ak, b += ldb) {
        cpl_vec column[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            column[v] = cpl_vec_load(b + v * CPL_LANES);
        }
#pragma GCC unroll 6
        for (int m = 0; m < CPL_TILE_M; m++) {
            cpl_vec row = cpl_vec_all(m < 3 ? low[m * am] : high[(m - 3) * am]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) {
                sum[m][v] = cpl_vec_fma(row, column[v], sum[m][v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < CPL_TILE_M; m++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            cpl_vec_store(c + m * ldc + v * CPL_LANES, sum[m][v]);
        }
    }
}

/* The same for N columns, N a multiple of CPL_LANES. Each sum runs over k in order, so an element's bits do not depend on N. */
static __attribute__((noinline)) void cpl_tile_rows(bool add, int64_t N, int64_t K, const float *a, int64_t am, int64_t ak,
                                                    const float *b, int64_t ldb, float *c, int64_t ldc) {
    int64_t n = 0;
    for (; n + 2 * CPL_LANES <= N; n += 2 * CPL_LANES) {
        cpl_tile_kernel(2, add, K, a, am, ak, b + n, ldb, c + n, ldc);
    }
    if (n < N) {
        cpl_tile_kernel(1, add, K, a, am, ak, b + n, ldb, c + n, ldc);
    }
}

/* Lane-wise larger of x and y; y where one is a NaN. */
static inline cpl_vec cpl_vec_max(cpl_vec x, cpl_vec y) {
#if defined(__AVX512F__)
    return (cpl_vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (cpl_vec)_mm256_max_ps((__m256)x, (__m256)y);
#else
    cpl_vec_int greater = x > y;
    return (cpl_vec)(((cpl_vec_int)x & greater) | ((cpl_vec_int)y & ~greater));
#endif
}

static inline float cpl_vec_largest(cpl_vec v) {
#if defined(__AVX512F__)
    v = cpl_vec_max(v, CPL_VEC_SWAP(v, 8));
#endif
#if defined(__AVX2__)
    v = cpl_vec_max(v, CPL_VEC_SWAP(v, 4));
#endif
    v = cpl_vec_max(v, CPL_VEC_SWAP(v, 2));
    v = cpl_vec_max(v, CPL_VEC_SWAP(v, 1));
    return v[0];
}

/* cpl_exp2f_normal of each lane. */
static inline cpl_vec cpl_vec_exp2_normal(cpl_vec x) {
    const cpl_vec magic = cpl_vec_all(12582912.0f);
    cpl_vec c = cpl_vec_max(cpl_vec_all(-127.0f), x);
    cpl_vec shifted = c + magic;
    cpl_vec r = c - (shifted - magic);
    cpl_vec rr = r * r;
    cpl_vec low = cpl_vec_fma(r, cpl_vec_all(2.402264791363012e-1f), cpl_vec_all(6.931472028550421e-1f));
    cpl_vec middle = cpl_vec_fma(r, cpl_vec_all(9.618437357674640e-3f), cpl_vec_all(5.550332471162809e-2f));
    cpl_vec high = cpl_vec_fma(r, cpl_vec_all(1.535336188319500e-4f), cpl_vec_all(1.339887440266574e-3f));
    cpl_vec p = cpl_vec_fma(cpl_vec_fma(high, rr, middle), rr, low);
    p = cpl_vec_fma(p, r, cpl_vec_all(1.0f));
    cpl_vec_uint n = (cpl_vec_uint)shifted - (cpl_vec_uint)magic + 127u;
    return p * (cpl_vec)(n << 23);
}

#endif

/* What the forward and the backward pass of attention share: block sizes, the geometry of one head, packing.
 * Refuses a [T,T] matrix: scores exist for CPL_QUERIES x CPL_KEYS at a time. */
#ifndef CPL_KERNELS_CPU_ATTENTION_H
#define CPL_KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"
#include <math.h>
#include <omp.h>

/* Both are whole groups of CPL_TILE_M rows, keys also whole pairs of vectors in every variant. */
enum { CPL_QUERIES = 48, CPL_KEYS = 192 };

#define CPL_LOG2_E 1.44269504088896341f
#define CPL_LN_2   0.69314718055994531f

typedef struct {
    cpl_dtype dt;
    int64_t T, H, D, C;
    int64_t wide;   /* D rounded up to whole vectors */
    int64_t blocks; /* of CPL_KEYS keys */
    int64_t padded; /* blocks * CPL_KEYS */
    float scale;    /* 1 / sqrt(D) */
    float scale2;   /* log2(e) / sqrt(D): scores are kept in powers of two, which spares a step of each exponential */
} head_shape;

static inline head_shape head_shape_of(cpl_dtype dt, int64_t T, int64_t H, int64_t D) {
    head_shape s = {.dt = dt, .T = T, .H = H, .D = D, .C = H * D};
    s.wide = cpl_ceil_div(D, CPL_LANES) * CPL_LANES;
    s.blocks = cpl_ceil_div(T, CPL_KEYS);
    s.padded = s.blocks * CPL_KEYS;
    s.scale = 1.0f / sqrtf((float)D);
    s.scale2 = CPL_LOG2_E * s.scale;
    return s;
}

/* Element index of q (part 0), k (1) or v (2) of token t in qkv [B,T,3,H,D]. */
static inline int64_t qkv_at(const head_shape *s, int64_t b, int64_t t, int part, int64_t h) {
    return ((b * s->T + t) * 3 + part) * s->C + h * s->D;
}

/* y[r, 0..wide) = factor * x[at + r*stride + 0..D), zero beyond D and for rows beyond n.   y [rows, wide] */
static inline void pack_rows(const head_shape *s, float *y, int64_t rows, const void *x, int64_t at, int64_t stride, int64_t n,
                             float factor) {
    for (int64_t r = 0; r < rows; r++) {
        float *to = y + r * s->wide;
        if (r >= n) {
            memset(to, 0, (size_t)s->wide * sizeof *to);
            continue;
        }
        const float *from = cpl_view_act(s->dt, to, x, at + r * stride, s->D);
#pragma omp simd
        for (int64_t d = 0; d < s->D; d++) {
            to[d] = factor * from[d];
        }
        for (int64_t d = s->D; d < s->wide; d++) {
            to[d] = 0.0f;
        }
    }
}

/* y[at + 0..D) = factor * row, rounded; row [wide] is changed. */
static inline void store_row(const head_shape *s, void *y, int64_t at, float *row, float factor) {
    for (int64_t d = 0; d < s->wide; d += CPL_LANES) {
        cpl_vec_store(row + d, cpl_vec_load(row + d) * cpl_vec_all(factor));
    }
    cpl_store_act(s->dt, y, at, row, s->D);
}

/* The transpose of blocks of keys: y[block][d][key] = x[at + (block*CPL_KEYS + key)*stride + d], zero for the keys beyond n that
 * complete a pair of vectors.   rows: scratch [8, wide] */
static inline void pack_transposed(const head_shape *s, float *restrict y, float *restrict rows, const void *x, int64_t at,
                                   int64_t stride, int64_t n) {
    for (int64_t t = 0; t < cpl_ceil_div(n, 2 * CPL_LANES) * 2 * CPL_LANES; t += 8) {
        pack_rows(s, rows, 8, x, at + t * stride, stride, n - t, 1.0f);
        float *restrict to = y + t / CPL_KEYS * s->D * CPL_KEYS + t % CPL_KEYS;
        for (int64_t d = 0; d < s->D; d++) {
            for (int l = 0; l < 8; l++) {
                to[d * CPL_KEYS + l] = rows[l * s->wide + d];
            }
        }
    }
}

#endif

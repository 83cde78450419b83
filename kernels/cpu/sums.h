/* Sums of one chunk of a flat buffer in f64.
 * Refuses to let the instruction set show: eight lanes always, joined in one order. */
#ifndef CPL_KERNELS_CPU_SUMS_H
#define CPL_KERNELS_CPU_SUMS_H

#include <stdint.h>

#define CPL_CHUNK_SUM(name, type, term)                                                                                            \
    static inline double name(const type *x, int64_t n) {                                                                          \
        double lane[8] = {0};                                                                                                      \
        int64_t whole = n / 8 * 8;                                                                                                 \
        for (int64_t i = 0; i < whole; i += 8) {                                                                                   \
            for (int l = 0; l < 8; l++) {                                                                                          \
                double v = (double)x[i + l];                                                                                       \
                lane[l] += term;                                                                                                   \
            }                                                                                                                      \
        }                                                                                                                          \
        for (int64_t i = whole; i < n; i++) {                                                                                      \
            double v = (double)x[i];                                                                                               \
            lane[i - whole] += term;                                                                                               \
        }                                                                                                                          \
        return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));                          \
    }
CPL_CHUNK_SUM(cpl_chunk_sum, float, v)
CPL_CHUNK_SUM(cpl_chunk_square, float, v *v) /* squares of f32 are exact in f64 */
CPL_CHUNK_SUM(cpl_chunk_square_f64, double, v *v)
#undef CPL_CHUNK_SUM

#endif

/* What a step must know of its gradient: where it is not finite, its sum of squares, its exponents.
 * Refuses to sum in an order that depends on threads: one partial sum a chunk, eight fixed lanes in each. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sums.h"
#include "kernels/dtype.h"

enum { SCAN_CHUNK = 16384, EXPONENT_BLOCK = 256 };

/* The largest key |x| of a chunk: at or over 0x7f800000 if and only if one is inf or nan. Signed maximum, for SSE and AVX2 have it.
 */
static int32_t largest_key(const float *x, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = (int32_t)(cpl_f32_bits(x[i]) & 0x7fffffffu);
        largest = key > largest ? key : largest;
    }
    return largest;
}

static uint32_t kinds_in(const float *x, int64_t n) {
    uint32_t kinds = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t key = cpl_f32_bits(x[i]) & 0x7fffffffu;
        kinds |= (uint32_t)(key == 0x7f800000u) | (uint32_t)(key > 0x7f800000u) << 1;
    }
    return kinds;
}

cpl_status CPL_CPU(grad_scan)(cpl_device *dev, uint32_t *kinds, uint32_t *any, double *chunk_sums, const float *grad,
                              const int64_t *begin, int64_t tensors) {
    uint32_t found_any = 0;
    memset(kinds, 0, (size_t)tensors * sizeof *kinds);
#pragma omp parallel num_threads(cpl_cpu_team(dev, tensors > 0 ? begin[tensors] - begin[0] : 0)) reduction(| : found_any)
    for (int64_t t = 0; t < tensors; t++) {
        const float *x = grad + begin[t];
        int64_t n = begin[t + 1] - begin[t];
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < n; first += SCAN_CHUNK) {
            int64_t count = cpl_min_i64(n - first, SCAN_CHUNK);
            if (largest_key(x + first, count) >= 0x7f800000) {
                uint32_t found = kinds_in(x + first, count);
                found_any |= found;
#pragma omp atomic
                kinds[t] |= found;
            }
        }
    }
    *any |= found_any != 0;
    return chunk_sums == NULL ? CPL_OK : CPL_CPU(sum_squares)(dev, chunk_sums, grad + begin[0], begin[tensors] - begin[0]);
}

/* Kinds of what elements [first, last), from grad on, hold of each tensor. */
static uint32_t scan_part(uint32_t *kinds, const float *grad, const int64_t *begin, int64_t tensors, int64_t first, int64_t last) {
    uint32_t found_any = 0;
    for (int64_t t = 0; t < tensors; t++) {
        int64_t from = begin[t] < first ? first : begin[t], to = begin[t + 1] < last ? begin[t + 1] : last;
        if (from < to && largest_key(grad + (from - first), to - from) >= 0x7f800000) {
            uint32_t found = kinds_in(grad + (from - first), to - from);
            found_any |= found;
            kinds[t] |= found;
        }
    }
    return found_any != 0;
}

static float tree_of(const cpl_reach *grad, int low, int high, int64_t i) {
    if (high - low < 2) {
        return ((const float *)grad->at[low])[i];
    }
    int middle = low + (high - low) / 2;
    return tree_of(grad, low, middle, i) + tree_of(grad, middle, high, i);
}

static void sum_part(const cpl_sum_part *part, const cpl_reach *kinds, const cpl_reach *chunk_sums, uint32_t *any,
                     const int64_t *begin, int64_t tensors) {
    const cpl_reach *grad = &part->grad;
    float *own = grad->at[grad->own];
    int64_t n = part->last - part->first;
    for (int r = 0; r < kinds->count && n > 0; r++) {
        *any |= scan_part(kinds->at[r], grad->at[r], begin, tensors, part->first, part->last);
    }
    for (int64_t i = 0; i < n; i++) {
        own[i] = tree_of(grad, 0, kinds->count, i);
    }
    for (int64_t at = 0; at < n; at += CPL_SUM_CHUNK) {
        double sum = cpl_chunk_square(own + at, cpl_min_i64(n - at, CPL_SUM_CHUNK));
        for (int r = 0; r < kinds->count; r++) {
            ((double *)chunk_sums->at[r])[(part->first + at) / CPL_SUM_CHUNK] = sum;
        }
    }
}

/* Ranks on the CPU do not reach each other: this is what a GPU's is compared with. */
cpl_status CPL_CPU(grad_sum)(cpl_device *dev, const cpl_sum_part *part, const cpl_reach *kinds, const cpl_reach *chunk_sums,
                             uint32_t *any, const int64_t *begin, int64_t tensors) {
    for (int p = 0; p < 2; p++) {
        sum_part(&part[p], kinds, chunk_sums, any, begin, tensors);
    }
    return CPL_OK;
}

cpl_status CPL_CPU(sum_squares)(cpl_device *dev, double *chunk_sums, const float *x, int64_t n) {
    int64_t chunks = cpl_ceil_div(n, CPL_SUM_CHUNK);
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
    for (int64_t i = 0; i < chunks; i++) {
        int64_t first = i * CPL_SUM_CHUNK;
        chunk_sums[i] = cpl_chunk_square(x + first, cpl_min_i64(n - first, CPL_SUM_CHUNK));
    }
    return CPL_OK;
}

/* Keys of a block are made with vector instructions, counted with scalar ones into two tables in turn, so that a run of equal
 * exponents does not wait for its own stores. */
static int32_t count_block(int64_t count[2][256], const float *x, int64_t n, float factor) {
    uint8_t exponent[EXPONENT_BLOCK];
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = (int32_t)(cpl_f32_bits(factor * x[i]) & 0x7fffffffu);
        int32_t finite = key < 0x7f800000 ? key : 0;
        largest = finite > largest ? finite : largest;
        exponent[i] = (uint8_t)(key >> 23);
    }
    for (int64_t i = 0; i < n; i++) {
        count[i & 1][exponent[i]] += 1;
    }
    return largest;
}

cpl_status CPL_CPU(exponents)(cpl_device *dev, int64_t *counts, float *max_abs, const float *x, int64_t n, float factor) {
    int32_t largest = 0;
#pragma omp parallel num_threads(cpl_cpu_team(dev, n)) reduction(max : largest)
    {
        int64_t own[2][256] = {{0}};
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < n; first += EXPONENT_BLOCK) {
            int32_t most = count_block(own, x + first, cpl_min_i64(n - first, EXPONENT_BLOCK), factor);
            largest = most > largest ? most : largest;
        }
#pragma omp critical(cpl_exponents)
        for (int e = 0; e < 256; e++) {
            counts[e] += own[0][e] + own[1][e];
        }
    }
    float most = cpl_f32_from_bits((uint32_t)largest);
    *max_abs = most > *max_abs ? most : *max_abs;
    return CPL_OK;
}

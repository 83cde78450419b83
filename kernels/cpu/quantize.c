/* Uniform round-to-nearest-even quantization of one 2-D tensor, with its error beside it.
 * Refuses weights that are not finite and scales that their storage type cannot hold, and writes no weight then. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sums.h"
#include "kernels/cpu/vector.h"
#include "kernels/pack.h"
#include <math.h>

enum { PIECE = 1024, RANGE_PIECE = 65536, ROW_ROUND = 256 };

/* Weights of a group lie in [lo, hi], both of which include 0; bad: how many are not finite. */
typedef struct {
    float lo, hi;
    int64_t bad;
} range;

/* What a group is quantized by; low, high bound the code before `offset` is added (symmetric codes are stored from 0 up). */
typedef struct {
    float scale;
    int32_t zero, low, high, offset;
} group_rule;

/* Error of one row, added over rows in their order. */
typedef struct {
    double sum_sq_error, sum_sq, max_error, sum_noise;
} row_error;

/* Positive floats are ordered like their bits as a signed integer, and so are negative ones once the sign is flipped; both maxima
 * and the count are integers, a piece at a time, and so go through vectors. */
static range range_of(const float *w, int64_t n) {
    int32_t hi = 0, minus_lo = 0;
    int64_t bad = 0;
    for (int64_t at = 0; at < n; at += PIECE) {
        int32_t found = 0;
        for (int64_t i = at; i < cpl_min_i64(at + PIECE, n); i++) {
            int32_t bits = (int32_t)cpl_f32_bits(w[i]), flipped = (int32_t)(cpl_f32_bits(w[i]) ^ 0x80000000u);
            hi = bits > hi ? bits : hi;
            minus_lo = flipped > minus_lo ? flipped : minus_lo;
            found += (bits & 0x7fffffff) >= 0x7f800000;
        }
        bad += found;
    }
    return (range){-cpl_f32_from_bits((uint32_t)minus_lo), cpl_f32_from_bits((uint32_t)hi), bad};
}

/* Scale and zero point (NULL: symmetric) of a range; false where the scale is infinite, or 0 though the range is not. A scale
 * that its storage rounds down far (subnormal f16) would put the zero point past the last code: it is clamped like any code. */
static bool scale_of(const cpl_quant_spec *spec, range r, float *scale, uint8_t *zero) {
    bool symmetric = spec->scheme == CPL_QUANT_SYMMETRIC;
    float span = symmetric ? (-r.lo > r.hi ? -r.lo : r.hi) : r.hi - r.lo;
    float levels = (float)(symmetric ? (1 << (spec->bits - 1)) - 1 : (1 << spec->bits) - 1);
    *scale = cpl_act_round(spec->scale_dtype, span / levels);
    if (zero) {
        *zero = 0;
    }
    if (span == 0) {
        return true;
    }
    if (!isfinite(*scale) || *scale == 0) {
        return false;
    }
    if (zero) {
        float at = rintf(-r.lo / *scale);
        *zero = (uint8_t)(at < levels ? at : levels);
    }
    return true;
}

/* Errors of n <= PIECE weights against their quantized values, added to e. Doubles that are not negative are ordered like their
 * bits. */
static void measure(row_error *e, const float *restrict w, const float *restrict value, int64_t n) {
    double distance[PIECE];
    int64_t worst = 0;
    for (int64_t i = 0; i < n; i++) {
        distance[i] = fabs((double)w[i] - (double)value[i]);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t bits;
        memcpy(&bits, &distance[i], sizeof bits);
        worst = bits > worst ? bits : worst;
    }
    double most;
    memcpy(&most, &worst, sizeof most);
    e->max_error = most > e->max_error ? most : e->max_error;
    e->sum_sq_error += cpl_chunk_square_f64(distance, n);
    e->sum_sq += cpl_chunk_square(w, n);
}

/* code, value [n], n <= PIECE, of w [n]. rint(w/scale) by the addition of 1.5*2^23, which rounds to an integer, half to even, below
 * 2^22: |w/scale| is under 2^9, for a stored scale is over 2/3 of the one computed. */
static void round_piece(const group_rule *g, uint8_t *restrict code, float *restrict value, const float *restrict w, int64_t n) {
    const float magic = 12582912.0f;
    float divisor = g->scale == 0 ? 1.0f : g->scale; /* scale 0: all weights are 0 */
    for (int64_t i = 0; i < n; i++) {
        int32_t q = (int32_t)(cpl_f32_bits(w[i] / divisor + magic) - cpl_f32_bits(magic)) + g->zero;
        q = q < g->low ? g->low : q;
        q = q > g->high ? g->high : q;
        code[i] = (uint8_t)(q + g->offset);
        value[i] = (float)(q - g->zero) * g->scale;
    }
}

/* What one call works on; see ops.def. zeros: also where the caller wants none. */
typedef struct {
    const cpl_quant_spec *spec;
    const float *w;
    int64_t rows, cols, groups_per_row; /* 0: one group for the tensor */
    uint8_t *codes, *zeros;
    float *scales, *w_hat;
    bool measured;
} job;

static group_rule rule_of(const job *j, int64_t group) {
    int levels = 1 << j->spec->bits, half = levels / 2 - 1;
    if (j->spec->scheme == CPL_QUANT_SYMMETRIC) {
        return (group_rule){.scale = j->scales[group], .low = -half, .high = half, .offset = half};
    }
    return (group_rule){.scale = j->scales[group], .zero = j->zeros[group], .high = levels - 1};
}

/* Part of one group, `count` weights from index `at` of the tensor. */
static void quantize_part(const job *j, const group_rule *g, int64_t at, int64_t count, row_error *e, int64_t *code_count) {
    uint8_t code[PIECE];
    float value[PIECE];
    for (int64_t end = at + count; at < end; at += PIECE) {
        int64_t n = cpl_min_i64(end - at, PIECE);
        round_piece(g, code, value, j->w + at, n);
        if (j->measured) {
            measure(e, j->w + at, value, n);
            for (int64_t i = 0; i < n; i++) {
                code_count[code[i]] += 1;
            }
        }
        if (j->codes) {
            memcpy(j->codes + at, code, (size_t)n);
        }
        if (j->w_hat) {
            memcpy(j->w_hat + at, value, (size_t)n * sizeof *value);
        }
    }
    e->sum_noise += (double)count * ((double)g->scale * (double)g->scale) / 12.0;
}

static row_error quantize_row(const job *j, int64_t r, int64_t *code_count) {
    row_error e = {0};
    int64_t width = j->groups_per_row ? j->spec->group : j->cols, group = r * j->groups_per_row;
    for (int64_t c = 0; c < j->cols; c += width, group++) {
        group_rule g = rule_of(j, j->groups_per_row ? group : 0);
        quantize_part(j, &g, r * j->cols + c, cpl_min_i64(j->cols - c, width), &e, code_count);
    }
    return e;
}

/* Scale and zero point of every group; returns weights that are not finite + groups of finite weights without a usable scale. */
static int64_t find_scales(cpl_device *dev, const job *j) {
    int64_t n = j->rows * j->cols, refused = 0;
    if (j->groups_per_row == 0) {
        float lo = 0, hi = 0;
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n)) reduction(min : lo) reduction(max : hi) reduction(+ : refused)
        for (int64_t at = 0; at < n; at += RANGE_PIECE) {
            range part = range_of(j->w + at, cpl_min_i64(n - at, RANGE_PIECE));
            lo = part.lo < lo ? part.lo : lo;
            hi = part.hi > hi ? part.hi : hi;
            refused += part.bad;
        }
        return scale_of(j->spec, (range){lo, hi, 0}, j->scales, j->zeros) || refused > 0 ? refused : 1;
    }
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n)) reduction(+ : refused)
    for (int64_t g = 0; g < j->rows * j->groups_per_row; g++) {
        int64_t c = g % j->groups_per_row * j->spec->group;
        range r = range_of(j->w + g / j->groups_per_row * j->cols + c, cpl_min_i64(j->cols - c, j->spec->group));
        bool held = scale_of(j->spec, r, &j->scales[g], j->zeros ? &j->zeros[g] : NULL);
        refused += r.bad > 0 ? r.bad : !held;
    }
    return refused;
}

static void quantize_rows(cpl_device *dev, const job *j, cpl_quant_error *error) {
    row_error part[ROW_ROUND], total = {0};
#pragma omp parallel num_threads(cpl_cpu_team(dev, j->rows * j->cols))
    {
        int64_t code_count[256] = {0};
        for (int64_t start = 0; start < j->rows; start += ROW_ROUND) {
            int64_t rows = cpl_min_i64(j->rows - start, ROW_ROUND);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++) {
                part[r] = quantize_row(j, start + r, code_count);
            }
            if (error) {
#pragma omp single
                for (int64_t r = 0; r < rows; r++) {
                    total.sum_sq_error += part[r].sum_sq_error;
                    total.sum_sq += part[r].sum_sq;
                    total.sum_noise += part[r].sum_noise;
                    total.max_error = part[r].max_error > total.max_error ? part[r].max_error : total.max_error;
                }
            }
        }
        if (error) {
#pragma omp critical(cpl_quantize)
            for (int i = 0; i < 256; i++) {
                error->code_count[i] += code_count[i];
            }
        }
    }
    if (error) {
        error->sum_sq_error += total.sum_sq_error;
        error->sum_sq += total.sum_sq;
        error->sum_noise += total.sum_noise;
        error->max_error = total.max_error > error->max_error ? total.max_error : error->max_error;
    }
}

cpl_status CPL_CPU(quantize)(cpl_device *dev, const cpl_quant_spec *spec, const float *w, int64_t rows, int64_t cols,
                             uint8_t *codes, float *scales, uint8_t *zeros, float *w_hat, cpl_quant_error *error,
                             int64_t *refused) {
    cpl_status st = CPL_OK;
    int64_t groups;
    CPL_TRY(cpl_quant_groups(spec, rows, cols, &groups));
    if (groups == 0) {
        goto done;
    }
    bool whole = spec->group > cols;
    job j = {spec, w, rows, cols, whole ? 0 : cpl_ceil_div(cols, spec->group), codes, zeros, scales, w_hat, error != NULL};
    if (spec->scheme == CPL_QUANT_SYMMETRIC) {
        j.zeros = NULL;
    } else if (!zeros) {
        CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_FLAT, (size_t)groups, &j.zeros));
    }
    int64_t bad = find_scales(dev, &j);
    *refused += bad;
    if (bad == 0) {
        quantize_rows(dev, &j, error);
    }
done:
    return st;
}

/* One group of weights on the GPU: its range, scale and zero point, codes, values and errors, bit for bit as
 * kernels/cpu/quantize.c. Refuses to know who holds which weight: that is kernels/cuda/quantize.cu. */
#ifndef CPL_KERNELS_CUDA_QUANTIZE_CUH
#define CPL_KERNELS_CUDA_QUANTIZE_CUH

#include "kernels/cuda/flat.cuh"

namespace {

/* What one call works on; see ops.def. codes, zeros, w_hat, code_count may be NULL. */
struct quant_job {
    const float *w;
    uint8_t *codes, *zeros;
    float *scales, *w_hat;
    unsigned long long *refused, *code_count;
    int64_t cols, group, groups_per_row, groups;
    int bits, columns; /* columns: of the code counters, a power of 2 */
    bool symmetric, half_scale;
};

/* Bits of the largest weight and of the negated smallest, both at least 0: positive floats are ordered as their bits are as signed
 * integers, negative ones once the sign is flipped. From CPL_KEY_INF on: one is not finite. */
struct quant_range {
    int32_t hi, minus_lo;
};
__device__ __forceinline__ void widen(quant_range &r, float w) {
    int32_t bits = __float_as_int(w);
    r.hi = max(r.hi, bits);
    r.minus_lo = max(r.minus_lo, (int32_t)((uint32_t)bits ^ 0x80000000u));
}
__device__ __forceinline__ bool is_finite(quant_range r) {
    return max(r.hi, r.minus_lo) < CPL_KEY_INF;
}

/* factor: a power of two that brings weights and scale where no part of the quotient under- or overflows. inverse: of the scale so
 * multiplied. least, most: bounds of the code minus the zero point. shift: what is added to that for the stored code. */
struct quant_rule {
    float scale, divisor, factor, inverse, least, most, shift;
    int zero;
    bool held; /* false: the scale is infinite, or 0 though the range is not */
};

__device__ __forceinline__ quant_rule rule_of(const quant_job &j, quant_range r) {
    quant_rule g;
    float hi = __int_as_float(r.hi), minus_lo = __int_as_float(r.minus_lo);
    float span = j.symmetric ? fmaxf(minus_lo, hi) : __fadd_rn(hi, minus_lo);
    int levels = j.symmetric ? (1 << (j.bits - 1)) - 1 : (1 << j.bits) - 1;
    float scale = __fdiv_rn(span, (float)levels);
    scale = j.half_scale ? __half2float(__float2half_rn(scale)) : scale;
    g.scale = scale;
    g.held = span == 0.0f || (scale > 0.0f && scale < INFINITY);
    g.zero = 0;
    if (!j.symmetric && scale > 0.0f) {
        g.zero = (int)fminf(rintf(__fdiv_rn(minus_lo, scale)), (float)levels);
    }
    g.least = (float)(j.symmetric ? -levels : -g.zero);
    g.most = (float)(levels - g.zero);
    g.shift = (float)(j.symmetric ? levels : g.zero);
    float divisor = scale == 0.0f ? 1.0f : scale; /* scale 0: all weights are 0 */
    g.factor = divisor < 0x1p-60f ? 0x1p100f : divisor > 0x1p60f ? 0x1p-100f : 1.0f;
    g.divisor = divisor * g.factor;
    g.inverse = __frcp_rn(g.divisor);
    return g;
}

/* The code minus the zero point, rint(w / scale) within its bounds, of the correctly rounded quotient: from an inverse that is
 * rounded correctly two corrections give it (Markstein 1990, IBM J. Res. Dev. 34(1)), with no division a weight. Weights that
 * `factor` makes subnormal are far below half a scale. Adding 1.5 * 2^23 rounds to an integer, half to even. */
__device__ __forceinline__ float step_of(const quant_rule &g, float w) {
    float a = __fmul_rn(w, g.factor), q = __fmul_rn(a, g.inverse);
    q = __fmaf_rn(__fmaf_rn(-q, g.divisor, a), g.inverse, q);
    q = __fmaf_rn(__fmaf_rn(-q, g.divisor, a), g.inverse, q);
    q = __fsub_rn(__fadd_rn(q, 12582912.0f), 12582912.0f);
    return fminf(fmaxf(q, g.least), g.most);
}
__device__ __forceinline__ uint32_t code_of(const quant_rule &g, float step) {
    return __float_as_uint(__fadd_rn(step, __fadd_rn(g.shift, 12582912.0f))) & 0xffu;
}

/* Of the weights that one thread has met, or of a block. Differences of a weight and its value are exact in f32: the value is 0, or
 * within a factor of 2 of the weight, or a multiple of the weight's last place. */
struct quant_error_part {
    double sum_sq_error, sum_sq, sum_noise;
    float max_error;

    __device__ __forceinline__ void add(float w, float value) {
        float difference = __fsub_rn(w, value);
        double d = (double)difference, x = (double)w;
        sum_sq_error = fma(d, d, sum_sq_error);
        sum_sq = fma(x, x, sum_sq);
        max_error = fmaxf(max_error, fabsf(difference));
    }
    __device__ __forceinline__ void add_noise(const quant_rule &g, int64_t count) {
        sum_noise += (double)count * ((double)g.scale * (double)g.scale) * (1.0 / 12.0);
    }
};

/* Counters of codes, [1 << bits][columns] with columns << bits = CODE_WORDS or 32 columns: lanes meet seldom. */
enum { CODE_WORDS = 1024 };
struct code_counters {
    uint32_t *table;
    int columns, lane;
    __device__ __forceinline__ void add(uint32_t code) { atomicAdd(&table[code * columns + lane], 1u); }
};

/* Adds a block's errors and codes to what the call reports; the whole block, after all its weights. */
__device__ inline void keep_errors(const quant_job &j, quant_error_part e, const uint32_t *table, quant_error_part *parts) {
    __shared__ double sums[32];
    __shared__ float most[32];
    e.sum_sq_error = block_sum(e.sum_sq_error, sums);
    e.sum_sq = block_sum(e.sum_sq, sums);
    e.sum_noise = block_sum(e.sum_noise, sums);
    e.max_error = block_max(e.max_error, most);
    __syncthreads();
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = e;
    }
    for (int code = threadIdx.x; code < 1 << j.bits; code += blockDim.x) {
        unsigned long long sum = 0;
        for (int c = 0; c < j.columns; c++) {
            sum += table[code * j.columns + (c + code) % j.columns];
        }
        if (sum > 0) {
            atomicAdd(&j.code_count[code], sum);
        }
    }
}

/* Sixteen weights of a group of `count` in each of `lanes` threads: whole accesses of four where WIDE, else one weight at a time.
 */
enum { HELD = 16 };
template <bool WIDE> __device__ __forceinline__ int64_t place(int64_t start, int k, int lanes, int lane) {
    return WIDE ? start + (k / 4 * lanes + lane) * 4 + k % 4 : start + k * lanes + lane;
}
template <bool WIDE>
__device__ __forceinline__ void read_weights(float (&x)[HELD], const float *w, int64_t start, int64_t count, int lanes, int lane) {
#pragma unroll
    for (int k = 0; k < HELD; k += WIDE ? 4 : 1) {
        int64_t i = place<WIDE>(start, k, lanes, lane);
        if (WIDE) {
            packed<float, 4> v = {{0, 0, 0, 0}};
            if (i < count) {
                v = load<float, 4>(w + i);
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
                x[k + n] = v.at[n];
            }
        } else {
            x[k] = i < count ? w[i] : 0.0f;
        }
    }
}

/* Codes and values of what read_weights has read; at: where the group begins. */
template <bool WIDE, bool MEASURED>
__device__ __forceinline__ void write_weights(const quant_job &j, const quant_rule &g, const float (&x)[HELD], int64_t at,
                                              int64_t start, int64_t count, int lanes, int lane, quant_error_part &e,
                                              code_counters counters) {
    constexpr int N = WIDE ? 4 : 1;
#pragma unroll
    for (int k = 0; k < HELD; k += N) {
        int64_t i = place<WIDE>(start, k, lanes, lane);
        if (i < count) {
            packed<uint8_t, N> code;
            packed<float, N> value;
#pragma unroll
            for (int n = 0; n < N; n++) {
                float step = step_of(g, x[k + n]);
                code.at[n] = (uint8_t)code_of(g, step);
                value.at[n] = __fmul_rn(step, g.scale);
                if (MEASURED) {
                    e.add(x[k + n], value.at[n]);
                    counters.add(code.at[n]);
                }
            }
            if (j.codes != nullptr) {
                store(j.codes + at + i, code);
            }
            if (j.w_hat != nullptr) {
                store(j.w_hat + at + i, value);
            }
        }
    }
}

} // namespace

#endif

/* Uniform round-to-nearest-even quantization of one 2-D tensor, with its error beside it.
 * Refuses (counts) weights that are not finite and scales that their storage type cannot hold. */
#include "kernels/cuda/device.cuh"
extern "C" {
#include "kernels/pack.h"
}

enum { THREADS = 256, WARPS = THREADS / 32, CODES = 256, RANGE_BLOCKS = 1024, TOTAL_THREADS = 256, PER_SM = 8 };

/* Weights lie in [lo, hi], both of which include 0; bad: how many are not finite. */
struct range {
    float lo, hi;
    long long bad;
};

/* low, high bound the code before `offset` is added (symmetric codes are stored from 0 up). */
struct rule {
    float scale;
    int zero, low, high, offset;
    bool held;
};

/* Per block, added in order. */
struct error_part {
    double sum_sq_error, sum_sq, max_error, sum_noise;
};

/* What one call works on; see ops.def. */
struct job {
    const float *w;
    int64_t rows, cols, group, groups_per_row; /* 0 groups a row: one for the tensor */
    uint8_t *codes, *zeros;
    float *scales, *w_hat;
    unsigned long long *refused;
    bool symmetric, half_scale, measured;
    int bits;
};

__device__ __forceinline__ range join(range a, range b) {
    return {fminf(a.lo, b.lo), fmaxf(a.hi, b.hi), a.bad + b.bad};
}
__device__ __forceinline__ range warp_join(range r) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        range other = {__shfl_xor_sync(0xffffffffu, r.lo, lanes), __shfl_xor_sync(0xffffffffu, r.hi, lanes),
                       __shfl_xor_sync(0xffffffffu, r.bad, lanes)};
        r = join(r, other);
    }
    return r;
}
__device__ __forceinline__ void widen(range &r, float w) {
    r.lo = fminf(r.lo, w);
    r.hi = fmaxf(r.hi, w);
    r.bad += (__float_as_uint(w) & 0x7fffffffu) >= 0x7f800000u;
}

/* Scale and zero point of a range, as kernels/cpu/quantize.c: held is false where the scale is infinite, or 0 though the range is
 * not. */
__device__ rule rule_of(const job &j, range r) {
    int levels = j.symmetric ? (1 << (j.bits - 1)) - 1 : (1 << j.bits) - 1;
    float span = j.symmetric ? fmaxf(-r.lo, r.hi) : r.hi - r.lo, scale = __fdiv_rn(span, (float)levels);
    scale = j.half_scale ? __half2float(__float2half_rn(scale)) : scale;
    rule g = {scale, 0, j.symmetric ? -levels : 0, levels, j.symmetric ? levels : 0, true};
    if (span != 0.0f) {
        g.held = isfinite(scale) && scale != 0.0f;
        if (g.held && !j.symmetric) {
            g.zero = (int)fminf(rintf(__fdiv_rn(-r.lo, scale)), (float)levels);
        }
    }
    return g;
}

__device__ __forceinline__ int code_of(const rule &g, float w, float divisor) {
    int q = __float2int_rn(__fdiv_rn(w, divisor)) + g.zero;
    q = q < g.low ? g.low : q;
    return q > g.high ? g.high : q;
}

/* Weights [at, at + n) of one group by one warp, N an access; count: this warp's codes. */
template <int N> __device__ void quantize_part(const job &j, const rule &g, int64_t at, int64_t n, error_part &e, uint32_t *count) {
    float divisor = g.scale == 0.0f ? 1.0f : g.scale; /* scale 0: all weights are 0 */
    for (int64_t i = at + threadIdx.x % 32 * N; i < at + n; i += 32 * N) {
        packed<float, N> w = load<float, N>(j.w + i), value;
        packed<uint8_t, N> code;
#pragma unroll
        for (int k = 0; k < N; k++) {
            int q = code_of(g, w.at[k], divisor);
            code.at[k] = (uint8_t)(q + g.offset);
            value.at[k] = __fmul_rn((float)(q - g.zero), g.scale);
            if (j.measured) {
                double distance = fabs((double)w.at[k] - (double)value.at[k]);
                e.sum_sq_error = fma(distance, distance, e.sum_sq_error);
                e.sum_sq = fma((double)w.at[k], (double)w.at[k], e.sum_sq);
                e.max_error = fmax(e.max_error, distance);
                atomicAdd(&count[code.at[k]], 1u);
            }
        }
        if (j.codes != nullptr) {
            store(j.codes + i, code);
        }
        if (j.w_hat != nullptr) {
            store(j.w_hat + i, value);
        }
    }
    if (threadIdx.x % 32 == 0) {
        e.sum_noise += (double)n * ((double)g.scale * (double)g.scale) / 12.0;
    }
}

/* This block's error and codes, its warps and lanes in a fixed order. */
__device__ void keep_errors(error_part e, const uint32_t (*count)[CODES], error_part *part, unsigned long long *code_count) {
    __shared__ double shared[32];
    __shared__ double most[WARPS];
    e.sum_sq_error = block_sum(e.sum_sq_error, shared);
    e.sum_sq = block_sum(e.sum_sq, shared);
    e.sum_noise = block_sum(e.sum_noise, shared);
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        e.max_error = fmax(e.max_error, __shfl_xor_sync(0xffffffffu, e.max_error, lanes));
    }
    if (threadIdx.x % 32 == 0) {
        most[threadIdx.x / 32] = e.max_error;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 0; w < WARPS; w++) {
            e.max_error = fmax(e.max_error, most[w]);
        }
        part[blockIdx.x] = e;
    }
    for (int c = threadIdx.x; c < CODES; c += THREADS) {
        unsigned long long sum = 0;
        for (int w = 0; w < WARPS; w++) {
            sum += count[w][c];
        }
        if (sum > 0) {
            atomicAdd(&code_count[c], sum);
        }
    }
}

/* A warp a group: its range, then its codes, from the first-level cache. With one group for the tensor the rule is there already
 * and a warp takes a row. */
template <int N>
__global__ void __launch_bounds__(THREADS)
    quantize_kernel(job j, error_part *part, unsigned long long *code_count, const rule *whole) {
    __shared__ uint32_t count[WARPS][CODES];
    for (int i = threadIdx.x; i < WARPS * CODES; i += THREADS) {
        count[i / CODES][i % CODES] = 0;
    }
    __syncthreads();
    error_part e = {0, 0, 0, 0};
    unsigned long long refused = 0;
    int64_t per_row = j.groups_per_row > 0 ? j.groups_per_row : 1, width = j.groups_per_row > 0 ? j.group : j.cols;
    for (int64_t g = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32; g < j.rows * per_row; g += (int64_t)gridDim.x * WARPS) {
        int64_t c = g % per_row * width, at = g / per_row * j.cols + c, n = j.cols - c < width ? j.cols - c : width;
        rule own;
        if (j.groups_per_row > 0) {
            range r = {0, 0, 0};
            for (int64_t i = at + threadIdx.x % 32 * N; i < at + n; i += 32 * N) {
                packed<float, N> w = load<float, N>(j.w + i);
#pragma unroll
                for (int k = 0; k < N; k++) {
                    widen(r, w.at[k]);
                }
            }
            r = warp_join(r);
            own = rule_of(j, r);
            refused += r.bad > 0 ? (unsigned long long)r.bad : own.held ? 0u : 1u;
            if (threadIdx.x % 32 == 0) {
                j.scales[g] = own.scale;
                if (j.zeros != nullptr && !j.symmetric) {
                    j.zeros[g] = (uint8_t)own.zero;
                }
            }
        } else {
            own = *whole;
        }
        quantize_part<N>(j, own, at, n, e, count[threadIdx.x / 32]);
    }
    if (refused > 0 && threadIdx.x % 32 == 0) {
        atomicAdd(j.refused, refused);
    }
    if (j.measured) {
        __syncthreads();
        keep_errors(e, count, part, code_count);
    }
}

__global__ void __launch_bounds__(THREADS) range_kernel(range *part, const float *w, int64_t n) {
    __shared__ range shared[WARPS];
    range r = {0, 0, 0};
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        widen(r, w[i]);
    }
    r = warp_join(r);
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = r;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) {
            r = join(r, shared[i]);
        }
        part[blockIdx.x] = r;
    }
}

__global__ void whole_rule_kernel(job j, rule *whole, const range *part, int parts) {
    range r = {0, 0, 0};
    for (int i = threadIdx.x; i < parts; i += 32) {
        r = join(r, part[i]);
    }
    r = warp_join(r);
    if (threadIdx.x == 0) {
        rule g = rule_of(j, r);
        unsigned long long refused = r.bad > 0 ? (unsigned long long)r.bad : g.held ? 0u : 1u;
        *whole = g;
        j.scales[0] = g.scale;
        if (j.zeros != nullptr && !j.symmetric) {
            j.zeros[0] = (uint8_t)g.zero;
        }
        *j.refused += refused;
    }
}

__global__ void __launch_bounds__(TOTAL_THREADS) totals_kernel(cpl_quant_error *error, const error_part *part, int parts) {
    __shared__ double shared[32];
    double sums[3] = {0, 0, 0}, most = 0;
    for (int i = threadIdx.x; i < parts; i += TOTAL_THREADS) {
        sums[0] += part[i].sum_sq_error;
        sums[1] += part[i].sum_sq;
        sums[2] += part[i].sum_noise;
        most = fmax(most, part[i].max_error);
    }
    for (int k = 0; k < 3; k++) {
        sums[k] = block_sum(sums[k], shared);
    }
    __shared__ double all[TOTAL_THREADS];
    all[threadIdx.x] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < TOTAL_THREADS; i++) {
            most = fmax(most, all[i]);
        }
        error->sum_sq_error += sums[0];
        error->sum_sq += sums[1];
        error->sum_noise += sums[2];
        error->max_error = fmax(error->max_error, most);
    }
}

/* Scratch: the rule of the whole tensor, ranges of blocks, errors of blocks. */
extern "C" cpl_status CPL_CUDA(quantize)(cpl_device *dev, const cpl_quant_spec *spec, const float *w, int64_t rows, int64_t cols,
                                         uint8_t *codes, float *scales, uint8_t *zeros, float *w_hat, cpl_quant_error *error,
                                         int64_t *refused) {
    int64_t groups = 0;
    char *scratch = NULL;
    cudaStream_t stream = cpl_cuda_stream(dev);
    cpl_status st = cpl_quant_groups(spec, rows, cols, &groups);
    if (st != CPL_OK || groups == 0) {
        return st;
    }
    bool whole = spec->group > cols,
         wide = aligned16(w, w_hat) && (uintptr_t)codes % 4 == 0 && cols % 4 == 0 && spec->group % 4 == 0;
    job j = {w,
             rows,
             cols,
             spec->group,
             whole ? 0 : cpl_ceil_div(cols, spec->group),
             codes,
             zeros,
             scales,
             w_hat,
             (unsigned long long *)refused,
             spec->scheme == CPL_QUANT_SYMMETRIC,
             spec->scale_dtype == CPL_F16,
             error != NULL,
             spec->bits};
    int blocks = grid_for(dev, whole ? rows : groups, WARPS, PER_SM), ranges = grid_for(dev, rows * cols, THREADS * 16, 4);
    ranges = ranges < RANGE_BLOCKS ? ranges : RANGE_BLOCKS;
    st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, 256 + RANGE_BLOCKS * sizeof(range) + (size_t)blocks * sizeof(error_part),
                          &scratch);
    if (st != CPL_OK) {
        return st;
    }
    rule *own = (rule *)scratch;
    range *part = (range *)(scratch + 256);
    error_part *errors = (error_part *)(scratch + 256 + RANGE_BLOCKS * sizeof(range));
    unsigned long long *code_count = error == NULL ? NULL : (unsigned long long *)error->code_count;
    if (whole) {
        range_kernel<<<ranges, THREADS, 0, stream>>>(part, w, rows * cols);
        whole_rule_kernel<<<1, 32, 0, stream>>>(j, own, part, ranges);
    }
    if (wide) {
        quantize_kernel<4><<<blocks, THREADS, 0, stream>>>(j, errors, code_count, own);
    } else {
        quantize_kernel<1><<<blocks, THREADS, 0, stream>>>(j, errors, code_count, own);
    }
    if (error != NULL) {
        totals_kernel<<<1, TOTAL_THREADS, 0, stream>>>(error, errors, blocks);
    }
    return cpl_cuda_launched(dev, "quantize");
}

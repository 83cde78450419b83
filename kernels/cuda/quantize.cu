/* Uniform round-to-nearest-even quantization of one 2-D tensor, with its error beside it: weights are read once, but for one group
 * of the whole tensor. Refuses (counts) weights that are not finite and scales that their storage type cannot hold. */
#include "kernels/cuda/quantize.cuh"
extern "C" {
#include "kernels/pack.h"
}

namespace {

enum { THREADS = 256, MOST_THREADS = 512, TOTAL_THREADS = 256, PER_SM = 2048 };

/* Over the LANES threads of a group, a warp or a part of one, in every one of them. */
template <int LANES> __device__ __forceinline__ int32_t team_max(int32_t x) {
    if constexpr (LANES == 32) {
        return __reduce_max_sync(0xffffffffu, x);
    } else {
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
            x = max(x, __shfl_xor_sync(0xffffffffu, x, lanes));
        }
        return x;
    }
}

/* Over a block of whole warps, in every thread; `shared` has 64 elements and may be used again after the call. */
__device__ quant_range block_range(quant_range r, int32_t *shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    r.hi = __reduce_max_sync(0xffffffffu, r.hi);
    r.minus_lo = __reduce_max_sync(0xffffffffu, r.minus_lo);
    if (lane == 0) {
        shared[warp] = r.hi;
        shared[32 + warp] = r.minus_lo;
    }
    __syncthreads();
    r.hi = __reduce_max_sync(0xffffffffu, lane < warps ? shared[lane] : 0);
    r.minus_lo = __reduce_max_sync(0xffffffffu, lane < warps ? shared[32 + lane] : 0);
    __syncthreads();
    return r;
}

struct span {
    int64_t at, count;
};
__device__ __forceinline__ span span_of(const quant_job &j, int64_t group) {
    if (j.groups_per_row * j.group == j.cols) {
        return {group * j.group, j.group};
    }
    int64_t row = group / j.groups_per_row, c = (group - row * j.groups_per_row) * j.group;
    return {row * j.cols + c, j.cols - c < j.group ? j.cols - c : j.group};
}

__device__ __forceinline__ void keep_rule(const quant_job &j, const quant_rule &g, int64_t group) {
    j.scales[group] = g.scale;
    if (!j.symmetric && j.zeros != nullptr) {
        j.zeros[group] = (uint8_t)g.zero;
    }
}

__device__ __forceinline__ uint32_t count_bad(const float (&x)[HELD]) {
    uint32_t bad = 0;
    for (int k = 0; k < HELD; k++) {
        bad += key_of(x[k]) >= CPL_KEY_INF;
    }
    return bad;
}

__device__ __forceinline__ code_counters counters_of(const quant_job &j, uint32_t *table) {
    for (int i = threadIdx.x; i < CODE_WORDS; i += blockDim.x) {
        table[i] = 0;
    }
    __syncthreads();
    return {table, j.columns, (int)threadIdx.x & (j.columns - 1)};
}

/* Groups that a warp or a part of it holds: LANES threads a group, 16 weights each. */
template <int LANES, bool WIDE, bool MEASURED>
__global__ void __launch_bounds__(THREADS) team_kernel(quant_job j, quant_error_part *parts) {
    __shared__ uint32_t table[CODE_WORDS];
    code_counters counters = counters_of(j, table);
    quant_error_part e = {0, 0, 0, 0};
    constexpr int TEAMS = THREADS / LANES;
    int lane = threadIdx.x % LANES;
    uint32_t refused = 0;
    /* all lanes of a warp stay to the end: those without a group hold 0 weights */
    for (int64_t base = blockIdx.x * (int64_t)TEAMS; base < j.groups; base += (int64_t)gridDim.x * TEAMS) {
        int64_t group = base + threadIdx.x / LANES;
        span s = {0, 0};
        if (group < j.groups) {
            s = span_of(j, group);
        }
        float x[HELD];
        quant_range r = {0, 0};
        read_weights<WIDE>(x, j.w + s.at, 0, s.count, LANES, lane);
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            widen(r, x[k]);
        }
        r = {team_max<LANES>(r.hi), team_max<LANES>(r.minus_lo)};
        quant_rule g = rule_of(j, r);
        if (!is_finite(r)) {
            refused += count_bad(x);
        } else if (lane == 0) {
            refused += !g.held;
        }
        if (lane == 0 && group < j.groups) {
            keep_rule(j, g, group);
            if (MEASURED) {
                e.add_noise(g, s.count);
            }
        }
        write_weights<WIDE, MEASURED>(j, g, x, s.at, 0, s.count, LANES, lane, e, counters);
    }
    if (refused > 0) {
        atomicAdd(j.refused, (unsigned long long)refused);
    }
    if (MEASURED) {
        __syncthreads();
        keep_errors(j, e, table, parts);
    }
}

/* A block a group: what the block holds at a time is read once where that is the whole group, else the range takes a first reading,
 * and the second goes backwards, where the cache still has it. */
template <bool WIDE, bool MEASURED>
__global__ void __launch_bounds__(MOST_THREADS) block_kernel(quant_job j, quant_error_part *parts) {
    __shared__ uint32_t table[CODE_WORDS];
    __shared__ int32_t shared[64];
    code_counters counters = counters_of(j, table);
    quant_error_part e = {0, 0, 0, 0};
    int lanes = blockDim.x, lane = threadIdx.x;
    uint32_t refused = 0;
    for (int64_t group = blockIdx.x; group < j.groups; group += gridDim.x) {
        span s = span_of(j, group);
        float x[HELD];
        quant_range r = {0, 0};
        uint32_t bad = 0;
        int64_t start = 0;
        for (;; start += (int64_t)lanes * HELD) {
            read_weights<WIDE>(x, j.w + s.at, start, s.count, lanes, lane);
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                widen(r, x[k]);
            }
            if (!is_finite(r)) {
                bad += count_bad(x);
            }
            if (start + (int64_t)lanes * HELD >= s.count) {
                break;
            }
        }
        r = block_range(r, shared);
        quant_rule g = rule_of(j, r);
        refused += bad;
        if (lane == 0) {
            refused += is_finite(r) && !g.held;
            keep_rule(j, g, group);
            if (MEASURED) {
                e.add_noise(g, s.count);
            }
        }
        write_weights<WIDE, MEASURED>(j, g, x, s.at, start, s.count, lanes, lane, e, counters);
        for (start -= (int64_t)lanes * HELD; start >= 0; start -= (int64_t)lanes * HELD) {
            read_weights<WIDE>(x, j.w + s.at, start, s.count, lanes, lane);
            write_weights<WIDE, MEASURED>(j, g, x, s.at, start, s.count, lanes, lane, e, counters);
        }
    }
    if (refused > 0) {
        atomicAdd(j.refused, (unsigned long long)refused);
    }
    if (MEASURED) {
        __syncthreads();
        keep_errors(j, e, table, parts);
    }
}

/* --- one group for the tensor: a range, raised by integer maxima, then codes by blocks of 16 weights a thread --- */

template <bool WIDE> __global__ void __launch_bounds__(THREADS) range_kernel(quant_job j, quant_range *range, int64_t n) {
    __shared__ int32_t shared[64];
    quant_range r = {0, 0};
    uint32_t bad = 0;
    for (int64_t start = blockIdx.x * (int64_t)(THREADS * HELD); start < n; start += (int64_t)gridDim.x * THREADS * HELD) {
        float x[HELD];
        read_weights<WIDE>(x, j.w, start, n, THREADS, threadIdx.x);
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            widen(r, x[k]);
        }
        if (!is_finite(r)) {
            bad += count_bad(x);
        }
    }
    r = block_range(r, shared);
    if (threadIdx.x == 0) {
        atomicMax(&range->hi, r.hi);
        atomicMax(&range->minus_lo, r.minus_lo);
    }
    if (bad > 0) {
        atomicAdd(j.refused, (unsigned long long)bad);
    }
}

template <bool WIDE, bool MEASURED>
__global__ void __launch_bounds__(THREADS) whole_kernel(quant_job j, quant_error_part *parts, const quant_range *range, int64_t n) {
    __shared__ uint32_t table[CODE_WORDS];
    code_counters counters = counters_of(j, table);
    quant_error_part e = {0, 0, 0, 0};
    quant_range r = *range;
    quant_rule g = rule_of(j, r);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        keep_rule(j, g, 0);
        if (MEASURED) {
            e.add_noise(g, n);
        }
        if (is_finite(r) && !g.held) {
            atomicAdd(j.refused, 1ull);
        }
    }
    for (int64_t start = blockIdx.x * (int64_t)(THREADS * HELD); start < n; start += (int64_t)gridDim.x * THREADS * HELD) {
        float x[HELD];
        read_weights<WIDE>(x, j.w, start, n, THREADS, threadIdx.x);
        write_weights<WIDE, MEASURED>(j, g, x, 0, start, n, THREADS, threadIdx.x, e, counters);
    }
    if (MEASURED) {
        __syncthreads();
        keep_errors(j, e, table, parts);
    }
}

/* One block: the errors of all blocks, in a fixed order. */
__global__ void __launch_bounds__(TOTAL_THREADS) totals_kernel(cpl_quant_error *error, const quant_error_part *parts, int count) {
    __shared__ double sums[32];
    __shared__ float most[32];
    quant_error_part all = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < count; i += TOTAL_THREADS) {
        all.sum_sq_error += parts[i].sum_sq_error;
        all.sum_sq += parts[i].sum_sq;
        all.sum_noise += parts[i].sum_noise;
        all.max_error = fmaxf(all.max_error, parts[i].max_error);
    }
    all.sum_sq_error = block_sum(all.sum_sq_error, sums);
    all.sum_sq = block_sum(all.sum_sq, sums);
    all.sum_noise = block_sum(all.sum_noise, sums);
    all.max_error = block_max(all.max_error, most);
    if (threadIdx.x == 0) {
        error->sum_sq_error += all.sum_sq_error;
        error->sum_sq += all.sum_sq;
        error->sum_noise += all.sum_noise;
        error->max_error = fmax(error->max_error, (double)all.max_error);
    }
}

/* Threads of a block for a group of `count` weights that no warp holds. */
int block_threads(int64_t count) {
    int64_t threads = cpl_ceil_div(cpl_ceil_div(count, HELD), 32) * 32;
    return threads < MOST_THREADS ? (int)threads : (int)MOST_THREADS;
}

template <bool WIDE, bool MEASURED>
int launch(cpl_device *dev, const quant_job &j, quant_error_part *parts, quant_range *range, int64_t n) {
    cudaStream_t stream = cpl_cuda_stream(dev);
    int blocks;
    auto teams = [&](int lanes, auto kernel) {
        blocks = grid_for(dev, j.groups, THREADS / lanes, PER_SM / THREADS);
        kernel<<<blocks, THREADS, 0, stream>>>(j, parts);
    };
    if (range != NULL) {
        blocks = grid_for(dev, n, THREADS * HELD, PER_SM / THREADS);
        range_kernel<WIDE><<<blocks, THREADS, 0, stream>>>(j, range, n);
        whole_kernel<WIDE, MEASURED><<<blocks, THREADS, 0, stream>>>(j, parts, range, n);
    } else if (j.group <= 2 * HELD) {
        teams(2, team_kernel<2, WIDE, MEASURED>);
    } else if (j.group <= 4 * HELD) {
        teams(4, team_kernel<4, WIDE, MEASURED>);
    } else if (j.group <= 8 * HELD) {
        teams(8, team_kernel<8, WIDE, MEASURED>);
    } else if (j.group <= 32 * HELD) {
        teams(32, team_kernel<32, WIDE, MEASURED>);
    } else {
        int threads = block_threads(j.group);
        blocks = grid_for(dev, j.groups, 1, PER_SM / threads);
        block_kernel<WIDE, MEASURED><<<blocks, threads, 0, stream>>>(j, parts);
    }
    return blocks;
}

} // namespace

/* Scratch: the range of the whole tensor, then the errors of blocks (PER_SM / 32 an SM at the most). */
extern "C" cpl_status CPL_CUDA(quantize)(cpl_device *dev, const cpl_quant_spec *spec, const float *w, int64_t rows, int64_t cols,
                                         uint8_t *codes, float *scales, uint8_t *zeros, float *w_hat, cpl_quant_error *error,
                                         int64_t *refused) {
    int64_t groups = 0;
    char *scratch = NULL;
    cpl_status st = cpl_quant_groups(spec, rows, cols, &groups);
    if (st != CPL_OK || groups == 0) {
        return st;
    }
    size_t most_blocks = (size_t)cpl_cuda_of(dev)->sm_count * (PER_SM / 32);
    st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, 64 + most_blocks * sizeof(quant_error_part), &scratch);
    if (st != CPL_OK) {
        return st;
    }
    bool whole = spec->group > cols, wide = aligned16(w, w_hat) && (uintptr_t)codes % 4 == 0;
    wide = wide && (whole ? rows * cols % 4 == 0 : cols % 4 == 0 && spec->group % 4 == 0);
    quant_range *range = whole ? (quant_range *)scratch : NULL;
    quant_error_part *parts = (quant_error_part *)(scratch + 64);
    quant_job j = {};
    j.w = w;
    j.codes = codes;
    j.zeros = zeros;
    j.scales = scales;
    j.w_hat = w_hat;
    j.refused = (unsigned long long *)refused;
    j.code_count = error == NULL ? NULL : (unsigned long long *)error->code_count;
    j.cols = cols;
    j.group = spec->group;
    j.groups_per_row = whole ? 0 : cpl_ceil_div(cols, spec->group);
    j.groups = groups;
    j.bits = spec->bits;
    j.columns = spec->bits <= 5 ? 32 : CODE_WORDS >> spec->bits;
    j.symmetric = spec->scheme == CPL_QUANT_SYMMETRIC;
    j.half_scale = spec->scale_dtype == CPL_F16;
    if (whole) {
        st = CPL_CUDA(zero)(dev, range, sizeof *range);
        if (st != CPL_OK) {
            return st;
        }
    }
    bool measured = error != NULL;
    int blocks = wide       ? measured ? launch<true, true>(dev, j, parts, range, rows * cols)
                                       : launch<true, false>(dev, j, parts, range, rows * cols)
                       : measured ? launch<false, true>(dev, j, parts, range, rows * cols)
                            : launch<false, false>(dev, j, parts, range, rows * cols);
    if (measured) {
        totals_kernel<<<1, TOTAL_THREADS, 0, cpl_cuda_stream(dev)>>>(error, parts, blocks);
    }
    return cpl_cuda_launched(dev, "quantize");
}

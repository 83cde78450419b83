/* What a step must know of its gradient: where it is not finite, its sums of squares, its exponents.
 * Refuses float atomics: one f64 partial sum a chunk; bits and counts are integers, whose order does not matter. */
#include "kernels/cuda/flat.cuh"

namespace {

enum { THREADS = 256, LOADS = 8, PIECE = THREADS * LOADS * 4 };
enum { COUNT_THREADS = 512, COUNT_LOADS = 4, COUNT_PIECE = COUNT_THREADS * COUNT_LOADS * 4, EXPONENTS = 256, COLUMNS = 32 };

/* The last tensor that begins at element i or before. */
__device__ int64_t tensor_of(const int64_t *begin, int64_t tensors, int64_t i) {
    int64_t low = 0, high = tensors;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (begin[middle] <= i) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

/* Elements [first, last), which begin at grad and one of which is not finite, to the tensors they are in; a block, one atomic a
 * tensor. SHARED: other devices change kinds, too. */
template <bool SHARED>
__device__ __noinline__ void attribute(uint32_t *kinds, uint32_t *any, const float *grad, const int64_t *begin, int64_t tensors,
                                       int64_t first, int64_t last) {
    for (int64_t t = tensor_of(begin, tensors, first); t < tensors && begin[t] < last; t++) {
        int64_t from = begin[t] < first ? first : begin[t], to = begin[t + 1] < last ? begin[t + 1] : last;
        bool inf = false, nan = false;
        for (int64_t i = from + threadIdx.x; i < to; i += THREADS) {
            uint32_t key = key_of(grad[i - first]);
            inf |= key == CPL_KEY_INF;
            nan |= key > CPL_KEY_INF;
        }
        uint32_t found = (__syncthreads_or(inf) ? 1u : 0u) | (__syncthreads_or(nan) ? 2u : 0u);
        if (threadIdx.x == 0 && found != 0) {
            SHARED ? atomicOr_system(&kinds[t], found) : atomicOr(&kinds[t], found);
            atomicOr(any, 1u);
        }
    }
}

/* A block a piece of [origin, end). The usual piece is finite, which its largest key tells. SUMS: with the sums of squares of the
 * chunks of a piece, of the bits that chunk_kernel gives them. */
template <bool SUMS>
__global__ void __launch_bounds__(THREADS)
    scan_kernel(uint32_t *kinds, uint32_t *any, double *chunk_sums, const float *grad, const int64_t *begin, int64_t tensors,
                int64_t origin, int64_t end, bool wide) {
    constexpr int CHUNKS = PIECE / CPL_SUM_CHUNK;
    __shared__ double shared[32];
    int64_t first = origin + blockIdx.x * (int64_t)PIECE, last = first + PIECE < end ? first + PIECE : end;
    uint32_t largest = 0;
    if (wide && last - first == PIECE) {
        packed<float, 4> x[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            x[k] = load<float, 4>(grad + first + (k * THREADS + threadIdx.x) * 4);
        }
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                largest = max(largest, key_of(x[k].at[j]));
            }
        }
        if (SUMS) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                double sum = 0;
#pragma unroll
                for (int k = c * LOADS / CHUNKS; k < (c + 1) * LOADS / CHUNKS; k++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sum = chunk_term<true>(sum, x[k].at[j]);
                    }
                }
                sum = block_sum(sum, shared);
                if (threadIdx.x == 0) {
                    chunk_sums[blockIdx.x * (int64_t)CHUNKS + c] = sum;
                }
            }
        }
    } else {
#pragma unroll 8
        for (int64_t i = first + threadIdx.x; i < last; i += THREADS) {
            largest = max(largest, key_of(grad[i]));
        }
        for (int c = 0; SUMS && c < CHUNKS && first + c * (int64_t)CPL_SUM_CHUNK < last; c++) {
            int64_t at = first + c * (int64_t)CPL_SUM_CHUNK, count = last - at < CPL_SUM_CHUNK ? last - at : CPL_SUM_CHUNK;
            double sum = block_sum(chunk_part<true, THREADS>(grad + at, count, false), shared);
            if (threadIdx.x == 0) {
                chunk_sums[blockIdx.x * (int64_t)CHUNKS + c] = sum;
            }
        }
    }
    if (__syncthreads_or(largest >= CPL_KEY_INF)) {
        attribute<false>(kinds, any, grad + first, begin, tensors, first, last);
    }
}

/* v[LOW] = the tree over v[LOW .. HIGH-1]. */
template <int LOW, int HIGH> __device__ __forceinline__ void tree_sum(packed<float, 4> *v) {
    if constexpr (HIGH - LOW > 1) {
        constexpr int MIDDLE = LOW + (HIGH - LOW) / 2;
        tree_sum<LOW, MIDDLE>(v);
        tree_sum<MIDDLE, HIGH>(v);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[LOW].at[j] += v[MIDDLE].at[j];
        }
    }
}

template <int RANKS> struct gradients {
    float *grad[2][RANKS], *own[2]; /* of both stretches */
    int64_t first[2], last[2];
    uint32_t *kinds[RANKS];
    double *chunk_sums[RANKS];
};

/* A block a chunk of one of the two stretches, `ahead` of them the first one's; these are spread evenly over all, so that links and
 * memory work at the same time. The sums wait in registers until all contributions have been looked at, for the own one may be
 * where they go. */
template <int RANKS>
__global__ void __launch_bounds__(THREADS)
    sum_kernel(const gradients<RANKS> g, uint32_t *any, const int64_t *begin, int64_t tensors, int64_t ahead, bool wide) {
    constexpr int PACKS = CPL_SUM_CHUNK / (4 * THREADS);
    __shared__ double shared[32];
    int64_t before = blockIdx.x * ahead / gridDim.x;
    int part = (blockIdx.x + (int64_t)1) * ahead / gridDim.x > before ? 0 : 1;
    int64_t at_chunk = (part == 0 ? before : blockIdx.x - before) * CPL_SUM_CHUNK, first = g.first[part] + at_chunk;
    int count = (int)min(g.last[part] - first, (int64_t)CPL_SUM_CHUNK);
    bool whole = wide && count == CPL_SUM_CHUNK;
    const float *grad[RANKS];
#pragma unroll
    for (int r = 0; r < RANKS; r++) {
        grad[r] = g.grad[part][r] + at_chunk;
    }
    packed<float, 4> v[PACKS][RANKS];
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        int at = (k * THREADS + (int)threadIdx.x) * 4;
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
            if (whole) {
                v[k][r] = load<float, 4>(grad[r] + at);
            } else {
                for (int j = 0; j < 4; j++) {
                    v[k][r].at[j] = at + j < count ? grad[r][at + j] : 0.0f;
                }
            }
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
#pragma unroll
        for (int r = 0; r < RANKS; r++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                largest = max(largest, key_of(v[k][r].at[j]));
            }
        }
        tree_sum<0, RANKS>(v[k]);
    }
    if (__syncthreads_or(largest >= CPL_KEY_INF)) {
        for (int r = 0; r < RANKS; r++) {
            attribute<true>(g.kinds[r], any, g.grad[part][r] + at_chunk, begin, tensors, first, first + count);
        }
        __syncthreads();
    }
    float *own = g.own[part] + at_chunk;
    double sum = 0;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        int at = (k * THREADS + (int)threadIdx.x) * 4;
        if (whole) {
            store(own + at, v[k][0]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!whole && at + j < count) {
                own[at + j] = v[k][0].at[j];
            }
            sum = chunk_term<true>(sum, v[k][0].at[j]);
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x < RANKS) {
        g.chunk_sums[threadIdx.x][first / CPL_SUM_CHUNK] = sum;
    }
}

template <int RANKS>
cpl_status launch_sum(cpl_device *dev, const cpl_sum_part *part, const cpl_reach *kinds, const cpl_reach *chunk_sums, uint32_t *any,
                      const int64_t *table, int64_t tensors) {
    if constexpr (RANKS > CPL_REACH_MOST) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "grad_sum over %d ranks", kinds->count);
    } else if (kinds->count != RANKS) {
        return launch_sum<RANKS + 1>(dev, part, kinds, chunk_sums, any, table, tensors);
    } else {
        gradients<RANKS> g;
        bool wide = true;
        int64_t chunks[2];
        for (int p = 0; p < 2; p++) {
            g.own[p] = (float *)part[p].grad.at[part[p].grad.own];
            g.first[p] = part[p].first;
            g.last[p] = part[p].last;
            chunks[p] = cpl_ceil_div(part[p].last - part[p].first, CPL_SUM_CHUNK);
            for (int r = 0; r < RANKS; r++) {
                g.grad[p][r] = (float *)part[p].grad.at[r];
                wide = wide && (chunks[p] == 0 || aligned16(g.grad[p][r]));
            }
        }
        for (int r = 0; r < RANKS; r++) {
            g.kinds[r] = (uint32_t *)kinds->at[r];
            g.chunk_sums[r] = (double *)chunk_sums->at[r];
        }
        sum_kernel<RANKS>
            <<<(unsigned)(chunks[0] + chunks[1]), THREADS, 0, cpl_cuda_stream(dev)>>>(g, any, table, tensors, chunks[0], wide);
        return cpl_cuda_launched(dev, "grad_sum");
    }
}

/* Bins of a block in shared memory, a column a lane, so that the few exponents a gradient has cost no more than many. The largest
 * finite magnitude as its key, which is ordered alike. */
struct exponent_counts {
    uint32_t *table; /* [EXPONENTS][COLUMNS] */
    float factor;
    uint32_t largest;

    __device__ __forceinline__ void add(float x) {
        uint32_t key = key_of(__fmul_rn(factor, x));
        largest = max(largest, key < CPL_KEY_INF ? key : 0u);
        atomicAdd(&table[(key >> 23) * COLUMNS + threadIdx.x % COLUMNS], 1u);
    }
};

__global__ void __launch_bounds__(COUNT_THREADS)
    exponents_kernel(unsigned long long *counts, uint32_t *max_abs, const float *x, int64_t n, float factor, bool wide) {
    __shared__ uint32_t table[EXPONENTS * COLUMNS];
    __shared__ uint32_t largest;
    for (int i = threadIdx.x; i < EXPONENTS * COLUMNS; i += COUNT_THREADS) {
        table[i] = 0;
    }
    if (threadIdx.x == 0) {
        largest = 0;
    }
    __syncthreads();
    exponent_counts own = {table, factor, 0};
    int64_t pieces = wide ? n / COUNT_PIECE : 0;
    for (int64_t p = blockIdx.x; p < pieces; p += gridDim.x) {
        packed<float, 4> v[COUNT_LOADS];
#pragma unroll
        for (int k = 0; k < COUNT_LOADS; k++) {
            v[k] = load<float, 4>(x + p * COUNT_PIECE + (k * COUNT_THREADS + threadIdx.x) * 4);
        }
#pragma unroll
        for (int k = 0; k < COUNT_LOADS; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                own.add(v[k].at[j]);
            }
        }
    }
    for (int64_t i = pieces * COUNT_PIECE + blockIdx.x * (int64_t)COUNT_THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * COUNT_THREADS) {
        own.add(x[i]);
    }
    atomicMax(&largest, own.largest);
    __syncthreads();
    for (int e = threadIdx.x; e < EXPONENTS; e += COUNT_THREADS) {
        unsigned long long sum = 0;
        over_columns<COLUMNS>(table, e, [&](uint32_t c) { sum += c; });
        if (sum > 0) {
            atomicAdd(&counts[e], sum);
        }
    }
    if (threadIdx.x == 0) {
        atomicMax(max_abs, largest);
    }
}

} // namespace

extern "C" cpl_status CPL_CUDA(grad_scan)(cpl_device *dev, uint32_t *kinds, uint32_t *any, double *chunk_sums, const float *grad,
                                          const int64_t *begin, int64_t tensors) {
    const void *table = NULL;
    if (tensors == 0) {
        return CPL_OK;
    }
    int64_t n = begin[tensors] - begin[0];
    cpl_status st = CPL_CUDA(zero)(dev, kinds, (size_t)tensors * sizeof *kinds);
    if (st != CPL_OK || n == 0) {
        return st;
    }
    st = cpl_cuda_constant(dev, begin, ((size_t)tensors + 1) * sizeof *begin, &table);
    if (st != CPL_OK) {
        return st;
    }
    (chunk_sums != NULL ? scan_kernel<true>
                        : scan_kernel<false>)<<<(unsigned)cpl_ceil_div(n, PIECE), THREADS, 0, cpl_cuda_stream(dev)>>>(
        kinds, any, chunk_sums, grad, (const int64_t *)table, tensors, begin[0], begin[tensors], aligned16(grad + begin[0]));
    return cpl_cuda_launched(dev, "grad_scan");
}

extern "C" cpl_status CPL_CUDA(grad_sum)(cpl_device *dev, const cpl_sum_part *part, const cpl_reach *kinds,
                                         const cpl_reach *chunk_sums, uint32_t *any, const int64_t *begin, int64_t tensors) {
    const void *table = NULL;
    if (part[0].first == part[0].last && part[1].first == part[1].last) {
        return CPL_OK;
    }
    cpl_status st = cpl_cuda_constant(dev, begin, ((size_t)tensors + 1) * sizeof *begin, &table);
    return st != CPL_OK ? st : launch_sum<1>(dev, part, kinds, chunk_sums, any, (const int64_t *)table, tensors);
}

extern "C" cpl_status CPL_CUDA(sum_squares)(cpl_device *dev, double *chunk_sums, const float *x, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    chunk_kernel<true, THREADS>
        <<<(unsigned)cpl_ceil_div(n, CPL_SUM_CHUNK), THREADS, 0, cpl_cuda_stream(dev)>>>(chunk_sums, x, n, aligned16(x));
    return cpl_cuda_launched(dev, "sum_squares");
}

extern "C" cpl_status CPL_CUDA(exponents)(cpl_device *dev, int64_t *counts, float *max_abs, const float *x, int64_t n,
                                          float factor) {
    if (n == 0) {
        return CPL_OK;
    }
    exponents_kernel<<<grid_for(dev, n, COUNT_PIECE, 4), COUNT_THREADS, 0, cpl_cuda_stream(dev)>>>(
        (unsigned long long *)counts, (uint32_t *)max_abs, x, n, factor, aligned16(x));
    return cpl_cuda_launched(dev, "exponents");
}

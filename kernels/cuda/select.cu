/* Exact selection by magnitude: histograms of keys, and the mask once the threshold is known.
 * Refuses to break ties by anything but the index: the first ones go. */
#include "kernels/cuda/flat.cuh"

namespace {

enum { KEY_BITS = 31, SHARED_BITS = 11, THREADS = 1024, LOADS = 4, PIECE = CPL_SELECT_PIECE, MANY_THREADS = 256 };
static_assert(PIECE == THREADS * LOADS * 4 && PIECE % MANY_THREADS == 0, "a piece is a block's step");
enum { MASK_THREADS = 256, MASK_LOADS = 8, MASK_PIECE = MASK_THREADS * MASK_LOADS * 4, PENDING = 2 };

/* Which keys count, and where: those whose top bits are `prefix`, by the next `bits`. */
struct digit {
    uint32_t prefix;
    int bits, shift; /* shift: bits below the digit */
};

/* Counters of 16 bits in shared memory, [bins / 2][COLUMNS] words of two bins each: a column a lane, so that no two lanes of a warp
 * wait for one another, however the magnitudes are distributed. */
template <int COLUMNS> struct bins {
    uint32_t *table;
    digit d;
    uint32_t nans;

    __device__ __forceinline__ void add(float w) {
        uint32_t key = key_of(w), top = key >> d.shift, bin = top & ((1u << d.bits) - 1);
        nans += key > CPL_KEY_INF;
        if (top >> d.bits == d.prefix) {
            atomicAdd(&table[(bin >> 1) * COLUMNS + threadIdx.x % COLUMNS], bin & 1 ? 0x10000u : 1u);
        }
    }
    __device__ __forceinline__ int rows() const { return 1 << (d.bits - 1); }
    __device__ void clear() {
        for (int i = threadIdx.x; i < rows() * COLUMNS / 4; i += THREADS) {
            reinterpret_cast<uint4 *>(table)[i] = make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }
    /* After all warps have counted; the whole block. */
    __device__ void flush(unsigned long long *counts) {
        __syncthreads();
        for (int row = threadIdx.x; row < rows(); row += THREADS) {
            uint32_t even = 0, odd = 0;
            over_columns<COLUMNS>(table, row, [&](uint32_t c) {
                even += c & 0xffffu;
                odd += c >> 16;
            });
            if (even > 0) {
                atomicAdd(&counts[2 * row], (unsigned long long)even);
            }
            if (odd > 0) {
                atomicAdd(&counts[2 * row + 1], (unsigned long long)odd);
            }
        }
    }
};

/* A block an SM. w is aligned to 16 bytes; the `head` elements before it and those behind the last piece are counted one by one.
 * stride > 1: one piece of as many, and no head.
 * A column sees 512 * 32 / COLUMNS elements of a piece at most, and is emptied before it could pass 65535. */
template <int COLUMNS>
__global__ void __launch_bounds__(THREADS) histogram_kernel(unsigned long long *counts, unsigned long long *nans, const float *w,
                                                            int64_t n, int head, int64_t stride, digit d) {
    extern __shared__ uint4 shared[];
    constexpr int MOST = 65535 / (PIECE / COLUMNS) - 2;
    bins<COLUMNS> own = {reinterpret_cast<uint32_t *>(shared), d, 0};
    own.clear();
    int64_t whole = n / PIECE, pieces = (whole + stride - 1) / stride, step = stride * PIECE;
    int since = 0;
    packed<float, 4> x[LOADS];
    if (blockIdx.x < pieces) {
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            x[k] = load<float, 4>(w + blockIdx.x * step + (k * THREADS + threadIdx.x) * 4);
        }
    }
    for (int64_t p = blockIdx.x; p < pieces; p += gridDim.x) {
        int64_t next = (p + gridDim.x) * step;
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            packed<float, 4> now = x[k];
            if (p + gridDim.x < pieces) {
                x[k] = load<float, 4>(w + next + (k * THREADS + threadIdx.x) * 4);
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                own.add(now.at[j]);
            }
        }
        if (++since == MOST) {
            own.flush(counts);
            __syncthreads();
            own.clear();
            since = 0;
        }
    }
    int64_t behind = pieces * stride == whole ? whole * PIECE : n; /* the last, shorter piece: in the sample or not */
    for (int64_t i = behind + blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        own.add(w[i]);
    }
    if (blockIdx.x == 0 && threadIdx.x < head) {
        own.add(w[(int)threadIdx.x - head]);
    }
    own.flush(counts);
    if (own.nans > 0) {
        atomicAdd(nans, (unsigned long long)own.nans);
    }
}

/* More bins than shared memory is used for, or a sample that is not aligned: one atomic for all lanes that share a bin. */
__global__ void __launch_bounds__(MANY_THREADS) histogram_many_kernel(unsigned long long *counts, unsigned long long *nans,
                                                                      const float *w, int64_t n, int64_t stride, digit d) {
    uint32_t found = 0;
    for (int64_t at = blockIdx.x * (int64_t)MANY_THREADS;; at += (int64_t)gridDim.x * MANY_THREADS) {
        int64_t base = at / PIECE * stride * PIECE + at % PIECE, i = base + threadIdx.x;
        if (base >= n) {
            break;
        }
        uint32_t key = i < n ? key_of(w[i]) : 0, top = key >> d.shift;
        bool counted = i < n && top >> d.bits == d.prefix;
        uint32_t bin = counted ? top & ((1u << d.bits) - 1) : 0xffffffffu;
        unsigned same = __match_any_sync(0xffffffffu, bin);
        found += key > CPL_KEY_INF;
        if (counted && __ffs((int)same) - 1 == (int)(threadIdx.x % 32)) {
            atomicAdd(&counts[bin], (unsigned long long)__popc(same));
        }
    }
    if (found > 0) {
        atomicAdd(nans, (unsigned long long)found);
    }
}

template <int COLUMNS>
cpl_status count_in_shared(cpl_device *dev, unsigned long long *counts, unsigned long long *nans, const float *w, int64_t n,
                           int64_t stride, digit d) {
    int bytes = (2 * COLUMNS) << d.bits;
    int64_t head = (16 - (uintptr_t)w % 16) % 16 / 4;
    head = head < n ? head : n;
    cpl_status st =
        cpl_cuda_status(cudaFuncSetAttribute(histogram_kernel<COLUMNS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                        __FILE__, __LINE__, "select_histogram");
    if (st != CPL_OK) {
        return st;
    }
    histogram_kernel<COLUMNS><<<grid_for(dev, cpl_ceil_div(n, PIECE), stride, 1), THREADS, (size_t)bytes, cpl_cuda_stream(dev)>>>(
        counts, nans, w + head, n - head, (int)head, stride, d);
    return cpl_cuda_launched(dev, "select_histogram");
}

} // namespace

extern "C" cpl_status CPL_CUDA(select_histogram)(cpl_device *dev, int64_t *counts, int64_t *nans, const float *w, int64_t n,
                                                 int64_t stride, uint32_t prefix, int prefix_bits, int bits) {
    if (bits < 1 || bits > 24 || prefix_bits < 0 || prefix_bits + bits > KEY_BITS) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__,
                        "select_histogram: bits %d after a prefix of %d, expected 1 to 24 and at most %d together", bits,
                        prefix_bits, KEY_BITS);
    }
    if (n == 0) {
        return CPL_OK;
    }
    auto *to = (unsigned long long *)counts, *bad = (unsigned long long *)nans;
    digit d = {prefix, bits, KEY_BITS - prefix_bits - bits};
    if (bits > SHARED_BITS || (stride > 1 && !aligned16(w))) {
        int64_t pieces = cpl_ceil_div(cpl_ceil_div(n, PIECE), stride), most = n < pieces * PIECE ? n : pieces * PIECE;
        histogram_many_kernel<<<grid_for(dev, most, MANY_THREADS * 4, 8), MANY_THREADS, 0, cpl_cuda_stream(dev)>>>(to, bad, w, n,
                                                                                                                   stride, d);
        return cpl_cuda_launched(dev, "select_histogram");
    }
    int most = 0; /* 227 KiB on sm_90, 163 on sm_80, but 99 on sm_86 and sm_89 */
    cpl_status st =
        cpl_cuda_status(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, cpl_cuda_of(dev)->ordinal), __FILE__,
                        __LINE__, "select_histogram");
    if (st != CPL_OK) {
        return st;
    }
    return most >= (64 << bits) ? count_in_shared<32>(dev, to, bad, w, n, stride, d)
                                : count_in_shared<16>(dev, to, bad, w, n, stride, d);
}

/* --- mask --- */

namespace {

/* A block a piece: ties[piece] = how many are equal to the threshold. Those become PENDING where some of all ties go, else 1.
 * *left_before = *left, which settle_kernel changes. */
__global__ void __launch_bounds__(MASK_THREADS)
    mask_kernel(uint8_t *mask, uint32_t *ties, int64_t *left_before, const int64_t *left, const float *w, int64_t n,
                uint32_t threshold, bool wide) {
    __shared__ int shared[32];
    int64_t first = blockIdx.x * (int64_t)MASK_PIECE, count = n - first < MASK_PIECE ? n - first : MASK_PIECE, some = *left;
    uint8_t tie = some > 0 ? PENDING : 1;
    int found = 0;
    auto value = [&](float x) {
        uint32_t key = key_of(x);
        found += key == threshold;
        return (uint8_t)(key > threshold ? 1 : key == threshold ? tie : 0);
    };
    if (wide && count == MASK_PIECE) {
        packed<float, 4> x[MASK_LOADS];
#pragma unroll
        for (int k = 0; k < MASK_LOADS; k++) {
            x[k] = load<float, 4>(w + first + (k * MASK_THREADS + threadIdx.x) * 4);
        }
#pragma unroll
        for (int k = 0; k < MASK_LOADS; k++) {
            packed<uint8_t, 4> out;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                out.at[j] = value(x[k].at[j]);
            }
            store(mask + first + (k * MASK_THREADS + threadIdx.x) * 4, out);
        }
    } else {
#pragma unroll 8
        for (int i = threadIdx.x; i < count; i += MASK_THREADS) {
            mask[first + i] = value(w[first + i]);
        }
    }
    found = block_sum(found, shared);
    if (threadIdx.x == 0) {
        ties[blockIdx.x] = (uint32_t)found;
        if (blockIdx.x == 0) {
            *left_before = some;
        }
    }
}

/* PENDING of one piece becomes `kept`. */
__device__ void settle_all(uint8_t *mask, int count, uint32_t kept, bool wide) {
    if (wide && count == MASK_PIECE) {
        uint32_t *words = reinterpret_cast<uint32_t *>(mask);
        for (int i = threadIdx.x; i < MASK_PIECE / 4; i += MASK_THREADS) {
            uint32_t x = words[i];
            if (x & 0x02020202u) {
                words[i] = (x & 0x01010101u) | (kept != 0 ? (x >> 1) & 0x01010101u : 0u);
            }
        }
        return;
    }
    for (int i = threadIdx.x; i < count; i += MASK_THREADS) {
        mask[i] = mask[i] == PENDING ? (uint8_t)kept : mask[i];
    }
}

/* The one piece in which the last of those to go lies: the first `removed` PENDING become 0, the others 1. A thread a run of the
 * piece. */
__device__ void settle_some(uint8_t *mask, int count, int64_t removed) {
    __shared__ int pending[MASK_THREADS];
    constexpr int RUN = MASK_PIECE / MASK_THREADS;
    int from = threadIdx.x * RUN, to = from + RUN < count ? from + RUN : count, own = 0, before = 0;
    for (int i = from; i < to; i++) {
        own += mask[i] == PENDING;
    }
    pending[threadIdx.x] = own;
    __syncthreads();
    for (int t = 0; t < MASK_THREADS; t++) {
        before += t < (int)threadIdx.x ? pending[t] : 0;
    }
    for (int i = from; i < to; i++) {
        if (mask[i] == PENDING) {
            mask[i] = before < removed ? 0 : 1;
            before++;
        }
    }
    __syncthreads();
}

/* Block b of B settles pieces [b pieces/B, (b+1) pieces/B); what goes there follows from the ties of all pieces before. */
__global__ void __launch_bounds__(MASK_THREADS) settle_kernel(uint8_t *mask, const uint32_t *ties, const int64_t *left_before,
                                                              int64_t *left, int64_t n, int64_t pieces, bool wide) {
    __shared__ int64_t shared[32];
    __shared__ uint32_t some[MASK_THREADS];
    int64_t budget = *left_before, before = 0;
    int64_t from = blockIdx.x * pieces / gridDim.x, to = (blockIdx.x + (int64_t)1) * pieces / gridDim.x;
    if (budget <= 0) {
        return;
    }
#pragma unroll 8
    for (int64_t p = threadIdx.x; p < from; p += MASK_THREADS) {
        before += ties[p];
    }
    before = block_sum(before, shared);
    for (int64_t start = from; start < to; start += MASK_THREADS) {
        int64_t p = start + threadIdx.x;
        uint32_t own = p < to ? ties[p] : 0;
        some[threadIdx.x] = own;
        if (__syncthreads_or(own != 0)) {
            for (int i = 0; i < MASK_THREADS && start + i < to; i++) {
                int64_t at = (start + i) * MASK_PIECE, removed = budget - before;
                int count = n - at < MASK_PIECE ? (int)(n - at) : MASK_PIECE;
                if (some[i] == 0) {
                    continue;
                }
                if (removed <= 0 || removed >= some[i]) {
                    settle_all(mask + at, count, removed <= 0, wide);
                } else {
                    settle_some(mask + at, count, removed);
                }
                before += some[i];
            }
        }
        __syncthreads();
    }
    if (to == pieces && from < to && threadIdx.x == 0) {
        *left = before < budget ? budget - before : 0;
    }
}

/* By selection and not by product: nan times 0 would stay nan. */
template <int N> __global__ void __launch_bounds__(MASK_THREADS) apply_kernel(float *x, const uint8_t *mask, int64_t n) {
    int64_t packs = n / N, first = blockIdx.x * (int64_t)(MASK_THREADS * LOADS) + threadIdx.x;
    packed<float, N> v[LOADS];
    packed<uint8_t, N> m[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        if (first + k * MASK_THREADS < packs) {
            v[k] = load<float, N>(x + (first + k * MASK_THREADS) * N);
            m[k] = load<uint8_t, N>(mask + (first + k * MASK_THREADS) * N);
        }
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        if (first + k * MASK_THREADS < packs) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                v[k].at[j] = m[k].at[j] ? v[k].at[j] : 0.0f;
            }
            store(x + (first + k * MASK_THREADS) * N, v[k]);
        }
    }
    int64_t rest = packs * N + threadIdx.x;
    if (N > 1 && blockIdx.x == 0 && rest < n) {
        x[rest] = mask[rest] ? x[rest] : 0.0f;
    }
}

} // namespace

/* Scratch: *left as it was, then the ties of each piece. */
extern "C" cpl_status CPL_CUDA(select_mask)(cpl_device *dev, uint8_t *mask, const float *w, int64_t n, uint32_t threshold,
                                            int64_t *ties_left) {
    int64_t *before = NULL, pieces = cpl_ceil_div(n, MASK_PIECE);
    cudaStream_t stream = cpl_cuda_stream(dev);
    if (n == 0 || threshold >> KEY_BITS) { /* above every key */
        return n == 0 ? CPL_OK : CPL_CUDA(zero)(dev, mask, (size_t)n);
    }
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, sizeof *before + (size_t)pieces * sizeof(uint32_t), &before);
    if (st != CPL_OK) {
        return st;
    }
    uint32_t *ties = (uint32_t *)(before + 1);
    bool wide = aligned16(w) && (uintptr_t)mask % 4 == 0;
    mask_kernel<<<(unsigned)pieces, MASK_THREADS, 0, stream>>>(mask, ties, before, ties_left, w, n, threshold, wide);
    settle_kernel<<<grid_for(dev, pieces, 1, 2), MASK_THREADS, 0, stream>>>(mask, ties, before, ties_left, n, pieces, wide);
    return cpl_cuda_launched(dev, "select_mask");
}

extern "C" cpl_status CPL_CUDA(apply_mask)(cpl_device *dev, float *x, const uint8_t *mask, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    if (aligned16(x) && (uintptr_t)mask % 4 == 0) {
        unsigned blocks = (unsigned)cpl_ceil_div(cpl_ceil_div(n, 4), MASK_THREADS * LOADS);
        apply_kernel<4><<<blocks, MASK_THREADS, 0, cpl_cuda_stream(dev)>>>(x, mask, n);
    } else {
        apply_kernel<1><<<(unsigned)cpl_ceil_div(n, MASK_THREADS * LOADS), MASK_THREADS, 0, cpl_cuda_stream(dev)>>>(x, mask, n);
    }
    return cpl_cuda_launched(dev, "apply_mask");
}

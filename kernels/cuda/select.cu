/* Exact selection by magnitude: histograms of keys, and the mask once the threshold is known.
 * Refuses to break ties by anything but the index: the first ones go. */
#include "kernels/cuda/device.cuh"

/* The key of w: the 31 bits of |w| as an integer. Order-preserving over finite floats and inf; +0 and -0 are equal. */
enum { KEY_BITS = 31, SHARED_BITS = 11, COPIES = 4, THREADS = 512, MASK_THREADS = 256, MASK_CHUNK = 16384, SCAN_THREADS = 1024 };

__device__ __forceinline__ uint32_t key_of(float w) {
    return __float_as_uint(w) & 0x7fffffffu;
}

/* Bins in shared memory, COPIES of them so that warps meet less often; added to the counts once a block. */
template <int N>
__global__ void __launch_bounds__(THREADS) histogram_kernel(unsigned long long *counts, unsigned long long *nans, const float *w,
                                                            int64_t packs, uint32_t prefix, int bits, int shift) {
    extern __shared__ uint32_t bins[]; /* [COPIES][1 << bits] */
    int width = 1 << bits;
    for (int i = threadIdx.x; i < COPIES * width; i += THREADS) {
        bins[i] = 0;
    }
    __syncthreads();
    uint32_t *own = bins + threadIdx.x / 32 % COPIES * width, low = (uint32_t)width - 1, found = 0;
#pragma unroll 2
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < packs; i += (int64_t)gridDim.x * THREADS) {
        packed<float, N> x = load<float, N>(w + i * N);
#pragma unroll
        for (int j = 0; j < N; j++) {
            uint32_t key = key_of(x.at[j]), top = key >> shift;
            found += key > 0x7f800000u;
            if (top >> bits == prefix) {
                atomicAdd(&own[top & low], 1u);
            }
        }
    }
    if (found > 0) {
        atomicAdd(nans, (unsigned long long)found);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        unsigned long long sum = 0;
        for (int c = 0; c < COPIES; c++) {
            sum += bins[c * width + i];
        }
        if (sum > 0) {
            atomicAdd(&counts[i], sum);
        }
    }
}

/* More bins than shared memory holds. */
__global__ void histogram_any_kernel(unsigned long long *counts, unsigned long long *nans, const float *w, int64_t n,
                                     uint32_t prefix, int bits, int shift) {
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        uint32_t key = key_of(w[i]), top = key >> shift;
        if (key > 0x7f800000u) {
            atomicAdd(nans, 1ull);
        }
        if (top >> bits == prefix) {
            atomicAdd(&counts[top & ((1u << bits) - 1)], 1ull);
        }
    }
}

extern "C" cpl_status CPL_CUDA(select_histogram)(cpl_device *dev, int64_t *counts, int64_t *nans, const float *w, int64_t n,
                                                 uint32_t prefix, int prefix_bits, int bits) {
    if (bits < 1 || bits > 24 || prefix_bits < 0 || prefix_bits + bits > KEY_BITS) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__,
                        "select_histogram: bits %d after a prefix of %d, expected 1 to 24 and at most %d together", bits,
                        prefix_bits, KEY_BITS);
    }
    int shift = KEY_BITS - prefix_bits - bits;
    cudaStream_t stream = cpl_cuda_stream(dev);
    auto *to = (unsigned long long *)counts, *bad = (unsigned long long *)nans;
    if (n == 0) {
        return CPL_OK;
    }
    size_t shared = (sizeof(uint32_t) * COPIES) << bits;
    if (bits > SHARED_BITS) {
        histogram_any_kernel<<<grid_for(dev, n, THREADS, 4), THREADS, 0, stream>>>(to, bad, w, n, prefix, bits, shift);
        return cpl_cuda_launched(dev, "select_histogram");
    }
    int64_t packs = aligned16(w) ? n / 4 : 0;
    if (packs > 0) {
        histogram_kernel<4>
            <<<grid_for(dev, packs, THREADS * 4, 4), THREADS, shared, stream>>>(to, bad, w, packs, prefix, bits, shift);
    }
    if (packs * 4 < n) {
        histogram_kernel<1><<<grid_for(dev, n - packs * 4, THREADS * 4, 4), THREADS, shared, stream>>>(
            to, bad, w + packs * 4, n - packs * 4, prefix, bits, shift);
    }
    return cpl_cuda_launched(dev, "select_histogram");
}

/* --- mask --- */

/* Ties are removed here; keep_kernel brings back those that stay. */
__global__ void __launch_bounds__(MASK_THREADS)
    mask_kernel(uint8_t *mask, int64_t *ties, const float *w, int64_t n, uint32_t threshold, bool wide) {
    __shared__ int shared[32];
    int64_t first = blockIdx.x * (int64_t)MASK_CHUNK, last = first + MASK_CHUNK < n ? first + MASK_CHUNK : n;
    int found = 0;
    int64_t whole = wide ? first + (last - first) / 4 * 4 : first;
#pragma unroll 4
    for (int64_t i = first + threadIdx.x * 4; i < whole; i += MASK_THREADS * 4) {
        packed<float, 4> x = load<float, 4>(w + i);
        packed<uint8_t, 4> out;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t key = key_of(x.at[j]);
            out.at[j] = key > threshold;
            found += key == threshold;
        }
        store(mask + i, out);
    }
    for (int64_t i = whole + threadIdx.x; i < last; i += MASK_THREADS) {
        uint32_t key = key_of(w[i]);
        mask[i] = key > threshold;
        found += key == threshold;
    }
    found = block_sum(found, shared);
    if (threadIdx.x == 0) {
        ties[blockIdx.x] = found;
    }
}

/* One block: ties[c] becomes how many of chunk c's ties are removed, or -1 where all are; *left falls by all removed. */
__global__ void __launch_bounds__(SCAN_THREADS) share_kernel(int64_t *ties, int64_t *left, int64_t chunks) {
    __shared__ int64_t warp_total[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t budget = *left, before = 0; /* ties in the chunks so far */
    for (int64_t start = 0; start < chunks; start += SCAN_THREADS) {
        int64_t c = start + threadIdx.x, own = c < chunks ? ties[c] : 0, sum = own;
        for (int distance = 1; distance < 32; distance *= 2) {
            int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
            sum += lane >= distance ? other : 0;
        }
        if (lane == 31) {
            warp_total[warp] = sum;
        }
        __syncthreads();
        int64_t base = before, all = 0;
        for (int v = 0; v < SCAN_THREADS / 32; v++) {
            base += v < warp ? warp_total[v] : 0;
            all += warp_total[v];
        }
        int64_t room = budget - (base + sum - own);
        room = room < 0 ? 0 : room;
        if (c < chunks) {
            ties[c] = own <= room ? -1 : room;
        }
        before += all;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        *left = budget - (before < budget ? before : budget);
    }
}

/* Chunks some of whose ties stay: in order of the index, all but the first `removed`. */
__global__ void __launch_bounds__(MASK_THREADS)
    keep_kernel(uint8_t *mask, const int64_t *removed, const float *w, int64_t n, uint32_t threshold) {
    __shared__ int warp_ties[MASK_THREADS / 32];
    int64_t gone = removed[blockIdx.x];
    int64_t first = blockIdx.x * (int64_t)MASK_CHUNK, last = first + MASK_CHUNK < n ? first + MASK_CHUNK : n, before = 0;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (gone < 0) {
        return;
    }
    for (int64_t start = first; start < last; start += MASK_THREADS) {
        int64_t i = start + threadIdx.x;
        bool tie = i < last && key_of(w[i]) == threshold;
        unsigned ties = __ballot_sync(0xffffffffu, tie);
        if (lane == 0) {
            warp_ties[warp] = __popc(ties);
        }
        __syncthreads();
        int64_t rank = before + __popc(ties & ((1u << lane) - 1));
        int all = 0;
        for (int v = 0; v < MASK_THREADS / 32; v++) {
            rank += v < warp ? warp_ties[v] : 0;
            all += warp_ties[v];
        }
        if (tie && rank >= gone) {
            mask[i] = 1;
        }
        before += all;
        __syncthreads();
    }
}

extern "C" cpl_status CPL_CUDA(select_mask)(cpl_device *dev, uint8_t *mask, const float *w, int64_t n, uint32_t threshold,
                                            int64_t *ties_left) {
    int64_t *ties = NULL, chunks = cpl_ceil_div(n, MASK_CHUNK);
    cudaStream_t stream = cpl_cuda_stream(dev);
    if (n == 0 || threshold >> KEY_BITS) { /* above every key */
        return n == 0 ? CPL_OK : CPL_CUDA(zero)(dev, mask, (size_t)n);
    }
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_FLAT, (size_t)chunks * sizeof *ties, &ties);
    if (st != CPL_OK) {
        return st;
    }
    bool wide = aligned16(w) && (uintptr_t)mask % 4 == 0;
    mask_kernel<<<(unsigned)chunks, MASK_THREADS, 0, stream>>>(mask, ties, w, n, threshold, wide);
    share_kernel<<<1, SCAN_THREADS, 0, stream>>>(ties, ties_left, chunks);
    keep_kernel<<<(unsigned)chunks, MASK_THREADS, 0, stream>>>(mask, ties, w, n, threshold);
    return cpl_cuda_launched(dev, "select_mask");
}

/* By selection and not by product: nan times 0 would stay nan. */
__global__ void apply_kernel(float *x, const uint8_t *mask, int64_t n, bool wide) {
    int64_t packs = wide ? n / 4 : 0, step = (int64_t)gridDim.x * MASK_THREADS;
    for (int64_t i = blockIdx.x * (int64_t)MASK_THREADS + threadIdx.x; i < packs; i += step) {
        packed<float, 4> v = load<float, 4>(x + i * 4);
        packed<uint8_t, 4> m = load<uint8_t, 4>(mask + i * 4);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v.at[j] = m.at[j] ? v.at[j] : 0.0f;
        }
        store(x + i * 4, v);
    }
    for (int64_t i = packs * 4 + blockIdx.x * (int64_t)MASK_THREADS + threadIdx.x; i < n; i += step) {
        x[i] = mask[i] ? x[i] : 0.0f;
    }
}

extern "C" cpl_status CPL_CUDA(apply_mask)(cpl_device *dev, float *x, const uint8_t *mask, int64_t n) {
    if (n == 0) {
        return CPL_OK;
    }
    bool wide = aligned16(x) && (uintptr_t)mask % 4 == 0;
    apply_kernel<<<grid_for(dev, n, MASK_THREADS * 4, 16), MASK_THREADS, 0, cpl_cuda_stream(dev)>>>(x, mask, n, wide);
    return cpl_cuda_launched(dev, "apply_mask");
}

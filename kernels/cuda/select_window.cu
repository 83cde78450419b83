/* The weights of a window of magnitudes into a list: one pass over memory.
 * Refuses an order in the list: only counts are taken of it. */
#include "kernels/cuda/flat.cuh"

namespace {

enum { THREADS = 256, LOADS = 8, PIECE = THREADS * LOADS * 4, WARPS = THREADS / 32, BLOCKS_PER_SM = 3 };

using pack = packed<float, 4>;

/* Which keys are listed: first_key to first_key + width. */
struct window {
    uint32_t first_key, width;

    __device__ __forceinline__ bool has(float w) const { return key_of(w) - first_key <= width; }
};

__device__ __forceinline__ void load_piece(pack (&x)[LOADS], const float *w, int64_t p) {
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        x[k] = load<float, 4>(w + p * PIECE + (k * THREADS + threadIdx.x) * 4);
    }
}

/* The sum of x of all threads before this one, and of all; `shared` [WARPS] may be used again after the next barrier. */
__device__ __forceinline__ int block_before(int x, int *shared, int *total) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = x, before = 0, all = 0;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        int below = __shfl_up_sync(0xffffffffu, sum, lanes);
        sum += lane >= lanes ? below : 0;
    }
    if (lane == 31) {
        shared[warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        before += i < warp ? shared[i] : 0;
        all += shared[i];
    }
    *total = all;
    return before + sum - x;
}

/* w is aligned to 16 bytes. A piece's matches are put together in shared memory while their place in the list is asked for and the
 * next piece is loaded; the `head` elements before w and those behind the last piece are taken one by one. */
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    window_kernel(float *list, int64_t capacity, unsigned long long *found, unsigned long long *below, unsigned long long *nans,
                  const float *w, int64_t n, int head, window wanted) {
    __shared__ float matches[PIECE];
    __shared__ int sums[WARPS];
    __shared__ unsigned long long totals[32];
    __shared__ int64_t place;
    int64_t pieces = n / PIECE, behind = pieces * PIECE;
    uint32_t less = 0, bad = 0;
    pack x[LOADS];
    if (blockIdx.x < pieces) {
        load_piece(x, w, blockIdx.x);
    }
    for (int64_t p = blockIdx.x; p < pieces; p += gridDim.x) {
        uint32_t mine = 0; /* a bit an element */
        int total;
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t key = key_of(x[k].at[j]);
                less += key < wanted.first_key;
                bad += key > CPL_KEY_INF;
                mine |= wanted.has(x[k].at[j]) ? 1u << (k * 4 + j) : 0u;
            }
        }
        int at = block_before(__popc(mine), sums, &total);
        int64_t start = 0;
        if (threadIdx.x == 0 && total > 0) {
            start = (int64_t)atomicAdd(found, (unsigned long long)total);
        }
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if (mine >> (k * 4 + j) & 1) {
                    matches[at++] = x[k].at[j];
                }
            }
        }
        if (p + gridDim.x < pieces) {
            load_piece(x, w, p + gridDim.x);
        }
        if (threadIdx.x == 0) {
            place = start;
        }
        __syncthreads();
        start = place;
        int64_t room = capacity - start;
        for (int i = threadIdx.x; i < total && i < room; i += THREADS) {
            list[start + i] = matches[i];
        }
    }
    for (int64_t i = behind + blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n + head; i += (int64_t)gridDim.x * THREADS) {
        float v = i < n ? w[i] : w[n - i - 1];
        uint32_t key = key_of(v);
        less += key < wanted.first_key;
        bad += key > CPL_KEY_INF;
        if (wanted.has(v)) {
            int64_t to = (int64_t)atomicAdd(found, 1ull);
            if (to < capacity) {
                list[to] = v;
            }
        }
    }
    unsigned long long all_less = block_sum((unsigned long long)less, totals), all_bad = block_sum((unsigned long long)bad, totals);
    if (threadIdx.x == 0 && all_less > 0) {
        atomicAdd(below, all_less);
    }
    if (threadIdx.x == 0 && all_bad > 0) {
        atomicAdd(nans, all_bad);
    }
}

} // namespace

extern "C" cpl_status CPL_CUDA(select_window)(cpl_device *dev, float *list, int64_t capacity, int64_t *found, int64_t *below,
                                              int64_t *nans, const float *w, int64_t n, uint32_t first_key, uint32_t last_key) {
    if (first_key > last_key || last_key > CPL_KEY_INF) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "select_window: keys 0x%x to 0x%x, expected some up to that of inf",
                        (unsigned)first_key, (unsigned)last_key);
    }
    if (n == 0) {
        return CPL_OK;
    }
    int64_t head = (16 - (uintptr_t)w % 16) % 16 / 4;
    head = head < n ? head : n;
    window_kernel<<<grid_for(dev, n, PIECE, BLOCKS_PER_SM), THREADS, 0, cpl_cuda_stream(dev)>>>(
        list, capacity, (unsigned long long *)found, (unsigned long long *)below, (unsigned long long *)nans, w + head, n - head,
        (int)head, window{first_key, last_key - first_key});
    return cpl_cuda_launched(dev, "select_window");
}

/* Rows of logits kept in shared memory: cross-entropy and distillation read each once, and the next row arrives while this one's
 * gradient is written. Refuses to share a slot: a thread reads and refills its own packs alone, so that copies need no barrier. */
#ifndef CPL_KERNELS_CUDA_ROWS_CUH
#define CPL_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/elementary.cuh"

constexpr int32_t CPL_IGNORED = -100;
/* Maxima start here: finite, so that differences of maxima are never inf - inf, and below any logit that matters. */
constexpr float CPL_LOWEST = -1e30f;
constexpr float CPL_LOG2E = 1.44269504089f, CPL_LN2 = 0.69314718056f;
/* Logits of a row at the most: packs are counted in int. */
constexpr int64_t CPL_ROW_MOST = 1 << 30;
/* A row is copied in this many groups; the first is worked on while the others are under way. */
constexpr int CPL_ROW_PARTS = 4;

/* About 2 units in the last place, subnormals as 0; exp2_fast beside it. */
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* All groups but the last `behind` have arrived; behind is a constant once the loop around it is unrolled. */
__device__ __forceinline__ void row_wait(int behind) {
    switch (behind) {
    case 3:
        copies_wait<3>();
        break;
    case 2:
        copies_wait<2>();
        break;
    case 1:
        copies_wait<1>();
        break;
    default:
        copies_wait<0>();
    }
}

/* Largest element, NaN left out: its exponential still makes the row's sum NaN. */
template <typename T, int N> __device__ __forceinline__ float pack_max(const packed<T, N> &x) {
    if constexpr (N == 1) {
        return x.f32(0);
    } else if constexpr (sizeof(T) == 4) {
        return fmaxf(fmaxf(x.f32(0), x.f32(1)), fmaxf(x.f32(2), x.f32(3)));
    } else {
        using pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
        const pair *p = reinterpret_cast<const pair *>(x.at);
        pair most = __hmax2(__hmax2(p[0], p[1]), __hmax2(p[2], p[3]));
        return fmaxf(to_f32(most.x), to_f32(most.y));
    }
}

/* Elements from V on become `value`; i: which pack of the row this is. */
template <typename T, int N> __device__ __forceinline__ void pack_limit(packed<T, N> &x, int64_t i, int64_t V, float value) {
    if (N > 1 && (i + 1) * N > V) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (i * N + j >= V) {
                x.set(j, value);
            }
        }
    }
}

/* What a thread does to a row of `packs` packs: pack threadIdx.x + j blockDim.x for j in [0, each), in CPL_ROW_PARTS parts. */
struct row_share {
    int packs, each;
    __device__ row_share(int64_t V, int N) {
        packs = (int)((V + N - 1) / N);
        each = (packs + (int)blockDim.x - 1) / (int)blockDim.x;
    }
    /* f(i) for this thread's packs of a part. */
    template <typename F> __device__ __forceinline__ void over(int part, F f) const {
        int last = (int)threadIdx.x + each * (part + 1) / CPL_ROW_PARTS * (int)blockDim.x;
        last = last < packs ? last : packs;
        for (int i = (int)threadIdx.x + each * part / CPL_ROW_PARTS * (int)blockDim.x; i < last; i += (int)blockDim.x) {
            f(i);
        }
    }
    /* f(i) for all its packs, without waiting for copies. */
    template <typename F> __device__ __forceinline__ void all(F f) const {
        for (int i = (int)threadIdx.x; i < packs; i += (int)blockDim.x) {
            f(i);
        }
    }
    /* f(i) for all its packs as their copies arrive. */
    template <bool STAGED, typename F> __device__ __forceinline__ void arriving(F f) const {
#pragma unroll
        for (int part = 0; part < CPL_ROW_PARTS; part++) {
            if (STAGED) {
                row_wait(CPL_ROW_PARTS - 1 - part);
            }
            over(part, f);
        }
    }
    /* f(i) for all its packs; what f sends for arrives in the order of the parts. */
    template <bool STAGED, typename F> __device__ __forceinline__ void leaving(F f) const {
#pragma unroll 1
        for (int part = 0; part < CPL_ROW_PARTS; part++) {
            over(part, f);
            if (STAGED) {
                copies_end();
            }
        }
    }
};

/* Logits of one row: in device memory, and with STAGED a copy of its packs in shared memory. */
template <typename T, int N, bool STAGED> struct row_source {
    const T *row;
    T *kept;
    /* Pack i; what lies past the vocabulary counts as -inf. */
    __device__ __forceinline__ packed<T, N> at(int i, int64_t V) const {
        packed<T, N> x = load<T, N>(STAGED ? kept + i * N : row + i * (int64_t)N);
        pack_limit(x, i, V, -INFINITY);
        return x;
    }
    /* Sends for pack i of another row, to take this one's place. */
    __device__ __forceinline__ void refill(int i, const T *other) const {
        copy16(shared_at(kept + i * N), other + i * (int64_t)N, true);
    }
};

/* Columns past the last pack of logits become 0. */
template <typename T, int N> __device__ __forceinline__ void clear_packs(T *row, int first, int64_t ld) {
    packed<T, N> none;
#pragma unroll
    for (int j = 0; j < N; j++) {
        none.set(j, 0.0f);
    }
    for (int64_t i = first + (int64_t)threadIdx.x; i < ld / N; i += blockDim.x) {
        store(row + i * N, none);
    }
}

/* --- host --- */

/* Threads for rows of `packs`: as many as keep 4 packs each, up to `most`; for long rows the number that leaves the fewest idle. */
static inline int row_threads(int64_t packs, int most) {
    if (packs < 4 * (int64_t)most) {
        int64_t threads = cpl_ceil_div(cpl_ceil_div(packs, 4), 32) * 32;
        return (int)(threads < most ? threads : most);
    }
    int best = most;
    for (int threads = most; threads >= most / 2; threads -= 128) {
        if (cpl_ceil_div(packs, threads) * threads < cpl_ceil_div(packs, best) * best) {
            best = threads;
        }
    }
    return best;
}

/* Blocks that fill the GPU once, at most one a row; shared: dynamic bytes of a block. */
template <typename K>
static inline cudaError_t row_grid(const cpl_device *dev, K kernel, int threads, size_t shared, int64_t R, int *grid) {
    int blocks = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (error == cudaSuccess) {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    }
    *grid = grid_for(dev, R, 1, blocks > 0 ? blocks : 1);
    return error;
}

#endif

/* Aligned rows of LayerNorm, both passes: blocks that stay, one a multiprocessor, each warp with a ring of its rows in shared
 * memory, of which one is at work and the others are on their way. Refuses barriers for it: of its ring a lane reads what it copied
 * itself, so waiting for its own copies is all it has to do. */
#ifndef CPL_KERNELS_CUDA_NORM_ROWS_CUH
#define CPL_KERNELS_CUDA_NORM_ROWS_CUH

#include "kernels/cuda/device.cuh"

enum { ANY_WARPS = 8, ANY_THREADS = 32 * ANY_WARPS }; /* of blocks for all other rows, a warp a row */

/* A warp's part of rows, PACKS packs a lane, of each of ARRAYS arrays, and its place in shared memory. */
template <typename T, int PACKS, int ARRAYS, int STAGES> struct row_ring {
    /* elements of a warp's packs, of its part of a row of one array, of all of them; all but its last stage; bytes of its packs */
    enum { N = pack_of<T>, SPAN = 32 * N, PART = PACKS * SPAN, ROW = ARRAYS * PART, LAST = (STAGES - 1) * ROW, BYTES = 32 * 16 };
    int lane, group, member, warp; /* rows are a group's; warp `member` of it */
    int share, column, own;        /* columns of a warp; the lane's first; its pack k is in the row where k SPAN < own */
    T *at;                         /* the lane's place: [STAGES][ARRAYS][PACKS][SPAN] */

    /* Of a block (32, groups), a row a warp, or wide: (32 warps of a row, groups). */
    __device__ __forceinline__ row_ring(uint4 *shared, int C, bool wide) {
        lane = threadIdx.x % 32;
        /* of one lane, so that the compiler knows them to be the same in all */
        group = __shfl_sync(0xffffffffu, threadIdx.y, 0);
        member = wide ? __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) : 0;
        warp = wide ? group * (int)(blockDim.x / 32) + member : group;
        int across = blockDim.x / 32 * SPAN;
        share = wide ? (C + across - 1) / across * SPAN : C;
        column = member * share + lane * N;
        own = min(C - column, share - lane * N);
        at = (T *)shared + warp * STAGES * ROW + lane * N;
    }
    /* The group's first row and how far before it the next is: the last rows come first, for what the product before wrote last is
     * in the cache still, and what the next one reads first will be. Side by side in different blocks, so that these differ by one
     * row at the most. */
    __device__ __forceinline__ int64_t first(int64_t R) const { return R - 1 - (group * (int64_t)gridDim.x + blockIdx.x); }
    __device__ __forceinline__ int64_t stride() const { return gridDim.x * (int64_t)blockDim.y; }
    /* Sends for a row, to the last of the arrays where `last` goes; zeros come where there is no row, past its end, and for a last
     * that is NULL. */
    template <typename... A>
    __device__ __forceinline__ void send(int slot, int64_t row, int64_t C, const T *last, A... arrays) const {
        int64_t from = row * C + column;
        int there = row >= 0 ? own : 0, there_too = last != nullptr ? there : 0;
        uint32_t to = shared_at(at + slot);
#pragma unroll
        for (int k = 0; k < PACKS; k++) {
            int i = k;
            ((copy16(to + i * BYTES, arrays + from + k * SPAN, k * SPAN < there), i += PACKS), ...);
            copy16(to + i * BYTES, last + from + k * SPAN, k * SPAN < there_too);
        }
        copies_end();
    }
};

/* A loop that uses x uses these words; else the compiler keeps them converted, in twice as many registers. */
template <typename T> __device__ __forceinline__ void held(words<T> *x) {
    asm volatile("" : "+r"(x->at[0]), "+r"(x->at[1]), "+r"(x->at[2]), "+r"(x->at[3]));
}

/* --- host --- */

/* A kernel for aligned rows and what its warps take. */
template <typename... P> struct row_plan {
    void (*kernel)(P...);
    int64_t warps, columns, bytes; /* of a block at the most; of a row at the most; of shared memory */
};

/* *done false: rows wider than a block takes. */
template <typename... P, typename... A>
static inline cudaError_t launch_rows(bool *done, cpl_device *dev, const row_plan<P...> &plan, int64_t C, int blocks,
                                      A... arguments) {
    size_t limit = 0;
    cudaError_t error = shared_limit(dev, &limit);
    int64_t fit = (int64_t)limit / plan.bytes, across = cpl_ceil_div(C, plan.columns);
    int64_t groups = (fit < plan.warps ? fit : plan.warps) / across;
    *done = false;
    if (error != cudaSuccess || groups == 0) {
        return error;
    }
    int bytes = (int)(groups * across * plan.bytes);
    error = cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        plan.kernel<<<blocks, dim3((unsigned)(32 * across), (unsigned)groups), bytes, cpl_cuda_stream(dev)>>>(arguments...);
        *done = true;
    }
    return error;
}

#endif

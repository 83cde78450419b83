/* What the kernels of attention for heads of 64 on sm_90 share: blocks of 128 rows as boxes in shared memory, the pieces of work,
 * the products of a warpgroup. Refuses any other head, and sequences that are not whole blocks. */
#ifndef CPL_KERNELS_CUDA_ATTENTION_SM90_CUH
#define CPL_KERNELS_CUDA_ATTENTION_SM90_CUH

#include "kernels/cuda/attention.h"
#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace {

enum { BLOCK = CPL_ATTENTION_SM90_BLOCK, HEAD = 64, GROUP = 128, THREADS = 3 * GROUP, BOX = BLOCK * HEAD * 2, HALF_BOX = BOX / 2 };
enum { STAGES = 3, WARPS = 2 * GROUP / 32, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240 };
enum { ROWS_16 = 16 * HEAD * 2, COLUMNS_16 = 32 }; /* bytes from 16 rows or columns of a box to the next */
static_assert(HEAD == (int)CPL_BOX_COLUMNS, "a row of a head is a row of a box");
constexpr float LOG2_E = 1.4426950408889634f;

struct pair_of_boxes {
    unsigned char first[BOX], second[BOX];
};
/* Own block b of queries has b + 1 other blocks, of keys n - b: blocks n-1-b and b are one piece of work, so that all are alike. */
struct piece {
    int head, pair, count, blocks;
    __device__ __forceinline__ piece(int number, int of_blocks) : blocks(of_blocks) {
        int pairs = (blocks + 1) / 2;
        head = number / pairs;
        pair = number % pairs;
        count = 2 * pair + 1 == blocks ? 1 : 2;
    }
    __device__ __forceinline__ int block(int i) const { return i == 0 ? blocks - 1 - pair : pair; }
};
/* Use number n of buffers that take turns: who fills it waits for the readers of the use before, who reads it for its filler. */
template <int TURNS> __device__ __forceinline__ void wait_empty(uint64_t (&empty)[TURNS], int n) {
    barrier_wait(&empty[n % TURNS], (n / TURNS & 1) ^ 1);
}
template <int TURNS> __device__ __forceinline__ void wait_full(uint64_t (&full)[TURNS], int n) {
    barrier_wait(&full[n % TURNS], n / TURNS & 1);
}

__device__ __forceinline__ void let_go(uint64_t *empty) {
    if (threadIdx.x % 32 == 0) {
        barrier_arrive(empty);
    }
}
/* s = own other^T: this warpgroup's rows of a box, and a whole one. */
template <typename T>
__device__ __forceinline__ void multiply_first(float (&s)[64], const unsigned char *own, const unsigned char *other, int group) {
#pragma unroll
    for (int step = 0; step < HEAD / 16; step++) {
        mma<T, false>(s, operand(own + group * HALF_BOX + step * COLUMNS_16, 16, 1024),
                      operand(other + step * COLUMNS_16, 16, 1024), step > 0);
    }
    mma_commit();
}

/* d (fresh: =) += left other. */
template <typename T>
__device__ __forceinline__ void multiply_second(float (&d)[32], const uint32_t (&left)[32], const unsigned char *other,
                                                bool fresh) {
#pragma unroll
    for (int step = 0; step < BLOCK / 16; step++) {
        mma_kept<T>(d, &left[4 * step], operand(other + step * ROWS_16, 16, 1024), !fresh || step > 0);
    }
}

/* [64, 64] of this warpgroup to rows of a matrix; to: its row 0, column 0. scale: of row lane / 4 of a warp's; scale8: of that + 8.
 */
template <typename T> __device__ __forceinline__ void put(T *to, int64_t stride, const float (&x)[32], float scale, float scale8) {
    int lane = threadIdx.x % 32;
    to += (threadIdx.x % GROUP / 32 * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < 8; c++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float factor = r == 0 ? scale : scale8;
            *reinterpret_cast<uint32_t *>(to + 8 * r * stride + 8 * c) =
                pack<T>(factor * x[4 * c + 2 * r], factor * x[4 * c + 2 * r + 1]);
        }
    }
}

/* What both kinds of blocks have: m.own_full, own_empty, full, empty. One thread, before all others go on. */
template <typename M> __device__ __forceinline__ void barriers_init(M &m) {
    for (int n = 0; n < 2; n++) {
        barrier_init(&m.own_full[n], 1);
        barrier_init(&m.own_empty[n], WARPS);
    }
    for (int n = 0; n < STAGES; n++) {
        barrier_init(&m.full[n], 1);
        barrier_init(&m.empty[n], WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    shared_to_copies();
}

/* --- host --- */

inline int pieces_of(const cpl_attention_shape *s) {
    return (int)(s->B * s->H * ((s->T / BLOCK + 1) / 2));
}

/* A block a multiprocessor, with an M at the first multiple of 1024 of its shared memory. */
template <typename M, typename... Arguments, typename... Values>
cpl_status launch(cpl_device *dev, void (*kernel)(Arguments...), const char *what, int pieces, const Values &...values) {
    const int bytes = (int)sizeof(M) + 1024, most = cpl_cuda_of(dev)->sm_count, grid = pieces < most ? pieces : most;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
        return cpl_cuda_status(error, __FILE__, __LINE__, what);
    }
    kernel<<<grid, THREADS, bytes, cpl_cuda_stream(dev)>>>(values...);
    return cpl_cuda_launched(dev, what);
}

} // namespace

#endif

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
enum { STAGES = 3, READERS = 2 * GROUP, WARPS = READERS / 32, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240 };
enum { ROWS_16 = 16 * HEAD * 2 / 16, COLUMNS_16 = 16 * 2 / 16 }; /* of an operand: from 16 rows or columns of a box to the next */
static_assert(HEAD == (int)CPL_BOX_COLUMNS, "a row of a head is a row of a box");
constexpr float LOG2_E = 1.4426950408889634f;

struct pair_of_boxes {
    unsigned char first[BOX], second[BOX];
};

/* The thread's warpgroup among those that multiply; the same in all its lanes, which the compiler is told so. */
__device__ __forceinline__ int group_of_thread() {
    return __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0) - 1;
}

/* An own block, from the thread that sends for it to those that work on it: its head, and how many other blocks it has; 0: no more.
 */
struct task {
    int head, length;
};
/* The own blocks that a thread block takes, one after another. They differ in how many other blocks they have, from 1 to all of a
 * head. Heads are taken by so many at a time that there are about two own blocks a thread block (so few that what they read stays
 * in the cache); of those heads the longest blocks come first, and the second time round the thread blocks go in reverse. The last
 * heads are taken together, up to twice as many. */
struct walk {
    int heads, blocks, some; /* in all; of a head; heads at a time */
    int first, here, round;  /* heads [first, first + here) are being taken */
    task now;

    __device__ __forceinline__ walk(int heads, int blocks) : heads(heads), blocks(blocks), first(0), here(0), round(0) {
        some = 2 * (int)gridDim.x / blocks;
        some = some < 1 ? 1 : some;
    }
    __device__ __forceinline__ bool next() {
        int blk = blockIdx.x, grid = gridDim.x;
        for (;;) {
            if (round * grid >= here * blocks) {
                first += here;
                here = heads - first < 2 * some ? heads - first : some;
                round = 0;
                if (here <= 0) {
                    return false;
                }
            }
            int at = round * grid + (round % 2 == 0 ? blk : grid - 1 - blk);
            round++;
            if (at < here * blocks) {
                now = {first + at % here, blocks - at / here};
                return true;
            }
        }
    }
};

/* Buffers that take turns. Who fills one waits for the readers of the time before, who reads it for its filler. */
template <int N> struct ring {
    int at = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        at = at + 1 < N ? at + 1 : 0;
        phase ^= at == 0;
    }
    __device__ __forceinline__ void wait_empty(uint64_t (&empty)[N]) const { barrier_wait(&empty[at], phase ^ 1); }
    __device__ __forceinline__ void wait_full(uint64_t (&full)[N]) const { barrier_wait(&full[at], phase); }
};

/* s = own other^T: this warpgroup's rows of a box, and a whole one (N 64) or half of one (32). */
template <typename T, int N>
__device__ __forceinline__ void multiply_first(float (&s)[N], const unsigned char *own, const unsigned char *other, int group) {
    uint64_t a = operand(own + group * HALF_BOX, 16, 1024), b = operand(other, 16, 1024);
#pragma unroll
    for (int step = 0; step < HEAD / 16; step++) {
        mma<T, false>(s, a + step * COLUMNS_16, b + step * COLUMNS_16, step > 0);
    }
    mma_commit();
}

/* d (fresh: =) += left other, a whole box (N 32) or half of one (16). */
template <typename T, int N>
__device__ __forceinline__ void multiply_second(float (&d)[32], const uint32_t (&left)[N], const unsigned char *other, bool fresh) {
    uint64_t b = operand(other, 16, 1024);
#pragma unroll
    for (int step = 0; step < N / 4; step++) {
        mma_kept<T>(d, &left[4 * step], b + step * ROWS_16, !fresh || step > 0);
    }
}

/* The own block that the barrier of `full` is about, for all who wait for it. */
__device__ __forceinline__ void hand_over(task *to, const task &now, uint64_t *full, int bytes) {
    *to = now;
    barrier_expect(full, bytes);
}

/* What both kinds of blocks have: m.own_full, own_empty, full, empty. One thread, before all others go on. Every reader lets go
 * itself: one for its warp, after __syncwarp, takes as long, and racecheck does not see that. */
template <typename M> __device__ __forceinline__ void barriers_init(M &m) {
    for (int n = 0; n < 2; n++) {
        barrier_init(&m.own_full[n], 1);
        barrier_init(&m.own_empty[n], READERS);
    }
    for (int n = 0; n < STAGES; n++) {
        barrier_init(&m.full[n], 1);
        barrier_init(&m.empty[n], READERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    shared_to_copies();
}

/* The shared memory of a thread block, with its barriers ready for all. */
template <typename M> __device__ __forceinline__ M &shared_begin() {
    extern __shared__ unsigned char memory[];
    M &m = *reinterpret_cast<M *>(memory + (1024 - shared_address(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        barriers_init(m);
    }
    __syncthreads();
    return m;
}
/* Registers go from the warpgroup that sends for operands, which calls the first, to those that work on them. */
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)PRODUCER_REGISTERS));
}
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)CONSUMER_REGISTERS));
}

/* --- host --- */

/* A thread block a multiprocessor, or one of `blocks` of the problem where those are fewer; with an M at the first multiple of 1024
 * of its shared memory. */
template <typename M, typename... Arguments, typename... Values>
cpl_status launch(cpl_device *dev, void (*kernel)(Arguments...), const char *what, int blocks, const Values &...values) {
    const int bytes = (int)sizeof(M) + 1024, most = cpl_cuda_of(dev)->sm_count, grid = blocks < most ? blocks : most;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
        return cpl_cuda_status(error, __FILE__, __LINE__, what);
    }
    kernel<<<grid, THREADS, bytes, cpl_cuda_stream(dev)>>>(values...);
    return cpl_cuda_launched(dev, what);
}

} // namespace

#endif

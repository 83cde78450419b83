/* The pieces of Hopper's matrix pipeline that kernels of sm_90a are made of: barriers, the bulk tensor copy engine, wgmma.
 * Refuses to be compiled for anything but sm_90a. Source: PTX ISA 8.0, asynchronous warpgroup instructions and cp.async.bulk. */
#ifndef CPL_KERNELS_CUDA_WGMMA_CUH
#define CPL_KERNELS_CUDA_WGMMA_CUH

#include "kernels/cuda/device.cuh"
#include <cuda.h>

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* --- barriers in shared memory: `arrivals` make a phase, and bytes that copies bring --- */

__device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *barrier, int phase) {
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
                 "@over bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(phase)
                 : "memory");
}

/* --- copies of a box of a tensor; first, row: its coordinates --- */

__device__ __forceinline__ void box_load(void *to, const CUtensorMap *map, uint64_t *barrier, int first, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
                     shared_address(to)),
                 "l"(map), "r"(shared_address(barrier)), "r"(first), "r"(row)
                 : "memory");
}
__device__ __forceinline__ void box_store(const CUtensorMap *map, const void *from, int first, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(first), "r"(row)
                 : "memory");
}
/* bytes, a multiple of 16, from memory at such a multiple. */
__device__ __forceinline__ void bytes_load(void *to, const void *from, int bytes, uint64_t *barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void stores_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* All committed stores of this thread have read their shared memory. */
__device__ __forceinline__ void stores_have_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void stores_over() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
/* Shared memory written by this thread may be read by the copy engine after a barrier. */
__device__ __forceinline__ void shared_to_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* --- matrix instructions --- */

/* Descriptor of an operand in 128-byte swizzled shared memory, 1024-byte aligned. lead, stride: bytes. */
__device__ __forceinline__ uint64_t operand(const void *p, uint32_t lead, uint32_t stride) {
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(lead >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           1ull << 62;
}
__device__ __forceinline__ void mma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void mma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int BEHIND> __device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BEHIND) : "memory");
}

/* Behind the wait for products that write or read x: no instruction with x moves before it. */
template <typename X, int N> __device__ __forceinline__ void mma_settled(X (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        if constexpr (std::is_same_v<X, float>) {
            asm volatile("" : "+f"(x[i])::"memory");
        } else {
            asm volatile("" : "+r"(x[i])::"memory");
        }
    }
}

#define CPL_MMA_OUT8(d, i)                                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CPL_MMA_OUT32(d, i) CPL_MMA_OUT8(d, i), CPL_MMA_OUT8(d, i + 8), CPL_MMA_OUT8(d, i + 16), CPL_MMA_OUT8(d, i + 24)
#define CPL_MMA_32                                                                                                                 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define CPL_MMA_64                                                                                                                 \
    CPL_MMA_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,"     \
               "%59,%60,%61,%62,%63"
#define CPL_MMA_N128(types)                                                                                                        \
    asm volatile("{\n"                                                                                                             \
                 ".reg .pred add;\n"                                                                                               \
                 "setp.ne.b32 add, %66, 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {" CPL_MMA_64 "}, %64, %65, add, 1, 1, 0, %67;\n"          \
                 "}\n"                                                                                                             \
                 : CPL_MMA_OUT32(d, 0), CPL_MMA_OUT32(d, 32)                                                                       \
                 : "l"(a), "l"(b), "r"(add), "n"((int)BY_ROWS))
#define CPL_MMA_N64(types)                                                                                                         \
    asm volatile("{\n"                                                                                                             \
                 ".reg .pred add;\n"                                                                                               \
                 "setp.ne.b32 add, %34, 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" CPL_MMA_32 "}, %32, %33, add, 1, 1, 0, %35;\n"           \
                 "}\n"                                                                                                             \
                 : CPL_MMA_OUT32(d, 0)                                                                                             \
                 : "l"(a), "l"(b), "r"(add), "n"((int)BY_ROWS))

/* d [64,128] of this warpgroup (+)= a [64,16] b [16,128]; element 4 j + 2 i + k of d is row 16 warp + lane/4 + 8 i, column
 * 8 j + 2 (lane % 4) + k. BY_ROWS: b lies in memory by rows of 128 columns, else by columns of 16 rows, as a does. */
template <typename T, bool BY_ROWS> __device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b, int add) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        CPL_MMA_N128("bf16.bf16");
    } else {
        CPL_MMA_N128("f16.f16");
    }
}
/* The same of half the width: d [64,64], b [16,64]. */
template <typename T, bool BY_ROWS> __device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b, int add) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        CPL_MMA_N64("bf16.bf16");
    } else {
        CPL_MMA_N64("f16.f16");
    }
}
#undef CPL_MMA_N64
#undef CPL_MMA_N128
#undef CPL_MMA_64

#define CPL_MMA_KEPT(types)                                                                                                        \
    asm volatile("{\n"                                                                                                             \
                 ".reg .pred add;\n"                                                                                               \
                 "setp.ne.b32 add, %37, 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {" CPL_MMA_32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 1;\n"  \
                 "}\n"                                                                                                             \
                 : CPL_MMA_OUT32(d, 0)                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

/* d [64,64] (+)= a [64,16] b [16,64], a in registers: word 2 j + i is row 16 warp + lane/4 + 8 i, columns 8 j + 2 (lane % 4) + 0,
 * 1, which is how d is held; b by rows of 64 columns. */
template <typename T> __device__ __forceinline__ void mma_kept(float (&d)[32], const uint32_t *a, uint64_t b, int add) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        CPL_MMA_KEPT("bf16.bf16");
    } else {
        CPL_MMA_KEPT("f16.f16");
    }
}
#undef CPL_MMA_KEPT

#undef CPL_MMA_32
#undef CPL_MMA_OUT32
#undef CPL_MMA_OUT8

/* A pair of 16-bit values in a word. */
template <typename T> __device__ __forceinline__ float2 unpack(uint32_t word) {
    words<T> x;
    x.at[0] = word;
    return make_float2(x.f32(0), x.f32(1));
}
template <typename T> __device__ __forceinline__ uint32_t pack(float a, float b) {
    words<T> x;
    x.set(0, a, b);
    return x.at[0];
}

/* 16 rows of a warp, from `row` on, and columns 8 c to 8 c + 15 of 16-bit values in rows of 128 bytes, swizzled as the copy engine
 * takes them; as an accumulator has them in pairs: w[2 j + i] is row lane / 4 + 8 i, column 8 (c + j) + 2 (lane % 4). c is even. */
__device__ __forceinline__ unsigned char *place_16x16(unsigned char *rows, int row, int c) {
    int lane = threadIdx.x % 32, own = row + lane % 16;
    return rows + own * 128 + ((c + lane / 16) ^ (own % 8)) * 16;
}
__device__ __forceinline__ void put_16x16(unsigned char *rows, int row, int c, const uint32_t (&w)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(place_16x16(rows, row, c))),
        "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
        : "memory");
}
__device__ __forceinline__ void get_16x16(uint32_t (&w)[4], unsigned char *rows, int row, int c) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(shared_address(place_16x16(rows, row, c)))
                 : "memory");
}

#endif

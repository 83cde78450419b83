/* The pieces of Hopper's matrix pipeline that product_gelu.cu is made of: barriers, the bulk tensor copy engine, wgmma.
 * Refuses to be compiled for anything but sm_90a. Source: PTX ISA 8.0, asynchronous warpgroup instructions and cp.async.bulk. */
#ifndef CPL_KERNELS_CUDA_PRODUCT_GELU_CUH
#define CPL_KERNELS_CUDA_PRODUCT_GELU_CUH

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

#define CPL_MMA(types, rows)                                                                                                       \
    asm volatile("{\n"                                                                                                             \
                 ".reg .pred add;\n"                                                                                               \
                 "setp.ne.b32 add, %66, 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " "                                                          \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
                 "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"    \
                 "%57,%58,%59,%60,%61,%62,%63}, %64, %65, add, 1, 1, 0, " rows ";\n"                                               \
                 "}\n"                                                                                                             \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),     \
                   "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),          \
                   "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),         \
                   "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),         \
                   "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),         \
                   "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),         \
                   "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),         \
                   "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                       \
                 : "l"(a), "l"(b), "r"(add))

/* d [64,128] of this warpgroup (+)= a [64,16] b [16,128]; element 4 j + 2 i + k of d is row 16 warp + lane/4 + 8 i, column
 * 8 j + 2 (lane % 4) + k. BY_ROWS: b lies in memory by rows of 128 columns, else by columns of 16 rows, as a does. */
template <typename T, bool BY_ROWS> __device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b, int add) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        if constexpr (BY_ROWS) {
            CPL_MMA("bf16.bf16", "1");
        } else {
            CPL_MMA("bf16.bf16", "0");
        }
    } else {
        if constexpr (BY_ROWS) {
            CPL_MMA("f16.f16", "1");
        } else {
            CPL_MMA("f16.f16", "0");
        }
    }
}
#undef CPL_MMA

#endif

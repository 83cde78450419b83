/* Tensor-core pieces of attention for bf16 and fp16: mma.sync m16n8k16, ldmatrix (PTX ISA; sm_80 and newer).
 * Refuses rows that are not 16-byte aligned. */
#ifndef CPL_KERNELS_CUDA_ATTENTION_MMA_CUH
#define CPL_KERNELS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/device.cuh"

/* A warp owns MT tiles of 16 rows. Lane = 4 g + t. A tile c of 16 x 8 results: c[0], c[1] in row g, columns 2t, 2t+1; c[2], c[3] in
 * row g + 8. Heads are padded with zeros to HD columns. 16 bytes of padding a row make ldmatrix free of bank conflicts for HD = 32,
 * 64, 96, 128: eight rows start 4 words times an odd number apart. */
enum { MMA_WARPS = 4, MMA_THREADS = 32 * MMA_WARPS };
template <int HD> constexpr int mma_ld = HD + 8; /* elements */

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
/* 2^x; a result below 2^-126 becomes 0, 2^-inf is 0 and NaN stays NaN. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <typename T> __device__ __forceinline__ uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&two);
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
    __half2 two = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&two);
}

/* tile [ROWS, HD] = tokens row0.. of a head; 0 past the last token and past D. x: the head in token 0 */
template <typename T, int ROWS, int HD>
__device__ __forceinline__ void mma_load(T *tile, const T *x, int64_t stride, int row0, int tokens, int D) {
    constexpr int CHUNKS = HD / 8;
#pragma unroll 1 /* in flight all the same, and no registers for addresses */
    for (int n = 0; n < ROWS * CHUNKS / MMA_THREADS; n++) {
        int i = threadIdx.x + n * MMA_THREADS, r = i / CHUNKS, d = i % CHUNKS * 8;
        bool valid = row0 + r < tokens && d < D;
        copy16(shared_at(tile + r * mma_ld<HD> + d), valid ? x + (int64_t)(row0 + r) * stride + d : x, valid);
    }
    static_assert(ROWS * CHUNKS % MMA_THREADS == 0, "every thread copies as often");
}

/* The left operand of products over the head: the warp's rows, kept in registers or read again each time. */
template <typename T, int MT, int HD, bool KEEP> struct row_operand {
    uint32_t at, kept[KEEP ? HD / 16 : 1][MT][4];
    __device__ __forceinline__ row_operand(const T *warp_rows, int lane) {
        at = shared_at(warp_rows + lane % 16 * mma_ld<HD> + lane / 16 * 8);
    }
    __device__ __forceinline__ void read(uint32_t (&a)[MT][4], int k) const {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            ldmatrix(a[m], at + (uint32_t)((m * 16 * mma_ld<HD> + k * 16) * sizeof(T)));
        }
    }
    /* Once, when the rows have arrived. */
    __device__ __forceinline__ void load() {
        if constexpr (KEEP) {
#pragma unroll
            for (int k = 0; k < HD / 16; k++) {
                read(kept[k], k);
            }
        }
    }
    __device__ __forceinline__ void get(uint32_t (&a)[MT][4], int k) const {
        if constexpr (KEEP) {
#pragma unroll
            for (int i = 0; i < MT * 4; i++) {
                a[i / 4][i % 4] = kept[k][i / 4][i % 4];
            }
        } else {
            read(a, k);
        }
    }
};

/* s = a b^T.   b [8 NT, HD] in shared memory */
template <typename T, int MT, int NT, int HD, bool KEEP>
__device__ __forceinline__ void mma_dots(float (&s)[MT][NT][4], const row_operand<T, MT, HD, KEEP> &rows, const T *b, int lane) {
    uint32_t at = shared_at(b + (lane % 8 + lane / 16 * 8) * mma_ld<HD> + lane / 8 % 2 * 8);
#pragma unroll
    for (int i = 0; i < MT * NT * 4; i++) {
        s[i / (NT * 4)][i / 4 % NT][i % 4] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < HD / 16; k++) {
        uint32_t a[MT][4];
        rows.get(a, k);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t f[4];
            ldmatrix(f, at + (uint32_t)((n * 8 * mma_ld<HD> + k * 16) * sizeof(T)));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(s[m][n], a[m], f[0], f[1], T{});
                mma(s[m][n + 1], a[m], f[2], f[3], T{});
            }
        }
    }
}

/* acc += p b, p rounded to T.   p: results of mma_dots   b [8 NT, HD] in shared memory */
template <typename T, int MT, int NT, int HD>
__device__ __forceinline__ void mma_accumulate(float (&acc)[MT][HD / 8][4], const float (&p)[MT][NT][4], const T *b, int lane) {
    uint32_t at = shared_at(b + lane % 16 * mma_ld<HD> + lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            a[m][0] = pack2<T>(p[m][2 * k][0], p[m][2 * k][1]);
            a[m][1] = pack2<T>(p[m][2 * k][2], p[m][2 * k][3]);
            a[m][2] = pack2<T>(p[m][2 * k + 1][0], p[m][2 * k + 1][1]);
            a[m][3] = pack2<T>(p[m][2 * k + 1][2], p[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < HD / 8; n += 2) {
            uint32_t f[4];
            ldmatrix_transposed(f, at + (uint32_t)((k * 16 * mma_ld<HD> + n * 8) * sizeof(T)));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(acc[m][n], a[m], f[0], f[1], T{});
                mma(acc[m][n + 1], a[m], f[2], f[3], T{});
            }
        }
    }
}

/* 16 tokens from row0 of a head = factor[0] or [1] (rows g, g + 8) times acc, through 16 rows of shared memory of this warp. */
template <typename T, int HD>
__device__ __forceinline__ void mma_store(T *x, int64_t stride, T *stage, const float (&acc)[HD / 8][4], float factor0,
                                          float factor1, int row0, int tokens, int D, int lane) {
    constexpr int LD = mma_ld<HD>, CHUNKS = HD / 8;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < HD / 8; n++) {
        T *at = stage + lane / 4 * LD + n * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t *>(at) = pack2<T>(acc[n][0] * factor0, acc[n][1] * factor0);
        *reinterpret_cast<uint32_t *>(at + 8 * LD) = pack2<T>(acc[n][2] * factor1, acc[n][3] * factor1);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        int r = i / CHUNKS, d = i % CHUNKS * 8;
        if (row0 + r < tokens && d < D) {
            *reinterpret_cast<uint4 *>(x + (int64_t)(row0 + r) * stride + d) = *reinterpret_cast<const uint4 *>(stage + r * LD + d);
        }
    }
}

#endif

/* Tiles of f32 in shared memory and their products by 16 x 16 threads, for attention of any type and head size.
 * Refuses tensor cores: attention_mma.cuh. */
#ifndef CPL_KERNELS_CUDA_ATTENTION_TILE_CUH
#define CPL_KERNELS_CUDA_ATTENTION_TILE_CUH

#include "kernels/cuda/device.cuh"

/* Thread (y, x) = (tid / 16, tid % 16) owns rows y + 16 i and, of scores, columns x + 16 j (i, j < M); of rows of W numbers it owns
 * 4 x + 64 c + 0..3. Tiles have R = 16 M rows. LD / 4 is odd, so that 16-byte accesses of a column of rows do not collide. */
enum { TILE_THREADS = 256 };
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
template <int W> constexpr int tile_ld = W + 4;       /* of a tile [R, W] of the head */
template <int M> constexpr int score_ld = 16 * M + 4; /* of a tile [R, R] of scores */

__device__ __forceinline__ int tile_y() {
    return threadIdx.x / 16;
}
__device__ __forceinline__ int tile_x() {
    return threadIdx.x % 16;
}

/* tile [R, W] = tokens row0.. of a head; 0 past the last token and past D.
 * x: the head in token 0; stride: elements between tokens; vector: 4 elements may be read at once. */
template <typename T, int M, int W>
__device__ __forceinline__ void tile_load(float *tile, const T *x, int64_t stride, int row0, int tokens, int D, bool vector) {
    for (int i = threadIdx.x; i < 16 * M * (W / 4); i += TILE_THREADS) {
        int r = i / (W / 4), d = i % (W / 4) * 4;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row0 + r < tokens && d < D) {
            const T *p = x + (int64_t)(row0 + r) * stride + d;
            if (vector) {
                packed<T, 4> four = load<T, 4>(p);
                v = make_float4(four.f32(0), four.f32(1), four.f32(2), four.f32(3));
            } else {
                v.x = to_f32(p[0]);
                v.y = d + 1 < D ? to_f32(p[1]) : 0.0f;
                v.z = d + 2 < D ? to_f32(p[2]) : 0.0f;
                v.w = d + 3 < D ? to_f32(p[3]) : 0.0f;
            }
        }
        *reinterpret_cast<float4 *>(tile + r * tile_ld<W> + d) = v;
    }
}

/* s = a b^T over the first D columns (padding there is 0). */
template <int M, int W> __device__ __forceinline__ void tile_dots(float (&s)[M][M], const float *a, const float *b, int D) {
    a += tile_y() * tile_ld<W>;
    b += tile_x() * tile_ld<W>;
#pragma unroll
    for (int i = 0; i < M * M; i++) {
        s[i / M][i % M] = 0.0f;
    }
#pragma unroll 2
    for (int d = 0; d < D; d += 4) {
        float4 x[M], y[M];
#pragma unroll
        for (int i = 0; i < M; i++) {
            x[i] = *reinterpret_cast<const float4 *>(a + 16 * i * tile_ld<W> + d);
            y[i] = *reinterpret_cast<const float4 *>(b + 16 * i * tile_ld<W> + d);
        }
#pragma unroll
        for (int i = 0; i < M; i++) {
#pragma unroll
            for (int j = 0; j < M; j++) {
                s[i][j] = fmaf(x[i].x, y[j].x, s[i][j]);
                s[i][j] = fmaf(x[i].y, y[j].y, s[i][j]);
                s[i][j] = fmaf(x[i].z, y[j].z, s[i][j]);
                s[i][j] = fmaf(x[i].w, y[j].w, s[i][j]);
            }
        }
    }
}

/* p [R, R] = s. A row is written and, in tile_accumulate, read by the same half warp: __syncwarp is enough between. */
template <int M> __device__ __forceinline__ void tile_put(float *p, const float (&s)[M][M]) {
#pragma unroll
    for (int i = 0; i < M; i++) {
#pragma unroll
        for (int j = 0; j < M; j++) {
            p[(tile_y() + 16 * i) * score_ld<M> + tile_x() + 16 * j] = s[i][j];
        }
    }
}

/* acc += p b.   p [R, R]   b [R, W] */
template <int M, int W>
__device__ __forceinline__ void tile_accumulate(float (&acc)[M][W / 64][4], const float *p, const float *b) {
    p += tile_y() * score_ld<M>;
    b += 4 * tile_x();
#pragma unroll 2
    for (int n = 0; n < 16 * M; n += 4) {
        float x[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            *reinterpret_cast<float4 *>(x[i]) = *reinterpret_cast<const float4 *>(p + 16 * i * score_ld<M> + n);
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int c = 0; c < W / 64; c++) {
                float4 y = *reinterpret_cast<const float4 *>(b + (n + m) * tile_ld<W> + 64 * c);
#pragma unroll
                for (int i = 0; i < M; i++) {
                    acc[i][c][0] = fmaf(x[i][m], y.x, acc[i][c][0]);
                    acc[i][c][1] = fmaf(x[i][m], y.y, acc[i][c][1]);
                    acc[i][c][2] = fmaf(x[i][m], y.z, acc[i][c][2]);
                    acc[i][c][3] = fmaf(x[i][m], y.w, acc[i][c][3]);
                }
            }
        }
    }
}

/* Token row0 + y + 16 i of a head = factor[i] acc[i]. */
template <typename T, int M, int W>
__device__ __forceinline__ void tile_store(T *x, int64_t stride, const float (&acc)[M][W / 64][4], const float (&factor)[M],
                                           int row0, int tokens, int D, bool vector) {
#pragma unroll
    for (int i = 0; i < M; i++) {
        int row = row0 + tile_y() + 16 * i;
#pragma unroll
        for (int c = 0; c < W / 64; c++) {
            int d = 4 * tile_x() + 64 * c;
            if (row >= tokens || d >= D) {
                continue;
            }
            T *to = x + (int64_t)row * stride + d;
            packed<T, 4> four;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                four.set(m, factor[i] * acc[i][c][m]);
            }
            if (vector) {
                store<T, 4>(to, four);
            } else {
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    if (d + m < D) {
                        to[m] = four.at[m];
                    }
                }
            }
        }
    }
}

/* Over the 16 lanes that share a row, in each of them. */
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lanes);
    }
    return x;
}
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    }
    return x;
}

#endif

/* Token and position embedding, forward and backward.
 * Refuses float atomics: rows are sorted by token (stable), and every token's rows are added in their order. */
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/scratch.h"
#include <cub/device/device_radix_sort.cuh>

enum { THREADS = 256, PIECE = CPL_EMBED_PIECE, COLUMN_THREADS = 128 };

template <typename T, int N>
__global__ void forward_kernel(T *x, const int32_t *tokens, const T *wte, const T *wpe, int64_t rows, int64_t T_, int packs) {
    int64_t n = rows * packs;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        int64_t row = i / packs, at = i % packs * N, C = (int64_t)packs * N;
        packed<T, N> a = load<T, N>(wte + tokens[row] * C + at), b = load<T, N>(wpe + row % T_ * C + at), out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            out.set(j, a.f32(j) + b.f32(j));
        }
        store(x + row * C + at, out);
    }
}

extern "C" cpl_status CPL_CUDA(embed_fwd)(cpl_device *dev, cpl_dtype dt, void *x, const int32_t *tokens, const void *wte,
                                          const void *wpe, int64_t B, int64_t T_, int64_t C) {
    if (B * T_ * C == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        cudaStream_t stream = cpl_cuda_stream(dev);
        if (C % N == 0 && aligned16(x, wte, wpe)) {
            forward_kernel<T, N><<<grid_for(dev, B * T_ * (C / N), THREADS, 32), THREADS, 0, stream>>>(
                (T *)x, tokens, (const T *)wte, (const T *)wpe, B * T_, T_, (int)(C / N));
        } else {
            forward_kernel<T, 1><<<grid_for(dev, B * T_ * C, THREADS, 32), THREADS, 0, stream>>>(
                (T *)x, tokens, (const T *)wte, (const T *)wpe, B * T_, T_, (int)C);
        }
    });
    return cpl_cuda_launched(dev, "embed_fwd");
}

__global__ void number_kernel(int32_t *rows, int64_t n) {
    int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i < n) {
        rows[i] = (int32_t)i;
    }
}

template <typename T, int N> __global__ void position_kernel(float *dwpe, const T *dx, int64_t B, int64_t T_, int packs) {
    int64_t n = T_ * packs, C = (int64_t)packs * N;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        int64_t at = i * N; /* of [T,C] */
        float sum[N] = {};
#pragma unroll 4
        for (int64_t b = 0; b < B; b++) {
            packed<T, N> d = load<T, N>(dx + b * T_ * C + at);
#pragma unroll
            for (int j = 0; j < N; j++) {
                sum[j] += d.f32(j);
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            dwpe[at + j] += sum[j];
        }
    }
}

/* A block has PIECE sorted places; a run is the places of one token. Runs that begin and end inside the piece go to dwte at once.
 * Of those that cross its borders a part stays in edge [pieces][2][C]: [0] the places of a run that began before, [1] those of one
 * that goes on behind and began here. */
template <typename T, int N>
__global__ void __launch_bounds__(COLUMN_THREADS)
    runs_kernel(float *dwte, float *edge, const T *dx, const int32_t *tokens, const int32_t *rows, int64_t n, int packs) {
    __shared__ int32_t token[PIECE + 2], row[PIECE];
    int64_t first = blockIdx.x * (int64_t)PIECE, C = (int64_t)packs * N;
    int count = (int)(n - first < PIECE ? n - first : PIECE);
    for (int i = threadIdx.x; i < count + 2; i += COLUMN_THREADS) { /* -1: no token, before the first and behind the last */
        int64_t place = first + i - 1;
        token[i] = place >= 0 && place < n ? tokens[place] : -1;
    }
    for (int i = threadIdx.x; i < count; i += COLUMN_THREADS) {
        row[i] = rows[first + i];
    }
    __syncthreads();
    int pack = blockIdx.y * COLUMN_THREADS + threadIdx.x;
    if (pack >= packs) {
        return;
    }
    int64_t at = (int64_t)pack * N;
    float sum[N] = {};
    bool before = token[0] == token[1];
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        packed<T, N> d = load<T, N>(dx + row[i] * C + at);
#pragma unroll
        for (int j = 0; j < N; j++) {
            sum[j] += d.f32(j);
        }
        bool ends = token[i + 2] != token[i + 1];
        if (!ends && i + 1 < count) {
            continue;
        }
        float *to = before ? edge + (2 * blockIdx.x) * C : !ends ? edge + (2 * blockIdx.x + 1) * C : dwte + token[i + 1] * C;
#pragma unroll
        for (int j = 0; j < N; j++) {
            to[at + j] = before || !ends ? sum[j] : to[at + j] + sum[j];
            sum[j] = 0;
        }
        before = false;
    }
}

/* The block of the piece in which a crossing run begins adds up its parts, piece after piece. */
__global__ void __launch_bounds__(COLUMN_THREADS)
    crossings_kernel(float *dwte, const float *edge, const int32_t *tokens, int64_t n, int64_t C) {
    int64_t piece = blockIdx.x, last = piece * PIECE + PIECE - 1, column = blockIdx.y * (int64_t)COLUMN_THREADS + threadIdx.x;
    if (last + 1 >= n || tokens[last] != tokens[last + 1]) {
        return; /* no run goes on behind this piece */
    }
    int32_t token = tokens[last];
    if (piece > 0 && tokens[piece * PIECE] == token && tokens[piece * PIECE - 1] == token) {
        return; /* it began before */
    }
    if (column >= C) {
        return;
    }
    float sum = edge[(2 * piece + 1) * C + column];
    for (int64_t next = piece + 1; next * PIECE < n && tokens[next * PIECE] == token; next++) {
        sum += edge[2 * next * C + column];
    }
    dwte[token * C + column] += sum;
}

static int bits_of(int64_t V) {
    int bits = 1;
    while (bits < 31 && ((int64_t)1 << bits) < V) {
        bits++;
    }
    return bits;
}

/* Scratch: sorted tokens and rows [n] each, row numbers [n], edges, and what the sort needs. */
extern "C" cpl_status CPL_CUDA(embed_bwd)(cpl_device *dev, cpl_dtype dt, float *dwte, float *dwpe, const void *dx,
                                          const int32_t *tokens, int64_t B, int64_t T_, int64_t C, int64_t V) {
    int64_t n = B * T_, pieces = cpl_ceil_div(n, PIECE);
    cudaStream_t stream = cpl_cuda_stream(dev);
    char *scratch = NULL;
    if (n * C == 0) {
        return CPL_OK;
    }
    if (n > INT32_MAX) {
        return cpl_fail(CPL_UNSUPPORTED, __FILE__, __LINE__, "embed_bwd: %lld tokens in a micro-batch, expected at most %d",
                        (long long)n, INT32_MAX);
    }
    size_t edges = cpl_scratch_embed_edges(n, C), list = cpl_scratch_embed_list(n), sort = 0;
    cub::DeviceRadixSort::SortPairs(NULL, sort, (const uint32_t *)NULL, (uint32_t *)NULL, (const int32_t *)NULL, (int32_t *)NULL,
                                    (int)n, 0, bits_of(V), stream);
    cpl_status st = cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ROWS, edges + 3 * list + sort, &scratch);
    if (st != CPL_OK) {
        return st;
    }
    float *edge = (float *)scratch;
    int32_t *sorted = (int32_t *)(scratch + edges), *rows = (int32_t *)(scratch + edges + list),
            *numbers = (int32_t *)(scratch + edges + 2 * list);
    number_kernel<<<(unsigned)cpl_ceil_div(n, THREADS), THREADS, 0, stream>>>(numbers, n);
    cudaError_t error = cub::DeviceRadixSort::SortPairs(scratch + edges + 3 * list, sort, (const uint32_t *)tokens,
                                                        (uint32_t *)sorted, numbers, rows, (int)n, 0, bits_of(V), stream);
    if (error != cudaSuccess) {
        return cpl_cuda_status(error, __FILE__, __LINE__, "embed_bwd: sort");
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        auto go = [&](auto width) {
            constexpr int N = decltype(width)::value;
            int packs = (int)(C / N);
            runs_kernel<T, N><<<dim3((unsigned)pieces, (unsigned)cpl_ceil_div(packs, COLUMN_THREADS)), COLUMN_THREADS, 0, stream>>>(
                dwte, edge, (const T *)dx, sorted, rows, n, packs);
            position_kernel<T, N>
                <<<grid_for(dev, T_ * packs, THREADS, 32), THREADS, 0, stream>>>(dwpe, (const T *)dx, B, T_, packs);
        };
        if (C % pack_of<T> == 0 && aligned16(dx)) {
            go(std::integral_constant<int, pack_of<T>>{});
        } else {
            go(std::integral_constant<int, 1>{});
        }
    });
    crossings_kernel<<<dim3((unsigned)pieces, (unsigned)cpl_ceil_div(C, COLUMN_THREADS)), COLUMN_THREADS, 0, stream>>>(
        dwte, edge, sorted, n, C);
    return cpl_cuda_launched(dev, "embed_bwd");
}

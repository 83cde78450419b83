/* The two products around GELU by our own kernel on sm_90, with what cuBLASLt does slowly or not at all in the same pass: forward
 * bias, GELU of the rounded sum, and that sum kept; backward GELU's derivative and the sums over rows that are the bias gradient.
 * Refuses other GPUs, f32, and rows that the copy engine cannot take (not at multiples of 16 bytes). */
#include "kernels/cuda/elementary.cuh"
#include "kernels/cuda/partials.cuh"
#include "kernels/cuda/product.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace {

/* A tile of d is made by one of two warpgroups while the other finishes the tile before it ("ping-pong"); a third one sends for the
 * operands. DEPTH: of a stage, 128 bytes. */
enum {
    TILE = CPL_GELU_TILE,
    DEPTH = CPL_BOX_COLUMNS,
    STAGES = 4,
    GROUP = 128,
    THREADS = 3 * GROUP,
    BOX = DEPTH * TILE * 2,
    HALF_BOX = BOX / 2
};
enum { PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232 };

struct stage {
    unsigned char a[BOX], b[BOX];
};
struct shared_memory {
    stage stages[STAGES];
    unsigned char buffer[2][2][BOX]; /* of each warpgroup: a tile of 16-bit values as two boxes of 64 columns */
    float sums[2][GROUP / 32][TILE];
    uint64_t full[STAGES], empty[STAGES], kept[2], turn[2];
};

enum mode { FORWARD, FORWARD_KEPT, BACKWARD };

struct extent {
    int tiles, across, blocks; /* tiles of d, of a row of tiles; stages of a tile */
    int64_t N;                 /* columns of d */
};

struct maps {
    CUtensorMap a, b, kept, d;
};

__device__ __forceinline__ void group_barrier(int group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"((int)GROUP) : "memory");
}

template <typename T> __device__ __forceinline__ uint32_t gelu_of(uint32_t word) {
    float2 x = unpack<T>(word);
    return pack<T>(cpl_gelu(x.x), cpl_gelu(x.y));
}

template <bool BY_ROWS> __device__ void produce(shared_memory &m, const maps &map, const extent &e) {
    int at = 0;
    for (int tile = blockIdx.x; tile < e.tiles; tile += gridDim.x) {
        int row = tile / e.across * TILE, column = tile % e.across * TILE;
        for (int k = 0; k < e.blocks; k++, at++) {
            int s = at % STAGES;
            if (at >= STAGES) {
                barrier_wait(&m.empty[s], (at / STAGES - 1) & 1);
            }
            barrier_expect(&m.full[s], 2 * BOX);
            box_load(m.stages[s].a, &map.a, &m.full[s], k * DEPTH, row);
            if (BY_ROWS) {
                box_load(m.stages[s].b, &map.b, &m.full[s], column, k * DEPTH);
                box_load(m.stages[s].b + HALF_BOX, &map.b, &m.full[s], column + TILE / 2, k * DEPTH);
            } else {
                box_load(m.stages[s].b, &map.b, &m.full[s], k * DEPTH, column);
            }
        }
    }
}

/* acc [half][..] = one tile, from stage number `at` on; lets go of each stage once the products with it are over. The warpgroups
 * take turns: a barrier tells a phase from the one after the next only, so nobody may wait for stages that are further ahead. */
template <typename T, bool BY_ROWS>
__device__ __forceinline__ void multiply(shared_memory &m, float (&acc)[2][64], int at, int blocks, int group, int own_tile) {
    if (group == 1 || own_tile > 0) {
        barrier_wait(&m.turn[group], (own_tile + group + 1) & 1);
    }
    for (int k = 0; k < blocks; k++, at++) {
        stage &s = m.stages[at % STAGES];
        barrier_wait(&m.full[at % STAGES], at / STAGES & 1);
        mma_fence();
#pragma unroll
        for (int step = 0; step < DEPTH / 16; step++) {
            uint64_t b = BY_ROWS ? operand(s.b + step * 16 * 128, HALF_BOX, 1024) : operand(s.b + step * 32, 16, 1024);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                mma<T, BY_ROWS>(acc[half], operand(s.a + half * HALF_BOX + step * 32, 16, 1024), b, k > 0 || step > 0);
            }
        }
        mma_commit();
        if (k > 0) {
            mma_wait<1>();
            if (threadIdx.x % GROUP == 0) {
                barrier_arrive(&m.empty[(at - 1) % STAGES]);
            }
        }
    }
    if (threadIdx.x % GROUP == 0) {
        barrier_arrive(&m.turn[1 - group]);
    }
    mma_wait<0>();
    if (threadIdx.x % GROUP == 0) {
        barrier_arrive(&m.empty[(at - 1) % STAGES]);
    }
}

/* The buffer, written by the whole warpgroup, to device memory. */
__device__ __forceinline__ void send(unsigned char (*buffer)[BOX], const CUtensorMap *map, int group, int row, int column) {
    shared_to_copies();
    group_barrier(group);
    if (threadIdx.x % GROUP == 0) {
        box_store(map, buffer[0], column, row);
        box_store(map, buffer[1], column + TILE / 2, row);
        stores_commit();
    }
}

template <typename T, int MODE>
__device__ __forceinline__ void finish_forward(shared_memory &m, const float (&acc)[2][64], const maps &map, const T *bias,
                                               int64_t N, int group, int row, int column) {
    unsigned char(*buffer)[BOX] = m.buffer[group];
    int own = threadIdx.x % GROUP / 32 * 16;
    if (threadIdx.x % GROUP == 0) {
        stores_have_read();
    }
    group_barrier(group);
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        float2 add[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int64_t at = column + 8 * (j + k) + threadIdx.x % 4 * 2;
            add[k] = at < N ? unpack<T>(*reinterpret_cast<const uint32_t *>(bias + at)) : make_float2(0, 0);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t w[4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float *pair = &acc[half][4 * j + 2 * n];
                uint32_t sum = pack<T>(pair[0] + add[n / 2].x, pair[1] + add[n / 2].y);
                w[n] = MODE == FORWARD_KEPT ? sum : gelu_of<T>(sum);
            }
            put_16x16(buffer[j / 8], half * 64 + own, j % 8, w);
        }
    }
    if (MODE == FORWARD_KEPT) {
        send(buffer, &map.kept, group, row, column);
        if (threadIdx.x % GROUP == 0) {
            stores_have_read();
        }
        group_barrier(group);
#pragma unroll
        for (int j = 0; j < 16; j += 2) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t w[4];
                get_16x16(w, buffer[j / 8], half * 64 + own, j % 8);
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    w[n] = gelu_of<T>(w[n]);
                }
                put_16x16(buffer[j / 8], half * 64 + own, j % 8, w);
            }
        }
    }
    send(buffer, &map.d, group, row, column);
}

/* A step of adding up over the 8 lanes with the same columns: half of the sums go to the lane across. kept: which are left. */
template <int HALF> __device__ __forceinline__ void halve(float (&sum)[32], int &kept) {
    bool upper = threadIdx.x & HALF;
    kept += upper ? HALF : 0;
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        float give = upper ? sum[k] : sum[k + HALF], keep = upper ? sum[k + HALF] : sum[k];
        sum[k] = keep + __shfl_xor_sync(0xffffffffu, give, HALF);
    }
}

/* The buffer has the values before GELU and gets the gradient over them; partial: sums of its columns, of this row of tiles. */
template <typename T>
__device__ __forceinline__ void finish_backward(shared_memory &m, const float (&acc)[2][64], const maps &map, float *partial,
                                                int64_t N, int group, int row, int column) {
    unsigned char(*buffer)[BOX] = m.buffer[group];
    int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP / 32;
    float sum[32];        /* of columns 8 j + 2 (lane % 4) + c, as sum[2 j + c], over this thread's 4 rows */
    group_barrier(group); /* all have read the sums of the tile before */
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
        sum[2 * j] = sum[2 * j + 1] = sum[2 * j + 2] = sum[2 * j + 3] = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t w[4];
            get_16x16(w, buffer[j / 8], half * 64 + warp * 16, j % 8);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float *pair = &acc[half][4 * j + 2 * n];
                float2 x = unpack<T>(w[n]);
                float2 d = make_float2(pair[0] * cpl_gelu_grad(x.x), pair[1] * cpl_gelu_grad(x.y));
                w[n] = pack<T>(d.x, d.y);
                sum[2 * j + n / 2 * 2] += d.x;
                sum[2 * j + n / 2 * 2 + 1] += d.y;
            }
            put_16x16(buffer[j / 8], half * 64 + warp * 16, j % 8, w);
        }
    }
    int kept = 0;
    halve<16>(sum, kept);
    halve<8>(sum, kept);
    halve<4>(sum, kept);
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        *reinterpret_cast<float2 *>(&m.sums[group][warp][8 * ((kept + k) / 2) + 2 * (lane % 4)]) = make_float2(sum[k], sum[k + 1]);
    }
    send(buffer, &map.d, group, row, column);
    int own = threadIdx.x % GROUP;
    if (partial != nullptr && column + own < N) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < GROUP / 32; w++) {
            total += m.sums[group][w][own];
        }
        partial[row / TILE * N + column + own] = total;
    }
}

template <typename T, int MODE>
__device__ void consume(shared_memory &m, const maps &map, const T *bias, float *partial, const extent &e, int group) {
    float acc[2][64];
    int turn = 0;
    for (int i = group; blockIdx.x + i * (int64_t)gridDim.x < e.tiles; i += 2, turn ^= 1) {
        int tile = blockIdx.x + i * gridDim.x, row = tile / e.across * TILE, column = tile % e.across * TILE;
        if (MODE == BACKWARD && threadIdx.x % GROUP == 0) {
            stores_have_read();
            barrier_expect(&m.kept[group], 2 * BOX);
            box_load(m.buffer[group][0], &map.kept, &m.kept[group], column, row);
            box_load(m.buffer[group][1], &map.kept, &m.kept[group], column + TILE / 2, row);
        }
        multiply<T, MODE == BACKWARD>(m, acc, i * e.blocks, e.blocks, group, i / 2);
        if (MODE == BACKWARD) {
            barrier_wait(&m.kept[group], turn);
            finish_backward<T>(m, acc, map, partial, e.N, group, row, column);
        } else {
            finish_forward<T, MODE>(m, acc, map, bias, e.N, group, row, column);
        }
    }
    if (threadIdx.x % GROUP == 0) {
        stores_have_read();
    }
}

template <typename T, int MODE>
__global__ void __launch_bounds__(THREADS, 1)
    product_kernel(const __grid_constant__ maps map, const T *bias, float *partial, const extent e) {
    extern __shared__ unsigned char memory[];
    shared_memory &m = *reinterpret_cast<shared_memory *>(memory + (1024 - shared_address(memory) % 1024) % 1024);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&m.full[s], 1);
            barrier_init(&m.empty[s], 1);
        }
        for (int g = 0; g < 2; g++) {
            barrier_init(&m.kept[g], 1);
            barrier_init(&m.turn[g], 1);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        shared_to_copies();
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)PRODUCER_REGISTERS));
        if (threadIdx.x == 0) {
            produce<MODE == BACKWARD>(m, map, e);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)CONSUMER_REGISTERS));
        consume<T, MODE>(m, map, bias, partial, e, threadIdx.x / GROUP - 1);
    }
}

/* --- host --- */

template <typename T, int MODE>
cpl_status launch(cpl_device *dev, const maps &map, const T *bias, float *partial, int64_t R, int64_t N, int64_t depth) {
    const extent e = {(int)(cpl_ceil_div(R, TILE) * cpl_ceil_div(N, TILE)), (int)cpl_ceil_div(N, TILE),
                      (int)cpl_ceil_div(depth, DEPTH), N};
    const int bytes = (int)sizeof(shared_memory) + 1024, most = cpl_cuda_of(dev)->sm_count,
              blocks = e.tiles < most ? e.tiles : most;
    auto *kernel = product_kernel<T, MODE>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
        return cpl_cuda_status(error, __FILE__, __LINE__, "product with GELU");
    }
    kernel<<<blocks, THREADS, bytes, cpl_cuda_stream(dev)>>>(map, bias, partial, e);
    return cpl_cuda_launched(dev, "product with GELU");
}

} // namespace

extern "C" bool cpl_cuda_product_gelu_usable(const cpl_device *dev, cpl_dtype dt, int64_t R, int64_t N, int64_t K, const void *x,
                                             const void *y, const void *w, const void *other) {
    return cpl_tensor_map_found() && cpl_cuda_of(dev)->capability == 90 && dt != CPL_F32 && N % 8 == 0 && K % 8 == 0 && R > 0 &&
           N > 0 && K > 0 && R <= INT32_MAX / 2 && N <= INT32_MAX / 2 && K <= INT32_MAX / 2 &&
           R / TILE * (N > K ? N : K) <= INT32_MAX && aligned16(x, y, w, other);
}

extern "C" cpl_status cpl_cuda_product_gelu_fwd(cpl_device *dev, cpl_dtype dt, void *y, void *pre, const void *x, const void *w,
                                                const void *bias, int64_t R, int64_t N, int64_t K) {
    maps map;
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_tensor_map(&map.a, dt, x, R, K, TILE));
    CPL_TRY(cpl_tensor_map(&map.b, dt, w, N, K, TILE));
    CPL_TRY(cpl_tensor_map(&map.kept, dt, pre != NULL ? pre : y, R, N, TILE));
    CPL_TRY(cpl_tensor_map(&map.d, dt, y, R, N, TILE));
    if (dt == CPL_BF16) {
        using T = __nv_bfloat16;
        st = pre != NULL ? launch<T, FORWARD_KEPT>(dev, map, (const T *)bias, NULL, R, N, K)
                         : launch<T, FORWARD>(dev, map, (const T *)bias, NULL, R, N, K);
    } else {
        using T = __half;
        st = pre != NULL ? launch<T, FORWARD_KEPT>(dev, map, (const T *)bias, NULL, R, N, K)
                         : launch<T, FORWARD>(dev, map, (const T *)bias, NULL, R, N, K);
    }
done:
    return st;
}

extern "C" cpl_status cpl_cuda_product_gelu_bwd(cpl_device *dev, cpl_dtype dt, void *dx, float *dbias, const void *dy,
                                                const void *w, const void *pre, int64_t R, int64_t N, int64_t K) {
    maps map;
    cpl_status st = CPL_OK;
    float *partial = NULL;
    int pieces = (int)cpl_ceil_div(R, TILE);
    CPL_TRY(cpl_tensor_map(&map.a, dt, dy, R, N, TILE));
    CPL_TRY(cpl_tensor_map(&map.b, dt, w, N, K, DEPTH));
    CPL_TRY(cpl_tensor_map(&map.kept, dt, pre, R, K, TILE));
    CPL_TRY(cpl_tensor_map(&map.d, dt, dx, R, K, TILE));
    if (dbias != NULL) {
        CPL_TRY(cpl_cuda_scratch(dev, CPL_CUDA_SCRATCH_ROWS, cpl_scratch_gelu(R, K), &partial));
    }
    st = dt == CPL_BF16 ? launch<__nv_bfloat16, BACKWARD>(dev, map, NULL, partial, R, K, N)
                        : launch<__half, BACKWARD>(dev, map, NULL, partial, R, K, N);
    if (st == CPL_OK && dbias != NULL) {
        add_partials(cpl_cuda_stream(dev), {{dbias}}, 1, partial, K, pieces);
        st = cpl_cuda_launched(dev, "bias gradient");
    }
done:
    return st;
}

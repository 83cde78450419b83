/* Cross-entropy of next-token prediction and, in place of the logits, its gradient.
 * Refuses to hide a bad logit: inf or nan in a row makes its loss and its gradient nan. */
#include "kernels/cuda/rows.cuh"

enum { MOST_THREADS = 768 };

/* Sum of e^(x - top) over logits x, top the largest. The difference comes first: it is exact where it matters, however large both
 * are. */
struct softmax_sum {
    float top, sum;
};

__device__ __forceinline__ void rebase(softmax_sum &a, float top) {
    a.sum *= exp2_fast((a.top - top) * CPL_LOG2E);
    a.top = top;
}

template <typename T, int N> __device__ __forceinline__ void absorb(softmax_sum &a, const packed<T, N> &x) {
    rebase(a, fmaxf(a.top, pack_max(x)));
#pragma unroll
    for (int j = 0; j < N; j++) {
        a.sum += exp2_fast((x.f32(j) - a.top) * CPL_LOG2E);
    }
}

/* Over the block, the same in every thread: over lanes, then over warps. shared [32] is written again two rows later: by then all
 * threads have passed the barrier of the row between. */
__device__ __forceinline__ softmax_sum block_merge(softmax_sum a, softmax_sum *shared) {
    int lane = threadIdx.x % 32;
    rebase(a, warp_max(a.top));
    a.sum = warp_sum(a.sum);
    if (lane == 0) {
        shared[threadIdx.x / 32] = a;
    }
    __syncthreads();
    a = lane < (int)blockDim.x / 32 ? shared[lane] : softmax_sum{CPL_LOWEST, 0.0f};
    rebase(a, warp_max(a.top));
    a.sum = warp_sum(a.sum);
    return a;
}

/* ln sum - (chosen - top): near 0 the two parts are, too, and their sum keeps its digits. */
__device__ __forceinline__ float row_loss(softmax_sum a, float chosen) {
    return logf(a.sum) + (a.top - chosen);
}

/* The gradient in place of the row; where next is not NULL, its packs take the place of this one's. */
template <typename T, int N, bool STAGED>
__device__ __forceinline__ void write_row(T *row, row_source<T, N, STAGED> from, const row_share &share, softmax_sum a,
                                          int32_t target, float factor, const T *next, int64_t V) {
    float each = factor / a.sum;
    share.template leaving<STAGED>([&](int i) {
        packed<T, N> x = from.at(i, V), out;
        float g[N];
#pragma unroll
        for (int j = 0; j < N; j++) {
            g[j] = each * exp2_fast((x.f32(j) - a.top) * CPL_LOG2E);
        }
        if (i == target / N) {
#pragma unroll
            for (int j = 0; j < N; j++) {
                g[j] -= j == target % N ? factor : 0.0f;
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            out.set(j, g[j]);
        }
        pack_limit(out, i, V, 0.0f);
        store(row + i * (int64_t)N, out);
        if (STAGED && next != nullptr) {
            from.refill(i, next);
        }
    });
}

/* Rows blockIdx.x, + gridDim.x, ... STAGED: the row lies in shared memory, copied there while the one before it was written; else
 * it is read twice. N: elements an access. */
template <typename T, int N, bool STAGED>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    cross_entropy_kernel(T *logits, float *losses, const int32_t *targets, const cpl_step_state *state, float row_weight, int64_t R,
                         int64_t V, int64_t ld) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ softmax_sum parts[2][32];
    const row_share share(V, N);
    float factor = state != nullptr ? state->loss_scale * row_weight : 0.0f;
    int32_t next_target = targets[blockIdx.x];
    bool arriving = false;
    for (int64_t r = blockIdx.x, turn = 0; r < R; r += gridDim.x) {
        T *row = logits + r * ld;
        const row_source<T, N, STAGED> from = {row, reinterpret_cast<T *>(memory)};
        int32_t target = next_target;
        next_target = r + gridDim.x < R ? targets[r + gridDim.x] : CPL_IGNORED;
        const T *next = STAGED && next_target != CPL_IGNORED ? row + gridDim.x * ld : nullptr;
        if (target == CPL_IGNORED) {
            arriving = false;
            if (threadIdx.x == 0) {
                losses[r] = 0.0f;
            }
            if (state != nullptr) {
                clear_packs<T, N>(row, 0, ld);
            }
            continue;
        }
        if (STAGED && !arriving) {
            share.template leaving<STAGED>([&](int i) { from.refill(i, row); });
        }
        /* Before the barrier of block_merge, so before anything of the row is overwritten. */
        float chosen = threadIdx.x != 0 ? 0.0f : target >= 0 && target < V ? to_f32(row[target]) : NAN;
        softmax_sum a = {CPL_LOWEST, 0.0f};
        share.template arriving<STAGED>([&](int i) { absorb(a, from.at(i, V)); });
        a = block_merge(a, parts[turn]);
        turn ^= 1;
        if (threadIdx.x == 0) {
            losses[r] = row_loss(a, chosen);
        }
        if (state != nullptr) {
            write_row<T, N, STAGED>(row, from, share, a, target, factor, next, V);
            clear_packs<T, N>(row, share.packs, ld);
        } else if (next != nullptr) {
            share.template leaving<STAGED>([&](int i) { from.refill(i, next); });
        }
        arriving = next != nullptr;
    }
}

typedef struct {
    void *logits;
    float *losses;
    const int32_t *targets;
    const cpl_step_state *state;
    float row_weight;
    int64_t R, V, ld;
} arguments;

template <typename T, int N, bool STAGED> static cudaError_t launch(cpl_device *dev, const arguments &a) {
    int threads = row_threads(cpl_ceil_div(a.V, N), MOST_THREADS), grid = 0;
    size_t shared = STAGED ? (size_t)cpl_ceil_div(a.V, N) * N * sizeof(T) : 0;
    cudaError_t error = row_grid(dev, cross_entropy_kernel<T, N, STAGED>, threads, shared, a.R, &grid);
    if (error == cudaSuccess) {
        cross_entropy_kernel<T, N, STAGED><<<grid, threads, shared, cpl_cuda_stream(dev)>>>((T *)a.logits, a.losses, a.targets,
                                                                                            a.state, a.row_weight, a.R, a.V, a.ld);
    }
    return error;
}

extern "C" cpl_status CPL_CUDA(cross_entropy)(cpl_device *dev, cpl_dtype dt, void *logits, float *losses, const int32_t *targets,
                                              const cpl_step_state *state, float row_weight, int64_t R, int64_t V, int64_t ld) {
    const arguments a = {logits, losses, targets, state, row_weight, R, V, ld};
    size_t limit = 0;
    if (R == 0) {
        return CPL_OK;
    }
    if (V < 1 || ld < V || V > CPL_ROW_MOST) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__,
                        "loss of %lld logits in rows of %lld, expected 1 or more in at least as many", (long long)V, (long long)ld);
    }
    cudaError_t error = shared_limit(dev, &limit);
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        if (error != cudaSuccess) {
            return;
        }
        if (!aligned16(logits) || ld % N != 0) {
            error = launch<T, 1, false>(dev, a);
        } else if ((size_t)cpl_ceil_div(V, N) * 16 > limit) {
            error = launch<T, N, false>(dev, a);
        } else {
            error = launch<T, N, true>(dev, a);
        }
    });
    cpl_status st = cpl_cuda_status(error, __FILE__, __LINE__, "cross_entropy");
    return st != CPL_OK ? st : cpl_cuda_launched(dev, "cross_entropy");
}

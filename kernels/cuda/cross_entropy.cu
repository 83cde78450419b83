/* Cross-entropy of next-token prediction and, in place of the logits, its gradient.
 * Refuses to hide a bad logit (loss.cuh) and a target that is no token: its loss is nan. */
#include "kernels/cuda/loss.cuh"

/* A block a row. KEPT: the row stays in shared memory between the two passes; each thread reads back what it put there itself. */
template <typename T, int N, bool KEPT>
__global__ void __launch_bounds__(CPL_LOSS_THREADS)
    cross_entropy_kernel(T *logits, float *losses, const int32_t *targets, const cpl_step_state *state, float row_weight, int64_t V,
                         int64_t ld) {
    extern __shared__ uint4 kept[];
    __shared__ float shared[32];
    T *row = logits + blockIdx.x * ld, *own = KEPT ? reinterpret_cast<T *>(kept) : row;
    int32_t target = targets[blockIdx.x];
    if (target == CPL_IGNORED) {
        if (threadIdx.x == 0) {
            losses[blockIdx.x] = 0;
        }
        if (state != nullptr) {
            clear_row(row, ld);
        }
        return;
    }
    bool valid = target >= 0 && target < V;
    float chosen = valid ? to_f32(row[target]) : NAN, x[N];
    running all;
#pragma unroll 4
    for (int64_t at = threadIdx.x * N; at < V; at += CPL_LOSS_THREADS * N) {
        packed<T, N> p = load<T, N>(row + at);
        if (KEPT) {
            store(own + at, p);
        }
        widen(x, p, at, V);
        all.add(x, largest(x), 1.0f);
    }
    float top, sum = block_running(all, 1.0f, &top, shared); /* all have read `chosen` before any writes */
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = logf(sum) + (top - chosen);
    }
    if (state == nullptr) {
        return;
    }
    float factor = state->loss_scale * row_weight, each = factor / sum;
    for (int64_t at = threadIdx.x * N; at < ld; at += CPL_LOSS_THREADS * N) {
        packed<T, N> out;
        if (at < V) {
            widen(x, load<T, N>(own + at), at, V);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            float p = at + j < V ? __expf(x[j] - top) * each : 0.0f;
            out.set(j, at + j == target ? p - factor : p);
        }
        store(row + at, out);
    }
}

template <typename T, int N>
static void launch(cpl_device *dev, T *logits, float *losses, const int32_t *targets, const cpl_step_state *state, float row_weight,
                   int64_t R, int64_t V, int64_t ld) {
    size_t bytes = (size_t)cpl_ceil_div(V, N) * N * sizeof(T);
    if (N > 1 && state != NULL && bytes <= CPL_SHARED_MOST && has_large_shared(dev)) {
        auto kernel = cross_entropy_kernel<T, N, true>;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, CPL_SHARED_MOST);
        kernel<<<(unsigned)R, CPL_LOSS_THREADS, bytes, cpl_cuda_stream(dev)>>>(logits, losses, targets, state, row_weight, V, ld);
    } else {
        cross_entropy_kernel<T, N, false>
            <<<(unsigned)R, CPL_LOSS_THREADS, 0, cpl_cuda_stream(dev)>>>(logits, losses, targets, state, row_weight, V, ld);
    }
}

/* A block reads up to a whole pack behind column V - 1, inside the row, for ld is a multiple of the pack. */
extern "C" cpl_status CPL_CUDA(cross_entropy)(cpl_device *dev, cpl_dtype dt, void *logits, float *losses, const int32_t *targets,
                                              const cpl_step_state *state, float row_weight, int64_t R, int64_t V, int64_t ld) {
    if (R == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        if (ld % N == 0 && aligned16(logits)) {
            launch<T, N>(dev, (T *)logits, losses, targets, state, row_weight, R, V, ld);
        } else {
            launch<T, 1>(dev, (T *)logits, losses, targets, state, row_weight, R, V, ld);
        }
    });
    return cpl_cuda_launched(dev, "cross_entropy");
}

/* The decision of a training step: norm, clip factor, skip or go on, the loss scale's next value, Adam's step count.
 * Refuses to decide from what one rank alone has seen: flag and sums come in combined over all ranks. */
#include "kernels/cuda/device.cuh"

namespace {

enum { THREADS = 1024, LOADS = 8 };

/* As on the CPU (kernels/cpu/step_control.c says why). */
__device__ void overflowed(cpl_step_state *state, const cpl_step_rules &rules) {
    bool at_min = !rules.dynamic || state->loss_scale <= rules.min_scale;
    state->stuck_steps = at_min ? state->stuck_steps + (state->stuck_steps < INT32_MAX) : 0;
    state->good_steps = 0;
    if (!rules.dynamic) {
        return;
    }
    state->hysteresis_left = state->hysteresis_left > 0 ? state->hysteresis_left - 1 : 0;
    if (state->hysteresis_left == 0) {
        float lower = state->loss_scale * rules.backoff;
        state->loss_scale = lower > rules.min_scale ? lower : rules.min_scale;
    }
}

__device__ void succeeded(cpl_step_state *state, const cpl_step_rules &rules) {
    state->adam_step += 1;
    state->stuck_steps = 0;
    if (!rules.dynamic) {
        return;
    }
    state->hysteresis_left = rules.hysteresis;
    state->good_steps += 1;
    if (state->good_steps >= rules.growth_interval) {
        float higher = state->loss_scale * rules.growth;
        state->loss_scale = higher < rules.max_scale ? higher : rules.max_scale;
        state->good_steps = 0;
    }
}

/* One block. Thread i adds the sums i, i + 1024, ..., then a butterfly: an order that depends on the number of chunks alone, hence
 * neither on ranks nor on scheduling, though it is not the CPU's (a chain of dependent additions is too slow here), so that the
 * norm may differ from the CPU's in its last bit. Roundings of the decision are kept apart as on the CPU. */
__global__ void __launch_bounds__(THREADS) control_kernel(cpl_step_state *state, cpl_step_rules rules, const uint32_t *overflow,
                                                          const double *chunk_sums, int64_t chunks) {
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < chunks; i += THREADS * LOADS) {
        double part[LOADS];
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            part[k] = i + k * THREADS < chunks ? chunk_sums[i + k * THREADS] : 0.0;
        }
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            sum += part[k];
        }
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x != 0) {
        return;
    }
    double unscale = (double)rules.inv_micro_batches / (double)state->loss_scale;
    double norm = __dmul_rn(sqrt(sum), unscale);
    bool finite = isfinite((float)norm);
    state->skip = *overflow != 0 || !finite;
    state->grad_norm = state->skip && finite ? INFINITY : (float)norm;
    if (state->skip) {
        state->grad_factor = 0;
        overflowed(state, rules);
        return;
    }
    double clip_factor = rules.clip > 0 ? (double)rules.clip / __dadd_rn(norm, 1e-6) : 1;
    state->grad_factor = (float)(unscale * (clip_factor < 1 ? clip_factor : 1));
    succeeded(state, rules);
}

} // namespace

extern "C" cpl_status CPL_CUDA(step_control)(cpl_device *dev, cpl_step_state *state, const cpl_step_rules *rules,
                                             const uint32_t *overflow, const double *chunk_sums, int64_t chunks) {
    control_kernel<<<1, THREADS, 0, cpl_cuda_stream(dev)>>>(state, *rules, overflow, chunk_sums, chunks);
    return cpl_cuda_launched(dev, "step_control");
}

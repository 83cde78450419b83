/* Distillation loss of a student against a teacher and, in place of the student's logits, its gradient.
 * Refuses to make nan of 0 log 0, and to hold probabilities: they are computed again from the logits in each pass. */
#include "kernels/cuda/loss.cuh"

/* power: the temperature where it is a whole number up to 4, else 0; then e^x is a power of e^(x / temperature). */
struct distillation {
    float inverse, alpha, beta, temperature;
    int power;
    cpl_kd_kind kind;
    bool same; /* m is q or p: the divergence is 0 whatever they are */
};

/* e^d from e^(d / temperature) */
__device__ __forceinline__ float plain_of(float e, float d, int power) {
    switch (power) {
    case 1:
        return e;
    case 2:
        return e * e;
    case 3:
        return e * e * e;
    case 4:
        return (e * e) * (e * e);
    default:
        return __expf(d);
    }
}

struct sums {
    float s_top, t_top, q, p, plain; /* maxima of student and teacher; sums at the temperature, and the student's at 1 */
};

/* The student's two sums with one maximum. */
struct running_student {
    float top, q, plain;
    __device__ running_student() : top(-INFINITY), q(0), plain(0) {}
    template <int N> __device__ __forceinline__ void add(const float (&x)[N], float most, const distillation &k) {
        if (most > top) {
            float lower = __expf((top - most) * k.inverse);
            plain = plain == 0.0f ? 0.0f : plain * plain_of(lower, top - most, k.power);
            q *= lower;
            top = most;
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            if (x[j] != -INFINITY) {
                float e = __expf((x[j] - top) * k.inverse);
                q += e;
                plain += plain_of(e, x[j] - top, k.power);
            }
        }
    }
};

/* log(p/q) = ((t - t_top) - (s - s_top)) / temperature + shift: exactly 0 for equal logits. */
struct point {
    float q, p, plain, d;
};
__device__ __forceinline__ point point_of(float s, float t, const sums &a, float shift, const distillation &k) {
    point x;
    float ds = s - a.s_top, dt = t - a.t_top, e = __expf(ds * k.inverse);
    x.q = e / a.q;
    x.p = __expf(dt * k.inverse) / a.p;
    x.plain = plain_of(e, ds, k.power) / a.plain;
    x.d = (dt - ds) * k.inverse + shift;
    return x;
}

/* The soft loss's term, and in *ratio log(q/p) (reverse) or log(q/m) (jsd): kernels/cpu/distill_loss.c. */
__device__ __forceinline__ float term_of(const point &x, const distillation &k, float *ratio) {
    if (k.kind == CPL_KD_FORWARD_KL) {
        *ratio = 0;
        return x.p == 0.0f ? 0.0f : x.p * x.d;
    }
    if (k.kind == CPL_KD_REVERSE_KL) {
        *ratio = x.q == 0.0f ? 0.0f : -x.d;
        return x.q * *ratio;
    }
    float rest = 1.0f - k.beta;
    bool student_larger = x.d < 0.0f;
    float e = __expf(-fabsf(x.d));
    float log_m = logf((student_larger ? rest : k.beta) + (student_larger ? k.beta : rest) * e);
    float p_over_m = student_larger ? x.d - log_m : -log_m, q_over_m = student_larger ? -log_m : -log_m - x.d;
    *ratio = x.q == 0.0f ? 0.0f : q_over_m;
    return k.beta * (x.p == 0.0f ? 0.0f : x.p * p_over_m) + rest * (x.q * *ratio);
}

__device__ __forceinline__ float gradient_of(const point &x, const distillation &k, float ratio, float mean, bool target,
                                             float factor) {
    float hard = 1.0f - k.alpha, soft = k.alpha * k.temperature * (k.kind == CPL_KD_JSD ? 1.0f - k.beta : 1.0f);
    float g = hard == 0.0f ? 0.0f : hard * (target ? x.plain - 1.0f : x.plain);
    if (soft != 0.0f && k.kind == CPL_KD_FORWARD_KL) {
        g += soft * (x.q - x.p);
    } else if (soft != 0.0f && !k.same) {
        g += soft * (x.q * (ratio - mean));
    }
    return g * factor;
}

/* A block a row: sums, then the loss and for forward KL the gradient at once; the others subtract a mean, known after a pass more.
 * The student's row stays in shared memory where it fits, the teacher's is read again from the second-level cache. */
template <typename T, int N, bool KEPT>
__global__ void __launch_bounds__(CPL_LOSS_THREADS)
    distill_kernel(T *student, const T *teacher, float *soft, float *hard, const int32_t *targets, const cpl_step_state *state,
                   float row_weight, distillation k, int64_t V, int64_t ld) {
    extern __shared__ uint4 kept[];
    __shared__ float shared[32];
    __shared__ double shared_double[32];
    T *row = student + blockIdx.x * ld, *own = KEPT ? reinterpret_cast<T *>(kept) : row;
    const T *other = teacher + blockIdx.x * ld;
    int32_t target = targets[blockIdx.x];
    if (target == CPL_IGNORED) {
        if (threadIdx.x == 0) {
            soft[blockIdx.x] = hard[blockIdx.x] = 0;
        }
        if (state != nullptr) {
            clear_row(row, ld);
        }
        return;
    }
    float chosen = target >= 0 && target < V ? to_f32(row[target]) : NAN, s[N], t[N];
    running_student rs;
    running rt;
    for (int64_t at = threadIdx.x * N; at < V; at += CPL_LOSS_THREADS * N) {
        packed<T, N> ps = load<T, N>(row + at), pt = load<T, N>(other + at);
        if (KEPT) {
            store(own + at, ps);
        }
        widen(s, ps, at, V);
        widen(t, pt, at, V);
        rs.add(s, largest(s), k);
        rt.add(t, largest(t), k.inverse);
    }
    sums a;
    a.s_top = block_max(rs.top, shared);
    float lower = rs.q == 0.0f ? 0.0f : __expf((rs.top - a.s_top) * k.inverse);
    a.q = block_sum(rs.q * lower, shared);
    a.plain = block_sum(rs.plain == 0.0f ? 0.0f : rs.plain * plain_of(lower, rs.top - a.s_top, k.power), shared);
    a.p = block_running(rt, k.inverse, &a.t_top, shared);
    float shift = logf(a.q) - logf(a.p), factor = state != nullptr ? state->loss_scale * row_weight : 0.0f, ratio;
    bool at_once = k.kind == CPL_KD_FORWARD_KL && state != nullptr;
    float soft_sum = 0, mean = 0;
    for (int64_t at = threadIdx.x * N; at < V; at += CPL_LOSS_THREADS * N) {
        widen(s, load<T, N>(own + at), at, V);
        widen(t, load<T, N>(other + at), at, V);
        packed<T, N> out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            float g = 0;
            if (at + j < V) {
                point x = point_of(s[j], t[j], a, shift, k);
                soft_sum += k.same ? 0.0f : term_of(x, k, &ratio);
                mean += k.kind == CPL_KD_JSD && !k.same ? x.q * ratio : 0.0f;
                g = at_once ? gradient_of(x, k, 0.0f, 0.0f, at + j == target, factor) : 0.0f;
            }
            out.set(j, g);
        }
        if (at_once) {
            store(row + at, out);
        }
    }
    double total = block_sum((double)soft_sum, shared_double);
    if (threadIdx.x == 0) {
        soft[blockIdx.x] = (float)total;
        hard[blockIdx.x] = logf(a.plain) + (a.s_top - chosen);
    }
    if (state == nullptr) {
        return;
    }
    if (!at_once) {
        mean = k.kind == CPL_KD_JSD ? (float)block_sum((double)mean, shared_double) : (float)total;
        for (int64_t at = threadIdx.x * N; at < V; at += CPL_LOSS_THREADS * N) {
            widen(s, load<T, N>(own + at), at, V);
            widen(t, load<T, N>(other + at), at, V);
            packed<T, N> out;
#pragma unroll
            for (int j = 0; j < N; j++) {
                float g = 0;
                if (at + j < V) {
                    point x = point_of(s[j], t[j], a, shift, k);
                    ratio = 0;
                    if (!k.same) {
                        (void)term_of(x, k, &ratio);
                    }
                    g = gradient_of(x, k, ratio, mean, at + j == target, factor);
                }
                out.set(j, g);
            }
            store(row + at, out);
        }
    }
    for (int64_t i = (V + N - 1) / N * N + threadIdx.x; i < ld; i += CPL_LOSS_THREADS) {
        row[i] = from_f32<T>(0.0f);
    }
}

template <typename T, int N>
static void launch(cpl_device *dev, T *student, const T *teacher, float *soft, float *hard, const int32_t *targets,
                   const cpl_step_state *state, float row_weight, const distillation &k, int64_t R, int64_t V, int64_t ld) {
    size_t bytes = (size_t)cpl_ceil_div(V, N) * N * sizeof(T);
    if (N > 1 && bytes <= CPL_SHARED_MOST && has_large_shared(dev)) {
        auto kernel = distill_kernel<T, N, true>;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, CPL_SHARED_MOST);
        kernel<<<(unsigned)R, CPL_LOSS_THREADS, bytes, cpl_cuda_stream(dev)>>>(student, teacher, soft, hard, targets, state,
                                                                               row_weight, k, V, ld);
    } else {
        distill_kernel<T, N, false><<<(unsigned)R, CPL_LOSS_THREADS, 0, cpl_cuda_stream(dev)>>>(
            student, teacher, soft, hard, targets, state, row_weight, k, V, ld);
    }
}

extern "C" cpl_status CPL_CUDA(distill_loss)(cpl_device *dev, cpl_dtype dt, void *student, const void *teacher, float *soft,
                                             float *hard, const int32_t *targets, const cpl_step_state *state, float row_weight,
                                             float temperature, float alpha, cpl_kd_kind kind, float beta, int64_t R, int64_t V,
                                             int64_t ld) {
    int power = temperature == 1.0f ? 1 : temperature == 2.0f ? 2 : temperature == 3.0f ? 3 : temperature == 4.0f ? 4 : 0;
    distillation k = {
        1.0f / temperature, alpha, beta, temperature, power, kind, kind == CPL_KD_JSD && (beta == 0.0f || beta == 1.0f)};
    if (R == 0) {
        return CPL_OK;
    }
    cpl_dispatch(dt, [&](auto zero) {
        using T = decltype(zero);
        constexpr int N = pack_of<T>;
        if (ld % N == 0 && aligned16(student, teacher)) {
            launch<T, N>(dev, (T *)student, (const T *)teacher, soft, hard, targets, state, row_weight, k, R, V, ld);
        } else {
            launch<T, 1>(dev, (T *)student, (const T *)teacher, soft, hard, targets, state, row_weight, k, R, V, ld);
        }
    });
    return cpl_cuda_launched(dev, "distill_loss");
}

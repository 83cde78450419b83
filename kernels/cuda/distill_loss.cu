/* Distillation loss of a student against a teacher and, in place of the student's logits, its gradient.
 * Refuses to hold probabilities: they are computed again from the logits, which are read from memory once where they fit. */
#include "kernels/cuda/rows.cuh"

enum { MOST_THREADS = 768 };
/* Above it a logit of -inf (here CPL_LOWEST) stood against a probability above 0: the divergence is infinite. */
constexpr float MOST_SOFT = 1e15f;

/* scale: log2(e) / temperature. power: the temperature where it is 1, 2 or 4, else 0. same: m is q or p, whose divergence is 0. */
struct distillation {
    float scale, temperature, alpha, beta;
    int power;
    bool same;
};

/* Exponents are s = (student - s_top) scale and t = (teacher - t_top) scale, tops being the largest logits. Sums: q of 2^s, p of
 * 2^t, plain of 2^(s temperature), and cross of 2^t (t - s) for forward KL, of 2^s (s - t) for reverse. */
struct row_sums {
    float s_top, t_top, q, p, plain, cross;
};

/* -inf becomes finite: where its power of two is a factor the product is 0, not nan. NaN is left to the sums, which have it too. */
__device__ __forceinline__ float bounded(float exponent) {
    return fmaxf(exponent, CPL_LOWEST);
}

/* 2^(s temperature) of e = 2^s */
__device__ __forceinline__ float plain_of(float e, float s, const distillation &k) {
    float square = e * e;
    return k.power == 1 ? e : k.power == 2 ? square : k.power == 4 ? square * square : exp2_fast(s * k.temperature);
}
/* The same for N of them: the choice is made once. */
template <int N>
__device__ __forceinline__ void plain_of(float (&plain)[N], const float (&e)[N], const float (&s)[N], const distillation &k) {
    if (k.power != 0) {
        bool square = k.power >= 2, again = k.power == 4;
#pragma unroll
        for (int j = 0; j < N; j++) {
            float once = square ? e[j] * e[j] : e[j];
            plain[j] = again ? once * once : once;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; j++) {
            plain[j] = exp2_fast(s[j] * k.temperature);
        }
    }
}

template <cpl_kd_kind KIND> __device__ __forceinline__ void rebase(row_sums &a, float s_top, float t_top, const distillation &k) {
    float s = bounded((a.s_top - s_top) * k.scale), t = bounded((a.t_top - t_top) * k.scale), q = exp2_fast(s), p = exp2_fast(t);
    if (KIND == CPL_KD_FORWARD_KL) {
        a.cross = p * fmaf(a.p, t - s, a.cross);
    } else if (KIND == CPL_KD_REVERSE_KL) {
        a.cross = q * fmaf(a.q, s - t, a.cross);
    }
    a = {s_top, t_top, a.q * q, a.p * p, a.plain * plain_of(q, s, k), a.cross};
}

template <cpl_kd_kind KIND, typename T, int N>
__device__ __forceinline__ void absorb(row_sums &a, const packed<T, N> &student, const packed<T, N> &teacher,
                                       const distillation &k) {
    float s[N], q[N], plain[N];
    rebase<KIND>(a, fmaxf(a.s_top, pack_max(student)), fmaxf(a.t_top, pack_max(teacher)), k);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float t = (teacher.f32(j) - a.t_top) * k.scale, p = exp2_fast(t);
        s[j] = (student.f32(j) - a.s_top) * k.scale;
        q[j] = exp2_fast(s[j]);
        a.p += p;
        a.q += q[j];
        if (KIND == CPL_KD_FORWARD_KL) {
            a.cross = fmaf(p, bounded(t) - bounded(s[j]), a.cross);
        } else if (KIND == CPL_KD_REVERSE_KL) {
            a.cross = fmaf(q[j], bounded(s[j]) - bounded(t), a.cross);
        }
    }
    plain_of(plain, q, s, k);
#pragma unroll
    for (int j = 0; j < N; j++) {
        a.plain += plain[j];
    }
}

template <cpl_kd_kind KIND> __device__ __forceinline__ void warp_merge(row_sums &a, const distillation &k) {
    rebase<KIND>(a, warp_max(a.s_top), warp_max(a.t_top), k);
    a.q = warp_sum(a.q);
    a.p = warp_sum(a.p);
    a.plain = warp_sum(a.plain);
    a.cross = warp_sum(a.cross);
}

/* Over the block, the same in every thread. shared [32] is written again two rows later: by then all threads have passed the
 * barrier of the row between. */
template <cpl_kd_kind KIND> __device__ __forceinline__ row_sums block_merge(row_sums a, row_sums *shared, const distillation &k) {
    int lane = threadIdx.x % 32;
    warp_merge<KIND>(a, k);
    if (lane == 0) {
        shared[threadIdx.x / 32] = a;
    }
    __syncthreads();
    a = lane < (int)blockDim.x / 32 ? shared[lane] : row_sums{CPL_LOWEST, CPL_LOWEST, 0, 0, 0, 0};
    warp_merge<KIND>(a, k);
    return a;
}

/* One element under JSD: m over the larger of p and q is w + (1-w) 2^-|d|, w the larger one's weight: nothing overflows and p = q
 * gives log 1 = 0. Logarithms are base 2; d = log(p/q). */
struct jsd_point {
    float q, p, q_over_m, p_over_m;
};
template <typename T>
__device__ __forceinline__ jsd_point jsd_of(float s, float t, float q_log, float p_log, float shift, float beta) {
    float d = bounded(t) - bounded(s) + shift, e = exp2_fast(-fabsf(d)), rest = 1.0f - beta;
    bool student_larger = d < 0.0f;
    float large = exp2_fast(student_larger ? s - q_log : t - p_log), small = large * e;
    float over = student_larger ? fmaf(beta, e, rest) : fmaf(rest, e, beta);
    float log_m = sizeof(T) == 4 ? log2f(over) : log2_fast(over);
    return student_larger ? jsd_point{large, small, -log_m, d - log_m} : jsd_point{small, large, -log_m - d, -log_m};
}

/* What the gradient needs of the row: g = plain * 2^(s T) + q 2^s - p 2^t (forward), or + 2^s (q (s - t) + level) (reverse), or
 * + q prob(s) (log2(q/m) - level) (jsd); less `chosen` at the target. */
struct row_gradient {
    float plain, q, p, level, chosen, q_log, p_log, shift;
    bool soft;
};

/* *soft in natural logarithms; for jsd the caller's sums {divergence, mean of log2(q/m) under q}. */
template <cpl_kd_kind KIND>
__device__ __forceinline__ row_gradient gradient_of(const row_sums &a, const distillation &k, float factor, float2 jsd,
                                                    float *soft) {
    float hard = 1.0f - k.alpha, weight = k.alpha * k.temperature, mean = 0.0f;
    row_gradient g = {factor * hard / a.plain, 0, 0, 0, factor * hard, log2f(a.q), log2f(a.p), log2f(a.q / a.p), false};
    if (KIND == CPL_KD_FORWARD_KL) {
        mean = a.cross / a.p + g.shift;
        g.q = factor * weight / a.q;
        g.p = factor * weight / a.p;
    } else if (KIND == CPL_KD_REVERSE_KL) {
        mean = a.cross / a.q - g.shift;
        g.q = factor * weight * CPL_LN2 / a.q;
        g.level = mean > MOST_SOFT ? -INFINITY : g.q * (-g.shift - mean);
    } else if (!k.same) {
        mean = jsd.x;
        weight *= 1.0f - k.beta;
        g.q = factor * weight * CPL_LN2;
        g.level = jsd.y;
    }
    *soft = mean > MOST_SOFT ? INFINITY : CPL_LN2 * mean;
    g.soft = weight != 0.0f && !(KIND == CPL_KD_JSD && k.same);
    return g;
}

/* A row of each: in memory and, STAGED, in shared memory. */
template <typename T, int N, bool STAGED> struct row_pair {
    row_source<T, N, STAGED> student, teacher;
    __device__ __forceinline__ void refill(int i, const T *next_student, const T *next_teacher) const {
        student.refill(i, next_student);
        teacher.refill(i, next_teacher);
    }
};

template <cpl_kd_kind KIND, typename T, int N>
__device__ __forceinline__ packed<T, N> gradient_pack(const packed<T, N> &student, const packed<T, N> &teacher, const row_sums &a,
                                                      const row_gradient &g, const distillation &k, int chosen) {
    packed<T, N> out;
    float s[N], e[N], plain[N], y[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        s[j] = (student.f32(j) - a.s_top) * k.scale;
        e[j] = exp2_fast(s[j]);
    }
    plain_of(plain, e, s, k);
#pragma unroll
    for (int j = 0; j < N; j++) {
        y[j] = g.plain * plain[j];
        if (g.soft) {
            float t = (teacher.f32(j) - a.t_top) * k.scale;
            if (KIND == CPL_KD_FORWARD_KL) { /* equal products cancel exactly */
                y[j] += __fmul_rn(g.q, e[j]) - __fmul_rn(g.p, exp2_fast(t));
            } else if (KIND == CPL_KD_REVERSE_KL) {
                y[j] = fmaf(e[j], fmaf(g.q, bounded(s[j]) - bounded(t), g.level), y[j]);
            } else {
                jsd_point x = jsd_of<T>(s[j], t, g.q_log, g.p_log, g.shift, k.beta);
                y[j] = fmaf(g.q * x.q, x.q_over_m - g.level, y[j]);
            }
        }
    }
    if (chosen >= 0) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            y[j] -= j == chosen ? g.chosen : 0.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        out.set(j, y[j]);
    }
    return out;
}

/* {divergence, mean of log2(q/m) under q}, base 2, over the block. */
template <typename T, int N, bool STAGED>
__device__ __forceinline__ float2 jsd_sums(const row_pair<T, N, STAGED> &from, const row_share &share, const row_sums &a,
                                           const distillation &k, float *shared, int64_t V) {
    float q_log = log2f(a.q), p_log = log2f(a.p), shift = log2f(a.q / a.p), divergence = 0, mean = 0;
    share.all([&](int i) {
        packed<T, N> student = from.student.at(i, V), teacher = from.teacher.at(i, V);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float s = (student.f32(j) - a.s_top) * k.scale, t = (teacher.f32(j) - a.t_top) * k.scale;
            jsd_point x = jsd_of<T>(s, t, q_log, p_log, shift, k.beta);
            float term = x.q * x.q_over_m;
            mean += term;
            divergence += fmaf(k.beta, x.p * x.p_over_m, (1.0f - k.beta) * term);
        }
    });
    return {block_sum(divergence, shared), block_sum(mean, shared)};
}

struct distill_rows {
    void *student;
    const void *teacher;
    float *soft, *hard;
    const int32_t *targets;
    const cpl_step_state *state;
    float row_weight;
    int64_t R, V, ld;
};

/* The gradient in place of the student's row; next: how far on the rows begin that take the place of these, 0: none. */
template <cpl_kd_kind KIND, typename T, int N, bool STAGED>
__device__ __forceinline__ void write_row(const row_pair<T, N, STAGED> &from, const row_share &share, const row_sums &a,
                                          const row_gradient &g, const distillation &k, int32_t target, int64_t next, int64_t V) {
    T *row = const_cast<T *>(from.student.row);
    share.template leaving<STAGED>([&](int i) {
        packed<T, N> student = from.student.at(i, V), teacher = from.teacher.at(i, V), out;
        out = gradient_pack<KIND>(student, teacher, a, g, k, i == target / N ? target % N : -1);
        pack_limit(out, i, V, 0.0f);
        store(row + i * (int64_t)N, out);
        if (STAGED && next != 0) {
            from.refill(i, from.student.row + next, from.teacher.row + next);
        }
    });
}

/* Rows blockIdx.x, + gridDim.x, ... STAGED: both rows lie in shared memory, copied there while those before them were worked on;
 * else they are read again for each pass. N: elements an access. */
template <cpl_kd_kind KIND, typename T, int N, bool STAGED>
__global__ void __launch_bounds__(MOST_THREADS) distill_kernel(distill_rows x, distillation k) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ row_sums parts[2][32];
    __shared__ float shared[32];
    const row_share share(x.V, N);
    T *kept = reinterpret_cast<T *>(memory);
    float factor = x.state != nullptr ? x.state->loss_scale * x.row_weight : 0.0f;
    int32_t next_target = x.targets[blockIdx.x];
    bool arriving = false;
    for (int64_t r = blockIdx.x, turn = 0; r < x.R; r += gridDim.x) {
        T *row = (T *)x.student + r * x.ld;
        const row_pair<T, N, STAGED> from = {{row, kept}, {(const T *)x.teacher + r * x.ld, kept + share.packs * N}};
        int32_t target = next_target;
        next_target = r + gridDim.x < x.R ? x.targets[r + gridDim.x] : CPL_IGNORED;
        int64_t next = STAGED && next_target != CPL_IGNORED ? gridDim.x * x.ld : 0;
        if (target == CPL_IGNORED) {
            arriving = false;
            if (threadIdx.x == 0) {
                x.soft[r] = x.hard[r] = 0.0f;
            }
            if (x.state != nullptr) {
                clear_packs<T, N>(row, 0, x.ld);
            }
            continue;
        }
        if (STAGED && !arriving) {
            share.template leaving<STAGED>([&](int i) { from.refill(i, from.student.row, from.teacher.row); });
        }
        /* Before the barrier of block_merge, so before anything of the row is overwritten. */
        float chosen = threadIdx.x != 0 ? 0.0f : target >= 0 && target < x.V ? to_f32(row[target]) : NAN, soft;
        row_sums a = {CPL_LOWEST, CPL_LOWEST, 0, 0, 0, 0};
        share.template arriving<STAGED>([&](int i) { absorb<KIND>(a, from.student.at(i, x.V), from.teacher.at(i, x.V), k); });
        a = block_merge<KIND>(a, parts[turn], k);
        turn ^= 1;
        float2 jsd = {0.0f, 0.0f};
        if (KIND == CPL_KD_JSD && !k.same) {
            jsd = jsd_sums(from, share, a, k, shared, x.V);
        }
        row_gradient g = gradient_of<KIND>(a, k, factor, jsd, &soft);
        if (threadIdx.x == 0) {
            x.soft[r] = soft;
            x.hard[r] = logf(a.plain) + (a.s_top - chosen);
        }
        if (x.state != nullptr) {
            write_row<KIND>(from, share, a, g, k, target, next, x.V);
            clear_packs<T, N>(row, share.packs, x.ld);
        } else if (next != 0) {
            share.template leaving<STAGED>([&](int i) { from.refill(i, row + next, from.teacher.row + next); });
        }
        arriving = next != 0;
    }
}

template <cpl_kd_kind KIND, typename T, int N, bool STAGED>
static cudaError_t launch(cpl_device *dev, const distill_rows &a, const distillation &k) {
    int threads = row_threads(cpl_ceil_div(a.V, N), MOST_THREADS), grid = 0;
    size_t shared = STAGED ? 2 * (size_t)cpl_ceil_div(a.V, N) * N * sizeof(T) : 0;
    cudaError_t error = row_grid(dev, distill_kernel<KIND, T, N, STAGED>, threads, shared, a.R, &grid);
    if (error == cudaSuccess) {
        distill_kernel<KIND, T, N, STAGED><<<grid, threads, shared, cpl_cuda_stream(dev)>>>(a, k);
    }
    return error;
}

template <typename T, int N, bool STAGED>
static cudaError_t launch_kind(cpl_device *dev, const distill_rows &a, const distillation &k, cpl_kd_kind kind) {
    switch (kind) {
    case CPL_KD_FORWARD_KL:
        return launch<CPL_KD_FORWARD_KL, T, N, STAGED>(dev, a, k);
    case CPL_KD_REVERSE_KL:
        return launch<CPL_KD_REVERSE_KL, T, N, STAGED>(dev, a, k);
    default:
        return launch<CPL_KD_JSD, T, N, STAGED>(dev, a, k);
    }
}

extern "C" cpl_status CPL_CUDA(distill_loss)(cpl_device *dev, cpl_dtype dt, void *student, const void *teacher, float *soft,
                                             float *hard, const int32_t *targets, const cpl_step_state *state, float row_weight,
                                             float temperature, float alpha, cpl_kd_kind kind, float beta, int64_t R, int64_t V,
                                             int64_t ld) {
    const distill_rows a = {student, teacher, soft, hard, targets, state, row_weight, R, V, ld};
    const distillation k = {(float)(1.4426950408889634 / (double)temperature),
                            temperature,
                            alpha,
                            beta,
                            temperature == 1.0f   ? 1
                            : temperature == 2.0f ? 2
                            : temperature == 4.0f ? 4
                                                  : 0,
                            kind == CPL_KD_JSD && (beta == 0.0f || beta == 1.0f)};
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
        if (!aligned16(student, teacher) || ld % N != 0) {
            error = launch_kind<T, 1, false>(dev, a, k, kind);
        } else if (2 * (size_t)cpl_ceil_div(V, N) * 16 > limit) {
            error = launch_kind<T, N, false>(dev, a, k, kind);
        } else {
            error = launch_kind<T, N, true>(dev, a, k, kind);
        }
    });
    cpl_status st = cpl_cuda_status(error, __FILE__, __LINE__, "distill_loss");
    return st != CPL_OK ? st : cpl_cuda_launched(dev, "distill_loss");
}

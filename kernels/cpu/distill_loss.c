/* Distillation loss of a student against a teacher and, in place of the student's logits, its gradient.
 * Refuses to hold probabilities of more than one row a thread, and to make nan of 0 log 0. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/loss.h"

/* One row, each [V]: logits of student and teacher (student later log(q/p) or log(q/m)), probabilities q and p at the temperature,
 * and the student's at temperature 1. */
typedef struct {
    float *student, *teacher, *q, *p, *plain;
} row;
enum { ROW_BUFFERS = 5 };

typedef struct {
    float temperature, alpha, beta;
    cpl_kd_kind kind;
    int64_t V;
} rules;

/* term = p log(p/q), d = log(p/q), here and below; 0 log 0 = 0, the limit. */
static void forward_terms(float *restrict term, const float *restrict d, const float *restrict p, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float t = p[i] * d[i];
        term[i] = p[i] == 0 ? 0 : t;
    }
}

/* term = q log(q/p), ratio = log(q/p) */
static void reverse_terms(float *restrict term, float *restrict ratio, const float *restrict d, const float *restrict q,
                          int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        ratio[i] = q[i] == 0 ? 0 : -d[i];
        term[i] = q[i] * ratio[i];
    }
}

/* term = beta p log(p/m) + (1-beta) q log(q/m), ratio = log(q/m). m over the larger of p and q is w + (1-w) e^-|d|, w the weight of
 * the larger one: nothing overflows, and p = q gives log 1 = 0 exactly. */
static void jsd_terms(float *restrict term, float *restrict ratio, const float *restrict d, const float *restrict p,
                      const float *restrict q, float beta, int64_t n) {
    float rest = 1.0f - beta;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        bool student_larger = d[i] < 0;
        float e = cpl_expf(-__builtin_fabsf(d[i]));
        float log_m = cpl_logf((student_larger ? rest : beta) + (student_larger ? beta : rest) * e);
        float p_over_m = student_larger ? d[i] - log_m : -log_m;
        float q_over_m = student_larger ? -log_m : -log_m - d[i];
        ratio[i] = q[i] == 0 ? 0 : q_over_m;
        float from_p = p[i] == 0 ? 0 : p[i] * p_over_m;
        term[i] = beta * from_p + rest * (q[i] * ratio[i]);
    }
}

static double weighted_sum(float *restrict scratch, const float *restrict q, const float *restrict ratio, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        scratch[i] = q[i] * ratio[i];
    }
    return (double)cpl_sum(scratch, n);
}

/* The soft loss of a row whose q, p are normalised; *mean = sum of q * ratio, which its gradient subtracts. d = teacher - student
 * log-probability = ((t - t_top) - (s - s_top)) / temperature + shift, exactly 0 for equal logits. */
static float soft_loss(const row *x, const rules *k, float s_top, float t_top, float shift, float *mean) {
    float d[CPL_LOSS_BLOCK], term[CPL_LOSS_BLOCK], inverse = 1.0f / k->temperature;
    double soft = 0, ratio_mean = 0;
    for (int64_t at = 0; at < k->V; at += CPL_LOSS_BLOCK) {
        int64_t n = cpl_min_i64(k->V - at, CPL_LOSS_BLOCK);
        float *s = x->student + at;
        const float *t = x->teacher + at;
        for (int64_t i = 0; i < n; i++) {
            d[i] = ((t[i] - t_top) - (s[i] - s_top)) * inverse + shift;
        }
        if (k->kind == CPL_KD_FORWARD_KL) {
            forward_terms(term, d, x->p + at, n);
        } else if (k->kind == CPL_KD_REVERSE_KL) {
            reverse_terms(term, s, d, x->q + at, n);
        } else {
            jsd_terms(term, s, d, x->p + at, x->q + at, k->beta, n);
        }
        soft += (double)cpl_sum(term, n);
        if (k->kind == CPL_KD_JSD) {
            ratio_mean += weighted_sum(term, x->q + at, s, n);
        }
    }
    *mean = (float)(k->kind == CPL_KD_JSD ? ratio_mean : soft);
    return (float)soft;
}

/* plain [V] becomes factor * d total / d student. d soft / d student = (q - p) / temperature, q (log(q/p) - soft) / temperature, or
 * (1-beta) q (log(q/m) - mean) / temperature; a weight of 0 leaves its part out, so that its infinities do not make nan. */
static void row_gradient(const row *x, const rules *k, int32_t target, float mean, float plain_sum, float factor) {
    float *restrict g = x->plain;
    const float *restrict q = x->q, *restrict p = x->p, *restrict ratio = x->student;
    float hard = 1.0f - k->alpha, normal = hard == 0 ? 0 : hard / plain_sum;
    float soft = k->alpha * k->temperature * (k->kind == CPL_KD_JSD ? 1.0f - k->beta : 1.0f);
    float chosen = hard == 0 ? 0 : hard * (g[target] / plain_sum - 1.0f);
    for (int64_t v = 0; v < k->V; v++) {
        g[v] *= normal;
    }
    g[target] = chosen;
    if (soft != 0 && k->kind == CPL_KD_FORWARD_KL) {
        for (int64_t v = 0; v < k->V; v++) {
            g[v] += soft * (q[v] - p[v]);
        }
    } else if (soft != 0) {
        for (int64_t v = 0; v < k->V; v++) {
            g[v] += soft * (q[v] * (ratio[v] - mean));
        }
    }
    for (int64_t v = 0; v < k->V; v++) {
        g[v] *= factor;
    }
}

static void scale_by(float *x, float factor, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        x[i] *= factor;
    }
}

/* Losses of a row of loaded logits; with factor != NULL also the gradient, in x->plain. */
static void one_row(const row *x, const rules *k, int32_t target, float *soft, float *hard, const float *factor) {
    float s_top = cpl_max(x->student, k->V), t_top = cpl_max(x->teacher, k->V), inverse = 1.0f / k->temperature, mean = 0;
    double plain_sum = cpl_loss_exp(x->plain, x->student, 1.0f, s_top, k->V);
    double q_sum = cpl_loss_exp(x->q, x->student, inverse, s_top, k->V);
    double p_sum = cpl_loss_exp(x->p, x->teacher, inverse, t_top, k->V);
    *hard = (float)(log(plain_sum) + ((double)s_top - (double)x->student[target]));
    scale_by(x->q, (float)(1.0 / q_sum), k->V);
    scale_by(x->p, (float)(1.0 / p_sum), k->V);
    bool same = k->kind == CPL_KD_JSD && (k->beta == 0 || k->beta == 1); /* m is q or p: the divergence is 0 whatever they are */
    if (same) {
        *soft = 0;
        memset(x->student, 0, (size_t)k->V * sizeof *x->student);
    } else {
        *soft = soft_loss(x, k, s_top, t_top, (float)(log(q_sum) - log(p_sum)), &mean);
    }
    if (factor) {
        row_gradient(x, k, target, mean, (float)plain_sum, *factor);
    }
}

cpl_status CPL_CPU(distill_loss)(cpl_device *dev, cpl_dtype dt, void *student, const void *teacher, float *soft, float *hard,
                                 const int32_t *targets, const cpl_step_state *state, float row_weight, float temperature,
                                 float alpha, cpl_kd_kind kind, float beta, int64_t R, int64_t V, int64_t ld) {
    cpl_status st = CPL_OK;
    float *rows; /* ROW_BUFFERS of [V] a thread */
    const rules k = {.temperature = temperature, .alpha = alpha, .beta = beta, .kind = kind, .V = V};
    int team = cpl_cpu_team(dev, R * V);
    int64_t stride = cpl_loss_stride(V);
    CPL_TRY(cpl_loss_check(targets, R, V, ld));
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_FLAT, (size_t)team * ROW_BUFFERS * (size_t)stride * sizeof *rows, &rows));
    float factor = state ? state->loss_scale * row_weight : 0;
#pragma omp parallel for schedule(static) num_threads(team)
    for (int64_t r = 0; r < R; r++) {
        float *own = rows + omp_get_thread_num() * ROW_BUFFERS * stride;
        const row x = {own, own + stride, own + 2 * stride, own + 3 * stride, own + 4 * stride};
        if (targets[r] == CPL_IGNORED) {
            soft[r] = hard[r] = 0;
            if (state) {
                cpl_loss_clear(dt, student, r * ld, ld);
            }
            continue;
        }
        cpl_load_act(dt, x.student, student, r * ld, V);
        cpl_load_act(dt, x.teacher, teacher, r * ld, V);
        one_row(&x, &k, targets[r], &soft[r], &hard[r], state ? &factor : NULL);
        if (state) {
            cpl_store_act(dt, student, r * ld, x.plain, V);
            cpl_loss_clear(dt, student, r * ld + V, ld - V);
        }
    }
done:
    return st;
}

/* Proves the three distillation losses and their gradients against f64 and finite differences.
 * Refuses to test one mixture only: alpha 0, 1 and between, temperatures below and above 1. */
#include "tests/support/support.h"
#include <math.h>
#include <string.h>

enum { R = 5, V = 1531, LD = 1536 };
static const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};
static const cpl_kd_kind kinds[] = {CPL_KD_FORWARD_KL, CPL_KD_REVERSE_KL, CPL_KD_JSD};
static const int32_t targets[R] = {0, V - 1, -100, 1024, 7};
typedef struct {
    double temperature, alpha, beta;
} mixture;
static const mixture mixtures[] = {{1, 0.5, 0.5}, {3, 0.75, 0.25}, {0.5, 1, 0.875}, {2, 0, 0.5}};
enum { MIXTURES = 4 };

static void log_softmax(double *out, const double *x, double temperature, int v) {
    double top = x[0], sum = 0;
    for (int i = 1; i < v; i++) {
        top = x[i] > top ? x[i] : top;
    }
    for (int i = 0; i < v; i++) {
        sum += exp((x[i] - top) / temperature);
    }
    for (int i = 0; i < v; i++) {
        out[i] = (x[i] - top) / temperature - log(sum);
    }
}

/* The definition, term by term. */
static double soft_oracle(const double *student, const double *teacher, cpl_kd_kind kind, const mixture *m, int v) {
    double *lq = test_array(v, 8), *lp = test_array(v, 8), sum = 0;
    log_softmax(lq, student, m->temperature, v);
    log_softmax(lp, teacher, m->temperature, v);
    for (int i = 0; i < v; i++) {
        double p = exp(lp[i]), q = exp(lq[i]), lm = log(m->beta * p + (1 - m->beta) * q);
        sum += kind == CPL_KD_FORWARD_KL   ? p * (lp[i] - lq[i])
               : kind == CPL_KD_REVERSE_KL ? q * (lq[i] - lp[i])
                                           : m->beta * p * (lp[i] - lm) + (1 - m->beta) * q * (lq[i] - lm);
    }
    test_release(&lq);
    test_release(&lp);
    return sum;
}
static double hard_oracle(const double *student, int32_t target, int v) {
    double *lq = test_array(v, 8);
    log_softmax(lq, student, 1, v);
    double loss = -lq[target];
    test_release(&lq);
    return loss;
}

typedef struct {
    double *student, *teacher; /* borrowed [v] */
    int32_t target;
    int v;
    cpl_kd_kind kind;
    mixture m;
} place;
static double total(void *context) {
    const place *x = context;
    return x->m.alpha * x->m.temperature * x->m.temperature * soft_oracle(x->student, x->teacher, x->kind, &x->m, x->v) +
           (1 - x->m.alpha) * hard_oracle(x->student, x->target, x->v);
}

static cpl_status call(cpl_device *dev, cpl_dtype dt, void *student, const void *teacher, float *soft, float *hard,
                       const cpl_step_state *state, cpl_kd_kind kind, const mixture *m) {
    int32_t on_device[R];
    memcpy(on_device, targets, sizeof on_device);
    return CPL_OPS(dev, distill_loss, dt, student, teacher, soft, hard, on_device, state, 0.25f, (float)m->temperature,
                   (float)m->alpha, kind, (float)m->beta, R, V, LD);
}

static void losses(cpl_device *dev) {
    for (int k = 0; k < 3 * MIXTURES; k++) {
        cpl_kd_kind kind = kinds[k % 3];
        const mixture *m = &mixtures[k / 3];
        cpl_dtype dt = types[k % 2 + k / 3 % 2];
        double *s64, *t64, want_soft[R] = {0}, want_hard[R] = {0};
        void *student = test_act(dt, 1, R * LD, 2.0f, &s64), *teacher = test_act(dt, 2, R * LD, 3.0f, &t64);
        void *kept = test_act(dt, 1, R * LD, 2.0f, NULL);
        float soft[R], hard[R];
        for (int r = 0; r < R; r++) {
            if (targets[r] >= 0) {
                want_soft[r] = soft_oracle(s64 + r * LD, t64 + r * LD, kind, m, V);
                want_hard[r] = hard_oracle(s64 + r * LD, targets[r], V);
            }
        }
        assert_ok(call(dev, dt, student, teacher, soft, hard, NULL, kind, m));
        test_close("soft", CPL_F32, soft, want_soft, R, 1e-6, 2e-6);
        test_close("hard", CPL_F32, hard, want_hard, R, 1e-6, 2e-7);
        test_same_bits("logits without a gradient", student, kept, R * LD * cpl_dtype_size(dt));
        test_release(&s64);
        test_release(&t64);
        test_release(&student);
        test_release(&teacher);
        test_release(&kept);
    }
}
static void test_soft_and_hard_losses_agree_with_f64(void **unused) {
    (void)unused;
    test_on_devices(losses);
}

/* Every logit of a short row, all kinds and mixtures. */
static void differences(cpl_device *dev) {
    enum { SHORT = 23 };
    const cpl_step_state state = {.loss_scale = 8};
    for (int k = 0; k < 3 * MIXTURES; k++) {
        float *s = test_normals(3, SHORT, 1.5f), *t = test_normals(4, SHORT, 1.5f), soft, hard;
        place x = {test_widen(CPL_F32, s, SHORT), test_widen(CPL_F32, t, SHORT), 6, SHORT, kinds[k % 3], mixtures[k / 3]};
        assert_ok(CPL_OPS(dev, distill_loss, CPL_F32, s, t, &soft, &hard, &x.target, &state, 0.25f, (float)x.m.temperature,
                          (float)x.m.alpha, x.kind, (float)x.m.beta, 1, SHORT, SHORT));
        for (int i = 0; i < SHORT; i++) {
            double want = 2 * test_derivative(total, &x, &x.student[i], 1e-5);
            test_close("dstudent", CPL_F32, &s[i], &want, 1, 2e-6, 3e-6);
        }
        test_release(&s);
        test_release(&t);
        test_release(&x.student);
        test_release(&x.teacher);
    }
}
static void test_gradients_agree_with_finite_differences(void **unused) {
    (void)unused;
    test_on_devices(differences);
}

/* Long rows in every storage type against the closed form d total / d s = alpha T (q-p) + (1-alpha) (softmax - onehot); padding and
 * ignored rows are 0. */
static void long_rows(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1024};
    const mixture *m = &mixtures[1];
    for (int k = 0; k < 3; k++) {
        cpl_dtype dt = types[k];
        double *s64, *t64, *want = test_array(R * LD, 8), *lq = test_array(V, 8), *lp = test_array(V, 8), *l1 = test_array(V, 8);
        void *student = test_act(dt, 1, R * LD, 2.0f, &s64), *teacher = test_act(dt, 2, R * LD, 3.0f, &t64);
        float soft[R], hard[R];
        for (int r = 0; r < R; r++) {
            log_softmax(lq, s64 + r * LD, m->temperature, V);
            log_softmax(lp, t64 + r * LD, m->temperature, V);
            log_softmax(l1, s64 + r * LD, 1, V);
            for (int i = 0; targets[r] >= 0 && i < V; i++) {
                want[r * LD + i] = 256 * (m->alpha * m->temperature * (exp(lq[i]) - exp(lp[i])) +
                                          (1 - m->alpha) * (exp(l1[i]) - (i == targets[r])));
            }
        }
        assert_ok(call(dev, dt, student, teacher, soft, hard, &state, CPL_KD_FORWARD_KL, m));
        test_close("dstudent", dt, student, want, R * LD, 1e-6, 1.01 * test_roundoff(dt) + 1e-5);
        test_release(&s64);
        test_release(&t64);
        test_release(&want);
        test_release(&lq);
        test_release(&lp);
        test_release(&l1);
        test_release(&student);
        test_release(&teacher);
    }
}
static void test_long_rows_padding_and_ignored_rows_have_the_closed_form_gradient(void **unused) {
    (void)unused;
    test_on_devices(long_rows);
}

static void identical(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    const mixture m = {2, 1, 0.3};
    for (int k = 0; k < 3; k++) {
        float *student = test_normals(5, R * LD, 3.0f), *teacher = test_normals(5, R * LD, 3.0f), soft[R], hard[R];
        assert_ok(call(dev, CPL_F32, student, teacher, soft, hard, &state, kinds[k], &m));
        for (int r = 0; r < R; r++) {
            assert_true(soft[r] == 0);
            assert_true(targets[r] < 0 ? hard[r] == 0 : hard[r] > 0);
        }
        for (int i = 0; i < R * LD; i++) {
            assert_true(student[i] == 0);
        }
        test_release(&student);
        test_release(&teacher);
    }
}
static void test_identical_teacher_and_student_have_no_soft_loss_and_no_gradient(void **unused) {
    (void)unused;
    test_on_devices(identical);
}

static void alpha_0_is_cross_entropy(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 4};
    for (int k = 0; k < 3; k++) {
        float *student = test_normals(1, R * LD, 2.0f), *logits = test_normals(1, R * LD, 2.0f),
              *teacher = test_normals(2, R * LD, 2.0f);
        float soft[R], hard[R], loss[R];
        int32_t on_device[R];
        memcpy(on_device, targets, sizeof on_device);
        teacher[0] = INFINITY; /* a weight of 0 leaves the teacher out, even this one */
        assert_ok(call(dev, CPL_F32, student, teacher, soft, hard, &state, kinds[k], &mixtures[3]));
        assert_ok(CPL_OPS(dev, cross_entropy, CPL_F32, logits, loss, on_device, &state, 0.25f, R, V, LD));
        if (test_on_gpu()) { /* there its sum is one of squares of e^(x/2) */
            double *want_hard = test_widen(CPL_F32, loss, R);
            test_close("hard", CPL_F32, hard, want_hard, R, 1e-6, 2e-7);
            test_release(&want_hard);
        } else {
            test_same_bits("hard", hard, loss, sizeof loss);
        }
        double *want = test_widen(CPL_F32, logits, R * LD);
        test_close("gradient", CPL_F32, student, want, R * LD, 0, 3e-7);
        test_release(&want);
        test_release(&student);
        test_release(&logits);
        test_release(&teacher);
    }
}
static void test_alpha_0_is_cross_entropy(void **unused) {
    (void)unused;
    test_on_devices(alpha_0_is_cross_entropy);
}

static void huge(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    const float tops[] = {100, 1e4f, 1e30f, 3.4e38f};
    for (int k = 0; k < 12; k++) {
        float top = tops[k / 3], s[4] = {top, -top, 0, top}, t[4] = {top, -top, -top, top}, soft, hard;
        int32_t target = 0;
        for (int half = 0; half < 2; half++) { /* T = 1/2 doubles them */
            float student[4];
            memcpy(student, s, sizeof s);
            assert_ok(CPL_OPS(dev, distill_loss, CPL_F32, student, t, &soft, &hard, &target, &state, 1.0f, half ? 0.5f : 2.0f, 0.5f,
                              kinds[k % 3], 0.5f, 1, 4, 4));
            assert_true(fabsf(soft) < 1e-6f && fabsf(hard - 0.6931472f) < 1e-6f);
            const double want[4] = {-0.25, 0, 0, 0.25};
            test_close("dstudent", CPL_F32, student, want, 4, 1e-6, 0);
        }
    }
}
static void test_huge_finite_logits_never_give_nan(void **unused) {
    (void)unused;
    test_on_devices(huge);
}

static void opposed(cpl_device *dev) {
    float s[2] = {200, -200}, t[2] = {-200, 200}, soft, hard; /* disjoint as far as f32 sees */
    int32_t target = 0;
    const double want[3] = {400, 400, 0.6931471805599453};
    for (int k = 0; k < 3; k++) {
        assert_ok(
            CPL_OPS(dev, distill_loss, CPL_F32, s, t, &soft, &hard, &target, NULL, 1.0f, 1.0f, 0.5f, kinds[k], 0.5f, 1, 2, 2));
        test_close("soft", CPL_F32, &soft, &want[k], 1, 0, 1e-6);
    }
}
static void test_disjoint_distributions_have_their_limits(void **unused) {
    (void)unused;
    test_on_devices(opposed);
}

static void bad_logits(cpl_device *dev) {
    const cpl_step_state state = {.loss_scale = 1};
    const float bad[] = {INFINITY, NAN};
    for (int k = 0; k < 12; k++) {
        float *x[2] = {test_normals(1, R * LD, 2.0f), test_normals(2, R * LD, 2.0f)}, soft[R], hard[R];
        x[k / 6][3 * LD + 40] = bad[k % 2];
        assert_ok(call(dev, CPL_F32, x[0], x[1], soft, hard, &state, kinds[k / 2 % 3], &mixtures[1]));
        assert_false(isfinite(soft[3]));
        assert_true(k / 6 == 1 || !isfinite(hard[3]));
        assert_false(isfinite(x[0][3 * LD + 40]));
        assert_false(isfinite(x[0][3 * LD + V - 1]));
        assert_true(isfinite(soft[4]) && isfinite(hard[4]) && isfinite(x[0][4 * LD]));
        test_release(&x[0]);
        test_release(&x[1]);
    }
}
static void test_inf_and_nan_reach_the_loss_and_the_gradient(void **unused) {
    (void)unused;
    test_on_devices(bad_logits);
}

static void extreme_beta(cpl_device *dev) {
    for (int k = 0; k < 2; k++) { /* m is one of the two distributions, the other has no weight */
        const cpl_step_state state = {.loss_scale = 1};
        const mixture m = {1, 1, k};
        float *student = test_normals(1, R * LD, 200.0f), *teacher = test_normals(2, R * LD, 200.0f), soft[R], hard[R];
        assert_ok(call(dev, CPL_F32, student, teacher, soft, hard, &state, CPL_KD_JSD, &m));
        for (int r = 0; r < R; r++) {
            assert_true(soft[r] == 0);
        }
        for (int i = 0; i < R * LD; i++) {
            assert_true(student[i] == 0);
        }
        test_release(&student);
        test_release(&teacher);
    }
}
static void test_jsd_of_beta_0_and_1_is_0(void **unused) {
    (void)unused;
    test_on_devices(extreme_beta);
}

static void test_threads_do_not_show_in_the_bits(void **unused) {
    (void)unused;
    enum { MANY = 4 };
    const cpl_step_state state = {.loss_scale = 1024};
    const int32_t many[MANY * R] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
    void *teachers = test_act(CPL_F16, 2, MANY * R * LD, 3.0f, NULL);
    for (int k = 0; test_isas[k] != NULL; k++) {
        void *x[2];
        float soft[2][MANY * R] = {{0}}, hard[2][MANY * R] = {{0}};
        for (int i = 0; i < 2; i++) {
            cpl_device *dev = test_device(test_isas[k], 1 + i);
            x[i] = test_act(CPL_F16, 1, MANY * R * LD, 3.0f, NULL);
            if (dev != NULL) {
                assert_ok(CPL_OPS(dev, distill_loss, CPL_F16, x[i], teachers, soft[i], hard[i], many, &state, 0.25f, 2.0f, 0.5f,
                                  CPL_KD_JSD, 0.5f, MANY * R, V, LD));
            }
            cpl_device_destroy(&dev);
        }
        test_same_bits("soft", soft[0], soft[1], sizeof soft[0]);
        test_same_bits("hard", hard[0], hard[1], sizeof hard[0]);
        test_same_bits("dstudent", x[0], x[1], MANY * R * LD * 2);
        test_release(&x[0]);
        test_release(&x[1]);
    }
    test_release(&teachers);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_soft_and_hard_losses_agree_with_f64),
        cmocka_unit_test(test_gradients_agree_with_finite_differences),
        cmocka_unit_test(test_long_rows_padding_and_ignored_rows_have_the_closed_form_gradient),
        cmocka_unit_test(test_identical_teacher_and_student_have_no_soft_loss_and_no_gradient),
        cmocka_unit_test(test_alpha_0_is_cross_entropy),
        cmocka_unit_test(test_huge_finite_logits_never_give_nan),
        cmocka_unit_test(test_disjoint_distributions_have_their_limits),
        cmocka_unit_test(test_inf_and_nan_reach_the_loss_and_the_gradient),
        cmocka_unit_test(test_jsd_of_beta_0_and_1_is_0),
        cmocka_unit_test(test_threads_do_not_show_in_the_bits),
    };
    return test_main(tests, NULL, NULL);
}

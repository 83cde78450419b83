/* Proves loss, gradients, distillation and AdamW steps equal to PyTorch's in float64 (tests/golden/make_golden.py).
 * Refuses to compare samples alone: norm and a random projection of every tensor are compared too. */
#include "tests/jobs/model/rig.h"
#include "tests/support/support.h"
#include "tests/golden/gpt2_small.h"

/* Tolerances per storage format, relative to a tensor's norm; f32 is the agreement of two orders of summation, the others a few
 * units of rounding of every activation, weight and gradient over two blocks. */
static double tolerance(cpl_dtype dt) {
    return dt == CPL_F32 ? test_slack(2e-6) : dt == CPL_F16 ? 4e-3 : 3e-2;
}
static double loss_tolerance(cpl_dtype dt) {
    return dt == CPL_F32 ? test_slack(1e-6) : dt == CPL_F16 ? 1e-3 : 1e-2;
}

static void close_to(const char *what, double got, double want, double relative) {
    if (!(fabs(got - want) <= relative * fabs(want))) {
        fail_msg("%s: %.9g, expected %.9g to %.2g", what, got, want, relative);
    }
}

static void check_gradient(cpl_dtype dt) {
    cpl_device *dev = rig_device(1);
    rig r;
    rig_create(&r, dev, golden_student, dt, GOLDEN_B, true, CPL_RECOMPUTE_NONE, 0);
    float scale = dt == CPL_F16 ? 1024.0f : 1.0f;
    rig_put_scale(&r, scale);
    float *grad = rig_gradient(&r, NULL), *rows = test_array(r.R, sizeof *rows);
    for (int64_t i = 0; i < r.l->total; i++) {
        grad[i] /= scale;
    }
    close_to("loss", rig_mean(&r, r.hard), golden_loss, loss_tolerance(dt));
    assert_ok(CPL_OPS(dev, download, rows, r.hard, (size_t)r.R * sizeof *rows));
    test_close("losses of rows", CPL_F32, rows, golden_rows, r.R, 4.0 * loss_tolerance(dt), 4.0 * loss_tolerance(dt));
    print_message("%s: worst relative deviation of a gradient %.2g\n", cpl_dtype_name(dt),
                  rig_compare(r.l, grad, golden_gradient, tolerance(dt)));
    test_release(&grad);
    test_release(&rows);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

static void test_golden_losses_and_gradients_f32(void **state) {
    (void)state;
    check_gradient(CPL_F32);
}
static void test_golden_losses_and_gradients_bf16(void **state) {
    (void)state;
    check_gradient(CPL_BF16);
}
static void test_golden_losses_and_gradients_f16(void **state) {
    (void)state;
    check_gradient(CPL_F16);
}

static void test_golden_forward_only_losses_are_those_of_the_step(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    rig r;
    rig_create(&r, dev, golden_student, CPL_F32, GOLDEN_B, false, CPL_RECOMPUTE_NONE, 5);
    assert_ok(cpl_model_forward(r.ws, r.weights, r.tokens));
    assert_ok(cpl_model_losses(r.ws, r.weights, r.targets, r.hard));
    close_to("loss", rig_mean(&r, r.hard), golden_loss, loss_tolerance(CPL_F32));
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

static void check_distillation(cpl_dtype dt, cpl_kd_kind kind, double soft, double hard, const golden_tensor *golden) {
    cpl_device *dev = rig_device(1);
    rig r, teacher;
    rig_create(&r, dev, golden_student, dt, GOLDEN_B, true, CPL_RECOMPUTE_NONE, 0);
    rig_create(&teacher, dev, golden_teacher, dt, GOLDEN_B, false, CPL_RECOMPUTE_NONE, 0);
    rig_fill(&teacher, RIG_TEACHER);
    const cpl_model_loss loss = {.teacher_weights = teacher.weights,
                                 .teacher_workspace = teacher.ws,
                                 .temperature = golden_temperature,
                                 .alpha = golden_alpha,
                                 .beta = golden_beta,
                                 .kind = kind};
    float *grad = rig_gradient(&r, &loss);
    close_to("soft", rig_mean(&r, r.soft), soft, 8.0 * loss_tolerance(dt));
    close_to("hard", rig_mean(&r, r.hard), hard, loss_tolerance(dt));
    print_message("%s kind %d: worst relative deviation of a gradient %.2g\n", cpl_dtype_name(dt), (int)kind,
                  rig_compare(r.l, grad, golden, 2.0 * tolerance(dt)));
    test_release(&grad);
    rig_destroy(&teacher);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

static void test_golden_distillation_every_kind(void **state) {
    (void)state;
    for (cpl_dtype dt = CPL_F32; dt <= CPL_BF16; dt++) {
        check_distillation(dt, CPL_KD_FORWARD_KL, golden_forward_kl_soft, golden_forward_kl_hard, golden_forward_kl);
        check_distillation(dt, CPL_KD_REVERSE_KL, golden_reverse_kl_soft, golden_reverse_kl_hard, golden_reverse_kl);
        check_distillation(dt, CPL_KD_JSD, golden_jsd_soft, golden_jsd_hard, golden_jsd);
    }
}

/* Three steps of two micro-batches with clipping, decay on the 2-D tensors and a power-of-two loss scale. */
static void test_golden_parameters_after_adamw_steps(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    rig r;
    rig_create(&r, dev, golden_student, CPL_F32, GOLDEN_B, true, CPL_RECOMPUTE_NONE, 0);
    int64_t n = r.l->total, decayed = r.l->decayed_end, chunks = (n + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK;
    const cpl_step_rules rules = {.growth = 2.0f,
                                  .backoff = 0.5f,
                                  .growth_interval = 2000,
                                  .hysteresis = 1,
                                  .min_scale = 1.0f,
                                  .max_scale = 65536.0f,
                                  .clip = golden_clip,
                                  .beta1 = golden_beta1,
                                  .beta2 = golden_beta2,
                                  .eps = golden_eps,
                                  .inv_micro_batches = 1.0f / GOLDEN_MICRO_BATCHES};
    cpl_step_state host = {.loss_scale = 256.0f};
    float *m = NULL, *v = NULL, *w = r.weights;
    double *sums = NULL;
    uint32_t *overflow = NULL;
    assert_ok(cpl_device_alloc(dev, &m, (size_t)n, sizeof *m, "first moment"));
    assert_ok(cpl_device_alloc(dev, &v, (size_t)n, sizeof *v, "second moment"));
    assert_ok(cpl_device_alloc(dev, &sums, (size_t)chunks, sizeof *sums, "partial sums"));
    assert_ok(cpl_device_alloc(dev, &overflow, 1, sizeof *overflow, "overflow"));
    for (uint32_t step = 0; step < GOLDEN_STEPS; step++) {
        double loss = 0.0;
        host.lr = golden_rates[step];
        assert_ok(CPL_OPS(dev, upload, r.state, &host, sizeof host));
        assert_ok(CPL_OPS(dev, zero, r.grad, (size_t)n * sizeof *r.grad));
        for (uint32_t micro = 0; micro < GOLDEN_MICRO_BATCHES; micro++) {
            rig_put_batch(&r, 10 + step * GOLDEN_MICRO_BATCHES + micro, true);
            rig_accumulate(&r, NULL);
            loss += rig_mean(&r, r.hard) / GOLDEN_MICRO_BATCHES;
        }
        assert_ok(CPL_OPS(dev, sum_squares, sums, r.grad, n));
        assert_ok(CPL_OPS(dev, step_control, r.state, &rules, overflow, sums, chunks));
        assert_ok(CPL_OPS(dev, adamw, CPL_F32, w, w, NULL, m, v, r.grad, NULL, decayed, golden_decay, r.state, &rules));
        assert_ok(CPL_OPS(dev, adamw, CPL_F32, w + decayed, w + decayed, NULL, m + decayed, v + decayed, r.grad + decayed, NULL,
                          n - decayed, 0.0f, r.state, &rules));
        assert_ok(CPL_OPS(dev, download, &host, r.state, sizeof host));
        close_to("loss of a step", loss, golden_step_loss[step], test_slack(4e-6));
        close_to("gradient norm of a step", host.grad_norm, golden_step_norm[step], test_slack(4e-6));
        assert_int_equal(host.skip, 0);
    }
    assert_int_equal(host.adam_step, GOLDEN_STEPS);
    assert_ok(CPL_OPS(dev, download, r.values, w, (size_t)n * sizeof *w));
    print_message("parameters: worst relative deviation %.2g\n", rig_compare(r.l, r.values, golden_updated, test_slack(4e-6)));
    cpl_device_free(dev, &m);
    cpl_device_free(dev, &v);
    cpl_device_free(dev, &sums);
    cpl_device_free(dev, &overflow);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_losses_and_gradients_f32),
        cmocka_unit_test(test_golden_losses_and_gradients_bf16),
        cmocka_unit_test(test_golden_losses_and_gradients_f16),
        cmocka_unit_test(test_golden_forward_only_losses_are_those_of_the_step),
        cmocka_unit_test(test_golden_distillation_every_kind),
        cmocka_unit_test(test_golden_parameters_after_adamw_steps),
    };
    return test_main(tests, NULL, NULL);
}

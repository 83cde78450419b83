/* Proves the gradient of the whole model by finite differences of its loss, per tensor, over odd shapes and every kind of loss.
 * Refuses f32 sums: losses of rows are added in f64. */
#include "tests/jobs/model/rig.h"
#include "tests/support/support.h"

/* Mean loss of the weights values + step * direction on one tensor; the loss rows come from cpl_model_step itself. */
static double loss_at(rig *r, const cpl_model_loss *loss, const cpl_param *p, const float *direction, double step) {
    int64_t n = cpl_param_count(p);
    float *saved = test_array(n, sizeof *saved);
    memcpy(saved, r->values + p->offset, (size_t)n * sizeof *saved);
    for (int64_t i = 0; i < n; i++) {
        r->values[p->offset + i] += (float)(step * direction[i]);
    }
    rig_put_values(r);
    double hidden = 0.0;
    if (loss != NULL && loss->hidden != NULL) {
        assert_ok(CPL_OPS(r->dev, zero, loss->hidden, sizeof *loss->hidden));
    }
    rig_accumulate(r, loss);
    if (loss != NULL && loss->hidden != NULL) {
        assert_ok(CPL_OPS(r->dev, download, &hidden, loss->hidden, sizeof hidden));
    }
    double soft = loss != NULL ? rig_mean(r, r->soft) : 0.0, hard = rig_mean(r, r->hard);
    memcpy(r->values + p->offset, saved, (size_t)n * sizeof *saved);
    rig_put_values(r);
    test_release(&saved);
    return cpl_model_loss_total(loss, soft, hard) + hidden;
}

/* Fourth-order central difference along `direction`. The steps are exact in f32 where direction and values are multiples of 2^-25.
 */
static double derivative(rig *r, const cpl_model_loss *loss, const cpl_param *p, const float *direction, double h) {
    double near = loss_at(r, loss, p, direction, h) - loss_at(r, loss, p, direction, -h);
    double far = loss_at(r, loss, p, direction, 2 * h) - loss_at(r, loss, p, direction, -2 * h);
    return (8.0 * near - far) / (12.0 * h);
}

/* A random direction through each tensor, and single elements of it. With a step of 1/64 the f32 loss is good to about 3e-5 of
 * derivative; `relative` is of the size a random projection of that gradient has. */
static void check_gradient(rig *r, const cpl_model_loss *loss, int elements) {
    const double h = 1.0 / 64, absolute = test_slack(6e-5), relative = 1e-3;
    float *grad = rig_gradient(r, loss);
    for (int64_t t = 0; t < r->l->count; t++) {
        const cpl_param *p = &r->l->param[t];
        int64_t n = cpl_param_count(p);
        float *direction = test_array(n, sizeof *direction);
        for (int probe = 0; probe <= elements; probe++) {
            double want = 0.0, size = 0.0;
            int64_t chosen = (int64_t)(rig_mix(700 + (uint32_t)probe, (uint32_t)t) % (uint32_t)n);
            for (int64_t i = 0; i < n; i++) {
                direction[i] = probe == 0 ? (float)rig_uniform(600 + (uint32_t)t, (uint32_t)i) : i == chosen ? 1.0f : 0.0f;
                want += (double)direction[i] * grad[p->offset + i];
                size += (double)direction[i] * direction[i] * grad[p->offset + i] * grad[p->offset + i];
            }
            double got = derivative(r, loss, p, direction, h);
            if (!(fabs(got - want) <= absolute + relative * sqrt(size))) {
                fail_msg("%s, probe %d: gradient %.7g, finite difference %.7g", p->name, probe, want, got);
            }
        }
        test_release(&direction);
    }
    test_release(&grad);
}

static void check_shape(cpl_model_shape shape, int64_t B, int64_t loss_rows, bool ignored, int elements) {
    cpl_device *dev = rig_device(1);
    rig r;
    rig_create(&r, dev, shape, CPL_F32, B, true, CPL_RECOMPUTE_NONE, loss_rows);
    rig_put_batch(&r, 3, ignored);
    check_gradient(&r, NULL, elements);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

static void test_gradient_odd_shape_equals_finite_differences(void **state) {
    (void)state;
    check_shape((cpl_model_shape){.layers = 2, .heads = 3, .width = 21, .context = 13, .vocab = 37}, 2, 0, true, 3);
}

static void test_gradient_smallest_shapes_equal_finite_differences(void **state) {
    (void)state;
    check_shape((cpl_model_shape){.layers = 1, .heads = 1, .width = 1, .context = 1, .vocab = 1}, 1, 0, false, 1);
    check_shape((cpl_model_shape){.layers = 1, .heads = 1, .width = 5, .context = 1, .vocab = 3}, 1, 0, false, 2);
    check_shape((cpl_model_shape){.layers = 3, .heads = 1, .width = 7, .context = 3, .vocab = 2}, 1, 2, false, 2);
    check_shape((cpl_model_shape){.layers = 1, .heads = 5, .width = 5, .context = 4, .vocab = 9}, 3, 5, false, 2);
}

static void test_gradient_long_context_equals_finite_differences(void **state) {
    (void)state;
    check_shape((cpl_model_shape){.layers = 1, .heads = 2, .width = 22, .context = 131, .vocab = 19}, 1, 50, true, 1);
}

static void test_gradient_of_every_distillation_equals_finite_differences(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    for (cpl_kd_kind kind = CPL_KD_FORWARD_KL; kind <= CPL_KD_JSD; kind++) {
        rig r, teacher;
        rig_create(&r, dev, (cpl_model_shape){.layers = 2, .heads = 2, .width = 10, .context = 7, .vocab = 23}, CPL_F32, 3, true,
                   CPL_RECOMPUTE_GELU, 8);
        rig_create(&teacher, dev, (cpl_model_shape){.layers = 1, .heads = 3, .width = 15, .context = 7, .vocab = 23}, CPL_F32, 3,
                   false, CPL_RECOMPUTE_NONE, 5);
        rig_fill(&teacher, RIG_TEACHER);
        const cpl_model_loss loss = {.teacher_weights = teacher.weights,
                                     .teacher_workspace = teacher.ws,
                                     .temperature = 2.0f,
                                     .alpha = 0.6f,
                                     .beta = 0.4f,
                                     .kind = kind};
        check_gradient(&r, &loss, 1);
        rig_destroy(&teacher);
        rig_destroy(&r);
    }
    cpl_device_destroy(&dev);
}

/* With and without a projection. */
static void check_hidden(cpl_device *dev, int64_t teacher_width, bool projected) {
    const cpl_model_shape student = {.layers = 1, .heads = 2, .width = 10, .context = 7, .vocab = 23};
    const cpl_model_shape tall = {.layers = 2, .heads = 5, .width = teacher_width, .context = 7, .vocab = 23};
    cpl_layout *l = NULL;
    rig r, teacher;
    assert_ok(projected ? cpl_layout_create_projected(&l, &student, teacher_width) : cpl_layout_create(&l, &student));
    rig_create_of(&r, dev, l, CPL_F32, 3, true, CPL_RECOMPUTE_BLOCK, 8);
    rig_create(&teacher, dev, tall, CPL_F32, 3, false, CPL_RECOMPUTE_NONE, 0);
    rig_fill(&teacher, RIG_TEACHER);
    cpl_model_loss loss = {.teacher_weights = teacher.weights,
                           .teacher_workspace = teacher.ws,
                           .temperature = 2.0f,
                           .alpha = 0.6f,
                           .hidden_weight = 1.5f};
    assert_ok(cpl_device_alloc(dev, &loss.hidden, 1, sizeof *loss.hidden, "hidden loss"));
    check_gradient(&r, &loss, 1);
    cpl_device_free(dev, &loss.hidden);
    rig_destroy(&teacher);
    rig_destroy(&r);
}

static void test_gradient_of_the_hidden_state_loss_equals_finite_differences(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    check_hidden(dev, 15, true);
    check_hidden(dev, 5, true);
    check_hidden(dev, 10, true);
    check_hidden(dev, 10, false);
    cpl_device_destroy(&dev);
}

/* Powers of two pass through every rounding of f32 unchanged. */
static void test_gradient_is_proportional_to_the_loss_scale_and_accumulates(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    rig r;
    rig_create(&r, dev, (cpl_model_shape){.layers = 2, .heads = 3, .width = 21, .context = 13, .vocab = 37}, CPL_F32, 2, true,
               CPL_RECOMPUTE_NONE, 0);
    int64_t n = r.l->total;
    float *one = rig_gradient(&r, NULL), *twice = test_array(n, sizeof *twice), *scaled;
    rig_put_scale(&r, 4096.0f);
    scaled = rig_gradient(&r, NULL);
    for (int64_t i = 0; i < n; i++) {
        scaled[i] /= 4096.0f;
    }
    test_same_bits("gradient at scale 4096", scaled, one, (size_t)n * sizeof *one);
    rig_put_scale(&r, 1.0f);
    assert_ok(CPL_OPS(dev, zero, r.grad, (size_t)n * sizeof *one));
    rig_accumulate(&r, NULL);
    rig_accumulate(&r, NULL);
    assert_ok(CPL_OPS(dev, download, twice, r.grad, (size_t)n * sizeof *one));
    for (int64_t t = 0; t < r.l->count; t++) {
        double error = 0.0, size = 0.0;
        for (int64_t i = r.l->begin[t]; i < r.l->begin[t + 1]; i++) {
            error = fmax(error, fabs(twice[i] - 2.0 * one[i]));
            size = fmax(size, fabs(2.0 * one[i]));
        }
        assert_true(error <= test_slack(2e-6) * size);
    }
    test_release(&one);
    test_release(&twice);
    test_release(&scaled);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

static void test_gradient_is_zero_when_every_target_is_ignored(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    rig r;
    rig_create(&r, dev, (cpl_model_shape){.layers = 1, .heads = 1, .width = 6, .context = 5, .vocab = 7}, CPL_F32, 2, true,
               CPL_RECOMPUTE_NONE, 0);
    int32_t ignored[10];
    for (int i = 0; i < 10; i++) {
        ignored[i] = -100;
    }
    assert_ok(CPL_OPS(dev, upload, r.targets, ignored, sizeof ignored));
    float *grad = rig_gradient(&r, NULL);
    for (int64_t i = 0; i < r.l->total; i++) {
        assert_true(grad[i] == 0.0f);
    }
    test_release(&grad);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradient_odd_shape_equals_finite_differences),
        cmocka_unit_test(test_gradient_smallest_shapes_equal_finite_differences),
        cmocka_unit_test(test_gradient_long_context_equals_finite_differences),
        cmocka_unit_test(test_gradient_of_every_distillation_equals_finite_differences),
        cmocka_unit_test(test_gradient_of_the_hidden_state_loss_equals_finite_differences),
        cmocka_unit_test(test_gradient_is_proportional_to_the_loss_scale_and_accumulates),
        cmocka_unit_test(test_gradient_is_zero_when_every_target_is_ignored),
    };
    return test_main(tests, NULL, NULL);
}

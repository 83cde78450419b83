/* Proves that recomputation, the number of threads and the chunks of the head change no bit that they promise not to change.
 * Refuses tolerances where bits are promised. */
#include "jobs/model/internal.h"
#include "tests/jobs/model/rig.h"
#include "tests/support/support.h"

static const cpl_model_shape shape = {.layers = 3, .heads = 3, .width = 33, .context = 70, .vocab = 101};

/* Gradient and losses of one step, new arrays. */
static float *step_of(int threads, cpl_dtype dt, cpl_recompute recompute, int64_t loss_rows, float **rows) {
    cpl_device *dev = rig_device(threads);
    rig r;
    rig_create(&r, dev, shape, dt, 3, true, recompute, loss_rows);
    rig_put_scale(&r, 256.0f);
    float *grad = rig_gradient(&r, NULL);
    *rows = test_array(r.R, sizeof **rows);
    assert_ok(CPL_OPS(dev, download, *rows, r.hard, (size_t)r.R * sizeof **rows));
    rig_destroy(&r);
    cpl_device_destroy(&dev);
    return grad;
}

static size_t grad_bytes(void) {
    cpl_layout *l = NULL;
    assert_ok(cpl_layout_create(&l, &shape));
    size_t bytes = (size_t)l->total * sizeof(float);
    cpl_layout_destroy(&l);
    return bytes;
}

static void check_same_bits(int threads, cpl_recompute recompute) {
    for (cpl_dtype dt = CPL_F32; dt <= CPL_F16; dt++) {
        float *rows, *other_rows;
        float *grad = step_of(1, dt, CPL_RECOMPUTE_NONE, 0, &rows), *other = step_of(threads, dt, recompute, 0, &other_rows);
        test_same_bits(cpl_dtype_name(dt), grad, other, grad_bytes());
        test_same_bits("losses", rows, other_rows, (size_t)3 * 70 * sizeof *rows);
        test_release(&grad);
        test_release(&other);
        test_release(&rows);
        test_release(&other_rows);
    }
}

static void test_recompute_gelu_gives_the_same_bits(void **state) {
    (void)state;
    check_same_bits(1, CPL_RECOMPUTE_GELU);
}
static void test_recompute_block_gives_the_same_bits(void **state) {
    (void)state;
    check_same_bits(1, CPL_RECOMPUTE_BLOCK);
}
static void test_two_threads_give_the_same_bits(void **state) {
    (void)state;
    check_same_bits(2, CPL_RECOMPUTE_NONE);
    check_same_bits(2, CPL_RECOMPUTE_BLOCK);
}

/* The head's weight gradient is summed per chunk, so it may differ by rounding; all else sees the same rows. */
static void test_loss_rows_change_only_the_order_of_sums(void **state) {
    (void)state;
    float *rows, *other_rows;
    float *grad = step_of(1, CPL_F32, CPL_RECOMPUTE_NONE, 0, &rows);
    size_t n = grad_bytes() / sizeof *grad;
    static const int64_t chunks[] = {1, 7, 64, 209};
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
        float *other = step_of(1, CPL_F32, CPL_RECOMPUTE_NONE, chunks[c], &other_rows);
        double square = 0.0, error = 0.0;
        for (size_t i = 0; i < n; i++) {
            square += (double)grad[i] * grad[i];
            error += ((double)other[i] - grad[i]) * ((double)other[i] - grad[i]);
        }
        assert_true(square > 0.0 && sqrt(error) <= test_slack(1e-6) * sqrt(square));
        for (int i = 0; i < 3 * 70; i++) {
            assert_true(fabsf(rows[i] - other_rows[i]) <= (float)test_slack(2e-6) * rows[i]);
        }
        test_release(&other);
        test_release(&other_rows);
    }
    test_release(&grad);
    test_release(&rows);
}

/* Forward passes for training and for inference: the same hidden state, bit for bit, and logits of any rows. */
static void test_inference_gives_the_bits_of_training(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    for (cpl_dtype dt = CPL_F32; dt <= CPL_F16; dt++) {
        size_t bytes = (size_t)3 * 70 * 33 * cpl_dtype_size(dt);
        char *hidden[2];
        void *logits = NULL;
        for (int training = 0; training < 2; training++) {
            rig r;
            rig_create(&r, dev, shape, dt, 3, training, CPL_RECOMPUTE_BLOCK, 4);
            assert_ok(cpl_model_forward(r.ws, r.weights, r.tokens));
            hidden[training] = test_array((int64_t)bytes, 1);
            assert_ok(CPL_OPS(dev, download, hidden[training], cpl_workspace_hidden(r.ws), bytes));
            assert_ok(cpl_model_logits_rows(r.ws, r.weights, 3 * 70 - 4, 4, &logits));
            assert_non_null(logits);
            assert_int_equal(cpl_model_logits_rows(r.ws, r.weights, 3 * 70 - 3, 4, &logits), CPL_INTERNAL);
            assert_int_equal(cpl_model_logits_rows(r.ws, r.weights, 0, 5, &logits), CPL_INTERNAL);
            assert_int_equal(cpl_model_logits_rows(r.ws, r.weights, -1, 1, &logits), CPL_INTERNAL);
            rig_destroy(&r);
        }
        test_same_bits("hidden state", hidden[0], hidden[1], bytes);
        test_release(&hidden[0]);
        test_release(&hidden[1]);
    }
    cpl_device_destroy(&dev);
}

/* Every byte of the workspace a NaN before the step: nothing is read that the step did not write. */
static void test_step_reads_nothing_left_behind(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    for (cpl_recompute recompute = CPL_RECOMPUTE_NONE; recompute <= CPL_RECOMPUTE_BLOCK; recompute++) {
        rig r;
        rig_create(&r, dev, shape, CPL_F16, 3, true, recompute, 64);
        size_t bytes = cpl_workspace_bytes(r.l, CPL_F16, 3, true, recompute, 64);
        float *clean = rig_gradient(&r, NULL), *after;
        char *poison = test_array((int64_t)bytes, 1);
        memset(poison, 0xff, bytes);
        assert_ok(CPL_OPS(dev, upload, r.ws->memory, poison, bytes));
        after = rig_gradient(&r, NULL);
        test_same_bits("gradient", clean, after, grad_bytes());
        test_release(&clean);
        test_release(&after);
        test_release(&poison);
        rig_destroy(&r);
    }
    cpl_device_destroy(&dev);
}

static void test_step_refuses_what_does_not_fit(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    rig r, teacher;
    rig_create(&r, dev, shape, CPL_F32, 3, true, CPL_RECOMPUTE_NONE, 0);
    cpl_model_shape other = shape;
    other.vocab++;
    rig_create(&teacher, dev, other, CPL_F32, 3, false, CPL_RECOMPUTE_NONE, 0);
    const cpl_model_loss loss = {
        .teacher_weights = teacher.weights, .teacher_workspace = teacher.ws, .temperature = 1.0f, .alpha = 0.5f};
    assert_int_equal(cpl_model_step(r.ws, r.weights, r.tokens, r.targets, &loss, r.state, r.grad, false, r.soft, r.hard, NULL),
                     CPL_USAGE);
    assert_non_null(strstr(cpl_status_message(), "vocab 102"));
    assert_int_equal(cpl_model_step(r.ws, r.weights, r.tokens, r.targets, &loss, r.state, r.grad, false, NULL, r.hard, NULL),
                     CPL_INTERNAL);
    assert_int_equal(cpl_model_step(teacher.ws, r.weights, r.tokens, r.targets, NULL, r.state, r.grad, false, NULL, r.hard, NULL),
                     CPL_INTERNAL);
    rig_destroy(&teacher);
    other = (cpl_model_shape){.layers = 1, .heads = 1, .width = 8, .context = shape.context, .vocab = shape.vocab};
    rig_create(&teacher, dev, other, CPL_F32, 3, false, CPL_RECOMPUTE_NONE, 0);
    cpl_model_loss hidden = {
        .teacher_weights = teacher.weights, .teacher_workspace = teacher.ws, .temperature = 1.0f, .hidden_weight = 1.0f};
    assert_int_equal(cpl_model_step(r.ws, r.weights, r.tokens, r.targets, &hidden, r.state, r.grad, false, r.soft, r.hard, NULL),
                     CPL_USAGE);
    assert_non_null(strstr(cpl_status_message(), "widths 33 and 8"));
    rig_destroy(&teacher);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recompute_gelu_gives_the_same_bits),   cmocka_unit_test(test_recompute_block_gives_the_same_bits),
        cmocka_unit_test(test_two_threads_give_the_same_bits),       cmocka_unit_test(test_loss_rows_change_only_the_order_of_sums),
        cmocka_unit_test(test_inference_gives_the_bits_of_training), cmocka_unit_test(test_step_reads_nothing_left_behind),
        cmocka_unit_test(test_step_refuses_what_does_not_fit),
    };
    return test_main(tests, NULL, NULL);
}

/* What a backward pass tells of finished gradients: each tensor once, with the value that it keeps.
 * Refuses to look at a gradient only at the end: what is told too early would by then be right. */
#include "tests/jobs/model/rig.h"
#include "tests/support/support.h"

typedef struct {
    rig *r;
    float *told;    /* [total]: the gradient of each range when it was told */
    int64_t ranges; /* told so far */
    int64_t stop;   /* fails at this range; -1: never */
} listener;

static cpl_status listen_to(void *to, int64_t first, int64_t last) {
    listener *l = to;
    const cpl_layout *layout = l->r->l;
    int64_t expected_first = 0, expected_last = 0;
    cpl_layout_range(layout, l->ranges, &expected_first, &expected_last);
    assert_true(first == expected_first && last == expected_last);
    if (l->ranges++ == l->stop) {
        return cpl_fail(CPL_DEVICE, __FILE__, __LINE__, "range %lld", (long long)l->stop);
    }
    size_t bytes = (size_t)(layout->begin[last] - layout->begin[first]) * sizeof(float);
    return CPL_OPS(l->r->dev, download, l->told + layout->begin[first], l->r->grad + layout->begin[first], bytes);
}

static void test_ranges_are_every_tensor_once(void **state) {
    for (int64_t layers = 1; layers < 5; layers++) {
        for (int projected = 0; projected < 2; projected++) {
            cpl_layout *l = NULL;
            int seen[64] = {0};
            const cpl_model_shape shape = {.layers = layers, .heads = 2, .width = 8, .context = 4, .vocab = 11};
            assert_ok(projected ? cpl_layout_create_projected(&l, &shape, 12) : cpl_layout_create(&l, &shape));
            for (int64_t k = 0, first, last; k < cpl_layout_ranges(l); k++) {
                cpl_layout_range(l, k, &first, &last);
                for (int64_t t = first; t < last; t++) {
                    seen[t]++;
                }
            }
            for (int64_t t = 0; t < l->count; t++) {
                assert_int_equal(seen[t], 1);
            }
            cpl_layout_destroy(&l);
        }
    }
}

static void told_is_final(cpl_dtype dt, cpl_recompute recompute) {
    rig r;
    cpl_device *dev = rig_device(1);
    rig_create(&r, dev, (cpl_model_shape){.layers = 3, .heads = 2, .width = 16, .context = 8, .vocab = 23}, dt, 2, true, recompute,
               5);
    listener l = {.r = &r, .told = test_array(r.l->total, sizeof(float)), .stop = -1};
    const cpl_grad_ready ready = {listen_to, &l};
    rig_accumulate(&r, NULL); /* an earlier micro-batch */
    assert_ok(cpl_model_step(r.ws, r.weights, r.tokens, r.targets, NULL, r.state, r.grad, false, NULL, r.hard, &ready));
    assert_int_equal(l.ranges, cpl_layout_ranges(r.l));
    test_same_bits("gradient when told", l.told, r.grad, (size_t)r.l->total * sizeof(float));
    double largest = 0;
    for (int64_t i = 0; i < r.l->total; i++) {
        largest = fmax(largest, fabs((double)l.told[i]));
    }
    assert_true(largest > 0);
    l = (listener){.r = &r, .told = l.told, .stop = 1};
    assert_int_equal(cpl_model_step(r.ws, r.weights, r.tokens, r.targets, NULL, r.state, r.grad, false, NULL, r.hard, &ready),
                     CPL_DEVICE);
    assert_int_equal(l.ranges, 2);
    cpl_free(&l.told);
    rig_destroy(&r);
    cpl_device_destroy(&dev);
}

static void test_a_gradient_does_not_change_after_it_was_told(void **state) {
    for (int recompute = CPL_RECOMPUTE_NONE; recompute <= CPL_RECOMPUTE_BLOCK; recompute++) {
        told_is_final(CPL_F32, (cpl_recompute)recompute);
        told_is_final(CPL_F16, (cpl_recompute)recompute);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranges_are_every_tensor_once),
        cmocka_unit_test(test_a_gradient_does_not_change_after_it_was_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

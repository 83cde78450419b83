/* What the operations of a training step take for themselves on a GPU, beside what cpl_device_pass_bytes foretells without one.
 * Refuses to pass without a GPU: it is skipped and says so. */
#include "jobs/model/model.h"
#include "tests/support/support.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const cpl_model_shape shape = {2, 12, 768, 1024, 5000};
enum { B = 4 };

typedef struct {
    cpl_device *dev;
    cpl_layout *layout;
    cpl_workspace *ws;
    void *weights;
    int32_t *tokens;
    float *grad, *hard;
    cpl_step_state *state;
    double *sum;
} rig;

static rig make(cpl_dtype dt) {
    rig r = {0};
    size_t rows = (size_t)(B * shape.context);
    cpl_step_state state = {.loss_scale = 1};
    assert_ok(cpl_device_create(&r.dev, "cuda", 0, 0));
    assert_ok(cpl_layout_create(&r.layout, &shape));
    size_t total = (size_t)r.layout->total;
    assert_ok(cpl_workspace_create(&r.ws, r.dev, r.layout, dt, B, true, CPL_RECOMPUTE_NONE, 0));
    assert_ok(cpl_device_alloc(r.dev, &r.weights, total, cpl_dtype_size(dt), "weights"));
    assert_ok(cpl_device_alloc(r.dev, &r.grad, total, sizeof(float), "gradients"));
    assert_ok(cpl_device_alloc(r.dev, &r.tokens, rows, sizeof(int32_t), "tokens"));
    assert_ok(cpl_device_alloc(r.dev, &r.hard, rows, sizeof(float), "losses"));
    assert_ok(cpl_device_alloc(r.dev, &r.state, 1, sizeof state, "state"));
    assert_ok(cpl_device_alloc(r.dev, &r.sum, 1, sizeof(double), "sum"));
    assert_ok(CPL_OPS(r.dev, upload, r.state, &state, sizeof state));
    return r;
}

static void destroy(rig *r) {
    cpl_workspace_destroy(&r->ws);
    cpl_layout_destroy(&r->layout);
    cpl_device_destroy(&r->dev);
}

/* attention: as CUPEL_ATTENTION; NULL: as it comes. */
static void check(cpl_dtype dt, const char *attention) {
    if (attention == NULL) {
        unsetenv("CUPEL_ATTENTION");
    } else {
        setenv("CUPEL_ATTENTION", attention, 1);
    }
    rig r = make(dt);
    size_t before = 0, after = 0, trimmed = 0, peak = 0;
    int64_t foretold = 0, nothing = 0;
    const cpl_pass idle = {.dt = cpl_dtype_storage(dt)};
    const cpl_pass pass = {.dt = cpl_dtype_storage(dt),
                           .B = B,
                           .T = shape.context,
                           .C = shape.width,
                           .H = shape.heads,
                           .flat = r.layout->total,
                           .training = true};
    cpl_device_memory(r.dev, &before, &peak);
    assert_ok(cpl_model_step(r.ws, r.weights, r.tokens, r.tokens, NULL, r.state, r.grad, false, NULL, r.hard, NULL));
    assert_ok(CPL_OPS(r.dev, sum_f32, r.sum, r.grad, r.layout->total));
    assert_ok(r.dev->ops->synchronize(r.dev));
    cpl_device_memory(r.dev, &after, &peak);
    cpl_device_pass_bytes("cuda", &pass, &foretold);
    cpl_device_pass_bytes("cuda", &idle, &nothing);
    double took = (double)(after - before) + (double)nothing;
    printf("%s, attention %s: took %.0f bytes, foretold %lld\n", cpl_dtype_name(dt), attention == NULL ? "timed" : attention, took,
           (long long)foretold);
    assert_true(fabs(took - (double)foretold) <= 0.05 * took);
    assert_true(cpl_device_memory_used(r.dev) > after); /* CUDA's own, too */
    cpl_device_trim(r.dev);
    cpl_device_memory(r.dev, &trimmed, &peak);
    assert_int_equal(trimmed, before);
    destroy(&r);
}

static void test_a_step_takes_what_was_foretold(void **state) {
    check(CPL_BF16, NULL);
    check(CPL_BF16, "own");
    check(CPL_F16, NULL);
    check(CPL_F32, NULL);
    check(CPL_TF32, NULL);
}

static void test_a_limit_is_kept_and_told(void **state) {
    setenv("CUPEL_DEVICE_BYTES", "100Mi", 1);
    cpl_device *dev = NULL;
    float *x = NULL;
    assert_ok(cpl_device_create(&dev, "cuda", 0, 0));
    unsetenv("CUPEL_DEVICE_BYTES");
    assert_int_equal(cpl_device_memory_room(dev), (size_t)100 << 20);
    assert_int_equal(cpl_device_alloc(dev, &x, 50 << 20, 1, "a large buffer"), CPL_NO_MEMORY); /* 64 MiB are cuBLASLt's */
    assert_ok(cpl_device_alloc(dev, &x, 20 << 20, 1, "a smaller buffer"));
    cpl_device_destroy(&dev);
}

int main(void) {
    cpl_device *dev = NULL;
    cpl_status st = cpl_device_create(&dev, "cuda", 0, 0);
    if (st == CPL_UNSUPPORTED) {
        printf("SKIPPED: %s\n", cpl_status_message());
        return 77;
    }
    cpl_device_destroy(&dev);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_step_takes_what_was_foretold),
        cmocka_unit_test(test_a_limit_is_kept_and_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

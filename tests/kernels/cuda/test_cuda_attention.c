/* attention on the GPU against the CPU, by our kernels and by cuDNN.
 * Refuses to pass an implementation off as another: each is forced by the environment of a device of its own. */
#include "kernels/dtype.h"
#include "tests/support/twin.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    cpl_dtype dt;
    int64_t B, T, H, D;
} problem;

typedef struct {
    problem s;
    test_twin qkv, out, lse, dout, dqkv, dbias, dbias_before;
} buffers;

static const char *const implementations[] = {"own", "cudnn"};
enum { IMPLEMENTATIONS = 2 };
static cpl_device *forced[IMPLEMENTATIONS]; /* owned, made at first use */

static cpl_device *device_of(int implementation) {
    if (forced[implementation] == NULL) {
        assert_int_equal(setenv("CUPEL_ATTENTION", implementations[implementation], 1), 0);
        assert_ok(cpl_device_create(&forced[implementation], "cuda", 0, 0));
    }
    /* read at the first attention */
    assert_int_equal(setenv("CUPEL_ATTENTION", implementations[implementation], 1), 0);
    return forced[implementation];
}

static buffers buffers_of(problem s) {
    int64_t n = s.B * s.T * s.H * s.D;
    size_t bytes = (size_t)n * cpl_dtype_size(s.dt), bias_bytes = (size_t)(3 * s.H * s.D) * sizeof(float);
    return (buffers){.s = s,
                     .qkv = test_twin_act(s.dt, 1, 3 * n, 1.0f),
                     .out = test_twin_new(bytes),
                     .lse = test_twin_new((size_t)(s.B * s.H * s.T) * sizeof(float)),
                     .dout = test_twin_act(s.dt, 2, n, 1.0f),
                     .dqkv = test_twin_new(3 * bytes),
                     .dbias = test_twin_new(bias_bytes),
                     .dbias_before = test_twin_of(test_normals(5, 3 * s.H * s.D, 1.0f), bias_bytes)};
}

static void buffers_free(buffers *x) {
    test_twin_free(&x->qkv);
    test_twin_free(&x->out);
    test_twin_free(&x->lse);
    test_twin_free(&x->dout);
    test_twin_free(&x->dqkv);
    test_twin_free(&x->dbias);
    test_twin_free(&x->dbias_before);
}

/* on: which buffers; dev: who computes. Waits. */
static cpl_status forward(cpl_device *dev, const buffers *x, int on) {
    const problem *s = &x->s;
    cpl_status st = CPL_OPS(dev, attention_fwd, s->dt, x->out.on[on], x->lse.on[on], x->qkv.on[on], s->B, s->T, s->H, s->D);
    return st != CPL_OK ? st : dev->ops->synchronize(dev);
}
/* bias: dbias becomes dbias_before and the gradient of the bias. */
static cpl_status enqueue_backward(cpl_device *dev, const buffers *x, int on, bool bias) {
    const problem *s = &x->s;
    if (bias) {
        assert_ok(CPL_OPS(dev, copy, x->dbias.on[on], x->dbias_before.on[on], x->dbias.bytes));
    }
    return CPL_OPS(dev, attention_bwd, s->dt, x->dqkv.on[on], bias ? x->dbias.on[on] : NULL, x->dout.on[on], x->out.on[on],
                   x->lse.on[on], x->qkv.on[on], s->B, s->T, s->H, s->D);
}
static cpl_status backward(cpl_device *dev, const buffers *x, int on) {
    cpl_status st = enqueue_backward(dev, x, on, true);
    return st != CPL_OK ? st : dev->ops->synchronize(dev);
}
static cpl_status backward_without_bias(cpl_device *dev, const buffers *x, int on) {
    cpl_status st = enqueue_backward(dev, x, on, false);
    return st != CPL_OK ? st : dev->ops->synchronize(dev);
}

/* The GPU's buffer gets what the CPU's holds (of_cpu), or bytes that read as NaN. */
static void refill(const test_twin *t, bool of_cpu) {
    void *host = test_twin_read(t, 0);
    if (!of_cpu) {
        memset(host, 0xff, t->bytes);
    }
    assert_ok(CPL_OPS(test_on[1], upload, t->on[1], host, t->bytes));
    cpl_free(&host);
}

/* Root mean square of the difference, over that of the CPU's. */
static void close_in_the_mean(const char *what, cpl_dtype dt, const test_twin *t, int64_t n, double most) {
    void *cpu = test_twin_read(t, 0), *gpu = test_twin_read(t, 1);
    double *want = test_widen(dt, cpu, n), *got = test_widen(dt, gpu, n), error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        size += want[i] * want[i];
    }
    if (!(sqrt(error) <= most * sqrt(size) + 1e-6 * sqrt((double)n))) {
        fail_msg("%s: root mean square error %.3g of the values; expected at most %.3g", what, sqrt(error / size), most);
    }
    cpl_free(&cpu);
    cpl_free(&gpu);
    cpl_free(&want);
    cpl_free(&got);
}

static void same_bits_again(const char *what, cpl_device *dev, const buffers *x, const test_twin *t,
                            cpl_status (*run)(cpl_device *, const buffers *, int)) {
    void *once = test_twin_read(t, 1);
    refill(t, false);
    assert_ok(run(dev, x, 1));
    void *again = test_twin_read(t, 1);
    test_same_bits(what, once, again, t->bytes);
    cpl_free(&once);
    cpl_free(&again);
}

/* Roundoff: both sides round the result (u each). Our tensor-core kernels and cuDNN round the probabilities (p) and their gradients
 * (p (dp - delta)) to 16 bits before the second products: an error of u sum p |v|, |v| up to 4, sum p = 1, in the output, and in
 * the gradients of u |dp - delta| / sqrt(D) |q| sqrt(sum p^2), the first up to 4, the second up to 4, the last below 1 beside
 * entries that large. In f32 a score has an error of about 2^-24 sum |q k|, 5e-6 at D = 128, relative in p; dp - delta is up to 40.
 */
static void compare_forward(const char *what, const buffers *x) {
    const problem *s = &x->s;
    int64_t n = s->B * s->T * s->H * s->D;
    double u = s->dt == CPL_F32 ? 0 : test_roundoff(s->dt);
    test_twin_close(what, s->dt, &x->out, n, 2e-5 + 3 * u, 2e-5 + 2.02 * u);
    close_in_the_mean(what, s->dt, &x->out, n, 1e-5 + 1.5 * u);
    test_twin_close(what, CPL_F32, &x->lse, s->B * s->H * s->T, 2e-5, 1e-5);
}
static void compare_backward(const char *what, const buffers *x) {
    const problem *s = &x->s;
    int64_t n = s->B * s->T * s->H * s->D;
    double u = s->dt == CPL_F32 ? 0 : test_roundoff(s->dt);
    test_twin_close(what, s->dt, &x->dqkv, 3 * n, 2e-4 + 8 * u, 1e-4 + 2.02 * u);
    close_in_the_mean(what, s->dt, &x->dqkv, 3 * n, 2e-5 + 1.5 * u);
    int64_t C = s->H * s->D;
    test_twin_close(what, CPL_F32, &x->dbias, 3 * C, sqrt((double)(s->B * s->T)) * (2e-5 + 4 * u), 1e-5);
    float *before = test_twin_read(&x->dbias_before, 1), *dbias = test_twin_read(&x->dbias, 1);
    test_same_bits("gradient of the bias of k", dbias + C, before + C, (size_t)C * sizeof *dbias);
    cpl_free(&before);
    cpl_free(&dbias);
}

static int compared[IMPLEMENTATIONS][2];

/* tried: 1, ours; 2, cuDNN too, whose plans take a good part of a second each. */
static void check(problem s, int tried) {
    buffers x = buffers_of(s);
    assert_ok(forward(test_on[0], &x, 0));
    assert_ok(backward(test_on[0], &x, 0));
    for (int i = 0; i < tried; i++) {
        char what[128];
        snprintf(what, sizeof what, "%s %s B=%d T=%d H=%d D=%d", implementations[i], cpl_dtype_name(s.dt), (int)s.B, (int)s.T,
                 (int)s.H, (int)s.D);
        cpl_device *dev = device_of(i);
        refill(&x.out, false);
        refill(&x.lse, false);
        refill(&x.dqkv, false);
        refill(&x.dbias, false);
        cpl_status st = forward(dev, &x, 1);
        if (st == CPL_OK) {
            compare_forward(what, &x);
            same_bits_again(what, dev, &x, &x.out, forward);
            compared[i][0]++;
        } else if (i == 0 || st != CPL_UNSUPPORTED) {
            fail_msg("%s: %s", what, cpl_status_message());
        }
        refill(&x.out, true); /* so that the backward is compared alone */
        refill(&x.lse, true);
        st = backward(dev, &x, 1);
        if (st == CPL_OK) {
            compare_backward(what, &x);
            same_bits_again(what, dev, &x, &x.dbias, backward);
            same_bits_again(what, dev, &x, &x.dqkv, backward_without_bias);
            compared[i][1]++;
        } else if (i == 0 || st != CPL_UNSUPPORTED) {
            fail_msg("%s: %s", what, cpl_status_message());
        }
    }
    buffers_free(&x);
}

static void check_all(cpl_dtype dt) {
    static const int64_t heads[] = {1, 5, 16, 32, 64, 80, 128}, tokens[] = {1, 3, 17, 64, 65, 128, 200, 257, 1024};
    memset(compared, 0, sizeof compared);
    for (size_t d = 0; d < sizeof heads / sizeof heads[0]; d++) {
        for (size_t t = 0; t < sizeof tokens / sizeof tokens[0]; t++) {
            bool large = tokens[t] > 257;
            bool cudnn = heads[d] % 64 == 0 && (tokens[t] == 65 || tokens[t] == 257 || large);
            check((problem){.dt = dt, .B = large ? 1 : 3, .T = tokens[t], .H = large ? 2 : 5, .D = heads[d]},
                  cudnn || (heads[d] == 80 && tokens[t] == 128) ? 2 : 1);
        }
    }
    print_message("%s: %d shapes; cuDNN: %d forwards, %d backwards\n", cpl_dtype_name(dt), compared[0][0], compared[1][0],
                  compared[1][1]);
}
static void test_attention_f32_agrees_with_the_cpu(void **state) {
    check_all(CPL_F32);
}
static void test_attention_bf16_agrees_with_the_cpu(void **state) {
    check_all(CPL_BF16);
}
static void test_attention_f16_agrees_with_the_cpu(void **state) {
    check_all(CPL_F16);
}
static void test_attention_of_wide_heads_agrees_with_the_cpu(void **state) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        check((problem){.dt = dt, .B = 1, .T = 65, .H = 3, .D = 131}, 1);
        check((problem){.dt = dt, .B = 2, .T = 100, .H = 1, .D = 256}, 1);
        check((problem){.dt = dt, .B = 2, .T = 70, .H = 3, .D = 88}, 1);
    }
}

/* The kernel for sm_90: more heads than multiprocessors, so that one goes on to the next, and an odd number of blocks. */
static void test_attention_of_many_heads_agrees_with_the_cpu(void **state) {
    for (int dt = CPL_BF16; dt <= CPL_F16; dt++) {
        check((problem){.dt = dt, .B = 23, .T = 256, .H = 12, .D = 64}, 1);
        check((problem){.dt = dt, .B = 31, .T = 128, .H = 9, .D = 64}, 1);
        check((problem){.dt = dt, .B = 2, .T = 384, .H = 1, .D = 64}, 1);
    }
}

/* Buffers that begin one element past an aligned address. */
static void test_attention_of_unaligned_buffers_agrees_with_the_cpu(void **state) {
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        const problem s = {.dt = dt, .B = 1, .T = 67, .H = 2, .D = 64};
        int64_t n = s.B * s.T * s.H * s.D, size = (int64_t)cpl_dtype_size(dt);
        test_twin qkv = test_twin_act(dt, 3, 3 * n + 1, 1.0f), dout = test_twin_act(dt, 4, n + 1, 1.0f);
        test_twin out = test_twin_zero((size_t)(size * (n + 1))), dqkv = test_twin_zero((size_t)(size * (3 * n + 1)));
        test_twin lse = test_twin_zero((size_t)(s.B * s.H * s.T) * sizeof(float));
        test_twin dbias = test_twin_zero((size_t)(3 * s.H * s.D + 1) * sizeof(float));
        double u = dt == CPL_F32 ? 0 : test_roundoff(dt);
        for (int on = 0; on < 2; on++) {
            cpl_device *dev = on == 0 ? test_on[0] : device_of(0);
            char *q = (char *)qkv.on[on] + size, *o = (char *)out.on[on] + size;
            assert_ok(CPL_OPS(dev, attention_fwd, dt, o, lse.on[on], q, s.B, s.T, s.H, s.D));
            assert_ok(CPL_OPS(dev, attention_bwd, dt, (char *)dqkv.on[on] + size, (float *)dbias.on[on] + 1,
                              (char *)dout.on[on] + size, o, lse.on[on], q, s.B, s.T, s.H, s.D));
            assert_ok(dev->ops->synchronize(dev));
        }
        test_twin_close("output", dt, &out, n + 1, 2e-5 + u, 2e-5 + 2.02 * u);
        test_twin_close("gradient", dt, &dqkv, 3 * n + 1, 2e-4 + 4 * u, 1e-4 + 2.02 * u);
        test_twin_close("gradient of the bias", CPL_F32, &dbias, 3 * s.H * s.D + 1, sqrt((double)s.T) * (2e-5 + 4 * u), 1e-5);
        test_twin_free(&qkv);
        test_twin_free(&dout);
        test_twin_free(&out);
        test_twin_free(&dqkv);
        test_twin_free(&dbias);
        test_twin_free(&lse);
    }
}

/* [n] act elements from `first`: all finite, or not. */
static bool all_finite(cpl_dtype dt, const void *x, int64_t first, int64_t n) {
    bool finite = true;
    for (int64_t i = first; i < first + n; i++) {
        finite = finite && isfinite(cpl_act_get(dt, x, i));
    }
    return finite;
}

static void poison(cpl_dtype dt, const test_twin *t, int64_t at, float value) {
    void *host = test_twin_read(t, 0);
    cpl_act_set(dt, host, at, value);
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], upload, t->on[d], host, t->bytes));
    }
    cpl_free(&host);
}

/* One inf in dout of token 70: its own dq and the dv of all it sees are not finite, dq of other tokens is; and one in a key of
 * token 70: the outputs from there on are not finite, those before are. */
static void check_propagation(cpl_device *dev, cpl_dtype dt, int64_t T, int64_t D, float value) {
    const problem s = {.dt = dt, .B = 1, .T = T, .H = 1, .D = D};
    const int64_t at = 70;
    buffers x = buffers_of(s);
    if (forward(dev, &x, 1) != CPL_OK) {
        assert_ptr_equal(dev, device_of(1)); /* cuDNN may not know the shape */
        buffers_free(&x);
        return;
    }
    poison(dt, &x.dout, at * D + 1, value);
    if (backward(dev, &x, 1) == CPL_OK) {
        void *dqkv = test_twin_read(&x.dqkv, 1);
        assert_false(all_finite(dt, dqkv, at * 3 * D, D));
        assert_true(all_finite(dt, dqkv, (at - 1) * 3 * D, D));
        assert_true(all_finite(dt, dqkv, (at + 1) * 3 * D, D));
        for (int64_t t = 0; t <= at; t++) {
            assert_false(all_finite(dt, dqkv, (t * 3 + 2) * D, D));
        }
        cpl_free(&dqkv);
    } else {
        assert_ptr_equal(dev, device_of(1));
    }
    poison(dt, &x.qkv, (at * 3 + 1) * D, value);
    assert_ok(forward(dev, &x, 1));
    void *out = test_twin_read(&x.out, 1);
    assert_true(all_finite(dt, out, 0, at * D));
    bool seen = false;
    for (int64_t t = at; t < s.T; t++) {
        seen = seen || !all_finite(dt, out, t * D, D);
    }
    assert_true(seen);
    cpl_free(&out);
    buffers_free(&x);
}

static void test_inf_and_nan_reach_output_and_gradient_and_not_the_past(void **state) {
    for (int i = 0; i < IMPLEMENTATIONS; i++) {
        for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
            check_propagation(device_of(i), dt, 130, 64, INFINITY);
            check_propagation(device_of(i), dt, 130, 64, NAN);
            check_propagation(device_of(i), dt, 256, 64, INFINITY);
            check_propagation(device_of(i), dt, 256, 64, NAN);
            check_propagation(device_of(i), dt, 130, 33, INFINITY);
        }
    }
}

typedef struct {
    cpl_device *dev;
    const buffers *x;
} recorded;

static cpl_status both(void *context) {
    const recorded *r = context;
    const buffers *x = r->x;
    const problem *s = &x->s;
    cpl_status st = CPL_OPS(r->dev, attention_fwd, s->dt, x->out.on[1], x->lse.on[1], x->qkv.on[1], s->B, s->T, s->H, s->D);
    return st != CPL_OK ? st : enqueue_backward(r->dev, x, 1, true);
}

/* The choice by time, recorded and replayed. */
static void test_a_recorded_graph_gives_the_same_bits(void **state) {
    cpl_device *dev = NULL;
    assert_int_equal(unsetenv("CUPEL_ATTENTION"), 0);
    assert_ok(cpl_device_create(&dev, "cuda", 0, 0));
    for (int dt = CPL_F32; dt <= CPL_F16; dt++) {
        cpl_graph *graph = NULL;
        buffers x = buffers_of((problem){.dt = dt, .B = 2, .T = 256, .H = 12, .D = 64});
        recorded r = {.dev = dev, .x = &x};
        assert_ok(both(&r));
        assert_ok(dev->ops->synchronize(dev));
        void *out = test_twin_read(&x.out, 1), *dqkv = test_twin_read(&x.dqkv, 1), *dbias = test_twin_read(&x.dbias, 1);
        assert_ok(cpl_device_record(dev, both, &r, &graph));
        refill(&x.out, false);
        refill(&x.dqkv, false);
        refill(&x.dbias, false);
        assert_ok(cpl_device_replay(dev, graph));
        assert_ok(dev->ops->synchronize(dev));
        void *out2 = test_twin_read(&x.out, 1), *dqkv2 = test_twin_read(&x.dqkv, 1), *dbias2 = test_twin_read(&x.dbias, 1);
        test_same_bits("replayed output", out, out2, x.out.bytes);
        test_same_bits("replayed gradient", dqkv, dqkv2, x.dqkv.bytes);
        test_same_bits("replayed gradient of the bias", dbias, dbias2, x.dbias.bytes);
        cpl_graph_destroy(dev, &graph);
        cpl_free(&out);
        cpl_free(&dqkv);
        cpl_free(&dbias);
        cpl_free(&out2);
        cpl_free(&dqkv2);
        cpl_free(&dbias2);
        buffers_free(&x);
    }
    cpl_device_destroy(&dev);
}

static void test_an_unknown_choice_is_refused(void **state) {
    cpl_device *dev = NULL;
    buffers x = buffers_of((problem){.dt = CPL_F32, .B = 1, .T = 3, .H = 1, .D = 4});
    assert_int_equal(setenv("CUPEL_ATTENTION", "fastest", 1), 0);
    assert_ok(cpl_device_create(&dev, "cuda", 0, 0));
    assert_int_equal(forward(dev, &x, 1), CPL_UNSUPPORTED);
    assert_int_equal(unsetenv("CUPEL_ATTENTION"), 0);
    cpl_device_destroy(&dev);
    buffers_free(&x);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_attention_f32_agrees_with_the_cpu),
        cmocka_unit_test(test_attention_bf16_agrees_with_the_cpu),
        cmocka_unit_test(test_attention_f16_agrees_with_the_cpu),
        cmocka_unit_test(test_attention_of_wide_heads_agrees_with_the_cpu),
        cmocka_unit_test(test_attention_of_many_heads_agrees_with_the_cpu),
        cmocka_unit_test(test_attention_of_unaligned_buffers_agrees_with_the_cpu),
        cmocka_unit_test(test_inf_and_nan_reach_output_and_gradient_and_not_the_past),
        cmocka_unit_test(test_a_recorded_graph_gives_the_same_bits),
        cmocka_unit_test(test_an_unknown_choice_is_refused),
    };
    int failed = test_gpu_main(tests, sizeof tests / sizeof tests[0]);
    for (int i = 0; i < IMPLEMENTATIONS; i++) {
        cpl_device_destroy(&forced[i]);
    }
    return failed;
}

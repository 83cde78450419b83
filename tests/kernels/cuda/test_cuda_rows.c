/* Operations over rows on the GPU against the CPU: embedding, LayerNorm, GELU, losses; odd shapes, all types, the same bits twice.
 * Refuses to measure tolerance by the result: it comes from the roundoff of the type and the number of terms. */
#include "io/base/rng.h"
#include "tests/support/twin.h"
#include <math.h>

enum { TYPES = 3 };
static const cpl_dtype types[TYPES] = {CPL_F32, CPL_BF16, CPL_F16};
static const double f32 = 0x1p-24;

static test_twin tokens_of(int64_t n, int64_t V, bool ignored) {
    int32_t *host = test_array(n, sizeof *host);
    for (int64_t i = 0; i < n; i++) {
        host[i] = (int32_t)((uint64_t)(i * i + 3 * i) * 2654435761u % (uint64_t)V);
        if (ignored && i % 5 == 2) {
            host[i] = -100;
        }
    }
    return test_twin_of(host, (size_t)n * sizeof *host);
}

static void free_all(test_twin **twins, int n) {
    for (int i = 0; i < n; i++) {
        test_twin_free(twins[i]);
    }
}

static void check_embedding(cpl_dtype dt, int64_t B, int64_t T, int64_t C, int64_t V) {
    int64_t R = B * T;
    test_twin tokens = tokens_of(R, V, false), x = test_twin_new((size_t)(R * C) * cpl_dtype_size(dt));
    test_twin wte = test_twin_act(dt, 1, V * C, 1.0f), wpe = test_twin_act(dt, 2, (T + 1) * C, 1.0f),
              dx = test_twin_act(dt, 3, R * C, 1.0f);
    test_twin dwte = test_twin_act(CPL_F32, 4, V * C, 1.0f), dwpe = test_twin_act(CPL_F32, 5, (T + 1) * C, 1.0f);
    void *bits[2];
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], embed_fwd, dt, x.on[d], tokens.on[d], wte.on[d], wpe.on[d], B, T, C));
        assert_ok(CPL_OPS(test_on[d], embed_bwd, dt, dwte.on[d], dwpe.on[d], dx.on[d], tokens.on[d], B, T, C, V));
    }
    test_twin_same("embedding", &x);
    test_twin_close("dwte", CPL_F32, &dwte, V * C, 16 * f32 * sqrt((double)R) * 4, 4 * f32 * sqrt((double)R));
    test_twin_close("dwpe", CPL_F32, &dwpe, (T + 1) * C, 16 * f32 * sqrt((double)B) * 4, 4 * f32 * sqrt((double)B));
    for (int run = 0; run < 2; run++) {
        test_twin again = test_twin_zero((size_t)(V * C) * sizeof(float));
        assert_ok(CPL_OPS(test_on[1], embed_bwd, dt, again.on[1], dwpe.on[1], dx.on[1], tokens.on[1], B, T, C, V));
        bits[run] = test_twin_read(&again, 1);
        test_twin_free(&again);
    }
    test_same_bits("dwte twice", bits[0], bits[1], (size_t)(V * C) * sizeof(float));
    cpl_free(&bits[0]);
    cpl_free(&bits[1]);
    free_all((test_twin *[]){&tokens, &x, &wte, &wpe, &dx, &dwte, &dwpe}, 7);
}

static void test_embedding(void **state) {
    static const int64_t shapes[][4] = {{1, 1, 1, 1},     {2, 7, 5, 3},   {3, 65, 33, 11},   {4, 100, 64, 256},
                                        {2, 300, 192, 7}, {2, 33, 24, 1}, {8, 64, 768, 5000}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int t = 0; t < TYPES; t++) {
            check_embedding(types[t], shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3]);
        }
    }
}

/* On the GPU. */
static void same_bits(const char *what, const test_twin *a, const test_twin *b, size_t bytes) {
    void *one = test_twin_read(a, 1), *other = test_twin_read(b, 1);
    test_same_bits(what, one, other, bytes);
    cpl_free(&one);
    cpl_free(&other);
}

static void check_layernorm(cpl_dtype dt, int64_t R, int64_t C, bool residual) {
    size_t size = cpl_dtype_size(dt), bytes = (size_t)(R * C) * size;
    double u = test_roundoff(dt);
    test_twin x = test_twin_act(dt, 1, R * C, 2.0f), g = test_twin_act(dt, 3, C, 1.0f);
    test_twin b = test_twin_act(dt, 4, C, 1.0f), y = test_twin_new(bytes);
    test_twin mean = test_twin_new((size_t)R * 4), rstd = test_twin_new((size_t)R * 4), dy = test_twin_act(dt, 5, R * C, 1.0f);
    test_twin dres = test_twin_act(dt, 6, R * C, 1.0f), dx = test_twin_new(bytes);
    test_twin dg = test_twin_act(CPL_F32, 7, C, 1.0f), db = test_twin_act(CPL_F32, 8, C, 1.0f);
    test_twin dbias = test_twin_act(CPL_F32, 9, C, 1.0f);
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], layernorm_fwd, dt, y.on[d], mean.on[d], rstd.on[d], x.on[d], g.on[d], b.on[d], R, C));
        assert_ok(CPL_OPS(test_on[d], layernorm_bwd, dt, dx.on[d], dg.on[d], db.on[d], residual ? dbias.on[d] : NULL, dy.on[d],
                          residual ? dres.on[d] : NULL, x.on[d], mean.on[d], rstd.on[d], g.on[d], R, C));
    }
    test_twin_close("mean", CPL_F32, &mean, R, 64 * f32, 64 * f32);
    test_twin_close("rstd", CPL_F32, &rstd, R, 0, 64 * f32);
    /* One row of one column divides by sqrt(1e-5): everything is 300 times as large. */
    double stretch = C == 1 ? 320 : 4;
    test_twin_close("y", dt, &y, R * C, stretch * (u + 64 * f32), 2 * u + 64 * f32);
    test_twin_close("dx", dt, &dx, R * C, stretch * (2 * u + 256 * f32), 2 * u + 64 * f32);
    test_twin_close("dg", CPL_F32, &dg, C, stretch * 64 * f32 * (double)(R + 8), 0);
    test_twin_close("db", CPL_F32, &db, C, 64 * f32 * (double)(R + 8), 0);
    test_twin_close("dbias", CPL_F32, &dbias, C, stretch * (64 * f32 + 2 * u) * (double)(R + 8), 0);
    for (int d = 0; d < 2; d++) { /* in place */
        assert_ok(CPL_OPS(test_on[d], layernorm_bwd, dt, dy.on[d], dg.on[d], db.on[d], NULL, dy.on[d], residual ? dres.on[d] : NULL,
                          x.on[d], mean.on[d], rstd.on[d], g.on[d], R, C));
    }
    same_bits("dx in place", &dx, &dy, bytes);
    free_all((test_twin *[]){&x, &g, &b, &y, &mean, &rstd, &dy, &dres, &dx, &dg, &db, &dbias}, 12);
}

static void test_layernorm(void **state) {
    /* Many rows: a warp has more of them than it keeps in shared memory, at last, in the backward pass, than lanes. */
    static const int64_t shapes[][2] = {{1, 1},     {3, 5},       {7, 64},     {70, 33},    {130, 192},   {600, 768},
                                        {9, 1000},  {33, 1600},   {5, 4096},   {301, 256},  {70, 2048},   {9, 264},
                                        {40, 2600}, {3300, 1024}, {7000, 392}, {9000, 520}, {2500, 1280}, {53000, 24}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int t = 0; t < TYPES; t++) {
            check_layernorm(types[t], shapes[i][0], shapes[i][1], false);
            check_layernorm(types[t], shapes[i][0], shapes[i][1], true);
        }
    }
}

static void test_gelu(void **state) {
    static const int64_t sizes[] = {1, 7, 64, 1001, 40000};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int t = 0; t < TYPES; t++) {
            cpl_dtype dt = types[t];
            test_twin x = test_twin_act(dt, 1, sizes[i], 3.0f), y = test_twin_new((size_t)sizes[i] * cpl_dtype_size(dt));
            for (int d = 0; d < 2; d++) {
                assert_ok(CPL_OPS(test_on[d], gelu_fwd, dt, y.on[d], x.on[d], sizes[i]));
            }
            test_twin_close("gelu", dt, &y, sizes[i], dt == CPL_F16 ? 0x1p-24 : 1e-30, 2 * test_roundoff(dt) + 256 * f32);
            free_all((test_twin *[]){&x, &y}, 2);
        }
    }
}

static test_twin state_of(float scale) {
    cpl_step_state *s = test_array(1, sizeof *s);
    s->loss_scale = scale;
    return test_twin_of(s, sizeof *s);
}

static void check_cross_entropy(cpl_dtype dt, int64_t R, int64_t V, int64_t ld) {
    double u = test_roundoff(dt);
    test_twin targets = tokens_of(R, V, true), state = state_of(64.0f);
    for (int with = 0; with < 2; with++) {
        test_twin logits = test_twin_act(dt, 1, R * ld, 3.0f), losses = test_twin_new((size_t)R * 4);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], cross_entropy, dt, logits.on[d], losses.on[d], targets.on[d], with ? state.on[d] : NULL,
                              0.25f, R, V, ld));
        }
        test_twin_close("losses", CPL_F32, &losses, R, 128 * f32, 64 * f32);
        if (with) {
            test_twin_close("dlogits", dt, &logits, R * ld, 16 * (64 * f32) + (dt == CPL_F16 ? 0x1p-24 : 0), 2 * u + 256 * f32);
        } else {
            test_twin_same("logits", &logits);
        }
        free_all((test_twin *[]){&logits, &losses}, 2);
    }
    free_all((test_twin *[]){&targets, &state}, 2);
}

static void test_cross_entropy(void **state) {
    static const int64_t shapes[][3] = {{1, 1, 1},         {5, 3, 7},         {17, 256, 256},     {33, 1000, 1008},
                                        {6, 50257, 50304}, {4, 50257, 50257}, {3, 130000, 130000}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int t = 0; t < TYPES; t++) {
            check_cross_entropy(types[t], shapes[i][0], shapes[i][1], shapes[i][2]);
        }
    }
}

/* What must not be hidden: inf and nan reach the loss; -inf is a logit like any other. */
static void test_bad_logits_show_in_the_loss(void **state) {
    enum { V = 24, R = 4 };
    const float bad[R] = {INFINITY, NAN, -INFINITY, 0.0f};
    float *host = test_array(R * V, sizeof *host), *losses;
    int32_t *targets = test_array(R, sizeof *targets);
    for (int r = 0; r < R; r++) {
        for (int v = 0; v < 4; v++) {
            host[r * V + 8 + v] = bad[r];
        }
    }
    test_twin logits = test_twin_of(host, R * V * sizeof *host), where = test_twin_of(targets, R * sizeof *targets),
              loss = test_twin_new(R * 4);
    assert_ok(CPL_OPS(test_on[1], cross_entropy, CPL_F32, logits.on[1], loss.on[1], where.on[1], NULL, 1.0f, R, V, V));
    losses = test_twin_read(&loss, 1);
    assert_true(isnan(losses[0]) && isnan(losses[1]));
    assert_float_equal(losses[2], logf(20.0f), 1e-5);
    assert_float_equal(losses[3], logf(24.0f), 1e-5);
    cpl_free(&losses);
    free_all((test_twin *[]){&logits, &where, &loss}, 3);
}

static void check_distillation(cpl_dtype dt, int64_t R, int64_t V, int64_t ld, cpl_kd_kind kind, float temperature, float alpha,
                               float beta) {
    double u = test_roundoff(dt);
    test_twin targets = tokens_of(R, V, true), state = state_of(64.0f);
    for (int with = 0; with < 2; with++) {
        test_twin student = test_twin_act(dt, 1, R * ld, 2.0f), teacher = test_twin_act(dt, 2, R * ld, 2.0f);
        test_twin soft = test_twin_new((size_t)R * 4), hard = test_twin_new((size_t)R * 4);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], distill_loss, dt, student.on[d], teacher.on[d], soft.on[d], hard.on[d], targets.on[d],
                              with ? state.on[d] : NULL, 0.25f, temperature, alpha, kind, beta, R, V, ld));
        }
        test_twin_close("soft", CPL_F32, &soft, R, 1024 * f32, 256 * f32);
        test_twin_close("hard", CPL_F32, &hard, R, 128 * f32, 64 * f32);
        if (with) {
            test_twin_close("dstudent", dt, &student, R * ld,
                            16 * (double)temperature * (256 * f32) + (dt == CPL_F16 ? 0x1p-24 : 0), 2 * u + 1024 * f32);
        }
        free_all((test_twin *[]){&student, &teacher, &soft, &hard}, 4);
    }
    free_all((test_twin *[]){&targets, &state}, 2);
}

static void test_distillation(void **state) {
    static const int64_t shapes[][3] = {{1, 1, 1}, {5, 3, 7}, {17, 256, 256}, {9, 1000, 1008}, {4, 50257, 50304}};
    static const float settings[][3] = {{2.0f, 0.5f, 0.3f}, {1.0f, 1.0f, 0.5f}, {2.5f, 0.9f, 0.7f}, {4.0f, 0.0f, 0.5f}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int t = 0; t < TYPES; t++) {
            for (int kind = CPL_KD_FORWARD_KL; kind <= CPL_KD_JSD; kind++) {
                const float *s = settings[(i + (size_t)t + (size_t)kind) % 4];
                check_distillation(types[t], shapes[i][0], shapes[i][1], shapes[i][2], (cpl_kd_kind)kind, s[0], s[1], s[2]);
            }
        }
    }
}

static void test_mse(void **state) {
    static const int64_t sizes[] = {1, 100, 4097, 70001};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (int t = 0; t < TYPES; t++) {
            cpl_dtype dt = types[t];
            int64_t n = sizes[i];
            test_twin a = test_twin_act(dt, 1, n, 1.0f), b = test_twin_act(dt, 2, n, 1.0f), grad = test_twin_act(dt, 3, n, 1.0f);
            test_twin sum = test_twin_zero(sizeof(double)), scale = state_of(8.0f);
            for (int d = 0; d < 2; d++) {
                assert_ok(CPL_OPS(test_on[d], mse, dt, sum.on[d], grad.on[d], a.on[d], b.on[d], scale.on[d], 0.5f, n));
            }
            test_twin_close("gradient", dt, &grad, n, 4 * f32 * 64, 2 * test_roundoff(dt) + 4 * f32);
            double *cpu = test_twin_read(&sum, 0), *gpu = test_twin_read(&sum, 1);
            assert_true(fabs(*cpu - *gpu) <= 1e-12 * fabs(*cpu) * sqrt((double)n));
            cpl_free(&cpu);
            cpl_free(&gpu);
            free_all((test_twin *[]){&a, &b, &grad, &sum, &scale}, 5);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_layernorm),
        cmocka_unit_test(test_gelu),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_bad_logits_show_in_the_loss),
        cmocka_unit_test(test_distillation),
        cmocka_unit_test(test_mse),
    };
    return test_gpu_main(tests, sizeof tests / sizeof tests[0]);
}

/* Linear layers on the GPU against the CPU: forward, both gradients, odd shapes and unaligned buffers, all types, the same bits
 * twice. Refuses to measure tolerance by the result: it comes from the number of terms and the roundoff of the type. */
#include "kernels/cuda/product.h"
#include "tests/support/twin.h"
#include <math.h>

typedef struct {
    int64_t R, N, K;
} shape;
static const shape shapes[] = {{1, 1, 1},     {3, 5, 7},     {17, 33, 9},    {64, 64, 64},
                               {130, 72, 40}, {65, 257, 96}, {2100, 33, 17}, {512, 768, 256}};
enum { SHAPES = sizeof shapes / sizeof shapes[0], TYPES = 3 };
static const cpl_dtype types[TYPES] = {CPL_F32, CPL_BF16, CPL_F16};

/* One rounding to dt, and `terms` products of size about `scale` in f32 in another order. */
static double tolerance(cpl_dtype dt, int64_t terms, double scale) {
    return 2.5 * test_roundoff(dt) * scale * sqrt((double)terms) + 8 * 0x1p-24 * (double)terms * scale;
}

static void check_forward(cpl_dtype dt, shape s) {
    size_t size = cpl_dtype_size(dt);
    test_twin x = test_twin_act(dt, 1, s.R * s.K, 1.0f), w = test_twin_act(dt, 2, s.N * s.K, 0.5f);
    test_twin bias = test_twin_act(dt, 3, s.N, 1.0f);
    double most = tolerance(dt, s.K + 1, 1.0);
    for (int kind = 0; kind < 7; kind++) {
        test_twin y = test_twin_new((size_t)(s.R * s.N) * size), pre = test_twin_new((size_t)(s.R * s.N) * size);
        test_twin residual = test_twin_act(dt, 4, s.R * s.N, 2.0f);
        bool keeps = kind == 1, into = kind == 6; /* 0, 1: GELU; then without, with residual; 6: in place */
        for (int d = 0; d < 2; d++) {
            const void *added = kind >= 4 ? residual.on[d] : NULL;
            assert_ok(kind < 2 ? CPL_OPS(test_on[d], linear_gelu_fwd, dt, y.on[d], keeps ? pre.on[d] : NULL, x.on[d], w.on[d],
                                         bias.on[d], s.R, s.N, s.K)
                               : CPL_OPS(test_on[d], linear_fwd, dt, into ? residual.on[d] : y.on[d], x.on[d], w.on[d],
                                         kind % 2 ? bias.on[d] : NULL, added, s.R, s.N, s.K));
        }
        if (into) {
            test_twin_close("y in place", dt, &residual, s.R * s.N, 1.2 * most, 2 * test_roundoff(dt));
        }
        if (!into) {
            test_twin_close("y", dt, &y, s.R * s.N, 1.2 * most, 2 * test_roundoff(dt));
        }
        if (keeps) {
            test_twin_close("pre", dt, &pre, s.R * s.N, most, 2 * test_roundoff(dt));
            test_twin again = test_twin_new((size_t)(s.R * s.N) * size);
            assert_ok(CPL_OPS(test_on[1], gelu_fwd, dt, again.on[1], pre.on[1], s.R * s.N));
            void *a = test_twin_read(&again, 1), *b = test_twin_read(&y, 1);
            test_same_bits("GELU computed again", a, b, again.bytes);
            cpl_free(&a);
            cpl_free(&b);
            test_twin_free(&again);
        }
        test_twin_free(&y);
        test_twin_free(&pre);
        test_twin_free(&residual);
    }
    test_twin_free(&x);
    test_twin_free(&w);
    test_twin_free(&bias);
}

static void check_backward(cpl_dtype dt, shape s) {
    size_t size = cpl_dtype_size(dt);
    test_twin x = test_twin_act(dt, 4, s.R * s.K, 1.0f), w = test_twin_act(dt, 5, s.N * s.K, 0.5f);
    test_twin dy = test_twin_act(dt, 6, s.R * s.N, 1.0f), pre = test_twin_act(dt, 7, s.R * s.K, 1.0f);
    for (int with_pre = 0; with_pre < 2; with_pre++) {
        test_twin dx = test_twin_new((size_t)(s.R * s.K) * size), dbias = test_twin_act(CPL_F32, 10, s.K, 1.0f);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], linear_bwd_input, dt, dx.on[d], dbias.on[d], dy.on[d], w.on[d],
                              with_pre ? pre.on[d] : NULL, s.R, s.N, s.K));
        }
        test_twin_close("dx", dt, &dx, s.R * s.K, 2 * tolerance(dt, s.N, 1.0), 4 * test_roundoff(dt));
        test_twin_close("dbias", CPL_F32, &dbias, s.K, 2 * tolerance(dt, s.N, 1.0) * (double)s.R, 4 * test_roundoff(dt));
        test_twin_free(&dx);
        test_twin_free(&dbias);
    }
    test_twin dw = test_twin_act(CPL_F32, 8, s.N * s.K, 1.0f);
    for (int times = 0; times < 3; times++) { /* overwrites, then accumulates */
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], linear_bwd_weight, dt, dw.on[d], dy.on[d], x.on[d], s.R, s.N, s.K, times == 0));
        }
    }
    test_twin_close("dw", CPL_F32, &dw, s.N * s.K, tolerance(CPL_F32, 3 * s.R + 1, 2.0), 0);
    test_twin_free(&dw);
    test_twin_free(&x);
    test_twin_free(&w);
    test_twin_free(&dy);
    test_twin_free(&pre);
}

static void test_the_gpu_agrees_with_the_cpu(void **state) {
    for (int t = 0; t < TYPES; t++) {
        for (int i = 0; i < SHAPES; i++) {
            check_forward(types[t], shapes[i]);
            check_backward(types[t], shapes[i]);
        }
    }
}

/* Flat buffers put a tensor of odd size before the next: only the element's own alignment holds. */
static void test_unaligned_operands(void **state) {
    for (int t = 0; t < TYPES; t++) {
        cpl_dtype dt = types[t];
        size_t size = cpl_dtype_size(dt);
        shape s = {33, 40, 24};
        test_twin x = test_twin_act(dt, 1, s.R * s.K + 1, 1.0f), w = test_twin_act(dt, 2, s.N * s.K + 1, 0.5f);
        test_twin bias = test_twin_act(dt, 3, s.N + 1, 1.0f), y = test_twin_new((size_t)(s.R * s.N) * size);
        test_twin dw = test_twin_act(CPL_F32, 8, s.N * s.K + 1, 1.0f), residual = test_twin_act(dt, 9, s.R * s.N + 1, 1.0f);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], linear_fwd, dt, y.on[d], (char *)x.on[d] + size, (char *)w.on[d] + size,
                              (char *)bias.on[d] + size, (char *)residual.on[d] + size, s.R, s.N, s.K));
            assert_ok(CPL_OPS(test_on[d], linear_bwd_weight, dt, (float *)dw.on[d] + 1, y.on[d], (char *)x.on[d] + size, s.R, s.N,
                              s.K, false));
        }
        test_twin_close("y", dt, &y, s.R * s.N, tolerance(dt, s.K + 1, 1.0), 2 * test_roundoff(dt));
        test_twin_close("dw", CPL_F32, &dw, s.N * s.K + 1, 8 * tolerance(dt, s.R, 4.0), 0); /* from y, rounded on each side */
        test_twin *all[] = {&x, &w, &bias, &y, &dw, &residual};
        for (int i = 0; i < 6; i++) {
            test_twin_free(all[i]);
        }
    }
}

/* TF32: operands lose all but 10 bits of mantissa, sums are f32. The CPU multiplies in f32. */
static void check_tf32(shape s) {
    const cpl_dtype on[2] = {CPL_F32, CPL_TF32};
    test_twin x = test_twin_act(CPL_F32, 1, s.R * s.K, 1.0f), w = test_twin_act(CPL_F32, 2, s.N * s.K, 0.5f);
    test_twin bias = test_twin_act(CPL_F32, 3, s.N, 1.0f), dy = test_twin_act(CPL_F32, 6, s.R * s.N, 1.0f);
    test_twin pre = test_twin_act(CPL_F32, 7, s.R * s.K, 1.0f), y = test_twin_new((size_t)(s.R * s.N) * sizeof(float));
    test_twin kept = test_twin_new((size_t)(s.R * s.N) * sizeof(float)), dx = test_twin_new((size_t)(s.R * s.K) * sizeof(float));
    test_twin dw = test_twin_act(CPL_F32, 8, s.N * s.K, 1.0f);
    for (int d = 0; d < 2; d++) {
        cpl_device *dev = test_on[d];
        assert_ok(CPL_OPS(dev, linear_gelu_fwd, on[d], y.on[d], kept.on[d], x.on[d], w.on[d], bias.on[d], s.R, s.N, s.K));
        assert_ok(CPL_OPS(dev, linear_bwd_input, on[d], dx.on[d], NULL, dy.on[d], w.on[d], pre.on[d], s.R, s.N, s.K));
        assert_ok(CPL_OPS(dev, linear_bwd_weight, on[d], dw.on[d], dy.on[d], x.on[d], s.R, s.N, s.K, false));
    }
    double relative = 4 * test_roundoff(CPL_TF32);
    test_twin_close("y", CPL_F32, &y, s.R * s.N, 1.2 * tolerance(CPL_TF32, s.K + 1, 1.0), relative);
    test_twin_close("pre", CPL_F32, &kept, s.R * s.N, tolerance(CPL_TF32, s.K + 1, 1.0), relative);
    test_twin_close("dx", CPL_F32, &dx, s.R * s.K, 2 * tolerance(CPL_TF32, s.N, 1.0), relative);
    test_twin_close("dw", CPL_F32, &dw, s.N * s.K, tolerance(CPL_TF32, s.R + 1, 2.0), relative);
    test_twin *all[] = {&x, &w, &bias, &dy, &pre, &y, &kept, &dx, &dw};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        test_twin_free(all[i]);
    }
}

static void test_tf32_agrees_with_fp32_to_ten_bits(void **state) {
    assert_true(cpl_device_has(test_on[1], CPL_TF32));
    for (int i = 0; i < SHAPES; i++) {
        check_tf32(shapes[i]);
    }
}

/* Full f32 products under the name of TF32 would pass every tolerance. */
static void test_tf32_is_not_fp32(void **state) {
    shape s = {512, 768, 256};
    const cpl_dtype types_run[2] = {CPL_F32, CPL_TF32};
    test_twin x = test_twin_act(CPL_F32, 1, s.R * s.K, 1.0f), w = test_twin_act(CPL_F32, 2, s.N * s.K, 0.5f);
    void *bits[2];
    for (int run = 0; run < 2; run++) {
        test_twin y = test_twin_new((size_t)(s.R * s.N) * sizeof(float));
        assert_ok(CPL_OPS(test_on[1], linear_fwd, types_run[run], y.on[1], x.on[1], w.on[1], NULL, NULL, s.R, s.N, s.K));
        bits[run] = test_twin_read(&y, 1);
        test_twin_free(&y);
    }
    double most = 0;
    for (int64_t i = 0; i < s.R * s.N; i++) {
        most = fmax(most, fabs((double)((float *)bits[0])[i] - (double)((float *)bits[1])[i]));
    }
    assert_true(most > 0x1p-12); /* f32 sums of 256 terms in another order: about 2^-18 */
    cpl_free(&bits[0]);
    cpl_free(&bits[1]);
    test_twin_free(&x);
    test_twin_free(&w);
}

static void test_the_same_bits_twice(void **state) {
    shape s = {1000, 768, 520};
    test_twin x = test_twin_act(CPL_BF16, 1, s.R * s.K, 1.0f), dy = test_twin_act(CPL_BF16, 2, s.R * s.N, 1.0f);
    void *bits[2];
    for (int run = 0; run < 2; run++) {
        test_twin dw = test_twin_zero((size_t)(s.N * s.K) * sizeof(float));
        assert_ok(CPL_OPS(test_on[1], linear_bwd_weight, CPL_BF16, dw.on[1], dy.on[1], x.on[1], s.R, s.N, s.K, false));
        bits[run] = test_twin_read(&dw, 1);
        test_twin_free(&dw);
    }
    test_same_bits("dw", bits[0], bits[1], (size_t)(s.N * s.K) * sizeof(float));
    cpl_free(&bits[0]);
    cpl_free(&bits[1]);
    test_twin_free(&x);
    test_twin_free(&dy);
}

/* Whatever is faster here: the kernel itself, over tiles that end inside the matrix, few and many of them. */
static void check_own(cpl_dtype dt, shape s) {
    size_t size = cpl_dtype_size(dt), bytes = (size_t)(s.R * s.N) * size;
    test_twin x = test_twin_act(dt, 1, s.R * s.K, 1.0f), w = test_twin_act(dt, 2, s.N * s.K, 0.5f),
              bias = test_twin_act(dt, 3, s.N, 1.0f);
    test_twin y = test_twin_new(bytes), pre = test_twin_new(bytes), alone = test_twin_new(bytes), again = test_twin_new(bytes);
    double most = tolerance(dt, s.K + 1, 1.0);
    assert_ok(CPL_OPS(test_on[0], linear_gelu_fwd, dt, y.on[0], pre.on[0], x.on[0], w.on[0], bias.on[0], s.R, s.N, s.K));
    assert_ok(cpl_cuda_product_gelu_fwd(test_on[1], dt, y.on[1], pre.on[1], x.on[1], w.on[1], bias.on[1], s.R, s.N, s.K));
    assert_ok(cpl_cuda_product_gelu_fwd(test_on[1], dt, alone.on[1], NULL, x.on[1], w.on[1], bias.on[1], s.R, s.N, s.K));
    assert_ok(CPL_OPS(test_on[1], gelu_fwd, dt, again.on[1], pre.on[1], s.R * s.N));
    test_twin_close("own pre", dt, &pre, s.R * s.N, most, 2 * test_roundoff(dt));
    test_twin_close("own y", dt, &y, s.R * s.N, 1.2 * most, 2 * test_roundoff(dt));
    void *bits[3] = {test_twin_read(&y, 1), test_twin_read(&alone, 1), test_twin_read(&again, 1)};
    test_same_bits("without keeping pre", bits[0], bits[1], bytes);
    test_same_bits("GELU of what was kept", bits[0], bits[2], bytes);
    /* dx [R,N] of dy [R,K] and w' [K,N] */
    test_twin back = test_twin_act(dt, 5, s.N * s.K, 0.5f), dx = test_twin_new(bytes), dbias = test_twin_act(CPL_F32, 6, s.N, 1.0f);
    test_twin twice = test_twin_act(CPL_F32, 6, s.N, 1.0f);
    assert_ok(CPL_OPS(test_on[0], linear_bwd_input, dt, dx.on[0], dbias.on[0], x.on[0], back.on[0], y.on[0], s.R, s.K, s.N));
    assert_ok(CPL_OPS(test_on[1], upload, y.on[1], y.on[0], bytes));
    for (int times = 0; times < 2; times++) {
        assert_ok(cpl_cuda_product_gelu_bwd(test_on[1], dt, dx.on[1], times ? twice.on[1] : dbias.on[1], x.on[1], back.on[1],
                                            y.on[1], s.R, s.K, s.N));
    }
    test_twin_close("own dx", dt, &dx, s.R * s.N, 2 * tolerance(dt, s.K, 1.0), 4 * test_roundoff(dt));
    test_twin_close("own dbias", CPL_F32, &dbias, s.N, 2 * tolerance(dt, s.K, 1.0) * (double)s.R, 4 * test_roundoff(dt));
    void *sums[2] = {test_twin_read(&dbias, 1), test_twin_read(&twice, 1)};
    test_same_bits("dbias twice", sums[0], sums[1], (size_t)s.N * 4);
    test_twin *all[] = {&x, &w, &bias, &y, &pre, &alone, &again, &back, &dx, &dbias, &twice};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        test_twin_free(all[i]);
    }
    for (int i = 0; i < 3; i++) {
        cpl_free(&bits[i]);
        cpl_free(&sums[i % 2]);
    }
}

static void test_our_products_around_gelu(void **state) {
    static const shape own[] = {{1, 8, 8},         {128, 128, 64},   {130, 136, 72},   {300, 520, 200},
                                {1000, 264, 1032}, {5000, 768, 256}, {2048, 3072, 768}};
    for (int t = 1; t < TYPES; t++) {
        for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) {
            if (cpl_cuda_product_gelu_usable(test_on[1], types[t], own[i].R, own[i].N, own[i].K, NULL, NULL, NULL, NULL)) {
                check_own(types[t], own[i]);
            }
        }
    }
}

/* [rows,columns] of bf16: 1, but i % most in column i of the first row. */
static test_twin ones(int64_t rows, int64_t columns, int64_t most) {
    static const uint16_t small[] = {0, 0x3f80, 0x4000, 0x4040, 0x4080}; /* 0 to 4 */
    uint16_t *x = NULL;
    assert_ok(cpl_alloc(&x, (size_t)(rows * columns), sizeof *x, "test"));
    for (int64_t i = 0; i < rows * columns; i++) {
        x[i] = small[i < columns ? i % most : 1];
    }
    return test_twin_of(x, (size_t)(rows * columns) * sizeof *x);
}

/* [rows,columns] of bf16, the first `wide` of each row `bits`, the others 0. */
static test_twin stripe(int64_t rows, int64_t columns, int64_t wide, uint16_t bits) {
    uint16_t *x = NULL;
    assert_ok(cpl_alloc(&x, (size_t)(rows * columns), sizeof *x, "test"));
    for (int64_t i = 0; i < rows * columns; i++) {
        x[i] = i % columns < wide ? bits : 0;
    }
    return test_twin_of(x, (size_t)(rows * columns) * sizeof *x);
}

/* In place: -256 + 257 + 2 = 3, and in the first row, where x is 0, -256 + 2. 257 and 259 are no bf16: a product that was rounded
 * on the way, or timed on y itself, comes to something else; a sum that was rounded before the residual, as cuBLASLt may, to 4. */
static void large_product_into_its_residual(shape s) {
    test_twin x = ones(s.R, s.K, 1), w = stripe(s.N, s.K, 257, 0x3f80), bias = stripe(1, s.N, s.N, 0x4000),
              y = stripe(s.R, s.N, s.N, 0xc380);
    assert_ok(CPL_OPS(test_on[1], linear_fwd, CPL_BF16, y.on[1], x.on[1], w.on[1], bias.on[1], y.on[1], s.R, s.N, s.K));
    uint16_t *found = test_twin_read(&y, 1);
    for (int64_t i = 0; i < s.R * s.N; i++) {
        assert_true(i < s.N ? found[i] == 0xc37e : found[i] == 0x4040 || found[i] == 0x4080);
    }
    cpl_free(&found);
    test_twin *all[] = {&x, &w, &bias, &y};
    for (int i = 0; i < 4; i++) {
        test_twin_free(all[i]);
    }
}

/* Large enough that its algorithms are timed side by side, on operands that are in use; whole numbers below 2^24 are exact in any
 * order. */
static void test_a_large_product_is_exact_whatever_is_chosen(void **state) {
    shape s = {4096, 2048, 1280};
    large_product_into_its_residual(s);
    test_twin dy = ones(s.R, s.N, 5), x = ones(s.R, s.K, 4), dw = test_twin_new((size_t)(s.N * s.K) * sizeof(float));
    for (int times = 1; times <= 3; times++) { /* overwrites, then accumulates */
        assert_ok(CPL_OPS(test_on[1], linear_bwd_weight, CPL_BF16, dw.on[1], dy.on[1], x.on[1], s.R, s.N, s.K, times == 1));
        float *found = test_twin_read(&dw, 1);
        for (int64_t i = 0; i < s.N * s.K; i++) {
            assert_true(found[i] == (float)(times * (s.R - 1 + i / s.K % 5 * (i % s.K % 4))));
        }
        cpl_free(&found);
    }
    test_twin_free(&dy);
    test_twin_free(&x);
    test_twin_free(&dw);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_gpu_agrees_with_the_cpu),
        cmocka_unit_test(test_unaligned_operands),
        cmocka_unit_test(test_tf32_agrees_with_fp32_to_ten_bits),
        cmocka_unit_test(test_tf32_is_not_fp32),
        cmocka_unit_test(test_the_same_bits_twice),
        cmocka_unit_test(test_our_products_around_gelu),
        cmocka_unit_test(test_a_large_product_is_exact_whatever_is_chosen),
    };
    return test_gpu_main(tests, sizeof tests / sizeof tests[0]);
}

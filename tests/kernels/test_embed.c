/* Proves the embedding and its gradient, also where a token comes often, and that bad tokens are refused.
 * Refuses to assume widths that divide: C is odd here. */
#include "tests/support/support.h"
#include <string.h>

enum { B = 3, T = 37, C = 171, V = 11, TMAX = 40 };
static const cpl_dtype types[] = {CPL_F32, CPL_BF16, CPL_F16};

static int32_t *tokens_create(void) {
    int32_t *tokens = test_array(B * T, sizeof *tokens);
    for (int i = 0; i < B * T; i++) {
        tokens[i] = i % 4 == 0 ? 3 : i * 7 % (V - 1); /* token 3 is frequent, token V-1 never comes */
    }
    return tokens;
}

static void forward(cpl_device *dev) {
    int32_t *tokens = tokens_create();
    for (int k = 0; k < 3; k++) {
        cpl_dtype dt = types[k];
        void *wte = test_act(dt, 1, V * C, 0.5f, NULL), *wpe = test_act(dt, 2, TMAX * C, 0.5f, NULL), *x = test_array(B * T * C, 4);
        assert_ok(CPL_OPS(dev, embed_fwd, dt, x, tokens, wte, wpe, B, T, C));
        for (int i = 0; i < B * T; i++) {
            for (int c = 0; c < C; c++) {
                float sum = cpl_act_get(dt, wte, tokens[i] * C + c) + cpl_act_get(dt, wpe, i % T * C + c);
                assert_true(cpl_act_get(dt, x, i * C + c) == cpl_act_round(dt, sum));
            }
        }
        test_release(&wte);
        test_release(&wpe);
        test_release(&x);
    }
    test_release(&tokens);
}
static void test_embedding_is_the_rounded_sum_of_token_and_position(void **unused) {
    (void)unused;
    test_on_devices(forward);
}

static void backward(cpl_device *dev) {
    int32_t *tokens = tokens_create();
    for (int k = 0; k < 3; k++) {
        cpl_dtype dt = types[k];
        double *dx64, *want_e = test_array(V * C, 8), *want_p = test_array(TMAX * C, 8);
        void *dx = test_act(dt, 3, B * T * C, 1.0f, &dx64);
        float *dwte = test_normals(4, V * C, 1.0f), *dwpe = test_normals(5, TMAX * C, 1.0f);
        for (int i = 0; i < V * C; i++) {
            want_e[i] = dwte[i];
        }
        for (int i = 0; i < TMAX * C; i++) {
            want_p[i] = dwpe[i];
        }
        for (int i = 0; i < B * T; i++) {
            for (int c = 0; c < C; c++) {
                want_e[tokens[i] * C + c] += dx64[i * C + c];
                want_p[i % T * C + c] += dx64[i * C + c];
            }
        }
        assert_ok(CPL_OPS(dev, embed_bwd, dt, dwte, dwpe, dx, tokens, B, T, C, V));
        test_close("dwte", CPL_F32, dwte, want_e, V * C, 1e-5, 1e-6);
        test_close("dwpe", CPL_F32, dwpe, want_p, TMAX * C, 1e-6, 1e-6);
        test_release(&dx64);
        test_release(&want_e);
        test_release(&want_p);
        test_release(&dx);
        test_release(&dwte);
        test_release(&dwpe);
    }
    test_release(&tokens);
}
static void test_gradient_adds_every_row_of_a_token_and_of_a_position(void **unused) {
    (void)unused;
    test_on_devices(backward);
}

/* x is linear in both tables: <dx, embed(wte, wpe)> = <dwte, wte> + <dwpe, wpe>. */
static void adjoint(cpl_device *dev) {
    int32_t *tokens = tokens_create();
    float *wte = test_normals(1, V * C, 1.0f), *wpe = test_normals(2, TMAX * C, 1.0f), *dx = test_normals(3, B * T * C, 1.0f);
    float *x = test_array(B * T * C, 4), *dwte = test_array(V * C, 4), *dwpe = test_array(TMAX * C, 4);
    assert_ok(CPL_OPS(dev, embed_fwd, CPL_F32, x, tokens, wte, wpe, B, T, C));
    assert_ok(CPL_OPS(dev, embed_bwd, CPL_F32, dwte, dwpe, dx, tokens, B, T, C, V));
    double left = 0, right = 0;
    for (int i = 0; i < B * T * C; i++) {
        left += (double)dx[i] * x[i];
    }
    for (int i = 0; i < V * C; i++) {
        right += (double)dwte[i] * wte[i];
    }
    for (int i = 0; i < TMAX * C; i++) {
        right += (double)dwpe[i] * wpe[i];
    }
    double difference = left - right;
    assert_true(difference < 2e-3 && difference > -2e-3);
    test_release(&tokens);
    test_release(&wte);
    test_release(&wpe);
    test_release(&dx);
    test_release(&x);
    test_release(&dwte);
    test_release(&dwpe);
}
static void test_backward_is_the_adjoint_of_forward(void **unused) {
    (void)unused;
    test_on_devices(adjoint);
}

static void refuses(cpl_device *dev) {
    int32_t *tokens = tokens_create();
    float *table = test_array(TMAX * C, 4), *x = test_array(B * T * C, 4);
    tokens[5] = V;
    assert_int_equal(CPL_OPS(dev, embed_bwd, CPL_F32, table, table, x, tokens, B, T, C, V), CPL_INPUT);
    assert_non_null(strstr(cpl_status_message(), "token 5 of the micro-batch is 11, expected 0 to 10"));
    tokens[5] = -1;
    assert_int_equal(CPL_OPS(dev, embed_fwd, CPL_F32, x, tokens, table, table, B, T, C), CPL_INPUT);
    assert_ok(CPL_OPS(dev, embed_fwd, CPL_F32, x, tokens, table, table, 0, T, C));
    test_release(&tokens);
    test_release(&table);
    test_release(&x);
}
static void test_tokens_outside_the_vocabulary_are_refused(void **unused) {
    (void)unused;
    test_cpu_only(); /* a GPU cannot tell the host: the trainer's tokens are checked when they are read */
    test_on_devices(refuses);
}

static void test_threads_do_not_show_in_the_gradient(void **unused) {
    (void)unused;
    int32_t *tokens = tokens_create();
    void *dx = test_act(CPL_F16, 3, B * T * C, 1.0f, NULL);
    for (int k = 0; test_isas[k] != NULL; k++) {
        float *dwte[2], *dwpe[2];
        for (int i = 0; i < 2; i++) {
            cpl_device *dev = test_device(test_isas[k], 1 + i);
            dwte[i] = test_array(V * C, 4);
            dwpe[i] = test_array(TMAX * C, 4);
            if (dev != NULL) {
                assert_ok(CPL_OPS(dev, embed_bwd, CPL_F16, dwte[i], dwpe[i], dx, tokens, B, T, C, V));
            }
            cpl_device_destroy(&dev);
        }
        test_same_bits("dwte", dwte[0], dwte[1], V * C * 4);
        test_same_bits("dwpe", dwpe[0], dwpe[1], TMAX * C * 4);
        for (int i = 0; i < 2; i++) {
            test_release(&dwte[i]);
            test_release(&dwpe[i]);
        }
    }
    test_release(&tokens);
    test_release(&dx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embedding_is_the_rounded_sum_of_token_and_position),
        cmocka_unit_test(test_gradient_adds_every_row_of_a_token_and_of_a_position),
        cmocka_unit_test(test_backward_is_the_adjoint_of_forward),
        cmocka_unit_test(test_tokens_outside_the_vocabulary_are_refused),
        cmocka_unit_test(test_threads_do_not_show_in_the_gradient),
    };
    return test_main(tests, NULL, NULL);
}

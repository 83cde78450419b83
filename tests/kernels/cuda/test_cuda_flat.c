/* Operations over flat buffers on the GPU against the CPU: casts, sums, the step's scan, decision and update, selection,
 * quantization. Refuses tolerance where the result is defined bit by bit: casts, kinds, masks, codes, scales, the scaler's state.
 */
#include "tests/support/twin.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TYPES = 3 };
static const cpl_dtype types[TYPES] = {CPL_F32, CPL_BF16, CPL_F16};
static const int64_t sizes[] = {1, 3, 64, 1000, 4096, 4097, 100003, 1048576};
enum { SIZES = sizeof sizes / sizeof sizes[0] };

static void free_all(test_twin **twins, int n) {
    for (int i = 0; i < n; i++) {
        test_twin_free(twins[i]);
    }
}

/* Normals with what is special among them: zeros of both signs, subnormals, ties; inf and nan where wanted. */
static float *specials(uint32_t stream, int64_t n, bool bad) {
    float *x = test_normals(stream, n, 1.0f);
    const float odd[] = {0.0f, -0.0f, 1e-40f, 65520.0f, 1.00390625f, -1.00390625f, 2.9802322e-8f, INFINITY, NAN};
    for (int64_t i = 0; i < n; i += 13) {
        x[i] = odd[(i / 13) % (bad ? 9 : 7)];
    }
    return x;
}

static void test_casts_are_the_same_bits(void **state) {
    for (int i = 0; i < SIZES; i++) {
        for (int t = 0; t < TYPES; t++) {
            int64_t n = sizes[i];
            size_t size = cpl_dtype_size(types[t]);
            test_twin x = test_twin_of(specials(1, n, false), (size_t)n * 4), y = test_twin_new((size_t)n * size),
                      back = test_twin_new((size_t)n * 4);
            for (int d = 0; d < 2; d++) {
                assert_ok(CPL_OPS(test_on[d], cast_from_f32, types[t], y.on[d], x.on[d], n));
                assert_ok(CPL_OPS(test_on[d], cast_to_f32, types[t], back.on[d], y.on[d], n));
                assert_ok(CPL_OPS(test_on[d], add_f32, back.on[d], x.on[d], n));
            }
            test_twin_same("cast", &y);
            test_twin_same("cast back and added", &back);
            free_all((test_twin *[]){&x, &y, &back}, 3);
        }
    }
}

static void test_sums(void **state) {
    for (int i = 0; i < SIZES; i++) {
        int64_t n = sizes[i], chunks = (n + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK;
        test_twin x = test_twin_act(CPL_F32, 2, n, 1.0f), sum = test_twin_zero(sizeof(double)),
                  squares = test_twin_new((size_t)chunks * sizeof(double));
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], sum_f32, sum.on[d], x.on[d], n));
            assert_ok(CPL_OPS(test_on[d], sum_squares, squares.on[d], x.on[d], n));
        }
        double *a = test_twin_read(&sum, 0), *b = test_twin_read(&sum, 1), *p = test_twin_read(&squares, 0),
               *q = test_twin_read(&squares, 1);
        assert_true(fabs(*a - *b) <= 1e-15 * (double)n);
        for (int64_t c = 0; c < chunks; c++) {
            assert_true(fabs(p[c] - q[c]) <= 1e-13 * p[c]);
        }
        cpl_free(&a);
        cpl_free(&b);
        cpl_free(&p);
        cpl_free(&q);
        free_all((test_twin *[]){&x, &sum, &squares}, 3);
    }
}

static void test_every_tensor_with_an_inf_or_nan_is_found(void **state) {
    enum { TENSORS = 5 };
    const int64_t begin[TENSORS + 1] = {0, 7, 4100, 4101, 50000, 50003};
    for (int where = -1; where < TENSORS; where++) {
        float *host = test_normals(3, begin[TENSORS], 1.0f);
        if (where >= 0) {
            host[begin[where]] = where % 2 ? INFINITY : NAN;
            host[begin[where + 1] - 1] = where == 3 ? NAN : host[begin[where + 1] - 1];
        }
        test_twin x = test_twin_of(host, (size_t)begin[TENSORS] * 4), kinds = test_twin_new(TENSORS * 4), any = test_twin_zero(4);
        test_twin sums = test_twin_new(13 * 8), alone = test_twin_new(13 * 8);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], grad_scan, kinds.on[d], any.on[d], sums.on[d], x.on[d], begin, TENSORS));
            assert_ok(CPL_OPS(test_on[d], sum_squares, alone.on[d], x.on[d], begin[TENSORS]));
        }
        test_twin_same("kinds", &kinds);
        test_twin_same("any", &any);
        double *along = test_twin_read(&sums, 1), *by_itself = test_twin_read(&alone, 1);
        test_same_bits("sums made by the scan", along, by_itself, 13 * 8);
        cpl_free(&along);
        cpl_free(&by_itself);
        free_all((test_twin *[]){&x, &kinds, &any, &sums, &alone}, 5);
    }
}

static void test_exponents(void **state) {
    test_twin x = test_twin_of(specials(4, 100003, true), 100003 * 4), counts = test_twin_zero(256 * 8), most = test_twin_zero(4);
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], exponents, counts.on[d], most.on[d], x.on[d], 100003, 0.125f));
    }
    test_twin_same("counts", &counts);
    test_twin_same("largest", &most);
    free_all((test_twin *[]){&x, &counts, &most}, 3);
}

/* 40 steps with overflows here and there: the whole state, the norm and what follows from it to f32 roundoff. */
static void test_the_scaler_takes_the_same_decisions(void **state) {
    enum { CHUNKS = 3000 };
    const cpl_step_rules rules = {.dynamic = true,
                                  .growth = 2,
                                  .backoff = 0.5f,
                                  .growth_interval = 3,
                                  .hysteresis = 2,
                                  .min_scale = 4,
                                  .max_scale = 1024,
                                  .clip = 1,
                                  .beta1 = 0.9f,
                                  .beta2 = 0.95f,
                                  .eps = 1e-8f,
                                  .inv_micro_batches = 0.25f};
    cpl_step_state *first = test_array(1, sizeof *first);
    *first = (cpl_step_state){.loss_scale = 256, .hysteresis_left = 2, .lr = 1e-3f};
    test_twin s = test_twin_of(first, sizeof *first);
    for (int step = 0; step < 40; step++) {
        double *sums = test_array(CHUNKS, sizeof *sums);
        uint32_t *word = test_array(1, sizeof *word);
        for (int i = 0; i < CHUNKS; i++) {
            sums[i] = 1e-3 * (double)((i * 7 + step) % 101);
        }
        sums[5] = step == 20 ? INFINITY : sums[5];
        *word = step % 7 == 3 || (step > 25 && step < 33);
        test_twin chunk = test_twin_of(sums, CHUNKS * sizeof *sums), overflow = test_twin_of(word, sizeof *word);
        for (int d = 0; d < 2; d++) {
            assert_ok(CPL_OPS(test_on[d], step_control, s.on[d], &rules, overflow.on[d], chunk.on[d], CHUNKS));
        }
        cpl_step_state *a = test_twin_read(&s, 0), *b = test_twin_read(&s, 1);
        assert_true((isnan(a->grad_norm) && isnan(b->grad_norm)) || a->grad_norm == b->grad_norm ||
                    fabsf(a->grad_norm - b->grad_norm) <= 0x1p-22f * a->grad_norm);
        assert_true(fabsf(a->grad_factor - b->grad_factor) <= 0x1p-22f * a->grad_factor);
        b->grad_norm = a->grad_norm;
        b->grad_factor = a->grad_factor;
        test_same_bits("state", b, a, sizeof *a);
        cpl_free(&a);
        cpl_free(&b);
        free_all((test_twin *[]){&chunk, &overflow}, 2);
    }
    test_twin_free(&s);
}

static void check_adamw(cpl_dtype dt, int64_t n, bool masked, bool skip) {
    const cpl_step_rules rules = {.beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f};
    cpl_step_state *now = test_array(1, sizeof *now);
    *now = (cpl_step_state){.adam_step = 3, .lr = 0.01f, .grad_factor = 0.5f, .skip = skip};
    uint8_t *keep = test_array(n, 1);
    float *squares = test_normals(7, n, 0.1f);
    for (int64_t i = 0; i < n; i++) {
        keep[i] = i % 3 != 1;
        squares[i] *= squares[i];
    }
    test_twin s = test_twin_of(now, sizeof *now), mask = test_twin_of(keep, (size_t)n), p = test_twin_act(CPL_F32, 5, n, 1.0f);
    test_twin m = test_twin_act(CPL_F32, 6, n, 0.1f), v = test_twin_of(squares, (size_t)n * 4),
              g = test_twin_act(CPL_F32, 8, n, 1.0f);
    test_twin work = test_twin_act(dt, 9, n, 1.0f);
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], adamw, dt, p.on[d], dt == CPL_F32 ? p.on[d] : work.on[d], NULL, m.on[d], v.on[d], g.on[d],
                          masked ? mask.on[d] : NULL, n, 0.1f, s.on[d], &rules));
    }
    if (skip) {
        test_twin_same("param", &p);
        test_twin_same("m", &m);
        test_twin_same("v", &v);
        test_twin_same("work", &work);
    }
    test_twin_close("param", CPL_F32, &p, n, 4 * 0x1p-24, 8 * 0x1p-24);
    test_twin_close("m", CPL_F32, &m, n, 4 * 0x1p-24, 4 * 0x1p-24);
    test_twin_close("v", CPL_F32, &v, n, 1e-9, 8 * 0x1p-24);
    test_twin_close("work", dt, &work, n, 8 * 0x1p-24, 2 * test_roundoff(dt));
    free_all((test_twin *[]){&s, &mask, &p, &m, &v, &g, &work}, 7);
}

static void test_adamw(void **state) {
    for (int i = 0; i < SIZES; i++) {
        for (int t = 0; t < TYPES; t++) {
            check_adamw(types[t], sizes[i], false, false);
            check_adamw(types[t], sizes[i], true, false);
            check_adamw(types[t], sizes[i], true, true);
        }
    }
}

static void test_selection_is_exact(void **state) {
    static const int passes[][2] = {{0, 11}, {11, 10}, {21, 10}, {0, 16}, {0, 1}};
    for (int i = 0; i < SIZES; i++) {
        int64_t n = sizes[i];
        float *host = specials(10, n, false);
        uint32_t some;
        memcpy(&some, &host[n / 2], sizeof some);
        some &= 0x7fffffffu;
        test_twin w = test_twin_of(host, (size_t)n * 4), nans = test_twin_zero(8);
        for (int p = 0; p < 5; p++) {
            int before = passes[p][0], bits = passes[p][1];
            test_twin counts = test_twin_zero(sizeof(int64_t) << bits);
            for (int d = 0; d < 2; d++) {
                assert_ok(CPL_OPS(test_on[d], select_histogram, counts.on[d], nans.on[d], w.on[d], n, 1,
                                  before ? some >> (31 - before) : 0, before, bits));
            }
            test_twin_same("histogram", &counts);
            test_twin_free(&counts);
        }
        test_twin_same("nans", &nans);
        const uint32_t thresholds[] = {some, 0, 0x3f800000u + (1u << 15), 0x80000000u};
        const int64_t ties[] = {0, 1, n / 26, n};
        for (int k = 0; k < 16; k++) {
            int64_t *left = test_array(1, sizeof *left);
            *left = ties[k / 4];
            test_twin mask = test_twin_new((size_t)n), budget = test_twin_of(left, sizeof *left);
            for (int d = 0; d < 2; d++) {
                assert_ok(CPL_OPS(test_on[d], select_mask, mask.on[d], w.on[d], n, thresholds[k % 4], budget.on[d]));
            }
            test_twin_same("mask", &mask);
            test_twin_same("ties left", &budget);
            test_twin x = test_twin_act(CPL_F32, 11, n, 1.0f);
            for (int d = 0; d < 2; d++) {
                assert_ok(CPL_OPS(test_on[d], apply_mask, x.on[d], mask.on[d], n));
            }
            test_twin_same("masked", &x);
            free_all((test_twin *[]){&mask, &budget, &x}, 3);
        }
        free_all((test_twin *[]){&w, &nans}, 2);
    }
}

static int by_bits(const void *a, const void *b) {
    uint32_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return (x > y) - (x < y);
}

/* The lists, sorted, where all found room; else how much of them is written, and that nothing else is. */
static void check_window(const test_twin *w, int64_t off, int64_t n, uint32_t first, uint32_t last, int64_t room) {
    test_twin list = test_twin_zero((size_t)n * 4), counts = test_twin_zero(3 * 8);
    for (int d = 0; d < 2; d++) {
        int64_t *c = counts.on[d], cut = n / 2;
        const float *x = (const float *)w->on[d] + off;
        assert_ok(CPL_OPS(test_on[d], select_window, list.on[d], room, c, c + 1, c + 2, x, cut, first, last));
        assert_ok(CPL_OPS(test_on[d], select_window, list.on[d], room, c, c + 1, c + 2, x + cut, n - cut, first, last));
    }
    test_twin_same("found, below, nans", &counts);
    float *a = test_twin_read(&list, 0), *b = test_twin_read(&list, 1);
    int64_t *found = test_twin_read(&counts, 0), listed = *found < room ? *found : room;
    for (int64_t i = listed; i < n; i++) {
        assert_true(b[i] == 0 && !signbit(b[i]));
    }
    for (int64_t i = 0; i < listed; i++) {
        uint32_t key;
        memcpy(&key, &b[i], sizeof key);
        key &= 0x7fffffffu;
        assert_true(key >= first && key <= last);
    }
    if (listed == *found) {
        qsort(a, (size_t)listed, sizeof *a, by_bits);
        qsort(b, (size_t)listed, sizeof *b, by_bits);
        test_same_bits("list", b, a, (size_t)listed * sizeof *a);
    }
    cpl_free(&a);
    cpl_free(&b);
    cpl_free(&found);
    test_twin_free(&list);
    test_twin_free(&counts);
}

static void test_windows_list_the_same_weights(void **state) {
    static const int64_t lengths[] = {1, 5, 4095, 8191, 8192, 8195, 16384, 100003, 5000011};
    static const uint32_t keys[][2] = {{0, 0x7f800000}, {0x3f000000, 0x3f1fffff}, {0, 0}, {0x7f800000, 0x7f800000}};
    for (int i = 0; i < 9; i++) {
        int64_t n = lengths[i];
        test_twin w = test_twin_of(specials(15, n + 3, true), (size_t)(n + 3) * 4);
        for (int k = 0; k < 4; k++) {
            check_window(&w, k, n, keys[k][0], keys[k][1], n);
            check_window(&w, (k + 1) % 4, n, keys[k][0], keys[k][1], n / 100);
        }
        test_twin_free(&w);
    }
}

static void test_samples_are_of_the_same_pieces(void **state) {
    static const int64_t lengths[] = {1, 16383, 16384, 3 * 16384 + 1, 5000011};
    for (int i = 0; i < 5; i++) {
        test_twin w = test_twin_of(specials(16, lengths[i] + 1, true), (size_t)(lengths[i] + 1) * 4);
        for (int64_t stride = 1; stride <= 300; stride = 2 * stride + stride / 3) {
            for (int bits = 11; bits <= 16; bits += 5) {
                for (int off = 0; off < 2; off++) {
                    test_twin counts = test_twin_zero(sizeof(int64_t) << bits), nans = test_twin_zero(8);
                    for (int d = 0; d < 2; d++) {
                        assert_ok(CPL_OPS(test_on[d], select_histogram, counts.on[d], nans.on[d], (float *)w.on[d] + off,
                                          lengths[i], stride, 0, 0, bits));
                    }
                    test_twin_same("sampled histogram", &counts);
                    test_twin_same("nans", &nans);
                    free_all((test_twin *[]){&counts, &nans}, 2);
                }
            }
        }
        test_twin_free(&w);
    }
}

static void check_quantize(cpl_quant_spec spec, int64_t rows, int64_t cols, float scale, int bad) {
    int64_t n = rows * cols, groups = 0;
    float *host = test_normals(12, n, scale);
    for (int64_t i = 0; i < n && bad == 0; i += 37) {
        host[i] = i % 2 ? 0.0f : host[i / 2];
    }
    for (int64_t i = 0; i < cols; i++) {
        host[i] = bad ? host[i] : 0.0f; /* a row of zeros */
    }
    host[n / 2] = bad == 1 ? NAN : bad == 2 ? 3e38f : host[n / 2];
    groups = spec.group > cols ? 1 : rows * ((cols + spec.group - 1) / spec.group);
    test_twin w = test_twin_of(host, (size_t)n * 4), codes = test_twin_new((size_t)n), scales = test_twin_new((size_t)groups * 4);
    test_twin zeros = test_twin_zero((size_t)groups), hat = test_twin_new((size_t)n * 4),
              error = test_twin_zero(sizeof(cpl_quant_error));
    test_twin refused = test_twin_zero(8);
    for (int d = 0; d < 2; d++) {
        assert_ok(CPL_OPS(test_on[d], quantize, &spec, w.on[d], rows, cols, codes.on[d], scales.on[d], zeros.on[d], hat.on[d],
                          error.on[d], refused.on[d]));
    }
    test_twin_same("refused", &refused);
    int64_t *count = test_twin_read(&refused, 1);
    assert_int_equal(*count != 0, bad != 0);
    cpl_free(&count);
    if (bad == 0) {
        test_twin_same("codes", &codes);
        test_twin_same("scales", &scales);
        test_twin_same("zeros", &zeros);
        test_twin_same("w_hat", &hat);
        cpl_quant_error *a = test_twin_read(&error, 0), *b = test_twin_read(&error, 1);
        assert_true(fabs(a->sum_sq_error - b->sum_sq_error) <= 1e-12 * a->sum_sq_error + 1e-300);
        assert_true(fabs(a->sum_sq - b->sum_sq) <= 1e-12 * a->sum_sq + 1e-300);
        assert_true(fabs(a->sum_noise - b->sum_noise) <= 1e-12 * a->sum_noise + 1e-300);
        assert_true(a->max_error == b->max_error);
        test_same_bits("code counts", b->code_count, a->code_count, sizeof a->code_count);
        cpl_free(&a);
        cpl_free(&b);
    }
    free_all((test_twin *[]){&w, &codes, &scales, &zeros, &hat, &error, &refused}, 7);
}

static void test_quantization_is_exact(void **state) {
    static const int64_t shapes[][2] = {{1, 1}, {3, 5}, {7, 64}, {16, 100}, {33, 768}, {5, 3072}, {64, 129}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int64_t rows = shapes[i][0], cols = shapes[i][1];
        const int64_t grouping[] = {rows * cols, cols, 32, 64, 128, 7};
        for (int bits = 2; bits <= 8; bits++) {
            for (int k = 0; k < 6; k++) {
                for (int scheme = 0; scheme < 4; scheme++) {
                    if (k >= 2 && grouping[k] > cols) {
                        continue;
                    }
                    cpl_quant_spec spec = {scheme % 2 ? CPL_QUANT_ASYMMETRIC : CPL_QUANT_SYMMETRIC, bits, grouping[k],
                                           scheme / 2 ? CPL_F32 : CPL_F16};
                    check_quantize(spec, rows, cols, 0.02f, 0);
                }
            }
        }
    }
    cpl_quant_spec spec = {CPL_QUANT_ASYMMETRIC, 4, 64, CPL_F16};
    check_quantize(spec, 8, 256, 1.0f, 1);
    check_quantize(spec, 8, 256, 1.0f, 2);
    spec.group = 8 * 256;
    check_quantize(spec, 8, 256, 1.0f, 1);
    check_quantize(spec, 8, 256, 1.0f, 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_casts_are_the_same_bits),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_every_tensor_with_an_inf_or_nan_is_found),
        cmocka_unit_test(test_exponents),
        cmocka_unit_test(test_the_scaler_takes_the_same_decisions),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_selection_is_exact),
        cmocka_unit_test(test_windows_list_the_same_weights),
        cmocka_unit_test(test_samples_are_of_the_same_pieces),
        cmocka_unit_test(test_quantization_is_exact),
    };
    return test_gpu_main(tests, sizeof tests / sizeof tests[0]);
}

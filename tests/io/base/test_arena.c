/* Checked allocation and the arena.
 * Refuses to test what the operating system does when memory really ends. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/arena.h"
#include <stdio.h>
#include <string.h>

static void test_overflow_is_found_in_products_and_sums(void **state) {
    size_t s = 0;
    int64_t i = 0;
    assert_true(cpl_mul_size(1u << 20, 1u << 20, &s) && s == (size_t)1 << 40);
    assert_false(cpl_mul_size(SIZE_MAX / 2, 3, &s));
    assert_false(cpl_add_size(SIZE_MAX, 1, &s));
    assert_true(cpl_mul_i64(-3, 5, &i) && i == -15);
    assert_false(cpl_mul_i64(INT64_MAX, 2, &i));
    assert_false(cpl_add_i64(INT64_MIN, -1, &i));
}

static void test_alloc_is_zeroed_and_aligned(void **state) {
    for (size_t n = 1; n < 3000; n += 97) {
        unsigned char *p = NULL;
        assert_int_equal(cpl_alloc(&p, n, 1, "bytes"), CPL_OK);
        assert_int_equal((uintptr_t)p % 64, 0);
        for (size_t i = 0; i < n; i++) {
            assert_int_equal(p[i], 0);
        }
        memset(p, 0xAA, n);
        cpl_free(&p);
        assert_null(p);
    }
}

static void test_alloc_of_nothing_is_null_and_free_accepts_it(void **state) {
    int x;
    int *p = &x;
    assert_int_equal(cpl_alloc(&p, 0, sizeof *p, "nothing"), CPL_OK);
    assert_null(p);
    cpl_free(&p);
    cpl_free(NULL);
}

static void test_alloc_refuses_overflow_and_names_what(void **state) {
    double *p;
    assert_int_equal(cpl_alloc(&p, SIZE_MAX / 4, sizeof *p, "the logits"), CPL_NO_MEMORY);
    assert_null(p);
    assert_non_null(strstr(cpl_status_message(), "the logits"));
    assert_int_equal(cpl_alloc(&p, SIZE_MAX - 8, 1, "padding"), CPL_NO_MEMORY);
    assert_int_equal(cpl_alloc(&p, (size_t)PTRDIFF_MAX + 1, 1, "half of everything"), CPL_NO_MEMORY);
    assert_null(p);
}

static void test_arena_pieces_are_zeroed_aligned_and_apart(void **state) {
    enum { PIECES = 3000 };
    static unsigned char *piece[PIECES];
    static size_t size[PIECES];
    cpl_arena *arena = NULL;
    assert_int_equal(cpl_arena_create(&arena), CPL_OK);
    for (size_t i = 0; i < PIECES; i++) {
        size[i] = i % 100 == 7 ? 20000 + i : i % 53; /* also larger than a block, also nothing */
        assert_int_equal(cpl_arena_alloc(arena, &piece[i], size[i], 1), CPL_OK);
        assert_non_null(piece[i]);
        assert_int_equal((uintptr_t)piece[i] % 16, 0);
        for (size_t k = 0; k < size[i]; k++) {
            assert_int_equal(piece[i][k], 0);
        }
        memset(piece[i], (int)(i % 251) + 1, size[i]);
    }
    for (size_t i = 0; i < PIECES; i++) {
        for (size_t k = 0; k < size[i]; k++) {
            assert_int_equal(piece[i][k], i % 251 + 1);
        }
    }
    cpl_arena_destroy(&arena);
    assert_null(arena);
    cpl_arena_destroy(&arena);
    cpl_arena_destroy(NULL);
}

static void test_arena_refuses_overflow(void **state) {
    cpl_arena *arena = NULL;
    int64_t *p;
    assert_int_equal(cpl_arena_create(&arena), CPL_OK);
    assert_int_equal(cpl_arena_alloc(arena, &p, SIZE_MAX / 2, sizeof *p), CPL_NO_MEMORY);
    assert_null(p);
    assert_int_equal(cpl_arena_alloc(arena, &p, SIZE_MAX - 20, 1), CPL_NO_MEMORY);
    assert_int_equal(cpl_arena_alloc(arena, &p, 1, sizeof *p), CPL_OK); /* still of use afterwards */
    cpl_arena_destroy(&arena);
}

static void test_arena_texts_of_any_length(void **state) {
    cpl_arena *arena = NULL;
    char *a, *b, *c, expected[64];
    assert_int_equal(cpl_arena_create(&arena), CPL_OK);
    assert_int_equal(cpl_arena_strdup(arena, &a, ""), CPL_OK);
    assert_int_equal(cpl_arena_printf(arena, &b, "%0*d", 50000, 7), CPL_OK);
    assert_int_equal(cpl_arena_printf(arena, &c, "h.%d.%s", 3, "attn"), CPL_OK);
    assert_string_equal(a, "");
    assert_int_equal(strlen(b), 50000);
    snprintf(expected, sizeof expected, "h.3.attn");
    assert_string_equal(c, expected);
    cpl_arena_destroy(&arena);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_overflow_is_found_in_products_and_sums),
        cmocka_unit_test(test_alloc_is_zeroed_and_aligned),
        cmocka_unit_test(test_alloc_of_nothing_is_null_and_free_accepts_it),
        cmocka_unit_test(test_alloc_refuses_overflow_and_names_what),
        cmocka_unit_test(test_arena_pieces_are_zeroed_aligned_and_apart),
        cmocka_unit_test(test_arena_refuses_overflow),
        cmocka_unit_test(test_arena_texts_of_any_length),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Status codes and messages.
 * Refuses to look at wording that belongs to the callers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/status.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static void test_fail_returns_code_and_keeps_formatted_text(void **state) {
    assert_int_equal(cpl_fail(CPL_INPUT, "a.c", 7, "%s:%d: expected %s", "x.bin", 3, "a header"), CPL_INPUT);
    assert_string_equal(cpl_status_message(), "x.bin:3: expected a header");
}

static void test_message_is_one_line_without_terminal_escapes(void **state) {
    cpl_fail(CPL_INPUT, "a.c", 7, "one\ntwo\r\x1b[31mred\x7f");
    assert_string_equal(cpl_status_message(), "one two  [31mred ");
    cpl_status_set_message("three\nfour");
    assert_string_equal(cpl_status_message(), "three four");
}

static void test_long_message_is_cut_between_characters(void **state) {
    char text[3 * CPL_MESSAGE_MAX] = "";
    for (int shift = 0; shift < 2; shift++) {
        memset(text, 0, sizeof text);
        text[0] = 'x';
        for (size_t i = (size_t)shift; i + 2 < sizeof text; i += 2) {
            memcpy(text + i, "\xC3\xA9", 2);
        }
        cpl_fail(CPL_INPUT, "a.c", 1, "%s", text);
        size_t n = strlen(cpl_status_message());
        assert_int_equal(n, shift == 0 ? CPL_MESSAGE_MAX - 2 : CPL_MESSAGE_MAX - 1);
        assert_memory_equal(cpl_status_message(), text, n);
    }
}

static void test_context_stands_before_the_message_and_ok_stays_silent(void **state) {
    cpl_fail(CPL_IO, "a.c", 1, "disk full");
    assert_int_equal(cpl_fail_context(CPL_IO, "saving step %d", 12), CPL_IO);
    assert_string_equal(cpl_status_message(), "saving step 12: disk full");
    assert_int_equal(cpl_fail_context(CPL_OK, "unused"), CPL_OK);
    assert_string_equal(cpl_status_message(), "saving step 12: disk full");
}

static void test_last_message_may_be_an_argument_of_the_next(void **state) {
    cpl_status_set_message("inner");
    cpl_fail(CPL_INPUT, "a.c", 1, "outer (%s)", cpl_status_message());
    assert_string_equal(cpl_status_message(), "outer (inner)");
    cpl_fail_context(CPL_INPUT, "again %s", cpl_status_message());
    assert_string_equal(cpl_status_message(), "again outer (inner): outer (inner)");
    cpl_status_set_message(cpl_status_message());
    assert_string_equal(cpl_status_message(), "again outer (inner): outer (inner)");
}

static void test_source_position_is_given_for_our_own_failures_only(void **state) {
    cpl_fail(CPL_INTERNAL, "kernels/x.c", 42, "impossible");
    assert_string_equal(cpl_status_message(), "impossible [kernels/x.c:42]");
    cpl_fail(CPL_USAGE, "kernels/x.c", 42, "wrong");
    assert_string_equal(cpl_status_message(), "wrong");
}

static void *fail_elsewhere(void *unused) {
    cpl_fail(CPL_IO, "a.c", 1, "of the other thread");
    return NULL;
}

static void test_every_thread_has_its_own_message(void **state) {
    pthread_t thread;
    cpl_status_set_message("mine");
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_string_equal(cpl_status_message(), "mine");
    cpl_status_clear();
    assert_string_equal(cpl_status_message(), "");
}

static void test_exit_statuses_are_those_of_the_command_line(void **state) {
    assert_int_equal(cpl_status_exit(CPL_OK), 0);
    assert_int_equal(cpl_status_exit(CPL_USAGE), 2);
    assert_int_equal(cpl_status_exit(CPL_STOPPED), 75);
    for (int st = 0; st < CPL_STATUS_COUNT; st++) {
        int status = cpl_status_exit((cpl_status)st);
        assert_true(st == CPL_OK ? status == 0 : status > 0 && status < 126);
        assert_string_not_equal(cpl_status_text((cpl_status)st), "unknown status");
    }
    assert_string_equal(cpl_status_text((cpl_status)999), "unknown status");
    assert_int_equal(cpl_status_exit((cpl_status)999), 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fail_returns_code_and_keeps_formatted_text),
        cmocka_unit_test(test_message_is_one_line_without_terminal_escapes),
        cmocka_unit_test(test_long_message_is_cut_between_characters),
        cmocka_unit_test(test_context_stands_before_the_message_and_ok_stays_silent),
        cmocka_unit_test(test_last_message_may_be_an_argument_of_the_next),
        cmocka_unit_test(test_source_position_is_given_for_our_own_failures_only),
        cmocka_unit_test(test_every_thread_has_its_own_message),
        cmocka_unit_test(test_exit_statuses_are_those_of_the_command_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

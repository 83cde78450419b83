/* Progress on a terminal and elsewhere.
 * Refuses to trust its own eyes: a small terminal plays the bytes. */
#include "tests/io/base/capture.h"
#include "io/base/log.h"

static int setup(void **state) {
    return unsetenv("CUPEL_PROGRESS_SECONDS");
}

static void test_progress_without_terminal_is_a_line_per_interval(void **state) {
    cpl_progress p;
    capture_file();
    cpl_log_init(0, false);
    cpl_progress_begin(&p, "teacher", 400, 1000);
    cpl_progress_step(&p, 401, "loss 9"); /* too early */
    p.started -= 9.6;
    p.last_shown -= 6;
    cpl_progress_step(&p, 900, "loss 2.31  9.8k tok/s");
    cpl_progress_step(&p, 901, "loss 9");
    cpl_progress_end(&p, "loss 2.30");
    assert_string_equal(captured_file(), "cupel: teacher   90 %  900/1000  loss 2.31  9.8k tok/s  0:10 elapsed  0:02 left\n"
                                         "cupel: teacher   90 %  901/1000  loss 2.30  0:10 elapsed\n");
}

static void test_a_wrong_interval_falls_back_to_five_seconds(void **state) {
    static const char *const wrong[] = {"", "x", "-1", "1x", "nan"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        cpl_progress p;
        setenv("CUPEL_PROGRESS_SECONDS", wrong[i], 1);
        capture_file();
        cpl_log_init(0, false);
        cpl_progress_begin(&p, "teacher", 0, 10);
        cpl_progress_step(&p, 1, "early");
        assert_string_equal(captured_file(), "");
    }
}

static void test_bar_shows_percentage_note_and_times_in_place(void **state) {
    char bytes[2][CAPTURE_MAX] = {"", ""};
    static screen s;
    cpl_progress p;
    capture_terminal(100);
    cpl_log_init(0, false);
    cpl_progress_begin(&p, "teacher", 0, 1000);
    p.started -= 99.6; /* as if it had run for 100 s, and not 101 s on a busy machine */
    p.last_shown -= 1;
    cpl_progress_step(&p, 840, "loss 2.31  9.8k tok/s");
    read_terminal(bytes[0], CAPTURE_MAX);
    cpl_progress_step(&p, 841, "too early to be drawn");
    p.last_shown -= 1;
    cpl_progress_step(&p, 1000, "");
    cpl_progress_end(&p, "loss 2.00");
    read_terminal(bytes[1], CAPTURE_MAX);
    end_terminal();
    play(&s, bytes[0]);
    assert_int_equal(s.y, 0);
    assert_string_equal(s.row[0],
                        "teacher  [###################....]   84 %  840/1000  loss 2.31  9.8k tok/s  1:40 elapsed  0:19 left");
    assert_null(strstr(bytes[1], "too early"));
    play(&s, bytes[1]);
    assert_int_equal(s.y, 1); /* the last state stays, and the cursor is below it */
    assert_int_equal(s.x, 0);
    assert_string_equal(s.row[0], "teacher  [##############################]  100 %  1000/1000  loss 2.00  1:40 elapsed");
}

static void test_bar_never_passes_the_width_of_the_terminal(void **state) {
    for (unsigned short width = 1; width <= 150; width = (unsigned short)(width + 7)) {
        char bytes[CAPTURE_MAX] = "";
        static screen s;
        cpl_progress p;
        capture_terminal(width);
        cpl_log_init(0, false);
        cpl_progress_begin(&p, "a stage with quite a long name", 0, 1000000);
        p.started -= 5000;
        p.last_shown -= 1;
        cpl_progress_step(&p, 123456, "loss 2.31  9.8k tok/s  scale 65536  and more words\nand a line");
        read_terminal(bytes, sizeof bytes);
        end_terminal();
        play(&s, bytes);
        assert_int_equal(s.y, 0);
        assert_true(s.widest < width || width == 1);
        assert_true(width > 1 || s.widest == 0);
        if (width > 40) {
            assert_non_null(strstr(s.row[0], " left")); /* the note is cut, not the time left */
        }
    }
}

static void test_lines_stand_alone_and_the_bar_comes_back_below(void **state) {
    char bytes[3][CAPTURE_MAX] = {"", "", ""};
    static screen s;
    cpl_progress p;
    capture_terminal(120);
    cpl_log_init(0, false);
    cpl_progress_begin(&p, "student", 0, 10);
    cpl_progress_step(&p, 1, "");
    cpl_log_info("evaluated: %d", 5);
    cpl_log_warn("overflow");
    read_terminal(bytes[0], CAPTURE_MAX);
    strcpy(bytes[1], bytes[0]);
    cpl_progress_step(&p, 2, "after"); /* drawn at once, for no bar is on the screen */
    read_terminal(bytes[1], CAPTURE_MAX);
    strcpy(bytes[2], bytes[1]);
    cpl_log_close();
    read_terminal(bytes[2], CAPTURE_MAX);
    end_terminal();
    play(&s, bytes[0]);
    assert_string_equal(s.row[0], "cupel: evaluated: 5");
    assert_string_equal(s.row[1], "cupel: warning: overflow");
    assert_string_equal(s.row[2], "");
    assert_int_equal(s.x, 0);
    play(&s, bytes[1]);
    assert_memory_equal(s.row[2], "student  [######....", 20);
    assert_int_equal(s.y, 2);
    play(&s, bytes[2]);
    assert_string_equal(s.row[2], ""); /* nothing of the bar is left for an error message to stand in */
    assert_int_equal(s.x, 0);
}

static void test_a_dumb_terminal_gets_lines(void **state) {
    char bytes[CAPTURE_MAX] = "";
    cpl_progress p;
    setenv("CUPEL_PROGRESS_SECONDS", "0", 1);
    capture_terminal(80);
    setenv("TERM", "dumb", 1);
    cpl_log_init(0, false);
    cpl_progress_begin(&p, "student", 0, 2);
    cpl_progress_step(&p, 1, "");
    read_terminal(bytes, sizeof bytes);
    end_terminal();
    assert_null(strchr(bytes, '\x1b'));
    assert_memory_equal(bytes, "cupel: student   50 %  1/2", 26);
}

static void test_empty_and_overfull_work_is_no_division_by_zero(void **state) {
    cpl_progress p;
    setenv("CUPEL_PROGRESS_SECONDS", "0", 1);
    capture_file();
    cpl_log_init(0, false);
    cpl_progress_begin(&p, "none", 0, 0);
    cpl_progress_end(&p, NULL);
    cpl_progress_begin(&p, "more", 0, 2);
    cpl_progress_step(&p, 3, "");
    assert_string_equal(captured_file(), "cupel: none  100 %  0/0  0:00 elapsed\ncupel: more  100 %  3/2  0:00 elapsed\n");
}

int main(void) {
#define EACH(test) cmocka_unit_test_setup_teardown(test, setup, NULL)
    const struct CMUnitTest tests[] = {
        EACH(test_progress_without_terminal_is_a_line_per_interval), EACH(test_a_wrong_interval_falls_back_to_five_seconds),
        EACH(test_bar_shows_percentage_note_and_times_in_place),     EACH(test_bar_never_passes_the_width_of_the_terminal),
        EACH(test_lines_stand_alone_and_the_bar_comes_back_below),   EACH(test_a_dumb_terminal_gets_lines),
        EACH(test_empty_and_overfull_work_is_no_division_by_zero),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

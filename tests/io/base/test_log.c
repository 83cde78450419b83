/* What a batch log and log.jsonl hold.
 * Refuses to trust its own eyes: a small parser reads the JSON. */
#include "tests/io/base/capture.h"
#include "io/base/log.h"
#include <ctype.h>
#include <math.h>

/* One JSON value at p (RFC 8259); what follows, or NULL. */
static const char *json_value(const char *p) {
    static const char *const word[] = {"null", "true", "false"};
    for (size_t i = 0; i < 3; i++) {
        if (strncmp(p, word[i], strlen(word[i])) == 0) {
            return p + strlen(word[i]);
        }
    }
    if (*p == '"') {
        for (p++; *p != '"'; p++) {
            if ((unsigned char)*p < 0x20) {
                return NULL;
            }
            if (*p == '\\' && (p[1] == '\0' || strchr("\"\\/bfnrtu", *++p) == NULL)) {
                return NULL;
            }
        }
        return p + 1;
    }
    if (*p == '{' || *p == '[') {
        char open = *p++;
        char shut = open == '{' ? '}' : ']';
        for (bool first = true; *p != shut; first = false) {
            if (!first && *p++ != ',') {
                return NULL;
            }
            p += strspn(p, " ");
            if (open == '{' && (*p != '"' || (p = json_value(p)) == NULL || *p++ != ':')) {
                return NULL;
            }
            if ((p = json_value(p)) == NULL) {
                return NULL;
            }
        }
        return p + 1;
    }
    p += *p == '-';
    if (!isdigit((unsigned char)*p)) {
        return NULL;
    }
    p += strspn(p, "0123456789");
    if (*p == '.') {
        p += 1 + strspn(p + 1, "0123456789");
    }
    if (*p == 'e' || *p == 'E') {
        p += 1 + (p[1] == '-' || p[1] == '+');
        p += strspn(p, "0123456789");
    }
    return p;
}

/* Every line of the file is one JSON object that has time and event; returns the text, *lines their number. */
static const char *read_log(const char *path, int *lines) {
    static char text[CAPTURE_MAX];
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    *lines = 0;
    for (const char *p = text; *p != '\0'; ++*lines) {
        assert_true(strncmp(p, "{\"time\":\"2", 10) == 0);
        const char *end = json_value(p);
        assert_non_null(end);
        assert_int_equal(*end, '\n');
        p = end + 1;
    }
    return text;
}

static char path[] = "test_log_XXXXXX";

static int new_path(void **state) {
    strcpy(path, "test_log_XXXXXX");
    int fd = mkstemp(path);
    return fd < 0 || close(fd) != 0;
}

static int remove_path(void **state) {
    return unlink(path);
}

static void test_other_ranks_say_and_write_nothing(void **state) {
    int lines;
    capture_file();
    cpl_log_init(1, false);
    assert_int_equal(cpl_log_open("/nonexistent/log.jsonl"), CPL_OK);
    assert_int_equal(cpl_log_open(path), CPL_OK);
    cpl_log_info("one");
    cpl_log_warn("two");
    cpl_log_event("step", "\"x\":1");
    cpl_progress p;
    cpl_progress_begin(&p, "work", 0, 2);
    cpl_progress_step(&p, 1, "");
    cpl_progress_end(&p, "");
    cpl_log_close();
    assert_string_equal(captured_file(), "");
    assert_string_equal(read_log(path, &lines), "");
}

static void test_quiet_leaves_warnings_on_stderr_and_everything_in_the_log(void **state) {
    int lines;
    capture_file();
    cpl_log_init(0, true);
    assert_int_equal(cpl_log_open(path), CPL_OK);
    cpl_log_info("calm");
    cpl_log_warn("hot");
    cpl_progress p;
    cpl_progress_begin(&p, "work", 0, 2);
    cpl_progress_end(&p, "");
    cpl_log_close();
    assert_string_equal(captured_file(), "cupel: warning: hot\n");
    const char *text = read_log(path, &lines);
    assert_int_equal(lines, 2);
    assert_non_null(strstr(text, "\"event\":\"info\",\"text\":\"calm\"}"));
    assert_non_null(strstr(text, "\"event\":\"warning\",\"text\":\"hot\"}"));
}

static void test_every_line_is_json_whatever_is_in_it(void **state) {
    int lines;
    char huge[20000];
    memset(huge, '"', sizeof huge - 1);
    huge[sizeof huge - 1] = '\0';
    capture_file();
    cpl_log_init(0, false);
    assert_int_equal(cpl_log_open(path), CPL_OK);
    cpl_log_info("quote \" backslash \\ line\nfeed \x01 tab\t bad \xFF\xC3 good \xC3\xA9");
    cpl_log_info("%s", huge);
    cpl_log_event("odd \" name", "\"loss\":%g,\"norm\":%g,\"low\":%g,\"text\":\"nan inf\",\"list\":[1,%g]", NAN, INFINITY,
                  -INFINITY, -NAN);
    cpl_log_event("empty", "%s", "");
    cpl_log_event("step", "\"step\":%d,\n\"x\":-1.5e-7", 3);
    cpl_log_close();
    const char *screen_text = captured_file();
    assert_int_equal(strchr(screen_text, '\n') - screen_text, strcspn(screen_text, "\x01\t\n")); /* one line, no controls */
    const char *text = read_log(path, &lines);
    assert_int_equal(lines, 5);
    assert_non_null(strstr(
        text, "\"text\":\"quote \\\" backslash \\\\ line\\nfeed \\u0001 tab\\t bad \xEF\xBF\xBD\xEF\xBF\xBD good \xC3\xA9\"}"));
    assert_non_null(strstr(text, "\"loss\":null,\"norm\":null,\"low\":null,\"text\":\"nan inf\",\"list\":[1,null]}"));
    assert_non_null(strstr(text, "\"event\":\"empty\"}\n"));
}

static void test_events_are_in_the_file_before_the_log_is_closed(void **state) {
    int lines;
    capture_file();
    cpl_log_init(0, false);
    assert_int_equal(cpl_log_open(path), CPL_OK);
    cpl_log_event("step", "\"step\":1");
    read_log(path, &lines);
    assert_int_equal(lines, 1);
    cpl_log_close();
    captured_file();
}

static void test_a_line_cut_by_a_kill_becomes_a_valid_event(void **state) {
    int lines;
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs("{\"time\":\"2024-01-01T00:00:00.000Z\",\"event\":\"info\"}\n{\"time\":\"2024-01-01T00:00:01.000Z\",\"eve", file);
    fclose(file);
    capture_file();
    cpl_log_init(0, false);
    for (int i = 0; i < 2; i++) { /* the second time there is nothing to mend */
        assert_int_equal(cpl_log_open(path), CPL_OK);
        cpl_log_event("resumed", "\"step\":7");
        cpl_log_close();
    }
    captured_file();
    const char *text = read_log(path, &lines);
    assert_int_equal(lines, 4);
    assert_non_null(strstr(text, "\"event\":\"cut\",\"text\":\"{\\\"time\\\":\\\"2024-01-01T00:00:01.000Z\\\",\\\"eve\"}\n"));
}

static void test_a_file_of_one_long_cut_line_is_mended(void **state) {
    int lines;
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    for (int i = 0; i < 50000; i++) {
        fputc('x', file);
    }
    fclose(file);
    capture_file();
    cpl_log_init(0, false);
    assert_int_equal(cpl_log_open(path), CPL_OK);
    cpl_log_close();
    captured_file();
    assert_non_null(strstr(read_log(path, &lines), "\"event\":\"cut\",\"text\":\"xxxx"));
    assert_int_equal(lines, 1);
}

static void test_a_log_that_cannot_be_opened_is_an_error_with_its_name(void **state) {
    cpl_log_init(0, false);
    assert_int_equal(cpl_log_open("/nonexistent/log.jsonl"), CPL_IO);
    assert_string_equal(cpl_status_message(), "/nonexistent/log.jsonl: cannot be opened for appending: No such file or directory");
}

static void test_a_full_disk_is_said_once(void **state) {
    int fd = open("/dev/full", O_WRONLY);
    if (fd < 0) {
        skip();
    }
    close(fd);
    capture_file();
    cpl_log_init(0, false);
    assert_int_equal(cpl_log_open("/dev/full"), CPL_OK);
    cpl_log_event("step", "\"step\":1");
    cpl_log_event("step", "\"step\":2");
    cpl_log_close();
    assert_string_equal(captured_file(), "cupel: warning: cannot write to the log: No space left on device\n");
}

static void test_quoting_never_passes_its_buffer_and_never_splits(void **state) {
    const char *text = "a\"\\\n\x01\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z";
    char out[80];
    for (size_t size = 0; size < sizeof out; size++) {
        memset(out, 0x55, sizeof out);
        cpl_json_quote(out, size, text);
        for (size_t i = size; i < sizeof out; i++) {
            assert_int_equal(out[i], 0x55);
        }
        if (size >= 3) {
            const char *end = json_value(out);
            assert_true(end != NULL && *end == '\0');
        } else if (size > 0) {
            assert_string_equal(out, "");
        }
    }
    assert_string_equal(out, "\"a\\\"\\\\\\n\\u0001\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80z\"");
}

int main(void) {
#define EACH(test) cmocka_unit_test_setup_teardown(test, new_path, remove_path)
    const struct CMUnitTest tests[] = {
        EACH(test_other_ranks_say_and_write_nothing),
        EACH(test_quiet_leaves_warnings_on_stderr_and_everything_in_the_log),
        EACH(test_every_line_is_json_whatever_is_in_it),
        EACH(test_events_are_in_the_file_before_the_log_is_closed),
        EACH(test_a_line_cut_by_a_kill_becomes_a_valid_event),
        EACH(test_a_file_of_one_long_cut_line_is_mended),
        EACH(test_a_log_that_cannot_be_opened_is_an_error_with_its_name),
        EACH(test_a_full_disk_is_said_once),
        EACH(test_quoting_never_passes_its_buffer_and_never_splits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* Proves that the report shows what is stored: order, marks, units, reasons of failures, the width of the terminal.
 * Refuses a results file that is not written by the program's own writer. */
#include "io/record.h"
#include "jobs/report.h"
#include "jobs/report_sweep.h"
#include "jobs/table.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#define assert_ok(call)                                                                                                            \
    do {                                                                                                                           \
        if ((call) != CPL_OK) {                                                                                                    \
            fail_msg("%s: %s", #call, cpl_status_message());                                                                       \
        }                                                                                                                          \
    } while (0)

enum { TRIALS = 5 };
static char folder[] = "test_report.XXXXXX";
static char results[64], teacher[64], grid[64];

static void write_teacher(void) {
    cpl_record *rec = NULL;
    const char *dim = "step";
    const int64_t n = 3;
    const double scale[] = {65536, 32768, 16384};
    assert_ok(cpl_record_create(&rec));
    assert_ok(cpl_record_text(rec, "kind", "train"));
    assert_ok(cpl_record_text(rec, "status", "done"));
    assert_ok(cpl_record_f64(rec, "val_loss", 1.23456));
    assert_ok(cpl_record_f64(rec, "perplexity", exp(1.23456)));
    assert_ok(cpl_record_i64(rec, "bytes", 5123456));
    assert_ok(cpl_record_i64(rec, "parameters", 2561728));
    assert_ok(cpl_record_i64(rec, "option_steps", 2000));
    assert_ok(cpl_record_i64(rec, "overflow_steps", 7));
    assert_ok(cpl_record_f64(rec, "wall_s", 123.44));
    assert_ok(cpl_record_f64(rec, "energy_j", 4667.5));
    assert_ok(cpl_record_array(rec, "loss_scale", CPL_T_F64, 1, &n, &dim, scale, "", "scale"));
    assert_ok(cpl_record_write(rec, teacher));
    cpl_record_destroy(&rec);
}

/* latency: NAN where it was not measured. rows: the first five by hand, further ones dominated and worse with their number. */
static void write_grid(int64_t rows, double latency) {
    cpl_record *rec = NULL;
    const char **model = malloc(sizeof *model * (size_t)rows), **sparsity = malloc(sizeof *sparsity * (size_t)rows);
    const char **status = malloc(sizeof *status * (size_t)rows), **error = malloc(sizeof *error * (size_t)rows);
    double *number[9];
    static const char *const name[9] = {"val_loss",       "perplexity",  "bytes", "sparsity_exact", "sqnr_db",
                                        "latency_p50_ms", "compression", "score", "pareto"};
    static const char *const asked[TRIALS] = {"0", "0.5", "0.9", "0.95", "0.99"};
    static const double first[TRIALS][9] = {{1.25, 3.4903, 4e6, 0, NAN, 9, 1, 1.01, 1},
                                            {1.30, 3.6693, 2.5e6, 0.5, NAN, 9, 2.05, 1.05, 1},
                                            {1.80, 6.0496, 3e6, 0.9, NAN, 9, 1.71, 1.4, 0},
                                            {1.70, 5.4739, 2.6e6, 0.95, NAN, 9, 1.97, 1.3, 0},
                                            {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN}};
    for (int c = 0; c < 9; c++) {
        number[c] = malloc(sizeof(double) * (size_t)rows);
    }
    for (int64_t i = 0; i < rows; i++) {
        model[i] = "teacher";
        sparsity[i] = asked[i % TRIALS];
        status[i] = i == 4 ? "failed" : "done";
        error[i] = i == 4 ? "rank 1: the sky fell" : "";
        for (int c = 0; c < 9; c++) {
            number[c][i] = i < TRIALS ? first[i][c] : first[2][c] + (c == 7 ? (double)i : 0);
        }
        number[5][i] = i == 4 ? (double)NAN : latency;
    }
    assert_ok(cpl_record_create(&rec));
    assert_ok(cpl_record_text(rec, "kind", "sweep"));
    assert_ok(cpl_record_text(rec, "status", "done"));
    assert_ok(cpl_record_text(rec, "pareto_axes", "val_loss,bytes"));
    assert_ok(cpl_record_i64(rec, "trials_total", rows));
    assert_ok(cpl_record_i64(rec, "trials_failed", 1));
    assert_ok(cpl_record_f64(rec, "wall_s", 10));
    assert_ok(cpl_record_f64(rec, "objective_latency", 0.1));
    assert_ok(cpl_record_f64(rec, "objective_memory", 0.1));
    assert_ok(cpl_record_f64(rec, "reference_val_loss", 1.2345));
    assert_ok(cpl_record_f64(rec, "reference_perplexity", 3.4367));
    assert_ok(cpl_record_f64(rec, "reference_bytes", 5123456));
    assert_ok(cpl_record_f64(rec, "reference_sparsity", 0));
    assert_ok(cpl_record_f64(rec, "reference_latency_p50_ms", latency));
    int64_t *index = malloc(sizeof *index * (size_t)rows);
    for (int64_t i = 0; i < rows; i++) {
        index[i] = i;
    }
    assert_ok(cpl_record_table_column(rec, "trials", "trial", CPL_T_I64, rows, index));
    assert_ok(cpl_record_table_column(rec, "trials", "model", CPL_T_TEXT, rows, model));
    assert_ok(cpl_record_table_column(rec, "trials", "sparsity", CPL_T_TEXT, rows, sparsity));
    assert_ok(cpl_record_table_column(rec, "trials", "status", CPL_T_TEXT, rows, status));
    for (int c = 0; c < 9; c++) {
        assert_ok(cpl_record_table_column(rec, "trials", name[c], CPL_T_F64, rows, number[c]));
        free(number[c]);
    }
    assert_ok(cpl_record_table_column(rec, "trials", "error", CPL_T_TEXT, rows, error));
    assert_ok(cpl_record_write(rec, grid));
    cpl_record_destroy(&rec);
    free(index);
    free(model);
    free(sparsity);
    free(status);
    free(error);
}

static void assemble(size_t parts) {
    cpl_record *root = NULL;
    const cpl_results_part part[] = {{"stages/teacher", teacher}, {"stages/grid", grid}};
    assert_ok(cpl_record_create(&root));
    assert_ok(cpl_record_text(root, "name", "kjv"));
    assert_ok(cpl_record_text(root, "cupel_version", "9.9"));
    assert_ok(cpl_record_i64(root, "ranks", 2));
    assert_ok(cpl_record_text(root, "hostnames", "box"));
    assert_ok(cpl_results_assemble(results, root, part, parts));
    cpl_record_destroy(&root);
}

static __attribute__((noinline)) char *report(int64_t rows, const char *columns) {
    char *text = NULL;
    size_t size = 0;
    FILE *to = open_memstream(&text, &size);
    assert_non_null(to);
    columns == NULL ? unsetenv("COLUMNS") : setenv("COLUMNS", columns, 1);
    assert_ok(cpl_report_rows(results, "where/it/is", to, rows));
    fclose(to);
    return text;
}

/* The n-th line (from 0) that contains both texts; fails the test where there is none. Freed by the caller. */
static char *line_with(const char *text, const char *a, const char *b) {
    for (const char *p = text; *p != '\0';) {
        size_t length = strcspn(p, "\n");
        char *line = strndup(p, length);
        if (strstr(line, a) != NULL && strstr(line, b) != NULL) {
            return line;
        }
        free(line);
        p += length + (p[length] == '\n');
    }
    fail_msg("no line has '%s' and '%s' in:\n%s", a, b, text);
    return NULL;
}

static void assert_has(const char *text, const char *a, const char *b) {
    free(line_with(text, a, b));
}

static size_t position(const char *text, const char *what) {
    const char *at = strstr(text, what);
    if (at == NULL) {
        fail_msg("'%s' is not in:\n%s", what, text);
    }
    return (size_t)(at - text);
}

static void test_stages_show_loss_size_steps_overflows_and_last_scale(void **state) {
    (void)state;
    write_grid(TRIALS, 9);
    assemble(2);
    char *text = report(40, NULL);
    assert_has(text, "kjv", "cupel 9.9, 2 ranks on box");
    assert_has(text, "where/it/is", "");
    char *line = line_with(text, "teacher ", "train");
    static const char *const cells[] = {"2.56 M", "1.2346", "3.437", "5.12 MB", "2000", "7", "2^14", "123.4", "4.67 kJ"};
    size_t at = 0;
    for (size_t i = 0; i < sizeof cells / sizeof cells[0]; i++) {
        at += position(line + at, cells[i]);
    }
    free(line);
    assert_has(text, "grid ", "5 trials, 1 failed");
    assert_has(text, "nat/token", "ms p50");
    free(text);
}

static void test_pareto_optimal_trials_come_first_by_size_and_the_others_by_score(void **state) {
    (void)state;
    write_grid(TRIALS, 9);
    assemble(2);
    char *text = report(40, NULL);
    assert_has(text, "*", "teacher sparsity=0.5 ");
    assert_has(text, "*", "teacher sparsity=0 ");
    size_t p25 = position(text, "sparsity=0.5 "), p4 = position(text, "sparsity=0 "), second = position(text, "sparsity=0.95"),
           third = position(text, "sparsity=0.9 "), same = position(text, "teacher unchanged, 16 bits");
    assert_true(p25 < p4 && p4 < second && second < third && third < same);
    char *line = line_with(text, "sparsity=0.95", "");
    assert_null(strchr(line, '*'));
    free(line);
    line = line_with(text, "teacher sparsity=0.5 ", "");
    static const char *const cells[] = {"1.3000", "3.669", "2.50 MB", "2.05", "50.0", "9.00", "1.0500"};
    size_t at = 0;
    for (size_t i = 0; i < sizeof cells / sizeof cells[0]; i++) {
        at += position(line + at, cells[i]);
    }
    free(line);
    free(text);
}

static void test_failed_trials_are_named_with_their_reason(void **state) {
    (void)state;
    write_grid(TRIALS, 9);
    assemble(2);
    char *text = report(40, NULL);
    assert_has(text, " failed: teacher sparsity=0.99: rank 1: the sky fell", "");
    free(text);
}

static void test_rows_of_a_sweep_are_limited_and_the_rest_is_counted(void **state) {
    (void)state;
    write_grid(105, 9);
    assemble(2);
    char *text = report(40, NULL);
    assert_has(text, " and 64 more", "stages/grid/trials");
    free(text);
    text = report(0, NULL);
    assert_null(strstr(text, " more"));
    size_t lines = 0;
    for (const char *p = text; (p = strstr(p, "teacher sparsity=")) != NULL; p++) {
        lines++;
    }
    assert_int_equal(lines, 105);
    free(text);
}

static void test_what_was_not_measured_has_no_column(void **state) {
    (void)state;
    write_grid(TRIALS, NAN);
    assemble(2);
    char *text = report(40, NULL);
    assert_null(strstr(text, "latency"));
    assert_null(strstr(text, "SQNR"));
    assert_null(strstr(text, "nan"));
    free(text);
}

/* Lines of the sweep's table, from its headings: every rule, row and heading fits, and the rows' figures end at the same columns.
 */
static void check_table(const char *table, size_t width) {
    size_t rows = 0, end = 0;
    for (const char *p = table; *p != '\0' && *p != '\n' && strncmp(p, " left out", 9) != 0 && strncmp(p, " failed", 7) != 0;) {
        size_t length = strcspn(p, "\n");
        assert_true(length <= width);
        assert_true(p[length - 1] != ' ');
        const char *loss = rows < 3 ? NULL : strstr(p, "  1.");
        if (loss != NULL) {
            assert_true(end == 0 || end == (size_t)(loss - p));
            end = (size_t)(loss - p);
        }
        rows++;
        p += length + 1;
    }
    assert_int_equal(rows, 3 + TRIALS);
    assert_true(end > 0);
}

static void test_columns_are_aligned_and_give_way_to_the_width_of_the_terminal(void **state) {
    (void)state;
    write_grid(TRIALS, 9);
    assemble(2);
    char *full = report(40, NULL), *latency = line_with(full, "variant", "latency");
    size_t natural = strlen(latency), most = 0;
    static const char *const order[] = {"compression", "perplexity", "removed", "score", "latency"};
    for (int width = 60; width <= 132; width += 8) {
        char columns[16];
        snprintf(columns, sizeof columns, "%d", width);
        char *text = report(40, columns), *table = strstr(text, "    variant");
        assert_non_null(table);
        check_table(table, (size_t)width);
        char *heading = line_with(text, "    variant", "val loss");
        size_t shown = 0;
        for (size_t i = 0; i < sizeof order / sizeof order[0]; i++) {
            bool there = strstr(heading, order[i]) != NULL;
            assert_true(!there || shown == i); /* in this order */
            shown += there;
        }
        assert_true(shown >= most);
        most = shown;
        assert_int_equal(strcmp(heading, latency) == 0, (size_t)width >= natural);
        free(heading);
        free(text);
    }
    assert_null(strstr(full, "~"));
    assert_null(strstr(full, "left out"));
    free(latency);
    free(full);
}

static void test_a_long_variant_is_cut_and_says_so(void **state) {
    (void)state;
    static const cpl_column columns[] = {
        {"variant", "", CPL_COLUMN_WIDE, 0}, {"loss", "nat", CPL_COLUMN_RIGHT, 0}, {"extra", "", CPL_COLUMN_LEFT, 1}};
    cpl_table *t = NULL;
    char *text = NULL;
    size_t size = 0;
    assert_ok(cpl_table_create(&t, columns, 3));
    assert_ok(cpl_table_row(t, true));
    assert_ok(cpl_table_cell(t, "%s", "\xc3\xa9t\xc3\xa9 0123456789 0123456789 0123456789 0123456789"));
    assert_ok(cpl_table_number(t, "%.2f", 1.5));
    assert_ok(cpl_table_cell(t, "%s", "long"));
    assert_ok(cpl_table_row(t, false));
    assert_ok(cpl_table_cell(t, "%s", "short"));
    assert_ok(cpl_table_number(t, "%.2f", NAN));
    assert_int_equal(cpl_table_cell(t, "x") == CPL_OK && cpl_table_cell(t, "x") == CPL_INTERNAL, 1);
    setenv("COLUMNS", "30", 1);
    FILE *to = open_memstream(&text, &size);
    assert_non_null(to);
    assert_ok(cpl_table_print(t, to));
    fclose(to);
    assert_string_equal(text, " variant                  loss\n"
                              "                           nat\n"
                              " -----------------------------\n"
                              " \xc3\xa9t\xc3\xa9 0123456789 0123456~  1.50\n"
                              " short                       -\n"
                              " left out for want of width: extra\n");
    free(text);
    cpl_table_destroy(&t);
}

static void test_a_study_without_stages_says_so(void **state) {
    (void)state;
    assemble(0);
    char *text = report(40, NULL);
    assert_has(text, "no stage is done yet", "");
    free(text);
}

static void test_other_files_are_refused_with_their_name(void **state) {
    (void)state;
    char path[80];
    snprintf(path, sizeof path, "%s/none.h5", folder);
    assert_int_equal(cpl_report_terminal(path, folder, stdout), CPL_NOT_FOUND);
    assert_non_null(strstr(cpl_status_message(), path));
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("this is no HDF5 file, but long enough to hold a superblock if it were one ...........................................",
          f);
    fclose(f);
    assert_int_equal(cpl_report_terminal(path, folder, stdout), CPL_DAMAGED);
    assert_non_null(strstr(cpl_status_message(), path));
    assert_int_equal(cpl_report_terminal(teacher, folder, stdout), CPL_INPUT);
    assert_string_equal(strstr(cpl_status_message(), ": "), ": expected the results of a cupel study");
    for (int64_t cut = 1; cut < 40; cut++) {
        write_grid(TRIALS, 9);
        assemble(2);
        FILE *whole = fopen(results, "r+");
        assert_non_null(whole);
        assert_int_equal(fseek(whole, 0, SEEK_END), 0);
        long size = ftell(whole);
        assert_int_equal(ftruncate(fileno(whole), size * cut / 40), 0);
        fclose(whole);
        FILE *null = fopen("/dev/null", "w");
        assert_non_null(null);
        assert_int_not_equal(cpl_report_terminal(results, folder, null), CPL_OK);
        assert_non_null(strstr(cpl_status_message(), results));
        fclose(null);
    }
}

static void test_amounts_have_three_digits_and_a_prefix(void **state) {
    (void)state;
    static const struct {
        double value;
        const char *text;
    } cases[] = {{0, "0 B"},           {12, "12 B"},        {999, "999 B"},     {1000, "1.00 kB"},
                 {1234567, "1.23 MB"}, {12345, "12.3 kB"},  {999499, "999 kB"}, {999500, "1.00 MB"},
                 {123e6, "123 MB"},    {7.25e9, "7.25 GB"}, {9996, "10.0 kB"},  {NAN, ""}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[CPL_AMOUNT_TEXT];
        cpl_amount_text(cases[i].value, "B", text);
        assert_string_equal(text, cases[i].text);
    }
}

static int make_folder(void **state) {
    (void)state;
    if (mkdtemp(folder) == NULL) {
        return 1;
    }
    snprintf(results, sizeof results, "%s/results.h5", folder);
    snprintf(teacher, sizeof teacher, "%s/teacher.h5", folder);
    snprintf(grid, sizeof grid, "%s/grid.h5", folder);
    write_teacher();
    return 0;
}

static int remove_folder(void **state) {
    (void)state;
    char command[80];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stages_show_loss_size_steps_overflows_and_last_scale),
        cmocka_unit_test(test_pareto_optimal_trials_come_first_by_size_and_the_others_by_score),
        cmocka_unit_test(test_failed_trials_are_named_with_their_reason),
        cmocka_unit_test(test_rows_of_a_sweep_are_limited_and_the_rest_is_counted),
        cmocka_unit_test(test_what_was_not_measured_has_no_column),
        cmocka_unit_test(test_columns_are_aligned_and_give_way_to_the_width_of_the_terminal),
        cmocka_unit_test(test_a_long_variant_is_cut_and_says_so),
        cmocka_unit_test(test_a_study_without_stages_says_so),
        cmocka_unit_test(test_other_files_are_refused_with_their_name),
        cmocka_unit_test(test_amounts_have_three_digits_and_a_prefix),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}

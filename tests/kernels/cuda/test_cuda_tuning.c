/* Proves that timed choices outlive a process, that two tables on one file see each other's, and that a damaged file is begun anew.
 * Refuses a GPU: nothing is timed here. */
#include "kernels/cuda/tuning.h"
#include "tests/support/support.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static const char file[] = "tuning/some-GPU-130100.tuning";

static cpl_tuning *open_table(void) {
    cpl_tuning *t = NULL;
    assert_ok(cpl_tuning_open(&t, "some GPU", 130100));
    return t;
}

static void keep(cpl_tuning *t, int64_t key, double ms, uint32_t value) {
    assert_ok(cpl_tuning_claim(t));
    assert_ok(cpl_tuning_keep(t, "op", &key, sizeof key, ms, &value, sizeof value));
    cpl_tuning_release(t);
}

static bool has(const cpl_tuning *t, int64_t key, double ms, uint32_t value) {
    double found_ms = 0;
    uint32_t found = 0;
    return cpl_tuning_find(t, "op", &key, sizeof key, &found_ms, &found, sizeof found) && found_ms == ms && found == value;
}

static void test_tables_on_one_file_see_each_other(void **unused) {
    (void)unused;
    (void)unlink(file);
    cpl_tuning *a = open_table(), *b = open_table();
    keep(a, 1, 0.5, 17);
    keep(b, 2, 0.25, 18);
    assert_true(has(a, 1, 0.5, 17) && !has(a, 2, 0.25, 18)); /* not looked for in the file yet */
    assert_ok(cpl_tuning_claim(a));
    assert_true(has(a, 2, 0.25, 18));
    cpl_tuning_release(a);
    keep(a, 1, 0.125, 19); /* the latest counts */
    cpl_tuning_close(&a);
    cpl_tuning_close(&b);
    a = open_table();
    assert_true(has(a, 1, 0.125, 19) && has(a, 2, 0.25, 18) && !has(a, 3, 0.5, 17));
    cpl_tuning_close(&a);
}

static void test_a_damaged_file_is_begun_anew(void **unused) {
    (void)unused;
    static const char *const damage[] = {"op 01 0.5\n", "garbage", "op 0102 nan 11\n", "op 0102 -1 11\n", "\n"};
    for (size_t i = 0; i < sizeof damage / sizeof *damage; i++) {
        (void)unlink(file);
        cpl_tuning *t = open_table();
        keep(t, 1, 0.5, 17);
        cpl_tuning_close(&t);
        FILE *f = fopen(file, "a");
        assert_non_null(f);
        assert_true(fputs(damage[i], f) >= 0 && fclose(f) == 0);
        t = open_table();
        assert_false(has(t, 1, 0.5, 17));
        keep(t, 2, 0.25, 18);
        cpl_tuning_close(&t);
        t = open_table();
        assert_true(has(t, 2, 0.25, 18) && !has(t, 1, 0.5, 17));
        cpl_tuning_close(&t);
    }
}

static void test_without_a_file_a_table_remembers_all_the_same(void **unused) {
    (void)unused;
    setenv("CUPEL_CACHE", "/proc/no/such/folder", 1);
    cpl_tuning *t = open_table();
    keep(t, 1, 0.5, 17);
    assert_true(has(t, 1, 0.5, 17));
    cpl_tuning_close(&t);
    setenv("CUPEL_CACHE", "tuning", 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables_on_one_file_see_each_other),
        cmocka_unit_test(test_a_damaged_file_is_begun_anew),
        cmocka_unit_test(test_without_a_file_a_table_remembers_all_the_same),
    };
    setenv("CUPEL_CACHE", "tuning", 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}

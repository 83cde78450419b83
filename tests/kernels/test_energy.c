/* The processor packages' energy counters, from a folder made like the kernel's.
 * Refuses to need a machine that has them. */
#include "tests/support/support.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[] = "powercap.XXXXXX";

static void write_file(int package, const char *name, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/intel-rapl:%d/%s", root, package, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static void make_zone(int number, const char *name, const char *range, const char *energy) {
    char path[256];
    snprintf(path, sizeof path, "%s/intel-rapl:%d", root, number);
    assert_int_equal(mkdir(path, 0777), 0);
    write_file(number, "name", name);
    write_file(number, "max_energy_range_uj", range);
    write_file(number, "energy_uj", energy);
}

/* Two packages, and a psys zone that holds both. */
static int make_folder(void **state) {
    strcpy(root + sizeof root - 7, "XXXXXX");
    assert_non_null(mkdtemp(root));
    make_zone(0, "package-0\n", "1000000000\n", "5000000\n");
    make_zone(1, "package-1\n", "1000000000\n", "999000000\n");
    make_zone(2, "psys\n", "1000000000\n", "1\n");
    setenv("CUPEL_POWERCAP", root, 1);
    return 0;
}

static int remove_folder(void **state) {
    static const char *const names[] = {"name", "max_energy_range_uj", "energy_uj"};
    char path[256];
    for (int zone = 0; zone < 3; zone++) {
        for (int i = 0; i < 3; i++) {
            snprintf(path, sizeof path, "%s/intel-rapl:%d/%s", root, zone, names[i]);
            (void)remove(path);
        }
        snprintf(path, sizeof path, "%s/intel-rapl:%d", root, zone);
        (void)rmdir(path);
    }
    return rmdir(root);
}

static void test_the_packages_are_summed_across_a_counter_that_begins_anew(void **state) {
    cpl_device *dev = NULL;
    cpl_energy a, b, c;
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    cpl_device_energy(dev, &a);
    assert_string_equal(a.source, "RAPL");
    assert_true(a.meter[0] != '\0');
    write_file(0, "energy_uj", "7500000\n");
    write_file(1, "energy_uj", "500000\n"); /* past the range: 1 J and then half a joule more */
    write_file(2, "energy_uj", "900000000\n");
    cpl_device_energy(dev, &b);
    assert_true(b.joules - a.joules > 4 - 1e-9 && b.joules - a.joules < 4 + 1e-9);
    cpl_device_energy(dev, &c);
    assert_true(c.joules == b.joules);
    assert_string_equal(a.meter, c.meter);
    cpl_device_destroy(&dev);
}

static void test_a_counter_that_cannot_be_read_any_more_is_no_figure(void **state) {
    cpl_device *dev = NULL;
    cpl_energy e;
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    cpl_device_energy(dev, &e);
    assert_non_null(e.source);
    write_file(1, "energy_uj", "soon\n");
    cpl_device_energy(dev, &e);
    assert_null(e.source);
    cpl_device_destroy(&dev);
}

static void note_energy(const char *key, const char *value, void *to) {
    if (strcmp(key, "energy") == 0) {
        snprintf(to, 200, "%s", value);
    }
}

static void test_one_package_that_may_not_be_read_is_no_figure_for_the_other(void **state) {
    cpl_device *dev = NULL;
    cpl_energy e;
    char path[256], said[200] = "";
    snprintf(path, sizeof path, "%s/intel-rapl:1/energy_uj", root);
    assert_int_equal(remove(path), 0);
    assert_int_equal(mkdir(path, 0777), 0); /* root may read every file */
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    cpl_device_energy(dev, &e);
    assert_null(e.source);
    cpl_device_describe(dev, note_energy, said);
    assert_non_null(strstr(said, "may not be read"));
    assert_int_equal(rmdir(path), 0);
    cpl_device_destroy(&dev);
}

static void test_without_counters_nothing_is_said(void **state) {
    cpl_device *dev = NULL;
    cpl_energy e;
    char said[200] = "";
    setenv("CUPEL_POWERCAP", "nowhere", 1);
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    cpl_device_energy(dev, &e);
    assert_null(e.source);
    cpl_device_describe(dev, note_energy, said);
    assert_non_null(strstr(said, "not measured"));
    cpl_device_destroy(&dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_the_packages_are_summed_across_a_counter_that_begins_anew, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_a_counter_that_cannot_be_read_any_more_is_no_figure, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(test_one_package_that_may_not_be_read_is_no_figure_for_the_other, make_folder,
                                        remove_folder),
        cmocka_unit_test(test_without_counters_nothing_is_said),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

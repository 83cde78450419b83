/* What is read through NVML, from a stand-in for it: energy, links, versions, and everything that may be missing.
 * Refuses nothing for want of a GPU: it needs none. */
#include "kernels/cuda/nvml.h"
#include "tests/support/support.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char why[CPL_NVML_TEXT];

/* library: of the build folder. */
static cpl_nvml *opened(const char *library, const char *mode) {
    char path[4096];
    cpl_nvml *nvml = NULL;
    snprintf(path, sizeof path, "%s/%s", getenv("CUPEL_BUILD") == NULL ? "." : getenv("CUPEL_BUILD"), library);
    setenv("CUPEL_NVML", path, 1);
    setenv("FAKE_NVML", mode, 1);
    why[0] = '\0';
    assert_ok(cpl_nvml_open(&nvml, why));
    return nvml;
}

static void test_energy_is_the_counter_in_joules(void **state) {
    cpl_nvml *nvml = opened("fake_nvml.so", "");
    char uuid[48], other[48];
    double first = 0, second = 0, still = 0;
    assert_non_null(nvml);
    assert_true(cpl_nvml_energy(nvml, "0000:01:00.0", &first, uuid, sizeof uuid, why));
    assert_true(cpl_nvml_energy(nvml, "0000:01:00.0", &second, uuid, sizeof uuid, why));
    assert_true(cpl_nvml_energy(nvml, "0000:02:00.0", &still, other, sizeof other, why));
    assert_true(first >= 1000 && second - first == 250 && still == 0.007);
    assert_string_equal(uuid, "GPU-00000000-0000-0000-0000-000000000001");
    assert_string_not_equal(uuid, other);
    assert_false(cpl_nvml_energy(nvml, "0000:03:00.0", &still, other, sizeof other, why));
    assert_non_null(strstr(why, "0000:03:00.0"));
    cpl_nvml_close(&nvml);
    assert_null(nvml);
    cpl_nvml_close(&nvml);
}

static void test_a_gpu_without_counter_and_an_old_library_give_no_figure(void **state) {
    char uuid[48];
    double joules = -1;
    cpl_nvml *nvml = opened("fake_nvml.so", "uncounted");
    assert_false(cpl_nvml_energy(nvml, "0000:01:00.0", &joules, uuid, sizeof uuid, why));
    assert_non_null(strstr(why, "no energy counter"));
    cpl_nvml_close(&nvml);
    nvml = opened("fake_nvml_old.so", "");
    assert_non_null(nvml);
    assert_false(cpl_nvml_energy(nvml, "0000:01:00.0", &joules, uuid, sizeof uuid, why));
    assert_non_null(strstr(why, "nvmlDeviceGetTotalEnergyConsumption"));
    assert_true(joules == -1);
    cpl_nvml_close(&nvml);
}

static void test_a_library_that_is_missing_or_does_not_start_is_no_error(void **state) {
    assert_null(opened("no_such_library.so", ""));
    assert_non_null(strstr(why, "cannot be opened"));
    assert_null(opened("fake_nvml.so", "broken"));
    assert_non_null(strstr(why, "does not start"));
}

static void test_links_and_the_driver(void **state) {
    char version[32];
    cpl_nvml *nvml = opened("fake_nvml.so", "");
    assert_true(cpl_nvml_nvlink(nvml, "0000:01:00.0", "0000:02:00.0"));
    assert_false(cpl_nvml_nvlink(nvml, "0000:01:00.0", "0000:03:00.0"));
    cpl_nvml_driver(nvml, version, sizeof version);
    assert_string_equal(version, "999.01");
    cpl_nvml_close(&nvml);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_energy_is_the_counter_in_joules),
        cmocka_unit_test(test_a_gpu_without_counter_and_an_old_library_give_no_figure),
        cmocka_unit_test(test_a_library_that_is_missing_or_does_not_start_is_no_error),
        cmocka_unit_test(test_links_and_the_driver),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

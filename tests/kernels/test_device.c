/* Devices: which back end opens, what it says when it cannot, how memory is counted.
 * Refuses to depend on the processor it runs on beyond what every one has. */
#include "tests/support/support.h"
#include <omp.h>
#include <stdlib.h>
#include <string.h>

static void test_unknown_back_end_is_wrong_usage(void **state) {
    cpl_device *dev = NULL;
    assert_int_equal(cpl_device_create(&dev, "tpu", 0, 1), CPL_USAGE);
    assert_null(dev);
    assert_non_null(strstr(cpl_status_message(), "tpu"));
    assert_int_equal(cpl_device_create(&dev, "cpu", 0, -1), CPL_USAGE);
    cpl_device_destroy(&dev);
    cpl_device_destroy(NULL);
}

static void test_auto_opens_a_device_with_every_operation(void **state) {
    cpl_device *dev = NULL;
    assert_ok(cpl_device_create(&dev, "auto", 0, 0));
    assert_true(cpl_device_threads(dev) >= 1);
    assert_true(dev->name[0] != '\0');
#define CPL_OP(name, parameters) assert_true(dev->ops->name != NULL);
#include "kernels/ops.def"
#undef CPL_OP
    cpl_device_destroy(&dev);
    assert_null(dev);
}

static void test_environment_says_what_auto_is(void **state) {
    cpl_device *dev = NULL;
    const char *outside = getenv("CUPEL_DEVICE");
    char kept[16];
    strncpy(kept, outside != NULL ? outside : "", sizeof kept - 1);
    kept[sizeof kept - 1] = '\0';
    setenv("CUPEL_DEVICE", "cpu", 1);
    assert_ok(cpl_device_create(&dev, "auto", 0, 1));
    assert_string_equal(dev->kind, "cpu");
    cpl_device_destroy(&dev);
    setenv("CUPEL_DEVICE", "abacus", 1);
    assert_int_equal(cpl_device_create(&dev, "auto", 0, 1), CPL_USAGE);
    assert_non_null(strstr(cpl_status_message(), "'abacus' (CUPEL_DEVICE)"));
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1)); /* asked for by name, it is not looked at */
    cpl_device_destroy(&dev);
    if (outside != NULL) {
        setenv("CUPEL_DEVICE", kept, 1);
    } else {
        unsetenv("CUPEL_DEVICE");
    }
}

/* `recorded` and what it runs. */
typedef struct {
    cpl_device *dev;
    float *x; /* device [N] */
} recording;
enum { N = 1 << 16 };
static cpl_status recorded(void *context) {
    recording *r = context;
    return CPL_OPS(r->dev, add_f32, r->x, r->x + N, N);
}

static void test_profile_notes_each_operation_once_with_its_time(void **state) {
    recording r = {0};
    cpl_trace trace = {0};
    cpl_graph *graph = NULL;
    float host[4] = {1, 2, 3, 4};
    assert_ok(cpl_device_create(&r.dev, "auto", 0, 1));
    assert_ok(cpl_device_alloc(r.dev, &r.x, (size_t)2 * N, sizeof *r.x, "profile"));
    assert_ok(recorded(&r));
    r.dev->trace = &trace;
    for (int i = 0; i < 700; i++) { /* more marks than anything else has */
        assert_ok(CPL_OPS(r.dev, upload, r.x, host, sizeof host));
        assert_ok(recorded(&r));
    }
    assert_int_equal(CPL_OPS(r.dev, select_histogram, NULL, NULL, r.x, 1, 1, 0, 20, 12),
                     CPL_INTERNAL); /* one that fails counts too */
    assert_ok(cpl_device_record(r.dev, recorded, &r, &graph));
    r.dev->trace = NULL;
    assert_ok(recorded(&r));
    assert_ok(cpl_trace_read(r.dev, &trace));
    assert_int_equal(trace.count, 1401);
    assert_string_equal(trace.op[0].op, "upload");
    assert_string_equal(trace.op[1399].op, "add_f32");
    assert_string_equal(trace.op[1400].op, "select_histogram");
    assert_true(trace.op[0].at == 0);
    for (int64_t i = 0; i < trace.count; i++) {
        assert_true(trace.op[i].ms >= 0);
        assert_true(i == 0 || trace.op[i].at >= trace.op[i - 1].at + trace.op[i - 1].ms - 1e-2);
    }
    assert_true(trace.op[1].ms > 0);
    cpl_trace_free(&trace);
    cpl_graph_destroy(r.dev, &graph);
    cpl_device_free(r.dev, &r.x);
    cpl_device_destroy(&r.dev);
}

static void test_instruction_set_that_is_not_there_is_refused(void **state) {
    cpl_device *dev = NULL;
    setenv("CUPEL_CPU", "v9", 1);
    assert_int_equal(cpl_device_create(&dev, "cpu", 0, 1), CPL_UNSUPPORTED);
    unsetenv("CUPEL_CPU");
    assert_null(dev);
    assert_non_null(strstr(cpl_status_message(), "CUPEL_CPU=v9"));
    dev = test_device("base", 3);
    assert_non_null(dev);
    assert_int_equal(cpl_device_threads(dev), 3);
    cpl_device_destroy(&dev);
}

static void test_threads_that_are_not_given_are_those_of_openmp(void **state) {
    cpl_device *dev = NULL;
    int before = omp_get_max_threads();
    omp_set_num_threads(3);
    assert_ok(cpl_device_create(&dev, "auto", 0, 0));
    omp_set_num_threads(before);
    assert_int_equal(cpl_device_threads(dev), 3);
    cpl_device_destroy(&dev);
}

static void test_memory_is_counted_zeroed_and_aligned(void **state) {
    cpl_device *dev = NULL;
    size_t held;
    size_t peak;
    char *blocks[100];
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    for (size_t i = 0; i < 100; i++) {
        assert_ok(cpl_device_alloc(dev, &blocks[i], i + 1, 8, "block"));
        assert_int_equal((uintptr_t)blocks[i] % 64, 0);
        assert_int_equal(blocks[i][8 * i + 7], 0);
        memset(blocks[i], 1, 8 * (i + 1));
    }
    cpl_device_memory(dev, &held, &peak);
    assert_int_equal(held, 8 * 5050);
    for (size_t i = 0; i < 100; i += 2) {
        cpl_device_free(dev, &blocks[i]);
        assert_null(blocks[i]);
        cpl_device_free(dev, &blocks[i]);
    }
    cpl_device_memory(dev, &held, &peak);
    assert_int_equal(held, 8 * 2550);
    assert_int_equal(peak, 8 * 5050);
    cpl_device_peak_restart(dev);
    assert_ok(cpl_device_alloc(dev, &blocks[0], 1, 8, "block"));
    cpl_device_free(dev, &blocks[0]);
    cpl_device_memory(dev, &held, &peak);
    assert_int_equal(held, 8 * 2550);
    assert_int_equal(peak, 8 * 2551);
    cpl_device_destroy(&dev); /* frees the other half: the leak checker of the sanitized build sees to it */
}

static void test_impossible_sizes_are_out_of_memory_by_name(void **state) {
    cpl_device *dev = NULL;
    float *x = (float *)(uintptr_t)64;
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    assert_int_equal(cpl_device_alloc(dev, &x, SIZE_MAX / 2, 4, "moments"), CPL_NO_MEMORY);
    assert_null(x);
    assert_non_null(strstr(cpl_status_message(), "moments"));
    assert_ok(cpl_device_alloc(dev, &x, 0, 4, "nothing"));
    assert_null(x);
    cpl_device_destroy(&dev);
}

static void test_a_limit_of_memory_is_kept_and_told(void **state) {
    cpl_device *dev = NULL;
    float *x = NULL, *y = NULL;
    setenv("CUPEL_DEVICE_BYTES", "1000", 1);
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    assert_int_equal(cpl_device_memory_room(dev), 1000);
    assert_ok(cpl_device_alloc(dev, &x, 150, sizeof *x, "gradients"));
    assert_int_equal(cpl_device_alloc(dev, &y, 101, sizeof *y, "moments"), CPL_NO_MEMORY);
    assert_null(y);
    assert_non_null(strstr(cpl_status_message(), "moments: 404 bytes wanted"));
    assert_non_null(strstr(cpl_status_message(), "allows 1000, and this process holds 600"));
    assert_ok(cpl_device_alloc(dev, &y, 100, sizeof *y, "moments"));
    cpl_device_free(dev, &x);
    assert_int_equal(cpl_device_memory_room(dev), 1000);
    cpl_device_destroy(&dev);
    static const char *const wrong[] = {"many", "-1", "1.5"};
    for (int i = 0; i < 3; i++) {
        setenv("CUPEL_DEVICE_BYTES", wrong[i], 1);
        assert_int_equal(cpl_device_create(&dev, "cpu", 0, 1), CPL_USAGE);
        assert_non_null(strstr(cpl_status_message(), wrong[i]));
    }
    unsetenv("CUPEL_DEVICE_BYTES");
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    assert_true(cpl_device_memory_room(dev) == SIZE_MAX && cpl_device_memory_used(dev) == 0);
    cpl_device_destroy(&dev);
}

static void test_tf32_is_fp32_that_the_cpu_has_not(void **state) {
    cpl_device *dev = NULL;
    assert_ok(cpl_device_create(&dev, "cpu", 0, 1));
    assert_false(cpl_device_has(dev, CPL_TF32));
    assert_true(cpl_device_has(dev, CPL_F32) && cpl_device_has(dev, CPL_BF16) && cpl_device_has(dev, CPL_F16));
    assert_true(cpl_dtype_storage(CPL_TF32) == CPL_F32 && cpl_dtype_size(CPL_TF32) == 4 && cpl_dtype_storage(CPL_F16) == CPL_F16);
    assert_string_equal(cpl_dtype_name(CPL_TF32), "tf32");
    cpl_device_destroy(&dev);
}

static void note_key(const char *key, const char *value, void *to) {
    char *keys = to;
    assert_true(value[0] != '\0');
    strncat(keys, key, 200);
    strncat(keys, ";", 2);
}

static void test_description_names_instruction_set_library_and_threads(void **state) {
    cpl_device *dev = NULL;
    char keys[1024] = "";
    assert_ok(cpl_device_create(&dev, "cpu", 0, 2));
    cpl_device_describe(dev, note_key, keys);
    assert_non_null(strstr(keys, "instruction set;"));
    assert_non_null(strstr(keys, "matrix library;"));
    assert_non_null(strstr(keys, "bf16 products;"));
    assert_non_null(strstr(keys, "threads;"));
    cpl_device_destroy(&dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unknown_back_end_is_wrong_usage),
        cmocka_unit_test(test_auto_opens_a_device_with_every_operation),
        cmocka_unit_test(test_environment_says_what_auto_is),
        cmocka_unit_test(test_profile_notes_each_operation_once_with_its_time),
        cmocka_unit_test(test_instruction_set_that_is_not_there_is_refused),
        cmocka_unit_test(test_threads_that_are_not_given_are_those_of_openmp),
        cmocka_unit_test(test_memory_is_counted_zeroed_and_aligned),
        cmocka_unit_test(test_impossible_sizes_are_out_of_memory_by_name),
        cmocka_unit_test(test_a_limit_of_memory_is_kept_and_told),
        cmocka_unit_test(test_tf32_is_fp32_that_the_cpu_has_not),
        cmocka_unit_test(test_description_names_instruction_set_library_and_threads),
    };
    return test_main(tests, NULL, NULL);
}

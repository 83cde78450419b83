/* Arrays of tests, and the stack that tests run on when their operations run on a GPU. See support.h.
 * Refuses to go on without memory, and writes behind an array. */
#include "tests/support/support.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { GUARD = 256, GUARD_BYTE = 0xa5, LEAST = 4096, BLOCKS = 4096 };
static const size_t stack_bytes = 16 << 20;

/* Page-locked memory is dear to make: blocks are used again, by size. */
typedef struct {
    unsigned char *memory; /* owned */
    size_t room, bytes;    /* room: a power of two; bytes: of the array in it, without the guard; */
    bool used;
} block;
static struct {
    cpl_device *dev; /* owned: makes the memory; NULL on the CPU */
    block block[BLOCKS];
    int blocks;
} gpu;

bool test_on_gpu(void) {
    return gpu.dev != NULL;
}

double test_slack(double tolerance) {
    double more = tolerance < 0x1p-14 ? tolerance : 0x1p-14;
    return test_on_gpu() ? tolerance + 15 * more : tolerance;
}

void test_cpu_only(void) {
    if (test_on_gpu()) {
        skip();
    }
}

static void *array_on_gpu(size_t bytes) {
    size_t room = LEAST;
    int i = 0;
    while (room < bytes + GUARD) {
        room *= 2;
    }
    while (i < gpu.blocks && (gpu.block[i].used || gpu.block[i].room != room)) {
        i++;
    }
    block *b = &gpu.block[i];
    if (i == gpu.blocks) {
        assert_true(gpu.blocks < BLOCKS);
        assert_ok(cpl_device_host_alloc(gpu.dev, &b->memory, room, 1, "test array"));
        b->room = room;
        gpu.blocks++;
    }
    memset(b->memory, 0, bytes);
    memset(b->memory + bytes, GUARD_BYTE, GUARD);
    b->bytes = bytes;
    b->used = true;
    return b->memory;
}

static void free_on_gpu(void *memory) {
    for (int i = 0; i < gpu.blocks; i++) {
        block *b = &gpu.block[i];
        if (b->memory != memory) {
            continue;
        }
        assert_true(b->used);
        b->used = false;
        for (int k = 0; k < GUARD; k++) {
            if (b->memory[b->bytes + (size_t)k] != GUARD_BYTE) {
                fail_msg("byte %d behind an array of %zu was written", k, b->bytes);
            }
        }
        return;
    }
    fail_msg("%p is no array of this test", memory);
}

void *test_array(int64_t n, size_t size) {
    void *out = NULL;
    n = n > 0 ? n : 1;
    if (test_on_gpu()) {
        return array_on_gpu((size_t)n * size);
    }
    assert_ok(cpl_alloc(&out, (size_t)n, size, "test array"));
    return out;
}

void test_release(void *array) {
    void *memory, *none = NULL;
    memcpy(&memory, array, sizeof memory);
    if (!test_on_gpu()) {
        cpl_free(array);
    } else if (memory != NULL) {
        free_on_gpu(memory);
        memcpy(array, &none, sizeof none);
    }
}

/* --- the tests of a program --- */

static struct {
    const struct CMUnitTest *tests; /* borrowed */
    size_t count;
    CMFixtureFunction setup, teardown;
    int failed;
    ucontext_t here, there;
} group;

static void run_group(void) {
    group.failed = _cmocka_run_group_tests("tests", group.tests, group.count, group.setup, group.teardown);
}

/* A test that fails jumps to where the group began, on the same stack. */
static int run_on_gpu(void) {
    void *stack = NULL;
    if (cpl_device_host_alloc(gpu.dev, &stack, stack_bytes, 1, "stack of the tests") != CPL_OK || getcontext(&group.there) != 0) {
        printf("%s\n", cpl_status_message());
        return 1;
    }
    group.there.uc_stack.ss_sp = stack;
    group.there.uc_stack.ss_size = stack_bytes;
    group.there.uc_link = &group.here;
    makecontext(&group.there, run_group, 0);
    if (swapcontext(&group.here, &group.there) != 0) {
        perror("stack of the tests");
        return 1;
    }
    for (int i = 0; i < gpu.blocks; i++) {
        cpl_device_host_free(gpu.dev, &gpu.block[i].memory);
    }
    cpl_device_host_free(gpu.dev, &stack);
    return group.failed;
}

int test_run(const struct CMUnitTest *tests, size_t count, CMFixtureFunction setup, CMFixtureFunction teardown) {
    const char *chosen = getenv("CUPEL_DEVICE");
    group.tests = tests;
    group.count = count;
    group.setup = setup;
    group.teardown = teardown;
    if (chosen == NULL || strcmp(chosen, "cuda") != 0) {
        run_group();
        return group.failed;
    }
    setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
    cpl_status st = cpl_device_create(&gpu.dev, "cuda", 0, 0);
    if (st == CPL_UNSUPPORTED) {
        printf("SKIPPED: %s\n", cpl_status_message());
        return 77;
    }
    if (st != CPL_OK) {
        printf("%s\n", cpl_status_message());
        return 1;
    }
    int failed = run_on_gpu();
    cpl_device_destroy(&gpu.dev);
    return failed;
}

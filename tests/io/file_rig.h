/* What the tests of files share: a folder of their own, whole files in memory, expected failures, and a disk on which writes fail.
 * Refuses to be compiled by itself: each test program has its own. */
#ifndef CPL_TESTS_IO_FILE_RIG_H
#define CPL_TESTS_IO_FILE_RIG_H

#include "io/base/status.h"
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

#define assert_ok(call)                                                                                                            \
    do {                                                                                                                           \
        if ((call) != CPL_OK) {                                                                                                    \
            fail_msg("%s: %s", #call, cpl_status_message());                                                                       \
        }                                                                                                                          \
    } while (0)

static char folder[64];
static inline const char *path_of(const char *name) {
    static char path[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static inline int make_folder(void **state) {
    (void)state;
    strcpy(folder, "test_files.XXXXXX");
    return mkdtemp(folder) == NULL;
}
static inline int remove_folder(void **state) {
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    return system(command);
}

typedef struct {
    unsigned char *bytes;
    size_t n;
} content;
static inline content slurp(const char *path) {
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    content c = {.n = (size_t)ftell(f)};
    rewind(f);
    c.bytes = malloc(c.n + 1);
    assert_non_null(c.bytes);
    assert_int_equal(fread(c.bytes, 1, c.n, f), c.n);
    fclose(f);
    return c;
}
static inline void spill(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static inline void expect(cpl_status want, cpl_status got, const char *text) {
    if (got != want || strstr(cpl_status_message(), text) == NULL) {
        fail_msg("expected status %d with \"%s\", got %d: %s", want, text, got, cpl_status_message());
    }
}

/* Stands before libc's in the eyes of HDF5's POSIX driver: writes into a .part fail from the one after `writes_left` on. */
static long writes_left = -1; /* negative: all succeed */
ssize_t pwrite(int file, const void *bytes, size_t n, off_t at);
ssize_t pwrite(int file, const void *bytes, size_t n, off_t at) {
    char link[64];
    char name[512];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name);
    if (writes_left >= 0 && length > 5 && memcmp(name + length - 5, ".part", 5) == 0) {
        if (writes_left == 0) {
            errno = EDQUOT;
            return -1;
        }
        writes_left--;
    }
    return (ssize_t)syscall(SYS_pwrite64, file, bytes, n, at);
}

#endif

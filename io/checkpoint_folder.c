/* The step-N.h5 of a folder: the newest whole one, and which to keep.
 * Refuses to take a damaged file for a whole one, and to remove files of other names. */
#include "io/base/log.h"
#include "io/checkpoint.h"
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* N of "step-N" followed by `suffix`, or -1. N as written by %lld: digits only, without leading zeros. */
static int64_t step_of(const char *name, const char *suffix) {
    static const char prefix[] = "step-";
    if (strncmp(name, prefix, sizeof prefix - 1) != 0) {
        return -1;
    }
    const char *digit = name + sizeof prefix - 1;
    int64_t step = 0;
    if (digit[0] < '0' || digit[0] > '9' || (digit[0] == '0' && digit[1] >= '0' && digit[1] <= '9')) {
        return -1;
    }
    for (; *digit >= '0' && *digit <= '9'; digit++) {
        if (!cpl_mul_i64(step, 10, &step) || !cpl_add_i64(step, *digit - '0', &step)) {
            return -1;
        }
    }
    return strcmp(digit, suffix) == 0 ? step : -1;
}

static int newest_first(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a;
    int64_t y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* The steps of all names with that suffix, newest first; *n = 0 where the folder is not there. *out: free with cpl_free. */
static cpl_status list_steps(const char *folder, const char *suffix, int64_t **out, size_t *n) {
    cpl_status st = CPL_OK;
    int64_t *steps = NULL;
    size_t capacity = 0;
    *n = 0;
    DIR *directory = opendir(folder);
    if (directory == NULL && errno == ENOENT) {
        goto done;
    }
    if (directory == NULL) {
        CPL_FAIL(CPL_IO, "%s: %s", folder, strerror(errno));
    }
    for (;;) {
        errno = 0;
        const struct dirent *entry = readdir(directory);
        if (entry == NULL) {
            break;
        }
        int64_t step = step_of(entry->d_name, suffix);
        if (step < 0) {
            continue;
        }
        if (*n == capacity) {
            int64_t *more = NULL;
            capacity = capacity == 0 ? 16 : 2 * capacity;
            CPL_TRY(cpl_alloc(&more, capacity, sizeof *more, "list of checkpoints"));
            if (*n > 0) {
                memcpy(more, steps, *n * sizeof *steps);
            }
            cpl_free(&steps);
            steps = more;
        }
        steps[(*n)++] = step;
    }
    if (errno != 0) {
        CPL_FAIL(CPL_IO, "%s: %s", folder, strerror(errno));
    }
    if (*n > 1) {
        qsort(steps, *n, sizeof *steps, newest_first);
    }
    *out = steps;
    steps = NULL;
done:
    if (directory != NULL) {
        (void)closedir(directory);
    }
    cpl_free(&steps);
    return st;
}

cpl_status cpl_checkpoint_newest(const char *folder, char *path, size_t size, int64_t *step) {
    cpl_status st = CPL_OK;
    int64_t *steps = NULL;
    size_t n = 0;
    *step = -1;
    CPL_TRY(list_steps(folder, ".h5", &steps, &n));
    for (size_t i = 0; i < n; i++) {
        int length = snprintf(path, size, "%s/step-%lld.h5", folder, (long long)steps[i]);
        if (length < 0 || (size_t)length >= size) {
            CPL_FAIL(CPL_INPUT, "%s/step-%lld.h5: the path is longer than %zu bytes", folder, (long long)steps[i], size - 1);
        }
        st = cpl_checkpoint_verify(path);
        if (st == CPL_OK) {
            *step = steps[i];
            goto done;
        }
        if (st != CPL_DAMAGED && st != CPL_NOT_FOUND) {
            goto done;
        }
        cpl_log_warn("passed over a damaged checkpoint: %s", cpl_status_message());
        st = CPL_OK;
    }
done:
    if (*step < 0 && size > 0) {
        path[0] = '\0';
    }
    cpl_free(&steps);
    return st;
}

static cpl_status remove_step(const char *folder, int64_t step, const char *suffix) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    char *path = NULL;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_arena_printf(arena, &path, "%s/step-%lld%s", folder, (long long)step, suffix));
    if (unlink(path) != 0 && errno != ENOENT) {
        CPL_FAIL(CPL_IO, "%s: cannot be removed: %s", path, strerror(errno));
    }
done:
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_checkpoint_prune(const char *folder, int keep) {
    cpl_status st = CPL_OK;
    int64_t *steps = NULL;
    int64_t *stale = NULL;
    size_t n = 0;
    CPL_TRY(list_steps(folder, ".h5.part", &stale, &n));
    for (size_t i = 0; i < n; i++) {
        CPL_TRY(remove_step(folder, stale[i], ".h5.part"));
    }
    CPL_TRY(list_steps(folder, ".h5", &steps, &n));
    for (size_t i = keep > 0 ? (size_t)keep : 0; i < n; i++) {
        CPL_TRY(remove_step(folder, steps[i], ".h5"));
    }
done:
    cpl_free(&steps);
    cpl_free(&stale);
    return st;
}

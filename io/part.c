/* Files that appear whole or not at all: written beside as NAME.part, synced, renamed, folder synced.
 * Refuses to report success before the rename is on disk. */
#include "io/h5.h"
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

cpl_status cpl_part_name(const char *path, char **out, cpl_arena *arena) {
    return cpl_arena_printf(arena, out, "%s.part", path);
}

cpl_status cpl_file_sync(const char *path) {
    cpl_status st = CPL_OK;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fsync(file) != 0) {
        CPL_FAIL(CPL_IO, "%s: cannot be synced to disk: %s", path, strerror(errno));
    }
done:
    if (file >= 0) {
        (void)close(file); /* nothing was written through it */
    }
    return st;
}

cpl_status cpl_file_reserve(const char *path, int64_t bytes) {
    cpl_status st = CPL_OK;
    struct statvfs disk;
    struct rlimit limit;
    int file = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0) {
        CPL_FAIL(CPL_IO, "%s: %s", path, strerror(errno));
    }
    if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < (rlim_t)bytes) {
        CPL_FAIL(CPL_IO, "%s: needs %lld bytes, files of this process may have %llu (ulimit -f): %s", path, (long long)bytes,
                 (unsigned long long)limit.rlim_cur, strerror(EFBIG));
    }
    if (fallocate(file, FALLOC_FL_KEEP_SIZE, 0, bytes) == 0) {
        goto done;
    }
    int why = errno;
    if (fstatvfs(file, &disk) != 0) {
        CPL_FAIL(CPL_IO, "%s: %s", path, strerror(errno));
    }
    double left = (double)disk.f_bavail * (double)disk.f_frsize;
    bool cannot = why == EOPNOTSUPP || why == ENOSYS || why == EINVAL;
    if (!cannot || left < (double)bytes) {
        CPL_FAIL(CPL_IO, "%s: needs %lld bytes of disk, %.0f are free: %s", path, (long long)bytes, left,
                 strerror(cannot ? ENOSPC : why));
    }
done:
    if (file >= 0) {
        (void)close(file); /* nothing was written through it */
    }
    return st;
}

cpl_status cpl_file_commit(const char *part, const char *path) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    char *copy = NULL;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_arena_strdup(arena, &copy, path));
    if (rename(part, path) != 0) {
        CPL_FAIL(CPL_IO, "%s: cannot be renamed to %s: %s", part, path, strerror(errno));
    }
    CPL_TRY(cpl_file_sync(dirname(copy)));
done:
    cpl_arena_destroy(&arena);
    return st;
}

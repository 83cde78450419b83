/* A line behind a file with the SHA-256 of what is before it.
 * Refuses nothing of files that have none: they were changed by another program, or are of another kind. */
#include "io/base/hash.h"
#include "io/h5.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char tag[] = "\ncupel-sha256 ";
enum { TAG = sizeof tag - 1, DIGITS = CPL_SHA256_HEX - 1, SEAL = TAG + DIGITS + 1, BLOCK = 1 << 16 };

/* n bytes from `at` on. False with errno (0: the file is shorter) if they cannot be read. */
static bool read_all(int file, void *to, size_t n, off_t at) {
    for (size_t done = 0; done < n;) {
        errno = 0;
        ssize_t got = pread(file, (char *)to + done, n - done, at + (off_t)done);
        if (got <= 0 && errno != EINTR) {
            return false;
        }
        done += got > 0 ? (size_t)got : 0;
    }
    return true;
}

/* Of the first n bytes. */
static cpl_status hash_of(int file, const char *path, off_t n, char hex[CPL_SHA256_HEX]) {
    cpl_status st = CPL_OK;
    char *block = NULL;
    cpl_sha256 hash;
    CPL_TRY(cpl_alloc(&block, BLOCK, 1, "buffer to hash a file"));
    cpl_sha256_init(&hash);
    for (off_t at = 0; at < n; at += BLOCK) {
        size_t bytes = n - at < BLOCK ? (size_t)(n - at) : BLOCK;
        if (!read_all(file, block, bytes, at)) {
            CPL_FAIL(CPL_IO, "%s: %s", path, errno != 0 ? strerror(errno) : "became shorter while it was read");
        }
        cpl_sha256_add(&hash, block, bytes);
    }
    cpl_sha256_end(&hash, hex);
done:
    cpl_free(&block);
    return st;
}

static cpl_status open_file(const char *path, int flags, int *file, off_t *size) {
    cpl_status st = CPL_OK;
    struct stat about;
    *file = open(path, flags | O_CLOEXEC | O_NONBLOCK); /* a pipe of that name must not hold us */
    if (*file < 0 || fstat(*file, &about) != 0) {
        CPL_FAIL(errno == ENOENT || errno == ENOTDIR ? CPL_NOT_FOUND : CPL_IO, "%s: %s", path, strerror(errno));
    }
    if (!S_ISREG(about.st_mode)) {
        CPL_FAIL(CPL_IO, "%s: expected an HDF5 file, it is not a regular file", path);
    }
    *size = about.st_size;
done:
    return st;
}

cpl_status cpl_file_seal(const char *path) {
    cpl_status st = CPL_OK;
    int file = -1;
    off_t size = 0;
    char hex[CPL_SHA256_HEX];
    char line[SEAL + 1];
    CPL_TRY(open_file(path, O_RDWR, &file, &size));
    CPL_TRY(hash_of(file, path, size, hex));
    snprintf(line, sizeof line, "%s%s\n", tag, hex);
    for (size_t done = 0; done < SEAL;) {
        ssize_t n = pwrite(file, line + done, SEAL - done, size + (off_t)done);
        if (n <= 0 && errno != EINTR) {
            CPL_FAIL(CPL_IO, "%s: cannot be written: %s", path, strerror(n < 0 ? errno : EIO));
        }
        done += n > 0 ? (size_t)n : 0;
    }
done:
    if (file >= 0 && close(file) != 0 && st == CPL_OK) {
        st = cpl_fail(CPL_IO, __FILE__, __LINE__, "%s: cannot be written: %s", path, strerror(errno));
    }
    return st;
}

cpl_status cpl_file_check_seal(const char *path) {
    cpl_status st = CPL_OK;
    int file = -1;
    off_t size = 0;
    char hex[CPL_SHA256_HEX];
    char line[SEAL];
    CPL_TRY(open_file(path, O_RDONLY, &file, &size));
    if (size < SEAL) {
        goto done;
    }
    if (!read_all(file, line, SEAL, size - SEAL)) {
        CPL_FAIL(CPL_IO, "%s: %s", path, errno != 0 ? strerror(errno) : "became shorter while it was read");
    }
    if (memcmp(line, tag, TAG) == 0) {
        CPL_TRY(hash_of(file, path, size - SEAL, hex));
        if (memcmp(line + TAG, hex, DIGITS) != 0) {
            CPL_FAIL(CPL_DAMAGED, "%s: its bytes are not those that were written (SHA-256 differs)", path);
        }
    }
done:
    if (file >= 0) {
        (void)close(file); /* nothing was written through it */
    }
    return st;
}

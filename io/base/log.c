/* One line an event, for people and for programs, from rank 0.
 * Refuses to lose a line silently: a log that cannot be written is said on stderr once. */
#include "io/base/log.h"
#include "io/base/arena.h"
#include "io/base/json.h"
#include "io/base/screen.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { TEXT_MAX = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool silent, quiet_people, write_failed; /* under lock */
static int log_fd = -1;

double cpl_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void cpl_log_init(int rank, bool quiet) {
    pthread_mutex_lock(&lock);
    silent = rank != 0;
    quiet_people = quiet;
    pthread_mutex_unlock(&lock);
    cpl_screen_init(rank != 0 || quiet);
}

/* One write per line: with O_APPEND a kill leaves whole lines, but for the one in hand. */
static bool write_all(int fd, const char *text, size_t bytes) {
    while (bytes > 0) {
        ssize_t n = write(fd, text, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        text += n;
        bytes -= (size_t)n;
    }
    return true;
}

static void time_text(char out[32]) {
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t n = strftime(out, 24, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(out + n, 32 - n, ".%03dZ", (int)(now.tv_nsec / 1000000));
}

/* members: JSON without braces, "" for none. Called under lock. */
static void write_event(const char *event, const char *members) {
    if (log_fd < 0) {
        return;
    }
    char when[32], name[128], *line = NULL;
    time_text(when);
    cpl_json_quote(name, sizeof name, event);
    int n = asprintf(&line, "{\"time\":\"%s\",\"event\":%s%s%s}\n", when, name, members[0] != '\0' ? "," : "", members);
    if (n >= 0 && write_all(log_fd, line, (size_t)n)) {
        free(line);
        return;
    }
    if (!write_failed) {
        write_failed = true;
        cpl_screen_line("warning: cannot write to the log: ", n < 0 ? "out of memory" : strerror(errno));
    }
    if (n >= 0) {
        free(line);
    }
}

/* Offset after the last line feed of the file. */
static bool last_line(int fd, off_t size, off_t *begin) {
    char block[4096];
    for (off_t end = size; end > 0;) {
        off_t from = end > (off_t)sizeof block ? end - (off_t)sizeof block : 0;
        ssize_t n = pread(fd, block, (size_t)(end - from), from);
        if (n != (ssize_t)(end - from)) {
            return false;
        }
        const char *found = memrchr(block, '\n', (size_t)n);
        if (found != NULL) {
            *begin = from + (found - block) + 1;
            return true;
        }
        end = from;
    }
    *begin = 0;
    return true;
}

/* A line that a kill cut becomes an event {"event":"cut","text":its first 1 KiB}. */
static cpl_status mend(int fd, const char *path) {
    cpl_status st = CPL_OK;
    struct stat info;
    off_t begin = 0;
    char cut[1025], members[6 * sizeof cut + 16] = "\"text\":";
    if (fstat(fd, &info) != 0) {
        CPL_FAIL(CPL_IO, "%s: cannot be examined: %s", path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) { /* /dev/null or a pipe: nothing was cut there */
        goto done;
    }
    if (!last_line(fd, info.st_size, &begin)) {
        CPL_FAIL(CPL_IO, "%s: cannot be read: %s", path, strerror(errno));
    }
    if (begin == info.st_size) {
        goto done;
    }
    ssize_t n = pread(fd, cut, sizeof cut - 1, begin);
    if (n < 0 || ftruncate(fd, begin) != 0) {
        CPL_FAIL(CPL_IO, "%s: its cut last line cannot be mended: %s", path, strerror(errno));
    }
    cut[n] = '\0';
    cpl_json_quote(members + strlen(members), sizeof members - strlen(members), cut);
    write_event("cut", members);
done:
    return st;
}

cpl_status cpl_log_open(const char *path) {
    cpl_status st = CPL_OK;
    pthread_mutex_lock(&lock);
    if (silent) {
        goto done;
    }
    if (log_fd >= 0) {
        CPL_FAIL(CPL_INTERNAL, "%s: a log is open already", path);
    }
    log_fd = open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (log_fd < 0) {
        CPL_FAIL(CPL_IO, "%s: cannot be opened for appending: %s", path, strerror(errno));
    }
    write_failed = false;
    st = mend(log_fd, path);
    if (st != CPL_OK) {
        close(log_fd);
        log_fd = -1;
    }
done:
    pthread_mutex_unlock(&lock);
    return st;
}

void cpl_log_close(void) {
    cpl_screen_clear();
    pthread_mutex_lock(&lock);
    if (log_fd >= 0 && close(log_fd) != 0 && !write_failed) {
        cpl_screen_line("warning: cannot write to the log: ", strerror(errno));
    }
    log_fd = -1;
    pthread_mutex_unlock(&lock);
}

static void say(bool warning, const char *format, va_list args) {
    char text[TEXT_MAX], members[2 * TEXT_MAX] = "\"text\":";
    pthread_mutex_lock(&lock);
    if (!silent) {
        vsnprintf(text, sizeof text, format, args);
        if (warning || !quiet_people) {
            cpl_screen_line(warning ? "warning: " : "", text);
        }
        cpl_json_quote(members + strlen(members), sizeof members - strlen(members), text);
        write_event(warning ? "warning" : "info", members);
    }
    pthread_mutex_unlock(&lock);
}

void cpl_log_info(const char *format, ...) {
    va_list args;
    va_start(args, format);
    say(false, format, args);
    va_end(args);
}

void cpl_log_warn(const char *format, ...) {
    va_list args;
    va_start(args, format);
    say(true, format, args);
    va_end(args);
}

void cpl_log_event(const char *event, const char *format, ...) {
    char *raw = NULL;
    va_list args;
    va_start(args, format);
    int n = vasprintf(&raw, format, args);
    va_end(args);
    char *members = n < 0 ? NULL : malloc(2 * (size_t)n + 1);
    pthread_mutex_lock(&lock);
    if (!silent && members != NULL) {
        cpl_json_members(members, raw);
        write_event(event, members);
    } else if (!silent) {
        cpl_screen_line("warning: no memory for the log event ", event);
    }
    pthread_mutex_unlock(&lock);
    free(members);
    if (n >= 0) {
        free(raw);
    }
}

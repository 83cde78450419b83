/* stderr into a file, or into a pseudo-terminal whose bytes a small terminal plays.
 * Refuses to be included twice in one program: it holds the state of the one stderr. */
#ifndef CPL_TESTS_CAPTURE_H
#define CPL_TESTS_CAPTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

enum { CAPTURE_MAX = 65536, COLUMNS_MAX = 200, ROWS_MAX = 64 };

static int real_stderr = -1, master = -1;
static FILE *plain;
static char captured[CAPTURE_MAX];

static inline void capture_file(void) {
    plain = tmpfile();
    assert_non_null(plain);
    fflush(stderr);
    real_stderr = dup(STDERR_FILENO);
    assert_true(real_stderr >= 0 && dup2(fileno(plain), STDERR_FILENO) >= 0);
}

static inline const char *captured_file(void) {
    fflush(stderr);
    assert_true(dup2(real_stderr, STDERR_FILENO) >= 0);
    close(real_stderr);
    rewind(plain);
    captured[fread(captured, 1, sizeof captured - 1, plain)] = '\0';
    fclose(plain);
    return captured;
}

static inline void capture_terminal(unsigned short columns) {
    struct winsize size = {.ws_col = columns, .ws_row = 24};
    setenv("TERM", "xterm", 1);
    master = posix_openpt(O_RDWR | O_NOCTTY);
    assert_true(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    assert_true(slave >= 0 && ioctl(slave, TIOCSWINSZ, &size) == 0);
    fflush(stderr);
    real_stderr = dup(STDERR_FILENO);
    assert_true(real_stderr >= 0 && dup2(slave, STDERR_FILENO) >= 0);
    close(slave);
}

/* All bytes so far; the terminal stays. */
static inline void read_terminal(char *out, size_t size) {
    fflush(stderr);
    tcdrain(STDERR_FILENO);
    assert_true(fcntl(master, F_SETFL, O_NONBLOCK) == 0);
    size_t used = strlen(out);
    for (ssize_t n; used + 1 < size && (n = read(master, out + used, size - 1 - used)) > 0;) {
        used += (size_t)n;
        out[used] = '\0';
    }
}

static inline void end_terminal(void) {
    fflush(stderr);
    assert_true(dup2(real_stderr, STDERR_FILENO) >= 0);
    close(real_stderr);
    close(master);
}

typedef struct {
    char row[ROWS_MAX][COLUMNS_MAX];
    int y, x, widest;
} screen;

/* Carriage return, line feed, erase to the end of the line, and characters of one column. */
static inline void play(screen *s, const char *bytes) {
    memset(s, 0, sizeof *s);
    for (const char *p = bytes; *p != '\0'; p++) {
        if (*p == '\r') {
            s->x = 0;
        } else if (*p == '\n') {
            s->y++;
            assert_true(s->y < ROWS_MAX);
        } else if (strncmp(p, "\x1b[K", 3) == 0) {
            memset(s->row[s->y] + s->x, 0, (size_t)(COLUMNS_MAX - s->x));
            p += 2;
        } else {
            assert_true((unsigned char)*p >= 0x20);
            assert_true(s->x < COLUMNS_MAX - 1);
            s->row[s->y][s->x++] = *p;
            s->widest = s->x > s->widest ? s->x : s->widest;
        }
    }
}

#endif

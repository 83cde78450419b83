/* Lines and the progress bar on stderr.
 * Refuses to draw a bar where stderr is no terminal, and a bar wider than the terminal. */
#include "io/base/screen.h"
#include "io/base/log.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 4200, BAR_MAX = 30, BAR_MIN = 8 };
#define REDRAW_SECONDS 0.2 /* on a terminal */
#define LINE_SECONDS   5.0 /* elsewhere, unless CUPEL_PROGRESS_SECONDS says otherwise */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool no_progress, bar_on_screen; /* under lock */

static bool on_terminal(void) {
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) && term != NULL && strcmp(term, "dumb") != 0;
}

static int terminal_width(void) {
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) {
        return size.ws_col;
    }
    return 80;
}

void cpl_screen_init(bool silent) {
    pthread_mutex_lock(&lock);
    no_progress = silent;
    pthread_mutex_unlock(&lock);
}

static void clear_bar(void) {
    if (bar_on_screen) {
        fputs("\r\x1b[K", stderr);
        bar_on_screen = false;
    }
}

void cpl_screen_clear(void) {
    pthread_mutex_lock(&lock);
    clear_bar();
    fflush(stderr);
    pthread_mutex_unlock(&lock);
}

/* Text from files may stand in a line: no escapes and no line feeds of its own. */
static void no_controls(char *text) {
    for (; *text != '\0'; text++) {
        if ((unsigned char)*text < 0x20 || *text == 0x7F) {
            *text = ' ';
        }
    }
}

void cpl_screen_line(const char *prefix, const char *text) {
    char line[LINE_MAX_BYTES];
    snprintf(line, sizeof line - 1, "cupel: %s%s", prefix, text);
    no_controls(line);
    strcat(line, "\n");
    pthread_mutex_lock(&lock);
    clear_bar();
    fputs(line, stderr);
    fflush(stderr);
    pthread_mutex_unlock(&lock);
}

/* 0:07, 12:34, 3:02:01; 512 d 3 h beyond 100 hours */
static void duration(double seconds, char out[32]) {
    long long s = seconds < 9e15 ? (long long)(seconds + 0.5) : (long long)9e15;
    s = s < 0 ? 0 : s;
    if (s >= 360000) {
        snprintf(out, 32, "%lld d %lld h", s / 86400, s % 86400 / 3600);
    } else if (s >= 3600) {
        snprintf(out, 32, "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    } else {
        snprintf(out, 32, "%lld:%02lld", s / 60, s % 60);
    }
}

/* Bytes of the first `columns` characters; a UTF-8 character counts as one column. */
static size_t bytes_of_columns(const char *text, int columns, int *used) {
    size_t n = 0;
    *used = 0;
    while (text[n] != '\0' && *used < columns) {
        n++;
        while (((unsigned char)text[n] & 0xC0) == 0x80) {
            n++;
        }
        (*used)++;
    }
    return n;
}

static double fraction_done(const cpl_progress *p) {
    double f = p->total > 0 ? (double)p->done / (double)p->total : 1;
    return f < 0 ? 0 : f > 1 ? 1 : f;
}

/* "0:52 elapsed  1:12 left"; no estimate before the first step of this run is done, nor after its last. */
static void times(const cpl_progress *p, bool last, char *out, size_t size) {
    double elapsed = cpl_now() - p->started;
    char gone[32], left[32];
    duration(elapsed, gone);
    if (!last && p->done > p->first && p->done < p->total) {
        duration(elapsed / (double)(p->done - p->first) * (double)(p->total - p->done), left);
        snprintf(out, size, "  %s elapsed  %s left", gone, left);
    } else {
        snprintf(out, size, "  %s elapsed", gone);
    }
}

/* label  [#####.....]  42 %  420/1000  note  0:52 elapsed  1:12 left. bar: its characters, 0 for none. */
static void compose(const cpl_progress *p, const char *note, int bar, const char *when, char out[LINE_MAX_BYTES]) {
    char drawn[2 * BAR_MAX + 8] = "";
    double f = fraction_done(p);
    if (bar > 0) {
        int full = (int)(f * bar);
        snprintf(drawn, sizeof drawn, "  [%.*s%.*s]", full, "##############################", bar - full,
                 "..............................");
    }
    snprintf(out, LINE_MAX_BYTES, "%s%s  %3d %%  %lld/%lld%s%s%s", p->label, drawn, (int)floor(100 * f), (long long)p->done,
             (long long)p->total, note[0] != '\0' ? "  " : "", note, when);
    no_controls(out);
}

/* What does not fit goes in this order: length of the bar, the bar, the end of the note. The times stay. */
static void draw(const cpl_progress *p, const char *note, bool last) {
    char line[LINE_MAX_BYTES], when[96];
    int used, width = terminal_width() - 1; /* a full last column makes some terminals wrap */
    times(p, last, when, sizeof when);
    for (int bar = BAR_MAX;; bar = bar > BAR_MIN ? bar - 1 : 0) {
        compose(p, note, bar, when, line);
        bytes_of_columns(line, INT32_MAX, &used);
        if (used <= width || bar == 0) {
            break;
        }
    }
    if (used > width) {
        int tail = (int)strlen(when);
        compose(p, note, 0, "", line);
        size_t n = bytes_of_columns(line, width > tail ? width - tail : width, &used);
        snprintf(line + n, sizeof line - n, "%s", width > tail ? when : "");
    }
    fprintf(stderr, "\r%s\x1b[K%s", line, last ? "\n" : "");
    bar_on_screen = !last;
}

static double line_seconds(void) {
    const char *text = getenv("CUPEL_PROGRESS_SECONDS");
    char *end;
    double seconds = text == NULL ? LINE_SECONDS : strtod(text, &end);
    return text != NULL && (end == text || *end != '\0' || !(seconds >= 0)) ? LINE_SECONDS : seconds;
}

/* now: whatever the interval says. Called under lock. */
static void show(cpl_progress *p, const char *note, bool now, bool last) {
    bool terminal = on_terminal();
    double time = cpl_now();
    if (no_progress || (!now && time - p->last_shown < (terminal ? REDRAW_SECONDS : line_seconds()))) {
        return;
    }
    p->last_shown = time;
    p->shown = true;
    note = note == NULL ? "" : note;
    if (terminal) {
        draw(p, note, last);
    } else {
        char line[LINE_MAX_BYTES], when[96];
        times(p, last, when, sizeof when);
        compose(p, note, 0, when, line);
        fprintf(stderr, "cupel: %s\n", line);
    }
    fflush(stderr);
}

void cpl_progress_begin(cpl_progress *p, const char *label, int64_t first, int64_t total) {
    pthread_mutex_lock(&lock);
    *p = (cpl_progress){
        .label = label, .first = first, .done = first, .total = total, .started = cpl_now(), .last_shown = cpl_now()};
    if (on_terminal()) {
        show(p, "", true, false);
    }
    pthread_mutex_unlock(&lock);
}

void cpl_progress_step(cpl_progress *p, int64_t done, const char *note) {
    pthread_mutex_lock(&lock);
    p->done = done;
    show(p, note, !bar_on_screen && on_terminal(), false);
    pthread_mutex_unlock(&lock);
}

void cpl_progress_end(cpl_progress *p, const char *note) {
    pthread_mutex_lock(&lock);
    show(p, note, true, true);
    pthread_mutex_unlock(&lock);
}

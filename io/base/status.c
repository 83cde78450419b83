/* The calling thread's last failure: one code, one line of text.
 * Refuses to print, to end the process, or to hold more than one line: control characters become spaces. */
#include "io/base/status.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[CPL_MESSAGE_MAX];

/* Text came from files and command lines: no line feeds and no terminal escapes pass, and a cut never splits a UTF-8 character. */
static void keep(const char *text) {
    size_t n = strnlen(text, CPL_MESSAGE_MAX - 1);
    if (text[n] != '\0') {
        while (n > 0 && ((unsigned char)text[n] & 0xC0) == 0x80) {
            n--;
        }
    }
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        message[i] = c < 0x20 || c == 0x7F ? ' ' : (char)c;
    }
    message[n] = '\0';
}

/* Codes that are about the program's surroundings, not the user's files: there the place in our source helps. */
static int shows_source(cpl_status code) {
    return code == CPL_HDF5 || code == CPL_DEVICE || code == CPL_COMM || code == CPL_INTERNAL;
}

cpl_status cpl_fail(cpl_status code, const char *file, int line, const char *format, ...) {
    char text[CPL_MESSAGE_MAX + 8]; /* apart from `message`, which may be among the arguments */
    va_list args;
    va_start(args, format);
    int written = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (written < 0) {
        snprintf(text, sizeof text, "(a message that could not be formatted: %s)", format);
    } else if (shows_source(code) && (size_t)written < sizeof text) {
        snprintf(text + written, sizeof text - (size_t)written, " [%s:%d]", file, line);
    }
    keep(text);
    return code;
}

cpl_status cpl_fail_context(cpl_status st, const char *format, ...) {
    if (st == CPL_OK) {
        return st;
    }
    char text[2 * CPL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    int written = vsnprintf(text, CPL_MESSAGE_MAX, format, args);
    va_end(args);
    size_t used = written < 0 ? 0 : (size_t)written < CPL_MESSAGE_MAX ? (size_t)written : CPL_MESSAGE_MAX - 1;
    snprintf(text + used, sizeof text - used, "%s%s", used > 0 ? ": " : "", message);
    keep(text);
    return st;
}

const char *cpl_status_message(void) {
    return message;
}

void cpl_status_set_message(const char *text) {
    char copy[CPL_MESSAGE_MAX + 8];
    snprintf(copy, sizeof copy, "%s", text == NULL ? "" : text);
    keep(copy);
}

void cpl_status_clear(void) {
    message[0] = '\0';
}

const char *cpl_status_text(cpl_status st) {
    switch (st) {
#define TEXT_OF(code, exit_status, text)                                                                                           \
    case CPL_##code:                                                                                                               \
        return text;
        CPL_STATUS_LIST(TEXT_OF)
#undef TEXT_OF
    case CPL_STATUS_COUNT:
        break;
    }
    return "unknown status";
}

int cpl_status_exit(cpl_status st) {
    switch (st) {
#define EXIT_OF(code, exit_status, text)                                                                                           \
    case CPL_##code:                                                                                                               \
        return exit_status;
        CPL_STATUS_LIST(EXIT_OF)
#undef EXIT_OF
    case CPL_STATUS_COUNT:
        break;
    }
    return 1;
}

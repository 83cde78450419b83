/* Status codes, the message that goes with the last failure, and the two macros every function uses.
 * Refuses to end the process: only main exits. */
#ifndef CPL_IO_BASE_STATUS_H
#define CPL_IO_BASE_STATUS_H

#include <stdarg.h>
#include <stddef.h>

/* code, exit status of the process, text. Order is severity: when ranks disagree the largest code wins. */
#define CPL_STATUS_LIST(X)                                                                                                         \
    X(OK, 0, "done")                                                                                                               \
    X(STOPPED, 75, "stopped early on purpose; run again to resume")                                                                \
    X(NOT_FOUND, 1, "not there")                                                                                                   \
    X(USAGE, 2, "wrong usage")                                                                                                     \
    X(INPUT, 1, "bad input")                                                                                                       \
    X(DAMAGED, 1, "damaged file")                                                                                                  \
    X(UNSUPPORTED, 1, "not supported by this build or machine")                                                                    \
    X(NUMERIC, 1, "training cannot go on")                                                                                         \
    X(NO_MEMORY, 1, "out of memory")                                                                                               \
    X(IO, 1, "file system error")                                                                                                  \
    X(HDF5, 1, "HDF5 error")                                                                                                       \
    X(DEVICE, 1, "device error")                                                                                                   \
    X(COMM, 1, "communication error")                                                                                              \
    X(INTERNAL, 1, "internal error")

typedef enum {
#define CPL_STATUS_ENUM(code, exit_status, text) CPL_##code,
    CPL_STATUS_LIST(CPL_STATUS_ENUM)
#undef CPL_STATUS_ENUM
        CPL_STATUS_COUNT
} cpl_status;

enum { CPL_MESSAGE_MAX = 1024 };

/* Inside a function that has `cpl_status st = CPL_OK;` and a label `done:` that frees everything and returns st. */
#define CPL_TRY(call)                                                                                                              \
    do {                                                                                                                           \
        st = (call);                                                                                                               \
        if (st != CPL_OK) {                                                                                                        \
            goto done;                                                                                                             \
        }                                                                                                                          \
    } while (0)
#define CPL_FAIL(code, ...)                                                                                                        \
    do {                                                                                                                           \
        st = cpl_fail((code), __FILE__, __LINE__, __VA_ARGS__);                                                                    \
        goto done;                                                                                                                 \
    } while (0)

/* Records the calling thread's message (one line, cut at CPL_MESSAGE_MAX - 1 bytes) and returns `code`. `file`, `line` are where
 * in our source it was noticed; the formatted text names the user's file, position and what was expected. */
cpl_status cpl_fail(cpl_status code, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5), cold));

/* Puts "text: " before the recorded message, to say what was being done. Returns `st` unchanged; does nothing for CPL_OK. */
cpl_status cpl_fail_context(cpl_status st, const char *format, ...) __attribute__((format(printf, 2, 3), cold));

/* The calling thread's last message, "" if none; valid until the next failure. */
const char *cpl_status_message(void);
/* Replaces the calling thread's message (used when another rank's message is adopted). */
void cpl_status_set_message(const char *text);
void cpl_status_clear(void);

const char *cpl_status_text(cpl_status st);
int cpl_status_exit(cpl_status st);

#endif

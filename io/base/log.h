/* What a person sees (stderr) and what a program reads (log.jsonl): one line an event, and the progress of long work.
 * Refuses to speak from any rank but 0, so that four ranks do not say a thing four times. */
#ifndef CPL_IO_BASE_LOG_H
#define CPL_IO_BASE_LOG_H

#include "io/base/status.h"
#include <stdbool.h>
#include <stdint.h>

/* Call once. rank != 0 silences everything. quiet: only warnings and errors on stderr. */
void cpl_log_init(int rank, bool quiet);
/* Opens DIR/log.jsonl for appending. A cut last line, from a kill, is kept as the text of an event "cut", so that every line is
 * JSON. Rank 0 only; others return CPL_OK. */
cpl_status cpl_log_open(const char *path);
/* Also clears a bar that an error left on the screen: call it before anything else is written to stderr. */
void cpl_log_close(void);

/* A line for people on stderr ("cupel: ..."), and an event {"time":..., "event":"info|warning", "text":...}. A bar on the screen is
 * cleared first. */
void cpl_log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void cpl_log_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* An event for programs only. `format` gives JSON members without braces: "\"step\":%lld". Bare nan and inf become null. */
void cpl_log_event(const char *event, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Writes text as a JSON string with quotes into out (size bytes, always terminated). */
void cpl_json_quote(char *out, size_t size, const char *text);

/* Progress of one piece of work: a bar redrawn at most 5 times a second on a terminal, else a line at most every 5 s
 * (CUPEL_PROGRESS_SECONDS). `note` is what the work says of itself ("loss 1.234  9.8k tok/s  scale 65536"). Time left is estimated
 * from this run's own pace. */
typedef struct {
    const char *label; /* borrowed */
    int64_t first, total, done;
    double started, last_shown;
    bool shown;
} cpl_progress;
void cpl_progress_begin(cpl_progress *p, const char *label, int64_t first, int64_t total);
void cpl_progress_step(cpl_progress *p, int64_t done, const char *note);
void cpl_progress_end(cpl_progress *p, const char *note);

double cpl_now(void); /* seconds, monotonic */

#endif

/* stderr as people see it: whole lines, and below them at most one bar.
 * Refuses to be used outside log.c and screen.c: everyone else speaks through log.h. */
#ifndef CPL_IO_BASE_SCREEN_H
#define CPL_IO_BASE_SCREEN_H

#include <stdbool.h>

/* no_progress: neither bars nor progress lines. */
void cpl_screen_init(bool no_progress);
/* "cupel: <prefix><text>" as one line; a bar is cleared first and comes back at the next step. */
void cpl_screen_line(const char *prefix, const char *text);
void cpl_screen_clear(void);

#endif

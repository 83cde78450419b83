/* The two things that keep log.jsonl valid JSON whatever is printed into it.
 * Refuses to build documents: one line is one event. */
#ifndef CPL_IO_BASE_JSON_H
#define CPL_IO_BASE_JSON_H

#include <stddef.h>

/* Copies JSON members, at most 2 * strlen(text) + 1 bytes: every nan and inf outside a string becomes null, for JSON (RFC 8259) has
 * no such numbers, and every control character a space. */
void cpl_json_members(char *out, const char *text);

#endif

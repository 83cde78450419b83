/* Checked allocation: every size that comes from outside is multiplied and added here.
 * Refuses to return memory for a size that overflowed. */
#ifndef CPL_IO_BASE_ARENA_H
#define CPL_IO_BASE_ARENA_H

#include "io/base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* True and *out = a*b (a+b), or false on overflow. */
static inline bool cpl_mul_size(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool cpl_add_size(size_t a, size_t b, size_t *out) {
    return !__builtin_add_overflow(a, b, out);
}
static inline bool cpl_mul_i64(int64_t a, int64_t b, int64_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool cpl_add_i64(int64_t a, int64_t b, int64_t *out) {
    return !__builtin_add_overflow(a, b, out);
}

/* *out = count * size zeroed bytes, 64-byte aligned; *out = NULL when the product is 0. `what` names it in the error. Free with
 * cpl_free. Errors: CPL_NO_MEMORY with the number of bytes and `what`. */
cpl_status cpl_alloc(void *out, size_t count, size_t size, const char *what);
/* Frees *pointer (a T **) and sets it to NULL; accepts NULL inside. */
void cpl_free(void *pointer);

/* Many small things with one lifetime: strings and lists of options. Not thread-safe. */
typedef struct cpl_arena cpl_arena;
cpl_status cpl_arena_create(cpl_arena **out);
void cpl_arena_destroy(cpl_arena **arena);
/* Zeroed, 16-byte aligned, owned by the arena. Errors: CPL_NO_MEMORY. */
cpl_status cpl_arena_alloc(cpl_arena *arena, void *out, size_t count, size_t size);
cpl_status cpl_arena_strdup(cpl_arena *arena, char **out, const char *text);
cpl_status cpl_arena_printf(cpl_arena *arena, char **out, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif

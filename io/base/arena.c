/* Checked allocation, and an arena for many small things with one lifetime.
 * Refuses sizes that overflow; never returns memory that is not zeroed. */
#include "io/base/arena.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ALLOC_ALIGN = 64, ARENA_ALIGN = 16, ARENA_BLOCK = 16384 };

static void put_pointer(void *out, void *value) {
    memcpy(out, &value, sizeof value);
}

cpl_status cpl_alloc(void *out, size_t count, size_t size, const char *what) {
    cpl_status st = CPL_OK;
    put_pointer(out, NULL);
    size_t bytes = 0, padded = 0;
    if (!cpl_mul_size(count, size, &bytes) || !cpl_add_size(bytes, ALLOC_ALIGN - 1, &padded) || bytes > PTRDIFF_MAX) {
        CPL_FAIL(CPL_NO_MEMORY, "no memory for %s: %zu times %zu bytes is more than this machine can address", what, count, size);
    }
    if (bytes == 0) {
        goto done;
    }
    padded -= padded % ALLOC_ALIGN;
    void *memory = aligned_alloc(ALLOC_ALIGN, padded);
    if (memory == NULL) {
        CPL_FAIL(CPL_NO_MEMORY, "no memory for %s: %zu bytes", what, bytes);
    }
    memset(memory, 0, padded);
    put_pointer(out, memory);
done:
    return st;
}

void cpl_free(void *pointer) {
    if (pointer == NULL) {
        return;
    }
    void *memory;
    memcpy(&memory, pointer, sizeof memory);
    free(memory);
    put_pointer(pointer, NULL);
}

typedef struct block block;
struct block {
    block *next; /* owned */
    size_t used, size;
    _Alignas(ARENA_ALIGN) unsigned char data[];
};

struct cpl_arena {
    block *blocks; /* owned; the newest that still has room is the first */
};

cpl_status cpl_arena_create(cpl_arena **out) {
    return cpl_alloc(out, 1, sizeof **out, "an arena");
}

void cpl_arena_destroy(cpl_arena **arena) {
    if (arena == NULL || *arena == NULL) {
        return;
    }
    for (block *b = (*arena)->blocks; b != NULL;) {
        block *next = b->next;
        free(b);
        b = next;
    }
    cpl_free(arena);
}

static cpl_status add_block(cpl_arena *arena, size_t bytes, block **out) {
    cpl_status st = CPL_OK;
    size_t size = bytes > ARENA_BLOCK ? bytes : ARENA_BLOCK, total = 0;
    block *b = cpl_add_size(size, sizeof *b, &total) && total <= PTRDIFF_MAX ? calloc(1, total) : NULL;
    if (b == NULL) {
        CPL_FAIL(CPL_NO_MEMORY, "no memory for options and texts: %zu bytes", bytes);
    }
    b->size = size;
    if (arena->blocks != NULL &&
        bytes > ARENA_BLOCK / 2) { /* a large one stands second, so that the first keeps serving small ones */
        b->next = arena->blocks->next;
        arena->blocks->next = b;
    } else {
        b->next = arena->blocks;
        arena->blocks = b;
    }
    *out = b;
done:
    return st;
}

cpl_status cpl_arena_alloc(cpl_arena *arena, void *out, size_t count, size_t size) {
    cpl_status st = CPL_OK;
    put_pointer(out, NULL);
    size_t bytes = 0, padded = 0;
    if (!cpl_mul_size(count, size, &bytes) || !cpl_add_size(bytes, ARENA_ALIGN - 1, &padded)) {
        CPL_FAIL(CPL_NO_MEMORY, "no memory for options and texts: %zu times %zu bytes", count, size);
    }
    padded = padded < ARENA_ALIGN ? ARENA_ALIGN : padded - padded % ARENA_ALIGN; /* also zero bytes have an address of their own */
    block *b = arena->blocks;
    if (b == NULL || b->size - b->used < padded) {
        CPL_TRY(add_block(arena, padded, &b));
    }
    put_pointer(out, b->data + b->used);
    b->used += padded;
done:
    return st;
}

cpl_status cpl_arena_strdup(cpl_arena *arena, char **out, const char *text) {
    size_t bytes = strlen(text) + 1;
    cpl_status st = cpl_arena_alloc(arena, out, bytes, 1);
    if (st == CPL_OK) {
        memcpy(*out, text, bytes);
    }
    return st;
}

cpl_status cpl_arena_printf(cpl_arena *arena, char **out, const char *format, ...) {
    cpl_status st = CPL_OK;
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    *out = NULL;
    int length = vsnprintf(NULL, 0, format, args);
    if (length < 0) {
        CPL_FAIL(CPL_INTERNAL, "cannot format '%s'", format);
    }
    CPL_TRY(cpl_arena_alloc(arena, out, (size_t)length + 1, 1));
    vsnprintf(*out, (size_t)length + 1, format, again);
done:
    va_end(again);
    va_end(args);
    return st;
}

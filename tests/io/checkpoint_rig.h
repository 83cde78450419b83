/* Checkpoints to write, read and spoil: one of every type, and a small one.
 * Refuses to be compiled by itself: each test program has its own. */
#ifndef CPL_TESTS_IO_CHECKPOINT_RIG_H
#define CPL_TESTS_IO_CHECKPOINT_RIG_H

#include "io/base/rng.h"
#include "io/checkpoint.h"
#include "tests/io/file_rig.h"

static inline unsigned char *random_bytes(size_t n, uint32_t stream) {
    unsigned char *x = malloc(n + 16);
    assert_non_null(x);
    for (size_t i = 0; i < n; i += 16) {
        uint32_t word[4];
        cpl_rng_block(7, CPL_RNG_TEST, stream, i / 16, word);
        memcpy(x + i, word, 16);
    }
    return x;
}

/* Every type, several chunks with a rest, one element, none. */
enum { ARRAYS = 8 };
static const cpl_ckpt_array shapes[ARRAYS] = {
    {.name = "weights", .type = CPL_T_F32, .total = 150001, .help = "master weights"},
    {.name = "sums", .type = CPL_T_F64, .total = 65536, .help = NULL},
    {.name = "counts", .type = CPL_T_I64, .total = 65537, .help = "größer"},
    {.name = "index", .type = CPL_T_I32, .total = 4097, .help = NULL},
    {.name = "mask", .type = CPL_T_U8, .total = 70000, .help = NULL},
    {.name = "codes", .type = CPL_T_U32, .total = 3, .help = NULL},
    {.name = "one", .type = CPL_T_F32, .total = 1, .help = NULL},
    {.name = "none", .type = CPL_T_F32, .total = 0, .help = NULL},
};

static inline void fill(cpl_ckpt_array a[ARRAYS], uint32_t stream) {
    for (int i = 0; i < ARRAYS; i++) {
        a[i] = shapes[i];
        a[i].n = a[i].total;
        a[i].data = random_bytes((size_t)a[i].total * cpl_type_size(a[i].type), stream + (uint32_t)i);
    }
}
static inline void drop(cpl_ckpt_array *a, int n) {
    for (int i = 0; i < n; i++) {
        free(a[i].data);
    }
}
static inline void assert_same(const cpl_ckpt_array *a, const cpl_ckpt_array *b, int n) {
    for (int i = 0; i < n; i++) {
        assert_memory_equal(a[i].data, b[i].data, (size_t)a[i].n * cpl_type_size(a[i].type));
    }
}

enum { SMALL = 3 };
static const cpl_ckpt_attr small_attr = {.name = "tokenizer", .type = CPL_T_TEXT, .text = "bytes"};
static inline void fill_small(cpl_ckpt_array a[SMALL], uint32_t stream) {
    static const cpl_ckpt_array small[SMALL] = {{.name = "weights", .type = CPL_T_F32, .total = 700, .help = "weights"},
                                                {.name = "zeros", .type = CPL_T_F32, .total = 500, .help = "moments at step 0"},
                                                {.name = "mask", .type = CPL_T_U8, .total = 99, .help = "mask"}};
    for (int i = 0; i < SMALL; i++) {
        a[i] = small[i];
        a[i].n = a[i].total;
        a[i].data = random_bytes((size_t)a[i].total * cpl_type_size(a[i].type), stream + (uint32_t)i);
    }
    memset(a[1].data, 0, 500 * sizeof(float));
}

#endif

/* What the tests of corpora share: an empty folder to work in, files made of bytes and tokens, and whole error messages.
 * Refuses to leave anything behind. */
#ifndef CPL_TESTS_IO_CORPUS_RIG_H
#define CPL_TESTS_IO_CORPUS_RIG_H

#include "io/base/rng.h"
#include "io/corpus.h"
#include "io/shard.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define assert_ok(call)                                                                                                            \
    do {                                                                                                                           \
        cpl_status assert_ok_status = (call);                                                                                      \
        if (assert_ok_status != CPL_OK) {                                                                                          \
            fail_msg("%s: %s", #call, cpl_status_message());                                                                       \
        }                                                                                                                          \
    } while (0)

/* The call fails with this status and exactly this message. */
#define assert_fails(call, status, message)                                                                                        \
    do {                                                                                                                           \
        assert_int_equal(call, status);                                                                                            \
        assert_string_equal(cpl_status_message(), message);                                                                        \
    } while (0)

/* The same where HDF5 gives the last words: the message begins with `start`. */
#define assert_fails_like(call, status, start)                                                                                     \
    do {                                                                                                                           \
        assert_int_equal(call, status);                                                                                            \
        if (strncmp(cpl_status_message(), start, strlen(start)) != 0 || strchr(cpl_status_message(), '\n') != NULL) {              \
            fail_msg("\"%s\" does not begin with \"%s\"", cpl_status_message(), start);                                            \
        }                                                                                                                          \
    } while (0)

static char rig_home[4096], rig_folder[] = "corpus-XXXXXX";

/* Group setup and teardown: an empty folder becomes the working folder. */
static inline int rig_enter(void **state) {
    (void)state;
    return getcwd(rig_home, sizeof rig_home) == NULL || mkdtemp(rig_folder) == NULL || chdir(rig_folder) != 0;
}

static inline int rig_remove_entry(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info;
    (void)kind;
    (void)where;
    return remove(path);
}

static inline int rig_leave(void **state) {
    (void)state;
    return chdir(rig_home) != 0 || nftw(rig_folder, rig_remove_entry, 8, FTW_DEPTH | FTW_PHYS) != 0;
}

static inline void rig_write(const char *path, const void *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static inline void rig_write_text(const char *path, const char *text) {
    rig_write(path, text, strlen(text));
}

/* The whole file; free it. */
static inline unsigned char *rig_read(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    struct stat info;
    assert_non_null(file);
    assert_int_equal(fstat(fileno(file), &info), 0);
    *bytes = (size_t)info.st_size;
    unsigned char *data = malloc(*bytes + 1);
    assert_non_null(data);
    assert_int_equal(fread(data, 1, *bytes, file), *bytes);
    fclose(file);
    return data;
}

static inline bool rig_is_there(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

/* An llm.c shard whose header is as given and whose body is `bytes` long. */
static inline void rig_write_llmc(const char *path, int32_t magic, int32_t version, int32_t count, const uint16_t *tokens,
                                  size_t bytes) {
    unsigned char *file = calloc(1, CPL_LLMC_HEADER + bytes);
    assert_non_null(file);
    memcpy(file, (int32_t[]){magic, version, count}, 12);
    if (bytes > 0) {
        memcpy(file + CPL_LLMC_HEADER, tokens, bytes);
    }
    rig_write(path, file, CPL_LLMC_HEADER + bytes);
    free(file);
}

static inline void rig_write_h5(const char *path, const int32_t *tokens, int64_t n, int64_t vocab, const char *tokenizer) {
    cpl_shard_h5_writer *w = NULL;
    assert_ok(cpl_shard_h5_create(&w, path, n, vocab, tokenizer));
    assert_ok(cpl_shard_h5_append(w, tokens, n));
    assert_ok(cpl_shard_h5_finish(&w));
}

/* Opens one file; the corpus is NULL where that fails. */
static inline cpl_status rig_open(cpl_corpus **c, const char *path, int64_t vocab) {
    return cpl_corpus_open(c, &path, 1, vocab);
}

static inline cpl_status rig_try(const char *path, int64_t vocab) {
    cpl_corpus *c = NULL;
    cpl_status st = rig_open(&c, path, vocab);
    if (st != CPL_OK) {
        assert_null(c);
    }
    cpl_corpus_close(&c);
    return st;
}

/* The corpus holds exactly these tokens, read in pieces of every length up to 7 and at once. */
static inline void rig_expect(const cpl_corpus *c, const int32_t *tokens, int64_t n) {
    assert_int_equal(cpl_corpus_tokens(c), n);
    int32_t *got = calloc((size_t)n + 1, sizeof *got);
    assert_non_null(got);
    for (int64_t piece = 1; piece <= 8; piece++) {
        int64_t step = piece == 8 ? n : piece;
        for (int64_t at = 0; at < n && (step == n || at < 64); at += step) {
            int64_t part = n - at < step ? n - at : step;
            assert_ok(cpl_corpus_read(c, at, part, got));
            assert_memory_equal(got, tokens + at, (size_t)part * sizeof *got);
        }
    }
    free(got);
}

#endif

/* A corpus written again as token shards of one format, each beside, synced and renamed.
 * Refuses vocabularies that do not fit u16 where the format has no more, and to replace a file that it is reading from. */
#include "io/corpus.h"
#include "io/base/log.h"
#include "io/h5.h"
#include "io/shard.h"
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 1 << 18 };              /* tokens in memory at a time */
enum { SHOW_PROGRESS_OVER = 1 << 26 }; /* tokens: less is done in a second */
enum { MOST_SHARDS = 1000000 };        /* six digits in the name */

typedef struct {
    const cpl_corpus *corpus; /* borrowed */
    const char *prefix;       /* borrowed */
    cpl_shard_format format;
    int64_t shard_tokens, shards;
    int32_t *tokens;   /* owned, [BLOCK] */
    uint16_t *narrow;  /* owned, [BLOCK] */
    cpl_arena *arena;  /* owned: names */
    cpl_progress *bar; /* borrowed; NULL: none */
} writer;

static cpl_status shard_name(const writer *w, int64_t index, char **out) {
    return cpl_arena_printf(w->arena, out, "%s_%06lld.%s", w->prefix, (long long)index, w->format == CPL_SHARD_HDF5 ? "h5" : "bin");
}

static cpl_status choose_format(writer *w, const char *format, int64_t shard_tokens) {
    cpl_status st = CPL_OK;
    if (strcmp(format, "h5") == 0) {
        w->format = CPL_SHARD_HDF5;
    } else if (strcmp(format, "llmc") == 0) {
        w->format = CPL_SHARD_LLMC;
    } else if (strcmp(format, "nanogpt") == 0) {
        w->format = CPL_SHARD_NANOGPT;
    } else {
        CPL_FAIL(CPL_USAGE, "%s: shards of format \"%s\", expected h5, llmc or nanogpt", w->prefix, format);
    }
    if (shard_tokens < 0 || (w->format == CPL_SHARD_LLMC && shard_tokens > INT32_MAX)) {
        CPL_FAIL(CPL_USAGE, "%s: %lld tokens a shard, expected 1 to %s, or 0 for as many as the format can hold", w->prefix,
                 (long long)shard_tokens, w->format == CPL_SHARD_LLMC ? "2147483647 (the header's count is int32)" : "2^63 - 1");
    }
    if (w->format != CPL_SHARD_HDF5 && w->corpus->vocab > CPL_SHARD_U16_VOCAB) {
        CPL_FAIL(CPL_INPUT,
                 "%s: a vocabulary of %lld in shards of format \"%s\" (uint16), expected at most %d; format \"h5\" holds it",
                 w->prefix, (long long)w->corpus->vocab, format, CPL_SHARD_U16_VOCAB);
    }
    int64_t most = w->format == CPL_SHARD_LLMC ? INT32_MAX : w->corpus->tokens;
    w->shard_tokens = shard_tokens == 0 || shard_tokens > most ? most : shard_tokens;
    w->shards = (w->corpus->tokens - 1) / w->shard_tokens + 1;
    if (w->shards > MOST_SHARDS) {
        CPL_FAIL(CPL_USAGE, "%s: %lld tokens a shard make %lld shards of %lld tokens, expected at most %d shards", w->prefix,
                 (long long)w->shard_tokens, (long long)w->shards, (long long)w->corpus->tokens, MOST_SHARDS);
    }
done:
    return st;
}

/* Before the first byte is written. A shard left over behind the last one would be taken for a part of this corpus by PREFIX_*. */
static cpl_status check_names(const writer *w) {
    cpl_status st = CPL_OK;
    for (int64_t i = 0; i <= w->shards; i++) {
        char *name = NULL;
        struct stat info;
        CPL_TRY(shard_name(w, i, &name));
        if (stat(name, &info) != 0) {
            continue;
        }
        if (i == w->shards) {
            CPL_FAIL(CPL_INPUT, "%s: is there already, left over behind the %lld shards to be written; expected it removed", name,
                     (long long)w->shards);
        }
        for (size_t f = 0; f < w->corpus->shards; f++) {
            if (w->corpus->shard[f].device == info.st_dev && w->corpus->shard[f].inode == info.st_ino) {
                CPL_FAIL(CPL_INPUT, "%s: would replace %s, which is being read; expected another prefix", name,
                         w->corpus->shard[f].path);
            }
        }
    }
done:
    return st;
}

static cpl_status put(int fd, const char *path, const void *data, size_t bytes) {
    cpl_status st = CPL_OK;
    size_t done_bytes = 0;
    while (done_bytes < bytes) {
        ssize_t n = write(fd, (const char *)data + done_bytes, bytes - done_bytes);
        if (n < 0 && errno != EINTR) {
            CPL_FAIL(CPL_IO, "%s: cannot write at byte %lld: %s", path, (long long)lseek(fd, 0, SEEK_CUR), strerror(errno));
        }
        done_bytes += n > 0 ? (size_t)n : 0;
    }
done:
    return st;
}

/* The next block of a shard into w->tokens; *n tokens. */
static cpl_status next_block(writer *w, int64_t first, int64_t left, int64_t *n) {
    cpl_status st = CPL_OK;
    *n = left < BLOCK ? left : BLOCK;
    CPL_TRY(cpl_corpus_read(w->corpus, first, *n, w->tokens));
    if (w->bar != NULL) {
        cpl_progress_step(w->bar, first + *n, "");
    }
done:
    return st;
}

static cpl_status write_header(const writer *w, int fd, const char *part, int64_t n) {
    cpl_status st = CPL_OK;
    uint32_t header[CPL_LLMC_HEADER / 4] = {htole32(CPL_LLMC_MAGIC), htole32(CPL_LLMC_VERSION), htole32((uint32_t)n)};
    if (w->format == CPL_SHARD_LLMC) {
        CPL_TRY(put(fd, part, header, sizeof header));
    }
done:
    return st;
}

/* A raw shard whose first two tokens happen to be some header's magic would be read as that. */
static cpl_status check_first_tokens(const writer *w, const char *part, const uint16_t *narrow, int64_t n) {
    cpl_status st = CPL_OK;
    uint32_t word = n >= 2 ? le16toh(narrow[0]) | (uint32_t)le16toh(narrow[1]) << 16 : 0;
    if (w->format == CPL_SHARD_NANOGPT && (word == CPL_LLMC_MAGIC || cpl_shard_other_magic(word) != NULL)) {
        CPL_FAIL(CPL_INPUT, "%s: its first two tokens would read as the magic %u of another format, expected format llmc or h5",
                 part, word);
    }
done:
    return st;
}

static cpl_status write_bin(writer *w, const char *part, int64_t first, int64_t n) {
    cpl_status st = CPL_OK;
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        CPL_FAIL(CPL_IO, "%s: cannot create: %s", part, strerror(errno));
    }
    CPL_TRY(write_header(w, fd, part, n));
    for (int64_t at = 0, block = 0; at < n; at += block) {
        CPL_TRY(next_block(w, first + at, n - at, &block));
        for (int64_t i = 0; i < block; i++) {
            w->narrow[i] = htole16((uint16_t)w->tokens[i]);
        }
        if (at == 0) {
            CPL_TRY(check_first_tokens(w, part, w->narrow, block));
        }
        CPL_TRY(put(fd, part, w->narrow, (size_t)block * sizeof *w->narrow));
    }
    int closing = fd;
    fd = -1;
    if (close(closing) != 0) {
        CPL_FAIL(CPL_IO, "%s: cannot finish writing: %s", part, strerror(errno));
    }
done:
    if (fd >= 0) {
        close(fd);
    }
    return st;
}

static cpl_status write_h5(writer *w, const char *part, int64_t first, int64_t n) {
    cpl_status st = CPL_OK;
    cpl_shard_h5_writer *out = NULL;
    CPL_TRY(cpl_shard_h5_create(&out, part, n, w->corpus->vocab, w->corpus->shard[0].tokenizer));
    for (int64_t at = 0, block = 0; at < n; at += block) {
        CPL_TRY(next_block(w, first + at, n - at, &block));
        CPL_TRY(cpl_shard_h5_append(out, w->tokens, block));
    }
    CPL_TRY(cpl_shard_h5_finish(&out));
done:
    cpl_shard_h5_drop(&out);
    return st;
}

static cpl_status write_shard(writer *w, int64_t index) {
    cpl_status st = CPL_OK;
    char *name = NULL, *part = NULL;
    int64_t first = index * w->shard_tokens, left = w->corpus->tokens - first;
    int64_t n = left < w->shard_tokens ? left : w->shard_tokens;
    CPL_TRY(shard_name(w, index, &name));
    CPL_TRY(cpl_part_name(name, &part, w->arena));
    CPL_TRY(w->format == CPL_SHARD_HDF5 ? write_h5(w, part, first, n) : write_bin(w, part, first, n));
    CPL_TRY(cpl_file_sync(part));
    CPL_TRY(cpl_file_commit(part, name));
done:
    if (st != CPL_OK && part != NULL) {
        unlink(part);
    }
    return st;
}

cpl_status cpl_corpus_write(const cpl_corpus *c, const char *prefix, const char *format, int64_t shard_tokens, int64_t *shards) {
    cpl_status st = CPL_OK;
    cpl_progress bar;
    writer w = {.corpus = c, .prefix = prefix};
    CPL_TRY(cpl_arena_create(&w.arena));
    CPL_TRY(choose_format(&w, format, shard_tokens));
    CPL_TRY(check_names(&w));
    CPL_TRY(cpl_alloc(&w.tokens, BLOCK, sizeof *w.tokens, "writing token shards"));
    CPL_TRY(cpl_alloc(&w.narrow, BLOCK, sizeof *w.narrow, "writing token shards"));
    if (c->tokens > SHOW_PROGRESS_OVER) {
        w.bar = &bar;
        cpl_progress_begin(w.bar, "prepare", 0, c->tokens);
    }
    for (int64_t i = 0; i < w.shards; i++) {
        CPL_TRY(write_shard(&w, i));
    }
    if (w.bar != NULL) {
        cpl_progress_end(w.bar, "");
    }
    if (shards != NULL) {
        *shards = w.shards;
    }
done:
    cpl_free(&w.tokens);
    cpl_free(&w.narrow);
    cpl_arena_destroy(&w.arena);
    return st;
}

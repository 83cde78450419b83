/* Several files as one long row of tokens, its training and held-out parts, and samples as a function of (seed, sample index).
 * Refuses to mix text with token shards, and to remember what was read last. */
#include "io/corpus.h"
#include "io/base/rng.h"
#include "io/shard.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CACHE_ALL = 32 << 20 }; /* bytes of HDF5 chunk cache, shared out over the files */
enum { HASH_BLOCK = 1 << 20 };

static bool is_h5(const char *path) {
    size_t n = strlen(path);
    return n > 3 && strcmp(path + n - 3, ".h5") == 0;
}

/* HDF5 keeps a descriptor open for each shard, and corpora of a thousand shards are common: the soft limit goes up to the hard one.
 */
static cpl_status allow_open_files(const char *const *paths, size_t n) {
    cpl_status st = CPL_OK;
    struct rlimit limit;
    rlim_t needed = 64; /* what else a run has open */
    for (size_t i = 0; i < n; i++) {
        needed += is_h5(paths[i]);
    }
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= needed) {
        goto done;
    }
    if (limit.rlim_max < needed) {
        CPL_FAIL(CPL_INPUT, "%s and %zu other files: %llu open files are needed, the limit here is %llu (ulimit -n)", paths[0],
                 n - 1, (unsigned long long)needed, (unsigned long long)limit.rlim_max);
    }
    limit.rlim_cur = needed;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) {
        CPL_FAIL(CPL_IO, "cannot raise the limit of open files to %llu: %s", (unsigned long long)needed, strerror(errno));
    }
done:
    return st;
}

static cpl_status check_same_kind(const cpl_shard *a, const cpl_shard *b) {
    cpl_status st = CPL_OK;
    if ((a->format == CPL_SHARD_TEXT) != (b->format == CPL_SHARD_TEXT)) {
        CPL_FAIL(CPL_INPUT, "%s: holds %s, expected %s as in %s", b->path, b->format == CPL_SHARD_TEXT ? "text" : "tokens",
                 a->format == CPL_SHARD_TEXT ? "text" : "tokens (*.bin or *.h5)", a->path);
    }
    if (strcmp(a->tokenizer, b->tokenizer) != 0) {
        CPL_FAIL(CPL_INPUT, "%s: tokens are of the tokenizer \"%s\", expected \"%s\" as in %s", b->path, b->tokenizer, a->tokenizer,
                 a->path);
    }
done:
    return st;
}

static cpl_status add_file(cpl_corpus *c, const char *path, size_t cache) {
    cpl_status st = CPL_OK;
    cpl_shard *s = &c->shard[c->shards];
    CPL_TRY(cpl_shard_open(s, path, cache));
    c->shards++;
    CPL_TRY(check_same_kind(&c->shard[0], s));
    c->start[c->shards - 1] = c->tokens;
    if (!cpl_add_i64(c->tokens, s->tokens, &c->tokens)) {
        CPL_FAIL(CPL_INPUT, "%s: with it the corpus has more than 2^63 tokens", path);
    }
    c->start[c->shards] = c->tokens;
done:
    return st;
}

cpl_status cpl_corpus_open(cpl_corpus **out, const char *const *paths, size_t n, int64_t vocab) {
    cpl_status st = CPL_OK;
    cpl_corpus *c = NULL;
    *out = NULL;
    if (n == 0) {
        CPL_FAIL(CPL_INPUT, "a corpus of no files, expected at least one");
    }
    if (vocab < 0 || vocab > INT32_MAX) {
        CPL_FAIL(CPL_INPUT, "%s: a vocabulary of %lld, expected 1 to %d", paths[0], (long long)vocab, INT32_MAX);
    }
    CPL_TRY(allow_open_files(paths, n));
    CPL_TRY(cpl_alloc(&c, 1, sizeof *c, "a corpus"));
    CPL_TRY(cpl_alloc(&c->shard, n, sizeof *c->shard, "the files of a corpus"));
    CPL_TRY(cpl_alloc(&c->start, n + 1, sizeof *c->start, "the files of a corpus"));
    for (size_t i = 0; i < n; i++) {
        CPL_TRY(add_file(c, paths[i], CACHE_ALL / n));
    }
    c->vocab = vocab;
    for (size_t i = 0; vocab == 0 && i < n; i++) {
        c->vocab = c->shard[i].vocab > c->vocab ? c->shard[i].vocab : c->vocab;
    }
    *out = c;
    c = NULL;
done:
    cpl_corpus_close(&c);
    return st;
}

void cpl_corpus_close(cpl_corpus **c) {
    if (c == NULL || *c == NULL) {
        return;
    }
    for (size_t i = 0; i < (*c)->shards; i++) {
        cpl_shard_close(&(*c)->shard[i]);
    }
    cpl_free(&(*c)->shard);
    cpl_free(&(*c)->start);
    cpl_free(c);
}

int64_t cpl_corpus_tokens(const cpl_corpus *c) {
    return c->tokens;
}
int64_t cpl_corpus_vocab(const cpl_corpus *c) {
    return c->vocab;
}
const char *cpl_corpus_tokenizer(const cpl_corpus *c) {
    return strcmp(c->shard[0].tokenizer, "bytes") == 0 ? "bytes" : "shards";
}

/* The file that holds token `at`: the last whose start is not beyond it. */
static size_t file_of(const cpl_corpus *c, int64_t at) {
    size_t low = 0, high = c->shards;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (c->start[middle] <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

cpl_status cpl_corpus_read(const cpl_corpus *c, int64_t first, int64_t n, int32_t *out) {
    cpl_status st = CPL_OK;
    if (first < 0 || n < 0 || first > c->tokens || n > c->tokens - first) {
        CPL_FAIL(CPL_INPUT, "%s: %lld tokens from position %lld asked for, the corpus has %lld", c->shard[0].path, (long long)n,
                 (long long)first, (long long)c->tokens);
    }
    for (size_t i = n > 0 ? file_of(c, first) : 0; n > 0; i++) {
        int64_t inside = first - c->start[i], part = c->shard[i].tokens - inside;
        part = part < n ? part : n;
        CPL_TRY(cpl_shard_read(&c->shard[i], inside, part, c->vocab, out));
        first += part;
        n -= part;
        out += part;
    }
done:
    return st;
}

static cpl_status hash_file(const cpl_shard *s, unsigned char *block, cpl_sha256 *hash) {
    cpl_status st = CPL_OK;
    struct stat info;
    int64_t at = 0;
    int fd = open(s->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &info) != 0) {
        CPL_FAIL(CPL_IO, "%s: cannot open: %s", s->path, strerror(errno));
    }
    if (info.st_dev != s->device || info.st_ino != s->inode || info.st_size != s->bytes) {
        CPL_FAIL(CPL_DAMAGED, "%s: was changed while in use: has %lld bytes, expected the file of %lld that was opened", s->path,
                 (long long)info.st_size, (long long)s->bytes);
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL); /* advice: its failure changes no result */
    while (at < s->bytes) {
        int64_t left = s->bytes - at;
        ssize_t got = pread(fd, block, left < HASH_BLOCK ? (size_t)left : HASH_BLOCK, (off_t)at);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            CPL_FAIL(CPL_IO, "%s: cannot read at byte %lld of %lld: %s", s->path, (long long)at, (long long)s->bytes,
                     got == 0 ? "the file ends there" : strerror(errno));
        }
        cpl_sha256_add(hash, block, (size_t)got);
        at += got;
    }
done:
    if (fd >= 0) {
        close(fd);
    }
    return st;
}

cpl_status cpl_corpus_sha256(const cpl_corpus *c, char hex[CPL_SHA256_HEX]) {
    cpl_status st = CPL_OK;
    unsigned char *block = NULL;
    cpl_sha256 hash;
    cpl_sha256_init(&hash);
    CPL_TRY(cpl_alloc(&block, HASH_BLOCK, 1, "hashing a corpus"));
    for (size_t i = 0; i < c->shards; i++) {
        CPL_TRY(hash_file(&c->shard[i], block, &hash));
    }
    cpl_sha256_end(&hash, hex);
done:
    cpl_free(&block);
    return st;
}

static cpl_split make_split(const cpl_corpus *c, int64_t begin, int64_t end, int64_t T) {
    int64_t windows = end - begin > 0 && T > 0 ? (end - begin - 1) / T : 0;
    return (cpl_split){.corpus = c, .begin = begin, .end = end, .T = T, .windows = windows};
}

void cpl_corpus_split(const cpl_corpus *c, double held_out, int64_t T, cpl_split *train, cpl_split *val) {
    double fraction = held_out > 0.0 ? (held_out < 1.0 ? held_out : 1.0) : 0.0; /* NaN: none */
    int64_t held = fraction < 1.0 ? (int64_t)floor(fraction * (double)c->tokens) : c->tokens;
    held = held < c->tokens ? held : c->tokens;
    *train = make_split(c, 0, c->tokens - held, T);
    *val = make_split(c, c->tokens - held, c->tokens, T);
}

cpl_status cpl_split_check(const cpl_split *s, int64_t sequences, const char *what) {
    cpl_status st = CPL_OK;
    int64_t needed = 0;
    if (s->T < 1 || sequences < 1 || !cpl_mul_i64(sequences, s->T, &needed) || !cpl_add_i64(needed, 1, &needed)) {
        CPL_FAIL(CPL_INPUT, "%s: a global batch of %lld sequences of %lld tokens, expected at least one of each and less than 2^63",
                 what, (long long)sequences, (long long)s->T);
    }
    int64_t there = s->end - s->begin;
    if (there < needed) {
        CPL_FAIL(CPL_INPUT, "%s has %lld tokens, a global batch of %lld sequences of %lld needs %lld: %lld tokens are missing",
                 what, (long long)there, (long long)sequences, (long long)s->T, (long long)needed, (long long)(needed - there));
    }
done:
    return st;
}

cpl_status cpl_split_window(const cpl_split *s, int64_t w, int32_t *tokens, int32_t *targets) {
    cpl_status st = CPL_OK;
    if (w < 0 || w >= s->windows) {
        CPL_FAIL(CPL_INPUT, "%s: window %lld of %lld tokens asked for, this part of the corpus has %lld", s->corpus->shard[0].path,
                 (long long)w, (long long)s->T, (long long)s->windows);
    }
    int64_t first = s->begin + w * s->T; /* below end, as w < windows */
    CPL_TRY(cpl_corpus_read(s->corpus, first, s->T, tokens));
    memcpy(targets, tokens + 1, (size_t)(s->T - 1) * sizeof *targets);
    CPL_TRY(cpl_corpus_read(s->corpus, first + s->T, 1, targets + s->T - 1));
done:
    return st;
}

/* Over 2^32 epochs the order repeats: the epoch is Philox's 32-bit step. */
cpl_status cpl_split_sample(const cpl_split *s, uint64_t seed, uint64_t i, int32_t *tokens, int32_t *targets) {
    cpl_status st = CPL_OK;
    if (s->windows < 1) {
        CPL_FAIL(CPL_INPUT, "%s: this part of the corpus has %lld tokens, a sequence of %lld needs %lld", s->corpus->shard[0].path,
                 (long long)(s->end - s->begin), (long long)s->T, (long long)s->T + 1);
    }
    uint64_t windows = (uint64_t)s->windows;
    uint64_t w = cpl_rng_permute(seed, CPL_RNG_DATA, (uint32_t)(i / windows), windows, i % windows);
    CPL_TRY(cpl_split_window(s, (int64_t)w, tokens, targets));
done:
    return st;
}

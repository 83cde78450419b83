/* Opening and reading one file of a corpus: text, llm.c and nanoGPT shards through a mapping, HDF5 through shard_h5.c.
 * Refuses files whose sizes do not add up, and to touch a mapping whose file was cut meanwhile (that would end the process). */
#include "io/shard.h"
#include "io/base/arena.h"
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

const char *cpl_shard_other_magic(uint32_t word) {
    static const struct {
        uint32_t magic;
        const char *kind;
    } known[] = {{20240326, "an llm.c model"},
                 {20240327, "an llm.c optimizer state"},
                 {20240328, "an llm.c tokenizer"},
                 {20240522, "an llm.c HellaSwag set"},
                 {20240801, "an llm.c uint32 token shard"},
                 {0x88D83401, "a big-endian llm.c token shard"}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].magic == word) {
            return known[i].kind;
        }
    }
    return NULL;
}

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n > m && strcmp(text + n - m, end) == 0;
}

/* Up to `size` bytes from the start of the file; *got says how many are there. */
static cpl_status read_start(int fd, const char *path, void *out, size_t size, size_t *got) {
    cpl_status st = CPL_OK;
    *got = 0;
    while (*got < size) {
        ssize_t n = pread(fd, (char *)out + *got, size - *got, (off_t)*got);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            CPL_FAIL(CPL_IO, "%s: cannot read at byte %zu: %s", path, *got, strerror(errno));
        }
        if (n == 0) {
            break;
        }
        *got += (size_t)n;
    }
done:
    return st;
}

static cpl_status check_llmc(cpl_shard *s, const uint32_t *header, size_t got) {
    cpl_status st = CPL_OK;
    if (got < CPL_LLMC_HEADER) {
        CPL_FAIL(CPL_DAMAGED, "%s: header of an llm.c shard is cut off at byte %zu, expected %d bytes", s->path, got,
                 CPL_LLMC_HEADER);
    }
    int32_t version = (int32_t)le32toh(header[1]), count = (int32_t)le32toh(header[2]);
    if (version != CPL_LLMC_VERSION) {
        CPL_FAIL(CPL_INPUT, "%s: llm.c shard of version %d at byte 4, expected version %d (uint16 tokens)", s->path, version,
                 CPL_LLMC_VERSION);
    }
    int64_t body = s->bytes - CPL_LLMC_HEADER;
    if (count < 0 || body != 2 * (int64_t)count) {
        CPL_FAIL(CPL_DAMAGED, "%s: header says %d tokens (byte 8), %lld%s are there: expected %lld bytes, the file has %lld",
                 s->path, count, (long long)(body / 2), body % 2 != 0 ? " and a half" : "",
                 (long long)(CPL_LLMC_HEADER + 2 * (int64_t)count), (long long)s->bytes);
    }
    s->format = CPL_SHARD_LLMC;
    s->data = CPL_LLMC_HEADER;
    s->tokens = count;
done:
    return st;
}

static cpl_status check_bin(cpl_shard *s, int fd) {
    cpl_status st = CPL_OK;
    uint32_t header[CPL_LLMC_HEADER / 4] = {0};
    size_t got = 0;
    CPL_TRY(read_start(fd, s->path, header, sizeof header, &got));
    s->vocab = CPL_SHARD_U16_VOCAB;
    uint32_t magic = got >= 4 ? le32toh(header[0]) : 0;
    if (magic == CPL_LLMC_MAGIC) {
        st = check_llmc(s, header, got);
        goto done;
    }
    if (cpl_shard_other_magic(magic) != NULL) {
        CPL_FAIL(CPL_INPUT, "%s: is %s (magic %u at byte 0), expected a uint16 token shard (magic %d, or none)", s->path,
                 cpl_shard_other_magic(magic), magic, CPL_LLMC_MAGIC);
    }
    if (s->bytes % 2 != 0) {
        CPL_FAIL(CPL_DAMAGED, "%s: %lld bytes are there, expected an even number (uint16 tokens)", s->path, (long long)s->bytes);
    }
    s->format = CPL_SHARD_NANOGPT;
    s->tokens = s->bytes / 2;
done:
    return st;
}

static cpl_status check_text(cpl_shard *s, int fd) {
    cpl_status st = CPL_OK;
    static const char hdf5[8] = "\211HDF\r\n\032\n";
    char start[8];
    size_t got = 0;
    CPL_TRY(read_start(fd, s->path, start, sizeof start, &got));
    if (got == sizeof start && memcmp(start, hdf5, sizeof start) == 0) {
        CPL_FAIL(CPL_INPUT, "%s: is an HDF5 file, expected text (a token shard in HDF5 is named *.h5)", s->path);
    }
    s->format = CPL_SHARD_TEXT;
    s->tokens = s->bytes;
    s->vocab = 256;
    strcpy(s->tokenizer, "bytes");
done:
    return st;
}

static cpl_status map_file(cpl_shard *s, int fd) {
    cpl_status st = CPL_OK;
    if ((uint64_t)s->bytes > SIZE_MAX) {
        CPL_FAIL(CPL_UNSUPPORTED, "%s: %lld bytes are more than this machine can address", s->path, (long long)s->bytes);
    }
    void *map = mmap(NULL, (size_t)s->bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        CPL_FAIL(CPL_IO, "%s: cannot map %lld bytes: %s", s->path, (long long)s->bytes, strerror(errno));
    }
    s->map = map;
done:
    return st;
}

static cpl_status open_regular(cpl_shard *s, int *fd) {
    cpl_status st = CPL_OK;
    struct stat info;
    *fd = open(s->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a FIFO would block here without O_NONBLOCK */
    if (*fd < 0 && (errno == ENOENT || errno == ENOTDIR)) {
        CPL_FAIL(CPL_NOT_FOUND, "%s: no such file", s->path);
    }
    if (*fd < 0 || fstat(*fd, &info) != 0) {
        CPL_FAIL(CPL_IO, "%s: cannot open: %s", s->path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        CPL_FAIL(CPL_INPUT, "%s: is %s, expected a file of text or tokens", s->path,
                 S_ISDIR(info.st_mode) ? "a folder" : "a device or a pipe");
    }
    if (info.st_size == 0) {
        CPL_FAIL(CPL_INPUT, "%s: is empty, expected at least one token", s->path);
    }
    s->device = info.st_dev;
    s->inode = info.st_ino;
    s->bytes = info.st_size;
done:
    return st;
}

cpl_status cpl_shard_open(cpl_shard *s, const char *path, size_t cache) {
    cpl_status st = CPL_OK;
    int fd = -1;
    *s = (cpl_shard){.tokenizer = "shards"};
    size_t length = strlen(path) + 1;
    CPL_TRY(cpl_alloc(&s->path, length, 1, "the name of a corpus file"));
    memcpy(s->path, path, length);
    CPL_TRY(open_regular(s, &fd));
    if (ends_with(path, ".h5")) {
        s->format = CPL_SHARD_HDF5;
        CPL_TRY(cpl_shard_h5_open(&s->h5, path, cache, &s->tokens, &s->vocab, s->tokenizer));
    } else {
        CPL_TRY(ends_with(path, ".bin") ? check_bin(s, fd) : check_text(s, fd));
        CPL_TRY(map_file(s, fd));
    }
    if (s->tokens == 0) {
        CPL_FAIL(CPL_INPUT, "%s: holds no tokens, expected at least one", path);
    }
done:
    if (fd >= 0) {
        close(fd);
    }
    if (st != CPL_OK) {
        cpl_shard_close(s);
    }
    return st;
}

void cpl_shard_close(cpl_shard *s) {
    if (s->map != NULL) {
        munmap((void *)(uintptr_t)s->map, (size_t)s->bytes);
        s->map = NULL;
    }
    cpl_shard_h5_close(&s->h5);
    cpl_free(&s->path);
}

/* A mapped page beyond the end of a file that was cut raises SIGBUS, and HDF5 reads zeros there. A file of that name that is
 * another one (replaced by rename) or gone does not matter: the mapping keeps the old one. */
static cpl_status check_not_cut(const cpl_shard *s) {
    cpl_status st = CPL_OK;
    struct stat info;
    if (stat(s->path, &info) == 0 && info.st_dev == s->device && info.st_ino == s->inode && info.st_size < s->bytes) {
        CPL_FAIL(CPL_DAMAGED, "%s: was cut to %lld bytes while in use, expected %lld", s->path, (long long)info.st_size,
                 (long long)s->bytes);
    }
done:
    return st;
}

static cpl_status check_vocab(const cpl_shard *s, int64_t first, int64_t n, int64_t vocab, const int32_t *tokens) {
    cpl_status st = CPL_OK;
    const uint32_t limit = (uint32_t)(vocab < s->vocab ? vocab : s->vocab);
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t token = (uint32_t)tokens[i];
        largest = token > largest ? token : largest;
    }
    for (int64_t i = 0; largest >= limit && i < n; i++) {
        if ((uint32_t)tokens[i] >= limit) {
            CPL_FAIL(CPL_INPUT, "%s: token %u at position %lld is outside the vocabulary, expected 0 to %u", s->path,
                     (uint32_t)tokens[i], (long long)(first + i), limit - 1);
        }
    }
done:
    return st;
}

cpl_status cpl_shard_read(const cpl_shard *s, int64_t first, int64_t n, int64_t vocab, int32_t *out) {
    cpl_status st = CPL_OK;
    CPL_TRY(check_not_cut(s));
    if (s->format == CPL_SHARD_HDF5) {
        CPL_TRY(cpl_shard_h5_read(s->h5, s->path, first, n, out));
    } else if (s->format == CPL_SHARD_TEXT) {
        const unsigned char *in = s->map + first;
        for (int64_t i = 0; i < n; i++) {
            out[i] = in[i];
        }
    } else {
        const uint16_t *in = (const uint16_t *)(const void *)(s->map + s->data) + first; /* a page's start + 0 or 1024: aligned */
        for (int64_t i = 0; i < n; i++) {
            out[i] = le16toh(in[i]);
        }
    }
    CPL_TRY(check_vocab(s, first, n, vocab, out));
done:
    return st;
}

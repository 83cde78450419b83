/* One file of a corpus: its format, how many tokens it holds, and any run of them as int32.
 * Refuses to read a file whole, and tokens outside the vocabulary. Private to io. */
#ifndef CPL_IO_SHARD_H
#define CPL_IO_SHARD_H

#include "io/corpus.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef enum { CPL_SHARD_TEXT, CPL_SHARD_LLMC, CPL_SHARD_NANOGPT, CPL_SHARD_HDF5 } cpl_shard_format;

/* llm.c, dev/data/data_common.py: int32[256] little-endian, of which the first three count, then uint16 tokens. */
enum { CPL_LLMC_MAGIC = 20240520, CPL_LLMC_VERSION = 1, CPL_LLMC_HEADER = 1024 };
/* Our own shard: root attributes format, version, vocab, tokenizer; 1-D data set "tokens", u16 or u32. */
#define CPL_SHARD_H5_FORMAT  "cupel-tokens"
#define CPL_SHARD_H5_DATASET "tokens"
enum { CPL_SHARD_H5_VERSION = 1, CPL_SHARD_H5_CHUNK = 16384 /* tokens */, CPL_SHARD_TOKENIZER = 64 /* bytes, with the final 0 */ };
enum { CPL_SHARD_U16_VOCAB = 65536 };

typedef struct cpl_shard_h5 cpl_shard_h5;

typedef struct {
    char *path; /* owned */
    cpl_shard_format format;
    int64_t tokens;
    int64_t vocab; /* what the file itself allows: 256 for text, 65536 for u16, its attribute for HDF5 */
    char tokenizer[CPL_SHARD_TOKENIZER];
    dev_t device; /* device, inode, bytes: the file as it was when opened */
    ino_t inode;
    int64_t bytes;
    int64_t data;             /* byte of the first token; 0 for HDF5 */
    const unsigned char *map; /* owned, `bytes` long; NULL for HDF5 */
    cpl_shard_h5 *h5;         /* owned; NULL unless HDF5 */
} cpl_shard;

/* cache: bytes of HDF5 chunk cache that this file may take. No file descriptor stays open but that of HDF5.
 * Errors: CPL_NOT_FOUND; CPL_INPUT (a folder, an empty file, another kind of file); CPL_DAMAGED (sizes that do not add up). */
cpl_status cpl_shard_open(cpl_shard *s, const char *path, size_t cache);
void cpl_shard_close(cpl_shard *s);
/* Tokens [first, first + n) of this file into out [n]; the caller keeps them within the file. Tokens must be below vocab and below
 * s->vocab. Errors: CPL_INPUT with file and position of the first token that is not; CPL_DAMAGED where the file was cut or its
 * checksum fails. */
cpl_status cpl_shard_read(const cpl_shard *s, int64_t first, int64_t n, int64_t vocab, int32_t *out);
/* What a cpl_corpus is; corpus_write.c looks at the files too. */
struct cpl_corpus {
    size_t shards;
    cpl_shard *shard; /* owned, [shards] */
    int64_t *start;   /* owned, [shards + 1]: token of the row at which each file begins; the last is `tokens` */
    int64_t tokens, vocab;
};
/* NULL, or what kind of llm.c file other than a u16 token shard begins with this word. */
const char *cpl_shard_other_magic(uint32_t word);

/* tokens, vocab, tokenizer: as the file says. */
cpl_status cpl_shard_h5_open(cpl_shard_h5 **out, const char *path, size_t cache, int64_t *tokens, int64_t *vocab,
                             char tokenizer[CPL_SHARD_TOKENIZER]);
void cpl_shard_h5_close(cpl_shard_h5 **h);
cpl_status cpl_shard_h5_read(const cpl_shard_h5 *h, const char *path, int64_t first, int64_t n, int32_t *out);
/* Writing: create, then append until `tokens` are there, then finish, which closes and reports what closing found; drop gives up,
 * also NULL. path must live as long as the writer. */
typedef struct cpl_shard_h5_writer cpl_shard_h5_writer;
cpl_status cpl_shard_h5_create(cpl_shard_h5_writer **out, const char *path, int64_t tokens, int64_t vocab, const char *tokenizer);
cpl_status cpl_shard_h5_append(cpl_shard_h5_writer *w, const int32_t *tokens, int64_t n);
cpl_status cpl_shard_h5_finish(cpl_shard_h5_writer **w);
void cpl_shard_h5_drop(cpl_shard_h5_writer **w);

#endif

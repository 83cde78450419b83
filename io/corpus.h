/* Corpora: text files and token shards, mapped and never read whole, as one row of tokens; samples are functions of (seed, index).
 * Refuses sizes that do not add up, tokens outside the vocabulary, and to keep any position: resuming needs the step alone. */
#ifndef CPL_IO_CORPUS_H
#define CPL_IO_CORPUS_H

#include "io/base/arena.h"
#include "io/base/hash.h"
#include <stdint.h>

/* How a file's format is told: *.h5 our own shard (root attributes format "cupel-tokens", version 1, vocab, tokenizer; data set
 * "tokens", u16 or u32, 1-D); *.bin with llm.c's header (int32[256], 20240520, 1, count) llm.c, else nanoGPT's raw u16; everything
 * else text, a token a byte. A corpus that holds HDF5 shards is read from one thread at a time: HDF5 is not thread-safe. A mapped
 * file must not be overwritten in place while it is in use; replacing it by rename is harmless. */
typedef struct cpl_corpus cpl_corpus;

/* paths: n files, one after another in this order. vocab: tokens must be below it; 0: 256 for text, else what the files allow: the
 * largest of the HDF5 shards' attribute "vocab" and of 65536 for *.bin. Text and token shards may not be mixed, nor shards of
 * different tokenizers. No token is read here: those outside the vocabulary are found when they are fetched. Errors: CPL_NOT_FOUND;
 * CPL_DAMAGED "file: header says 10 tokens, 8 are there" and the like; CPL_INPUT. */
cpl_status cpl_corpus_open(cpl_corpus **out, const char *const *paths, size_t n, int64_t vocab);
void cpl_corpus_close(cpl_corpus **c);
int64_t cpl_corpus_tokens(const cpl_corpus *c);
int64_t cpl_corpus_vocab(const cpl_corpus *c);
const char *cpl_corpus_tokenizer(const cpl_corpus *c); /* "bytes" (text, or HDF5 shards made from text) or "shards" */
/* SHA-256 over the bytes of all files, in order: of one file, what sha256sum prints. Rank 0 alone should call it: it reads
 * everything. Errors: CPL_IO; CPL_DAMAGED where a file was changed since it was opened. */
cpl_status cpl_corpus_sha256(const cpl_corpus *c, char hex[CPL_SHA256_HEX]);
/* Tokens [first, first + n) into out [n]. Errors: CPL_INPUT (outside the corpus, or a token outside the vocabulary), CPL_DAMAGED.
 */
cpl_status cpl_corpus_read(const cpl_corpus *c, int64_t first, int64_t n, int32_t *out);

/* A part of a corpus, cut into windows of T+1 tokens that start every T tokens: window w is tokens [begin + wT, begin + wT + T]. */
typedef struct {
    const cpl_corpus *corpus; /* borrowed */
    int64_t begin, end;       /* tokens */
    int64_t T;
    int64_t windows; /* (end - begin - 1) / T, at least 0 */
} cpl_split;
/* The last floor(fraction * tokens) tokens of the corpus are held out. */
void cpl_corpus_split(const cpl_corpus *c, double held_out, int64_t T, cpl_split *train, cpl_split *val);
/* CPL_INPUT "... has 900 tokens, a global batch of 8 sequences of 256 needs 2049: 1149 tokens are missing" where windows <
 * sequences. */
cpl_status cpl_split_check(const cpl_split *s, int64_t sequences, const char *what);
/* Training order: global sample i of the run is window permute(seed, epoch = i / windows, i % windows). Fills tokens [T] and
 * targets [T]. Errors: CPL_INPUT naming file and position of a token outside the vocabulary. */
cpl_status cpl_split_sample(const cpl_split *s, uint64_t seed, uint64_t i, int32_t *tokens, int32_t *targets);
/* Window w in file order, for evaluation. */
cpl_status cpl_split_window(const cpl_split *s, int64_t w, int32_t *tokens, int32_t *targets);

/* Writes the tokens of `c` as shards PREFIX_000000.h5 (.bin), PREFIX_000001.h5 ...: format "h5", "llmc" or "nanogpt", at most
 * shard_tokens each (0: as many as the format can hold); each is written beside, synced and renamed. *shards: how many there are
 * (may be NULL). Errors: CPL_USAGE (format, shard_tokens, over 10^6 shards); CPL_INPUT where the format cannot hold the vocabulary
 * (u16), a shard would replace a file of `c`, or a shard of an earlier run lies behind the last one; CPL_IO (disk full and the
 * like: older files stay). */
cpl_status cpl_corpus_write(const cpl_corpus *c, const char *prefix, const char *format, int64_t shard_tokens, int64_t *shards);

#endif

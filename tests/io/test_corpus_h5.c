/* HDF5 token shards that are not what they should be: forged ones whose checksums hold, damaged ones, and random damage to every
 * format. Refuses to let HDF5's own checks hide ours: a forged object header is sealed again with its checksum. */
#include "tests/io/corpus_rig.h"

enum { N = 40000 };  /* three chunks */
enum { PIECES = 3 }; /* of object headers: two of the root, one of tokens */

static int32_t source[N];

/* HDF5 1.10 loses the object header whose second piece does not hold (H5O_protect). Only asked for under the leak sanitizer. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void) {
    return "leak:libhdf5";
}

static int setup(void **state) {
    for (int i = 0; i < N; i++) {
        uint32_t word[4];
        cpl_rng_block(2, CPL_RNG_TEST, 0, (uint64_t)i, word);
        source[i] = (int32_t)(word[0] % 50257);
    }
    return rig_enter(state);
}

static uint32_t rotate(uint32_t x, int k) {
    return x << k | x >> (32 - k);
}

/* Bob Jenkins' lookup3 hashlittle with initial value 0, the checksum of HDF5's metadata. Source: burtleburtle.net/bob/c/lookup3.c.
 */
static uint32_t lookup3(const unsigned char *key, size_t n) {
    uint32_t s[3] = {0xdeadbeef + (uint32_t)n, 0xdeadbeef + (uint32_t)n, 0xdeadbeef + (uint32_t)n};
    static const int mix[6] = {4, 6, 8, 16, 19, 4}, last[7] = {14, 11, 25, 16, 4, 14, 24};
    if (n == 0) {
        return s[2];
    }
    for (;;) {
        for (size_t i = 0; i < 12 && i < n; i++) {
            s[i / 4] += (uint32_t)key[i] << 8 * (i % 4);
        }
        if (n <= 12) {
            break;
        }
        key += 12;
        n -= 12;
        for (int r = 0; r < 6; r++) { /* a -= c; a ^= rot(c); c += b, then the same with the three names turned */
            uint32_t *a = &s[r % 3], *b = &s[(r + 1) % 3], *c = &s[(r + 2) % 3];
            *a = (*a - *c) ^ rotate(*c, mix[r]);
            *c += *b;
        }
    }
    for (int r = 0; r < 7; r++) { /* c ^= b; c -= rot(b) */
        uint32_t *c = &s[(2 + r) % 3], *b = &s[(1 + r) % 3];
        *c = (*c ^ *b) - rotate(*b, last[r]);
    }
    return s[2];
}

/* Position of `what` after `from`. */
static size_t find(const unsigned char *file, size_t bytes, size_t from, const void *what, size_t n) {
    const unsigned char *at = memmem(file + from, bytes - from, what, n);
    assert_non_null(at);
    return (size_t)(at - file);
}

static uint64_t little_endian(const unsigned char *at, unsigned width) {
    uint64_t value = 0;
    for (unsigned i = 0; i < width; i++) {
        value |= (uint64_t)at[i] << 8 * i;
    }
    return value;
}

/* End (the place of the checksum) of the piece of a version 2 object header that begins at `at`, or 0 if none does. First piece:
 * "OHDR", 2, flags, [16 bytes of times], [4 of phase change], size of the messages in 1 << (flags & 3) bytes, messages. Others:
 * "OCHK", messages; position and length, checksum included, stand in a message of the piece before. */
static size_t piece_end(const unsigned char *file, size_t bytes, size_t at) {
    if (memcmp(file + at, "OHDR\2", 5) == 0) {
        unsigned flags = file[at + 5], width = 1u << (flags & 3);
        size_t p = at + 6 + (flags & 0x20 ? 16 : 0) + (flags & 0x10 ? 4 : 0);
        return p + width + (size_t)little_endian(file + p, width);
    }
    if (memcmp(file + at, "OCHK", 4) == 0) {
        uint64_t position = at; /* little-endian machines, as everywhere here */
        return at + (size_t)little_endian(file + find(file, bytes, 0, &position, 8) + 8, 8) - 4;
    }
    return 0;
}

/* Computes the checksums of all pieces of object headers again. Returns how many there are; -1 where one was wrong and had to be
 * right. */
static int seal(unsigned char *file, size_t bytes, bool expect_right) {
    int pieces = 0;
    for (size_t at = 0; at + 64 < bytes; at++) {
        size_t end = piece_end(file, bytes, at);
        if (end == 0) {
            continue;
        }
        assert_true(end + 4 <= bytes);
        uint32_t sum = lookup3(file + at, end - at);
        if (expect_right && memcmp(file + end, &sum, 4) != 0) {
            return -1;
        }
        memcpy(file + end, &sum, 4);
        pieces++;
    }
    return pieces;
}

/* A good shard "good.h5" and its bytes; free them. */
static unsigned char *good_shard(size_t *bytes) {
    rig_write_h5("good.h5", source, N, 50257, "shards");
    unsigned char *file = rig_read("good.h5", bytes);
    assert_int_equal(seal(file, *bytes, true), PIECES); /* and so lookup3 above is HDF5's */
    return file;
}

static void expect_forged(unsigned char *file, size_t bytes, cpl_status st, const char *message) {
    assert_int_equal(seal(file, bytes, false), PIECES);
    rig_write("f.h5", file, bytes);
    assert_fails_like(rig_try("f.h5", 0), st, message);
    free(file);
}

static void test_own_shard_is_read(void **state) {
    cpl_corpus *c = NULL;
    rig_write_h5("good.h5", source, N, 50257, "gpt2");
    assert_ok(rig_open(&c, "good.h5", 0));
    assert_int_equal(cpl_corpus_vocab(c), 50257);
    assert_string_equal(cpl_corpus_tokenizer(c), "shards");
    rig_expect(c, source, N);
    cpl_corpus_close(&c);
    assert_ok(rig_open(&c, "good.h5", 100000)); /* the shard's own bound still holds, a smaller one of the caller too */
    assert_int_equal(cpl_corpus_vocab(c), 100000);
    cpl_corpus_close(&c);
    rig_write_h5("small.h5", (int32_t[]){7, 8, 9}, 3, 9, "shards");
    assert_ok(rig_open(&c, "small.h5", 100));
    int32_t tokens[3];
    assert_fails(cpl_corpus_read(c, 0, 3, tokens), CPL_INPUT,
                 "small.h5: token 9 at position 2 is outside the vocabulary, expected 0 to 8");
    cpl_corpus_close(&c);
}

static void test_tokens_of_32_bits_are_named_as_they_stand(void **state) {
    cpl_corpus *c = NULL;
    int32_t tokens[4];
    const int32_t wide[] = {0, 70000, INT32_MAX - 1, INT32_MAX};
    rig_write_h5("wide.h5", wide, 4, INT32_MAX, "shards");
    assert_ok(rig_open(&c, "wide.h5", 0));
    assert_ok(cpl_corpus_read(c, 0, 3, tokens));
    assert_memory_equal(tokens, wide, 3 * sizeof *wide);
    assert_fails(cpl_corpus_read(c, 0, 4, tokens), CPL_INPUT,
                 "wide.h5: token 2147483647 at position 3 is outside the vocabulary, expected 0 to 2147483646");
    cpl_corpus_close(&c);
}

static void test_wrong_attributes_are_named(void **state) {
    size_t bytes = 0;
    unsigned char *f = good_shard(&bytes);
    memcpy(f + find(f, bytes, 0, "cupel-tokens", 12), "cupel-tokenz", 12);
    expect_forged(f, bytes, CPL_INPUT, "f.h5: attribute \"format\" is \"cupel-tokenz\", expected \"cupel-tokens\"");
    f = good_shard(&bytes);
    size_t at =
        find(f, bytes, find(f, bytes, 0, "version", 8), "\1\0\0\0\0\0\0\0", 8); /* the value: its type and space have no such run */
    f[at] = 2;
    expect_forged(f, bytes, CPL_INPUT, "f.h5: attribute \"version\" is 2, expected 1");
    const char *names[] = {"format", "version", "vocab", "tokenizer"};
    for (int i = 0; i < 4; i++) {
        char message[200];
        f = good_shard(&bytes);
        f[find(f, bytes, 0, names[i], strlen(names[i]) + 1)] = 'X';
        snprintf(message, sizeof message,
                 "f.h5: attribute \"%s\" of the root is missing, expected format, version, vocab and tokenizer", names[i]);
        expect_forged(f, bytes, CPL_DAMAGED, message);
    }
    const int64_t vocabs[] = {0, -1, (int64_t)INT32_MAX + 1, INT64_MIN};
    for (int i = 0; i < 4; i++) {
        char message[200];
        rig_write_h5("v.h5", source, 4, vocabs[i], "shards");
        snprintf(message, sizeof message, "v.h5: attribute \"vocab\" is %lld, expected 1 to 2147483647", (long long)vocabs[i]);
        assert_fails(rig_try("v.h5", 0), CPL_DAMAGED, message);
    }
    char long_name[65];
    memset(long_name, 'x', 64);
    long_name[64] = 0;
    rig_write_h5("t.h5", source, 4, 50257, long_name);
    assert_fails(rig_try("t.h5", 0), CPL_DAMAGED, "t.h5: attribute \"tokenizer\" has 64 bytes, expected 1 to 63");
    rig_write_h5("t.h5", source, 4, 50257, long_name + 1);
    assert_ok(rig_try("t.h5", 0));
}

static void test_wrong_data_set_is_named(void **state) {
    size_t bytes = 0;
    unsigned char *f = good_shard(&bytes);
    f[find(f, bytes, find(f, bytes, 0, "OCHK", 4), "tokens", 6)] = 'T'; /* the name of the link */
    expect_forged(f, bytes, CPL_DAMAGED, "f.h5: data set tokens is missing");
    f = good_shard(&bytes);
    size_t type = find(f, bytes, 0, "\x10\0\0\0\2\0\0\0", 8);
    f[type + 1] |= 8; /* signed: HDF5 file format, datatype message, class 0 */
    expect_forged(f, bytes, CPL_INPUT, "f.h5: data set tokens is of another type, expected unsigned integers of 16 or 32 bits");
    cpl_shard_h5_writer *w = NULL;
    assert_ok(cpl_shard_h5_create(&w, "part.h5", N, 50257, "shards"));
    assert_ok(cpl_shard_h5_append(w, source, 20000));
    assert_fails_like(cpl_shard_h5_append(w, source, 20001), CPL_INTERNAL,
                      "part.h5: 20001 tokens after 20000, expected 40000 in all");
    assert_fails_like(cpl_shard_h5_finish(&w), CPL_INTERNAL, "part.h5: 20000 tokens were written, expected 40000");
    assert_fails(rig_try("part.h5", 0), CPL_DAMAGED, "part.h5: data set tokens says 40000 tokens in 3 chunks, 2 chunks are there");
}

static void test_damaged_hdf5_is_an_error(void **state) {
    cpl_corpus *c = NULL;
    size_t bytes = 0;
    int32_t tokens[16];
    unsigned char *f = good_shard(&bytes);
    f[find(f, bytes, 0, "cupel-tokens", 12)] ^= 1; /* not sealed */
    rig_write("d.h5", f, bytes);
    assert_int_equal(rig_try("d.h5", 0), CPL_DAMAGED);
    assert_non_null(strstr(cpl_status_message(), "d.h5: "));
    free(f);
    f = good_shard(&bytes);
    uint16_t start[8];
    for (int i = 0; i < 8; i++) {
        start[i] = (uint16_t)source[CPL_SHARD_H5_CHUNK + i];
    }
    f[find(f, bytes, 0, start, sizeof start) + 1000] ^= 16; /* token 500 of the second chunk */
    rig_write("d.h5", f, bytes);
    assert_ok(rig_open(&c, "d.h5", 0));
    assert_ok(cpl_corpus_read(c, CPL_SHARD_H5_CHUNK - 16, 16, tokens));
    assert_fails_like(cpl_corpus_read(c, CPL_SHARD_H5_CHUNK - 15, 16, tokens), CPL_DAMAGED,
                      "d.h5: cannot read tokens 16369 to 16384: ");
    assert_true(strstr(cpl_status_message(), "Fletcher32") != NULL || /* HDF5 1.14 keeps to itself which filter it was */
                strstr(cpl_status_message(), "filter returned failure") != NULL);
    assert_ok(cpl_corpus_read(c, N - 16, 16, tokens));
    cpl_corpus_close(&c);
    for (size_t left = bytes - 1; left > 0; left = left * 2 / 3) {
        rig_write("d.h5", f, left);
        assert_fails_like(rig_try("d.h5", 0), CPL_DAMAGED, "d.h5: expected a whole HDF5 file: ");
    }
    rig_write_text("d.h5", "no HDF5 at all, by its name only");
    assert_fails_like(rig_try("d.h5", 0), CPL_DAMAGED, "d.h5: expected a whole HDF5 file: ");
    free(f);
}

static void test_shards_of_different_tokenizers_do_not_mix(void **state) {
    cpl_corpus *c = NULL;
    rig_write_h5("a.h5", source, 4, 50257, "gpt2");
    rig_write_h5("b.h5", source, 4, 50257, "llama");
    assert_fails(cpl_corpus_open(&c, (const char *[]){"a.h5", "b.h5"}, 2, 0), CPL_INPUT,
                 "b.h5: tokens are of the tokenizer \"llama\", expected \"gpt2\" as in a.h5");
    rig_write_h5("b.h5", source, 4, 50300, "gpt2");
    assert_ok(cpl_corpus_open(&c, (const char *[]){"a.h5", "b.h5"}, 2, 0));
    assert_int_equal(cpl_corpus_vocab(c), 50300);
    cpl_corpus_close(&c);
}

/* Reads everything that opens. 1: the tokens are `expected`, 0: others, -1: an error with a message of one line that names the
 * file. */
static int read_all(const char *path, const int32_t *expected, int64_t n) {
    static int32_t tokens[2 * N + 2000]; /* of a shard whose llm.c header is gone */
    cpl_corpus *c = NULL;
    cpl_status st = rig_open(&c, path, 0);
    int64_t there = st == CPL_OK ? cpl_corpus_tokens(c) : 0;
    if (st == CPL_OK) {
        assert_true(there <= (int64_t)(sizeof tokens / sizeof *tokens));
        st = cpl_corpus_read(c, 0, there, tokens);
    }
    cpl_corpus_close(&c);
    if (st != CPL_OK) {
        assert_int_equal(strncmp(cpl_status_message(), path, strlen(path)), 0);
        assert_null(strchr(cpl_status_message(), '\n'));
        return -1;
    }
    return there == n && memcmp(tokens, expected, (size_t)n * sizeof *tokens) == 0;
}

static void test_random_damage_is_an_error_or_harmless_in_hdf5_and_never_a_crash(void **state) {
    enum { ROUNDS = 250 };
    cpl_corpus *c = NULL;
    const char *names[] = {"good.h5", "l_000000.bin", "n_000000.bin"}, *damaged[] = {"m.h5", "ml.bin", "mn.bin"};
    rig_write_h5("good.h5", source, N, 50257, "shards");
    assert_ok(rig_open(&c, "good.h5", 0));
    assert_ok(cpl_corpus_write(c, "l", "llmc", 0, NULL));
    assert_ok(cpl_corpus_write(c, "n", "nanogpt", 0, NULL));
    cpl_corpus_close(&c);
    for (int k = 0; k < 3; k++) {
        size_t bytes = 0;
        int errors = 0;
        unsigned char *whole = rig_read(names[k], &bytes), *copy = malloc(bytes);
        assert_non_null(copy);
        for (uint32_t round = 0; round < ROUNDS; round++) {
            uint32_t word[4];
            cpl_rng_block(3, CPL_RNG_TEST, round, (uint64_t)k, word);
            memcpy(copy, whole, bytes);
            size_t left = word[0] % 4 == 0 ? 1 + word[1] % bytes : bytes,
                   region = word[2] % 3 == 0 ? left : 2048; /* headers more often */
            for (uint32_t hit = 0; hit < 1 + word[3] % 4; hit++) {
                uint32_t where[4];
                cpl_rng_block(4, CPL_RNG_TEST, round, (uint64_t)k * 8 + hit, where);
                copy[where[0] % (region < left ? region : left)] ^= (unsigned char)(1 + where[1] % 255);
            }
            rig_write(damaged[k], copy, left);
            int result = read_all(damaged[k], source, N);
            errors += result < 0;
            if (k == 0) {
                assert_int_not_equal(result, 0); /* checksums: never other tokens */
            }
        }
        assert_true(errors > ROUNDS / 16);
        free(whole);
        free(copy);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_own_shard_is_read),
        cmocka_unit_test(test_tokens_of_32_bits_are_named_as_they_stand),
        cmocka_unit_test(test_wrong_attributes_are_named),
        cmocka_unit_test(test_wrong_data_set_is_named),
        cmocka_unit_test(test_damaged_hdf5_is_an_error),
        cmocka_unit_test(test_shards_of_different_tokenizers_do_not_mix),
        cmocka_unit_test(test_random_damage_is_an_error_or_harmless_in_hdf5_and_never_a_crash),
    };
    return cmocka_run_group_tests_name("io/corpus_h5", tests, setup, rig_leave);
}

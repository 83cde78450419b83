/* Writing token shards: what is written reads back the same, and a failed write leaves what was there.
 * Refuses to trust the reader alone: the bytes of llm.c and nanoGPT shards are compared with their definition. */
#include "tests/io/corpus_rig.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>

enum { N = 40000 }; /* tokens: three chunks of an HDF5 shard */

/* A corpus of N tokens below vocab in one HDF5 shard "source.h5". */
static cpl_corpus *open_source(int32_t *tokens, int64_t vocab) {
    cpl_corpus *c = NULL;
    for (int i = 0; i < N; i++) {
        uint32_t word[4];
        cpl_rng_block(1, CPL_RNG_TEST, 0, (uint64_t)i, word);
        tokens[i] = (int32_t)(word[0] % (uint32_t)vocab);
    }
    rig_write_h5("source.h5", tokens, N, vocab, "shards");
    assert_ok(rig_open(&c, "source.h5", 0));
    return c;
}

/* Entries of the working folder whose name begins with prefix. */
static int entries(const char *prefix) {
    int n = 0;
    DIR *folder = opendir(".");
    assert_non_null(folder);
    for (struct dirent *e; (e = readdir(folder)) != NULL;) {
        n += strncmp(e->d_name, prefix, strlen(prefix)) == 0;
    }
    closedir(folder);
    return n;
}

static void remove_shards(const char *prefix, const char *end) {
    for (int i = 0; i < 64; i++) {
        char name[100];
        snprintf(name, sizeof name, "%s_%06d.%s", prefix, i, end);
        unlink(name);
    }
    assert_int_equal(entries(prefix), 0);
}

static void test_every_format_reads_back_the_same_tokens(void **state) {
    static int32_t tokens[N];
    const struct {
        const char *format, *end;
        int64_t shard_tokens, shards;
    } cases[] = {{"h5", "h5", 0, 1},           {"h5", "h5", 16384, 3},       {"h5", "h5", 16385, 3},
                 {"h5", "h5", 1000, 40},       {"llmc", "bin", 0, 1},        {"llmc", "bin", 7777, 6},
                 {"llmc", "bin", N, 1},        {"llmc", "bin", N - 1, 2},    {"nanogpt", "bin", 0, 1},
                 {"nanogpt", "bin", 20000, 2}, {"nanogpt", "bin", N + 1, 1}, {"h5", "h5", INT64_MAX, 1},
                 {"nanogpt", "bin", 9999, 5},  {"llmc", "bin", INT32_MAX, 1}};
    cpl_corpus *c = open_source(tokens, 50257), *again = NULL;
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        char names[64][32];
        const char *paths[64];
        int64_t shards = 0;
        assert_ok(cpl_corpus_write(c, "out", cases[k].format, cases[k].shard_tokens, &shards));
        assert_int_equal(shards, cases[k].shards);
        assert_int_equal(entries("out"), shards);
        for (int64_t i = 0; i < shards; i++) {
            snprintf(names[i], sizeof names[i], "out_%06lld.%s", (long long)i, cases[k].end);
            paths[i] = names[i];
        }
        assert_ok(cpl_corpus_open(&again, paths, (size_t)shards, 0));
        assert_int_equal(cpl_corpus_vocab(again), cases[k].end[0] == 'h' ? 50257 : 65536);
        assert_string_equal(cpl_corpus_tokenizer(again), "shards");
        rig_expect(again, tokens, N);
        cpl_corpus_close(&again);
        remove_shards("out", cases[k].end);
    }
    assert_ok(cpl_corpus_write(c, "out", "h5", 0, NULL));
    remove_shards("out", "h5");
    cpl_corpus_close(&c);
}

static void test_bytes_are_those_of_the_formats(void **state) {
    cpl_corpus *c = NULL;
    size_t bytes = 0;
    rig_write("abc.txt", "ab\377", 3);
    assert_ok(rig_open(&c, "abc.txt", 0));
    assert_ok(cpl_corpus_write(c, "raw", "nanogpt", 0, NULL));
    unsigned char *raw = rig_read("raw_000000.bin", &bytes);
    assert_int_equal(bytes, 6);
    assert_memory_equal(raw, "a\0b\0\377\0", 6);
    free(raw);
    assert_ok(cpl_corpus_write(c, "llmc", "llmc", 0, NULL));
    unsigned char *llmc = rig_read("llmc_000000.bin", &bytes), expected[CPL_LLMC_HEADER] = {0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 3};
    assert_int_equal(bytes, CPL_LLMC_HEADER + 6);
    assert_memory_equal(llmc, expected, CPL_LLMC_HEADER);
    assert_memory_equal(llmc + CPL_LLMC_HEADER, "a\0b\0\377\0", 6);
    free(llmc);
    cpl_corpus_close(&c);
}

static void test_shards_of_text_keep_vocabulary_and_tokenizer_in_hdf5(void **state) {
    cpl_corpus *c = NULL, *again = NULL;
    rig_write_text("t.txt", "In the beginning");
    assert_ok(rig_open(&c, "t.txt", 0));
    assert_ok(cpl_corpus_write(c, "t", "h5", 0, NULL));
    assert_ok(rig_open(&again, "t_000000.h5", 0));
    assert_int_equal(cpl_corpus_vocab(again), 256);
    assert_string_equal(cpl_corpus_tokenizer(again), "bytes");
    cpl_corpus_close(&again);
    cpl_corpus_close(&c);
}

static void test_same_tokens_give_the_same_hdf5_bytes(void **state) {
    static int32_t tokens[N];
    cpl_corpus *c = open_source(tokens, 1000);
    size_t a_bytes = 0, b_bytes = 0;
    assert_ok(cpl_corpus_write(c, "a", "h5", 0, NULL));
    sleep(1); /* times in the file would differ */
    assert_ok(cpl_corpus_write(c, "b", "h5", 0, NULL));
    unsigned char *a = rig_read("a_000000.h5", &a_bytes), *b = rig_read("b_000000.h5", &b_bytes);
    assert_int_equal(a_bytes, b_bytes);
    assert_memory_equal(a, b, a_bytes);
    assert_true(a_bytes < 3 * CPL_SHARD_H5_CHUNK * 2 + 8192); /* u16 where the vocabulary allows; the last chunk is a whole one */
    free(a);
    free(b);
    cpl_corpus_close(&c);
}

static void test_large_vocabulary_needs_hdf5(void **state) {
    static int32_t tokens[N];
    cpl_corpus *c = open_source(tokens, 128256), *again = NULL;
    assert_ok(cpl_corpus_write(c, "wide", "h5", 0, NULL));
    assert_ok(rig_open(&again, "wide_000000.h5", 0));
    assert_int_equal(cpl_corpus_vocab(again), 128256);
    rig_expect(again, tokens, N);
    cpl_corpus_close(&again);
    assert_fails(
        cpl_corpus_write(c, "narrow", "llmc", 0, NULL), CPL_INPUT,
        "narrow: a vocabulary of 128256 in shards of format \"llmc\" (uint16), expected at most 65536; format \"h5\" holds it");
    assert_int_equal(cpl_corpus_write(c, "narrow", "nanogpt", 0, NULL), CPL_INPUT);
    assert_int_equal(entries("narrow"), 0);
    cpl_corpus_close(&c);
}

static void test_wrong_arguments_write_nothing(void **state) {
    static int32_t tokens[N];
    cpl_corpus *c = open_source(tokens, 1000);
    assert_fails(cpl_corpus_write(c, "no", "zip", 0, NULL), CPL_USAGE,
                 "no: shards of format \"zip\", expected h5, llmc or nanogpt");
    assert_fails(cpl_corpus_write(c, "no", "h5", -1, NULL), CPL_USAGE,
                 "no: -1 tokens a shard, expected 1 to 2^63 - 1, or 0 for as many as the format can hold");
    assert_fails(cpl_corpus_write(c, "no", "llmc", (int64_t)INT32_MAX + 1, NULL), CPL_USAGE,
                 "no: 2147483648 tokens a shard, expected 1 to 2147483647 (the header's count is int32), or 0 for as many as the "
                 "format can hold");
    assert_fails(cpl_corpus_write(c, "missing/no", "llmc", 0, NULL), CPL_IO,
                 "missing/no_000000.bin.part: cannot create: No such file or directory");
    assert_fails_like(cpl_corpus_write(c, "missing/no", "h5", 0, NULL), CPL_IO, "missing/no_000000.h5.part: cannot be created: ");
    assert_int_equal(entries("no"), 0);
    cpl_corpus_close(&c);
}

static void test_more_shards_than_names_are_refused(void **state) {
    cpl_corpus *c = NULL;
    char *text = calloc(1, 1000001);
    assert_non_null(text);
    rig_write("million.txt", text, 1000001);
    free(text);
    assert_ok(rig_open(&c, "million.txt", 0));
    assert_fails(cpl_corpus_write(c, "m", "nanogpt", 1, NULL), CPL_USAGE,
                 "m: 1 tokens a shard make 1000001 shards of 1000001 tokens, expected at most 1000000 shards");
    cpl_corpus_close(&c);
}

static void test_leftover_shard_behind_the_last_is_refused(void **state) {
    static int32_t tokens[N];
    cpl_corpus *c = open_source(tokens, 1000);
    assert_ok(cpl_corpus_write(c, "l", "llmc", 10000, NULL)); /* 0 to 3 */
    assert_ok(cpl_corpus_write(c, "l", "llmc", 10000, NULL));
    assert_fails(cpl_corpus_write(c, "l", "llmc", 20000, NULL), CPL_INPUT,
                 "l_000002.bin: is there already, left over behind the 2 shards to be written; expected it removed");
    assert_int_equal(entries("l_"), 4);
    cpl_corpus_close(&c);
}

static void test_source_is_never_replaced(void **state) {
    static int32_t tokens[N];
    cpl_corpus *c = open_source(tokens, 1000), *again = NULL;
    assert_ok(cpl_corpus_write(c, "s", "llmc", 15000, NULL));
    assert_ok(cpl_corpus_open(&again, (const char *[]){"s_000000.bin", "s_000001.bin"}, 2, 0));
    assert_fails(cpl_corpus_write(again, "./s", "nanogpt", 15000, NULL), CPL_INPUT,
                 "./s_000000.bin: would replace s_000000.bin, which is being read; expected another prefix");
    cpl_corpus_close(&again);
    cpl_corpus_close(&c);
}

static void test_raw_shard_that_would_read_as_another_format_is_refused(void **state) {
    cpl_corpus *c = NULL;
    const int32_t tokens[] = {CPL_LLMC_MAGIC & 0xffff, CPL_LLMC_MAGIC >> 16, 1, 0};
    rig_write_h5("magic.h5", tokens, 4, 65536, "shards");
    assert_ok(rig_open(&c, "magic.h5", 0));
    assert_fails(cpl_corpus_write(c, "raw_magic", "nanogpt", 0, NULL), CPL_INPUT,
                 "raw_magic_000000.bin.part: its first two tokens would read as the magic 20240520 of another format, "
                 "expected format llmc or h5");
    assert_int_equal(entries("raw_magic"), 0);
    assert_ok(cpl_corpus_write(c, "raw_magic", "llmc", 0, NULL));
    cpl_corpus_close(&c);
}

/* A file size limit stands for a full disk: the write fails halfway. */
static void test_failed_write_leaves_the_old_shard_and_nothing_else(void **state) {
    static int32_t tokens[N];
    cpl_corpus *c = NULL, *other = open_source(tokens, 1000);
    rig_write_text("old.txt", "old tokens");
    assert_ok(rig_open(&c, "old.txt", 0));
    struct rlimit before, small;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small = before;
    small.rlim_cur = 50000;
    signal(SIGXFSZ, SIG_IGN);
    const char *formats[] = {"llmc", "nanogpt", "h5"}, *names[] = {"f_000000.bin", "f_000000.bin", "f_000000.h5"};
    for (int k = 0; k < 3; k++) {
        size_t bytes = 0, bytes_after = 0;
        assert_ok(cpl_corpus_write(c, "f", formats[k], 0, NULL));
        unsigned char *old = rig_read(names[k], &bytes);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
        cpl_status st = cpl_corpus_write(other, "f", formats[k], 0, NULL);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
        assert_int_equal(st, CPL_IO);
        assert_non_null(strstr(cpl_status_message(), names[k]));
        assert_non_null(strstr(cpl_status_message(), "File too large"));
        unsigned char *after = rig_read(names[k], &bytes_after);
        assert_int_equal(bytes_after, bytes);
        assert_memory_equal(after, old, bytes);
        assert_int_equal(entries("f_"), 1);
        free(old);
        free(after);
        remove_shards("f", names[k][9] == 'h' ? "h5" : "bin");
    }
    cpl_corpus_close(&c);
    cpl_corpus_close(&other);
}

/* The descriptor of an open file, found by its name. */
static int descriptor_of(const char *name) {
    char link[64], target[4096];
    for (int fd = 3; fd < 256; fd++) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, target, sizeof target - 1);
        target[n > 0 ? n : 0] = 0;
        if (n > 0 && strstr(target, name) != NULL) {
            return fd;
        }
    }
    return -1;
}

/* HDF5 that cannot write must neither crash at exit (this program's own) nor keep the name open. */
static void test_hdf5_writer_survives_a_disk_that_fails_at_any_write(void **state) {
    static int32_t tokens[CPL_SHARD_H5_CHUNK * 100]; /* more than HDF5 keeps in its cache */
    for (int fail_after = 0; fail_after <= 100; fail_after += 25) {
        cpl_shard_h5_writer *w = NULL;
        cpl_status st = CPL_OK;
        assert_ok(cpl_shard_h5_create(&w, "bad.h5", CPL_SHARD_H5_CHUNK * 100, 1000, "shards"));
        for (int k = 0; k < 100 && st == CPL_OK; k++) {
            if (k == fail_after) {
                int read_only = open("bad.h5", O_RDONLY);
                assert_true(read_only >= 0 && dup2(read_only, descriptor_of("bad.h5")) >= 0);
                close(read_only);
            }
            st = cpl_shard_h5_append(w, tokens, CPL_SHARD_H5_CHUNK);
        }
        if (st == CPL_OK) {
            st = cpl_shard_h5_finish(&w);
        } else {
            cpl_shard_h5_drop(&w);
        }
        assert_null(w);
        assert_int_equal(st, fail_after < 100 ? CPL_IO : CPL_OK);
        assert_int_equal(descriptor_of("bad.h5"), -1);
        if (st != CPL_OK) {
            assert_non_null(strstr(cpl_status_message(), "bad.h5: cannot"));
            assert_non_null(strstr(cpl_status_message(), "Bad file descriptor"));
        }
    }
    assert_ok(rig_try("bad.h5", 0));
}

static void test_token_outside_the_vocabulary_writes_nothing(void **state) {
    cpl_corpus *c = NULL;
    rig_write("v.txt", "ab\377", 3);
    assert_ok(rig_open(&c, "v.txt", 128));
    const char *formats[] = {"llmc", "nanogpt", "h5"};
    for (int k = 0; k < 3; k++) {
        assert_fails(cpl_corpus_write(c, "v_out", formats[k], 0, NULL), CPL_INPUT,
                     "v.txt: token 255 at position 2 is outside the vocabulary, expected 0 to 127");
        assert_int_equal(entries("v_out"), 0);
    }
    cpl_corpus_close(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_format_reads_back_the_same_tokens),
        cmocka_unit_test(test_bytes_are_those_of_the_formats),
        cmocka_unit_test(test_shards_of_text_keep_vocabulary_and_tokenizer_in_hdf5),
        cmocka_unit_test(test_same_tokens_give_the_same_hdf5_bytes),
        cmocka_unit_test(test_large_vocabulary_needs_hdf5),
        cmocka_unit_test(test_wrong_arguments_write_nothing),
        cmocka_unit_test(test_more_shards_than_names_are_refused),
        cmocka_unit_test(test_leftover_shard_behind_the_last_is_refused),
        cmocka_unit_test(test_source_is_never_replaced),
        cmocka_unit_test(test_raw_shard_that_would_read_as_another_format_is_refused),
        cmocka_unit_test(test_failed_write_leaves_the_old_shard_and_nothing_else),
        cmocka_unit_test(test_hdf5_writer_survives_a_disk_that_fails_at_any_write),
        cmocka_unit_test(test_token_outside_the_vocabulary_writes_nothing),
    };
    return cmocka_run_group_tests_name("io/corpus_write", tests, rig_enter, rig_leave);
}

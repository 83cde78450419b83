/* Corpora without HDF5: every format as it is read, and every way in which a file can be wrong, with the whole message.
 * Refuses to know anything of the order of samples (test_corpus_order.c) and of HDF5 (test_corpus_h5.c). */
#include "tests/io/corpus_rig.h"
#include <fcntl.h>

static void test_text_is_a_token_a_byte(void **state) {
    cpl_corpus *c = NULL;
    rig_write("all.txt", "\0a\377\n", 4);
    assert_ok(rig_open(&c, "all.txt", 0));
    assert_int_equal(cpl_corpus_vocab(c), 256);
    assert_string_equal(cpl_corpus_tokenizer(c), "bytes");
    rig_expect(c, (int32_t[]){0, 'a', 255, '\n'}, 4);
    cpl_corpus_close(&c);
    assert_null(c);
    cpl_corpus_close(&c);
    cpl_corpus_close(NULL);
}

static void test_llmc_and_nanogpt_shards_are_read(void **state) {
    cpl_corpus *c = NULL;
    const uint16_t tokens[] = {1, 50256, 65535, 0, 7};
    const int32_t expected[] = {1, 50256, 65535, 0, 7};
    rig_write_llmc("a.bin", CPL_LLMC_MAGIC, 1, 5, tokens, sizeof tokens);
    rig_write("b.bin", tokens, sizeof tokens);
    for (int i = 0; i < 2; i++) {
        assert_ok(rig_open(&c, i == 0 ? "a.bin" : "b.bin", 0));
        assert_int_equal(cpl_corpus_vocab(c), 65536);
        assert_string_equal(cpl_corpus_tokenizer(c), "shards");
        rig_expect(c, expected, 5);
        cpl_corpus_close(&c);
    }
}

static void test_several_files_are_one_row(void **state) {
    cpl_corpus *c = NULL;
    const uint16_t first[] = {10, 11, 12}, last[] = {14, 15};
    rig_write_llmc("a.bin", CPL_LLMC_MAGIC, 1, 3, first, sizeof first);
    rig_write_h5("b.h5", (int32_t[]){13}, 1, 65536, "shards");
    rig_write("c.bin", last, sizeof last);
    assert_ok(cpl_corpus_open(&c, (const char *[]){"a.bin", "b.h5", "c.bin"}, 3, 100));
    assert_int_equal(cpl_corpus_vocab(c), 100);
    rig_expect(c, (int32_t[]){10, 11, 12, 13, 14, 15}, 6);
    int32_t tokens[2], targets[2];
    cpl_split train, val;
    cpl_corpus_split(c, 0.0, 2, &train, &val);
    assert_int_equal(train.windows, 2);
    assert_ok(cpl_split_window(&train, 1, tokens, targets)); /* tokens 2 to 4: all three files */
    assert_memory_equal(tokens, ((int32_t[]){12, 13}), sizeof tokens);
    assert_memory_equal(targets, ((int32_t[]){13, 14}), sizeof targets);
    cpl_corpus_close(&c);
}

static void test_reading_outside_is_refused(void **state) {
    cpl_corpus *c = NULL;
    int32_t token[4];
    rig_write_text("abc.txt", "abc");
    assert_ok(rig_open(&c, "abc.txt", 0));
    assert_ok(cpl_corpus_read(c, 3, 0, token));
    assert_fails(cpl_corpus_read(c, 1, 3, token), CPL_INPUT, "abc.txt: 3 tokens from position 1 asked for, the corpus has 3");
    assert_int_equal(cpl_corpus_read(c, -1, 1, token), CPL_INPUT);
    assert_int_equal(cpl_corpus_read(c, INT64_MAX, 1, token), CPL_INPUT);
    assert_int_equal(cpl_corpus_read(c, 1, INT64_MAX, token), CPL_INPUT);
    assert_int_equal(cpl_corpus_read(c, 0, -1, token), CPL_INPUT);
    cpl_corpus_close(&c);
}

static void test_what_is_no_file_of_tokens_is_refused(void **state) {
    cpl_corpus *c = NULL;
    assert_fails(cpl_corpus_open(&c, NULL, 0, 0), CPL_INPUT, "a corpus of no files, expected at least one");
    assert_fails(rig_try("none.txt", 0), CPL_NOT_FOUND, "none.txt: no such file");
    assert_fails(rig_try("none.h5", 0), CPL_NOT_FOUND, "none.h5: no such file");
    assert_int_equal(mkdir("folder.bin", 0777), 0);
    assert_fails(rig_try("folder.bin", 0), CPL_INPUT, "folder.bin: is a folder, expected a file of text or tokens");
    assert_int_equal(mkfifo("pipe.txt", 0666), 0);
    assert_fails(rig_try("pipe.txt", 0), CPL_INPUT, "pipe.txt: is a device or a pipe, expected a file of text or tokens");
    const char *empty[] = {"empty.txt", "empty.bin", "empty.h5"};
    for (int i = 0; i < 3; i++) {
        char message[100];
        rig_write(empty[i], "", 0);
        snprintf(message, sizeof message, "%s: is empty, expected at least one token", empty[i]);
        assert_fails(rig_try(empty[i], 0), CPL_INPUT, message);
    }
    rig_write("h5.txt", "\211HDF\r\n\032\n....", 12);
    assert_fails(rig_try("h5.txt", 0), CPL_INPUT, "h5.txt: is an HDF5 file, expected text (a token shard in HDF5 is named *.h5)");
    rig_write_text("a.txt", "a");
    assert_fails(rig_try("a.txt", -1), CPL_INPUT, "a.txt: a vocabulary of -1, expected 1 to 2147483647");
    assert_int_equal(rig_try("a.txt", (int64_t)1 << 31), CPL_INPUT);
}

static void test_llmc_header_that_does_not_add_up_is_refused(void **state) {
    const uint16_t t[8] = {0};
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 1, 10, t, 16);
    assert_fails(rig_try("s.bin", 0), CPL_DAMAGED,
                 "s.bin: header says 10 tokens (byte 8), 8 are there: expected 1044 bytes, the file has 1040");
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 1, 7, t, 16);
    assert_fails(rig_try("s.bin", 0), CPL_DAMAGED,
                 "s.bin: header says 7 tokens (byte 8), 8 are there: expected 1038 bytes, the file has 1040");
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 1, 8, t, 15);
    assert_fails(rig_try("s.bin", 0), CPL_DAMAGED,
                 "s.bin: header says 8 tokens (byte 8), 7 and a half are there: expected 1040 bytes, the file has 1039");
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 1, -8, t, 16);
    assert_int_equal(rig_try("s.bin", 0), CPL_DAMAGED);
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 1, INT32_MIN, t, 0);
    assert_int_equal(rig_try("s.bin", 0), CPL_DAMAGED);
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 1, 0, t, 0);
    assert_fails(rig_try("s.bin", 0), CPL_INPUT, "s.bin: holds no tokens, expected at least one");
    rig_write_llmc("s.bin", CPL_LLMC_MAGIC, 2, 8, t, 16);
    assert_fails(rig_try("s.bin", 0), CPL_INPUT, "s.bin: llm.c shard of version 2 at byte 4, expected version 1 (uint16 tokens)");
    assert_int_equal(truncate("s.bin", 1023), 0);
    assert_fails(rig_try("s.bin", 0), CPL_DAMAGED, "s.bin: header of an llm.c shard is cut off at byte 1023, expected 1024 bytes");
    assert_int_equal(truncate("s.bin", 4), 0);
    assert_fails(rig_try("s.bin", 0), CPL_DAMAGED, "s.bin: header of an llm.c shard is cut off at byte 4, expected 1024 bytes");
}

static void test_other_files_of_llmc_are_named(void **state) {
    const uint16_t t[8] = {0};
    rig_write_llmc("s.bin", 20240801, 7, 4, t, 16);
    assert_fails(rig_try("s.bin", 0), CPL_INPUT,
                 "s.bin: is an llm.c uint32 token shard (magic 20240801 at byte 0), expected a uint16 token shard (magic 20240520, "
                 "or none)");
    const int32_t others[] = {20240326, 20240327, 20240328, 20240522, (int32_t)__builtin_bswap32(CPL_LLMC_MAGIC)};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        rig_write_llmc("s.bin", others[i], 1, 8, t, 16);
        assert_int_equal(rig_try("s.bin", 0), CPL_INPUT);
    }
}

static void test_odd_number_of_bytes_is_refused(void **state) {
    rig_write("odd.bin", "1234567", 7);
    assert_fails(rig_try("odd.bin", 0), CPL_DAMAGED, "odd.bin: 7 bytes are there, expected an even number (uint16 tokens)");
    rig_write("one.bin", "1", 1);
    assert_fails(rig_try("one.bin", 0), CPL_DAMAGED, "one.bin: 1 bytes are there, expected an even number (uint16 tokens)");
    rig_write("two.bin", "12", 2);
    assert_ok(rig_try("two.bin", 0));
}

static void test_token_outside_the_vocabulary_is_named_with_its_position(void **state) {
    cpl_corpus *c = NULL;
    int32_t tokens[2], targets[2];
    cpl_split train, val;
    const uint16_t first[] = {1, 2, 3}, last[] = {4, 5, 500, 6};
    rig_write("a.bin", first, sizeof first);
    rig_write_llmc("b.bin", CPL_LLMC_MAGIC, 1, 4, last, sizeof last);
    assert_ok(cpl_corpus_open(&c, (const char *[]){"a.bin", "b.bin"}, 2, 500));
    cpl_corpus_split(c, 0.0, 2, &train, &val);
    assert_ok(cpl_split_window(&train, 0, tokens, targets));
    assert_ok(cpl_split_window(&train, 1, tokens, targets));
    const char *message = "b.bin: token 500 at position 2 is outside the vocabulary, expected 0 to 499";
    assert_fails(cpl_split_window(&train, 2, tokens, targets), CPL_INPUT, message);
    cpl_status worst = CPL_OK;
    for (uint64_t i = 0; i < 3; i++) { /* one epoch meets it */
        cpl_status st = cpl_split_sample(&train, 1, i, tokens, targets);
        worst = st > worst ? st : worst;
    }
    assert_int_equal(worst, CPL_INPUT);
    assert_string_equal(cpl_status_message(), message);
    cpl_corpus_close(&c);
    rig_write("latin1.txt", "caf\351", 4);
    assert_ok(rig_open(&c, "latin1.txt", 128));
    int32_t text[4];
    assert_fails(cpl_corpus_read(c, 1, 3, text), CPL_INPUT,
                 "latin1.txt: token 233 at position 3 is outside the vocabulary, expected 0 to 127");
    cpl_corpus_close(&c);
}

static void test_text_and_shards_do_not_mix(void **state) {
    cpl_corpus *c = NULL;
    rig_write_text("a.txt", "ab");
    rig_write("b.bin", "abcd", 4);
    assert_fails(cpl_corpus_open(&c, (const char *[]){"a.txt", "b.bin"}, 2, 0), CPL_INPUT,
                 "b.bin: holds tokens, expected text as in a.txt");
    assert_fails(cpl_corpus_open(&c, (const char *[]){"b.bin", "a.txt"}, 2, 0), CPL_INPUT,
                 "a.txt: holds text, expected tokens (*.bin or *.h5) as in b.bin");
    rig_write_h5("c.h5", (int32_t[]){1}, 1, 256, "bytes");
    assert_fails(cpl_corpus_open(&c, (const char *[]){"b.bin", "c.h5"}, 2, 0), CPL_INPUT,
                 "c.h5: tokens are of the tokenizer \"bytes\", expected \"shards\" as in b.bin");
    assert_null(c);
}

/* Sparse: 3 GB that take a few blocks of disk. */
static void make_sparse(const char *path, const void *start, size_t start_bytes, off_t at, const void *end, size_t end_bytes) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, 3000000000), 0);
    assert_int_equal(pwrite(fd, start, start_bytes, 0), start_bytes);
    assert_int_equal(pwrite(fd, end, end_bytes, at), end_bytes);
    assert_int_equal(close(fd), 0);
}

static void test_files_over_2_gb_are_read_at_their_far_end(void **state) {
    cpl_corpus *c = NULL;
    int32_t tokens[4], targets[4];
    cpl_split train, val;
    const off_t far = 2900000000;
    const int32_t header[3] = {CPL_LLMC_MAGIC, 1, (3000000000 - CPL_LLMC_HEADER) / 2};
    const uint16_t five[] = {21, 22, 23, 24, 25};
    make_sparse("big.txt", "", 0, far, "vwxyz", 5);
    make_sparse("big.bin", "", 0, far, five, sizeof five);
    make_sparse("llmc.bin", header, sizeof header, far + CPL_LLMC_HEADER, five, sizeof five);
    for (int i = 0; i < 3; i++) {
        const int64_t width = i == 0 ? 1 : 2;
        assert_ok(rig_open(&c, (const char *[]){"big.txt", "big.bin", "llmc.bin"}[i], 0));
        assert_int_equal(cpl_corpus_tokens(c), i == 2 ? header[2] : 3000000000 / width);
        cpl_corpus_split(c, 0.0, 4, &train, &val);
        assert_ok(cpl_split_window(&train, far / width / 4, tokens, targets));
        const int32_t base = i == 0 ? 'v' : 21;
        for (int t = 0; t < 4; t++) {
            assert_int_equal(tokens[t], base + t);
            assert_int_equal(targets[t], base + t + 1);
        }
        cpl_corpus_close(&c);
    }
    const char *both[] = {"big.txt", "big.txt"}; /* positions beyond 2^32 in the row */
    assert_ok(cpl_corpus_open(&c, both, 2, 0));
    assert_ok(cpl_corpus_read(c, 3000000000 + far, 4, tokens));
    assert_memory_equal(tokens, ((int32_t[]){'v', 'w', 'x', 'y'}), sizeof tokens);
    cpl_corpus_close(&c);
}

static void test_file_cut_while_in_use_is_an_error_not_a_signal(void **state) {
    cpl_corpus *c = NULL;
    int32_t token[1];
    char *text = calloc(1, 100000);
    assert_non_null(text);
    rig_write("cut.txt", text, 100000);
    assert_ok(rig_open(&c, "cut.txt", 0));
    assert_ok(cpl_corpus_read(c, 99999, 1, token));
    assert_int_equal(truncate("cut.txt", 10), 0);
    assert_fails(cpl_corpus_read(c, 99999, 1, token), CPL_DAMAGED, "cut.txt: was cut to 10 bytes while in use, expected 100000");
    char hex[CPL_SHA256_HEX];
    assert_fails(cpl_corpus_sha256(c, hex), CPL_DAMAGED,
                 "cut.txt: was changed while in use: has 10 bytes, expected the file of 100000 that was opened");
    cpl_corpus_close(&c);
    rig_write("cut.txt", text, 100000);
    assert_ok(rig_open(&c, "cut.txt", 0));
    rig_write_text("other.txt", "x"); /* replaced by rename: the mapping keeps the old file */
    assert_int_equal(rename("other.txt", "cut.txt"), 0);
    assert_ok(cpl_corpus_read(c, 99999, 1, token));
    cpl_corpus_close(&c);
    free(text);
}

static void test_sha256_is_that_of_all_bytes_in_order(void **state) {
    cpl_corpus *c = NULL;
    char hex[CPL_SHA256_HEX], again[CPL_SHA256_HEX];
    rig_write_text("a.txt", "a");
    rig_write_text("bc.txt", "bc");
    assert_ok(cpl_corpus_open(&c, (const char *[]){"a.txt", "bc.txt"}, 2, 0));
    assert_ok(cpl_corpus_sha256(c, hex));
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"); /* "abc", FIPS 180-4 */
    cpl_corpus_close(&c);
    enum { LONG = 2500000 }; /* some blocks and a rest */
    char *text = malloc(LONG);
    assert_non_null(text);
    memset(text, 'x', LONG);
    rig_write("long.txt", text, LONG);
    cpl_sha256 whole;
    cpl_sha256_init(&whole);
    cpl_sha256_add(&whole, text, LONG);
    cpl_sha256_end(&whole, again);
    assert_ok(rig_open(&c, "long.txt", 0));
    assert_ok(cpl_corpus_sha256(c, hex));
    assert_string_equal(hex, again);
    cpl_corpus_close(&c);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_text_is_a_token_a_byte),
        cmocka_unit_test(test_llmc_and_nanogpt_shards_are_read),
        cmocka_unit_test(test_several_files_are_one_row),
        cmocka_unit_test(test_reading_outside_is_refused),
        cmocka_unit_test(test_what_is_no_file_of_tokens_is_refused),
        cmocka_unit_test(test_llmc_header_that_does_not_add_up_is_refused),
        cmocka_unit_test(test_other_files_of_llmc_are_named),
        cmocka_unit_test(test_odd_number_of_bytes_is_refused),
        cmocka_unit_test(test_token_outside_the_vocabulary_is_named_with_its_position),
        cmocka_unit_test(test_text_and_shards_do_not_mix),
        cmocka_unit_test(test_files_over_2_gb_are_read_at_their_far_end),
        cmocka_unit_test(test_file_cut_while_in_use_is_an_error_not_a_signal),
        cmocka_unit_test(test_sha256_is_that_of_all_bytes_in_order),
    };
    return cmocka_run_group_tests_name("io/corpus", tests, rig_enter, rig_leave);
}

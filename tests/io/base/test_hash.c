/* SHA-256 against published digests and against itself in other pieces.
 * Refuses to be a second implementation. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/hash.h"
#include "io/base/hash_compress.h"
#include "io/base/rng.h"
#include <stdlib.h>
#include <string.h>

static void digest(const void *data, size_t bytes, char hex[CPL_SHA256_HEX]) {
    cpl_sha256 h;
    cpl_sha256_init(&h);
    cpl_sha256_add(&h, data, bytes);
    cpl_sha256_end(&h, hex);
}

/* The examples of FIPS 180-4 and of NIST CSRC. */
static void test_published_digests(void **state) {
    static const struct {
        const char *text, *hex;
    } row[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
         "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
    };
    char hex[CPL_SHA256_HEX];
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        digest(row[i].text, strlen(row[i].text), hex);
        assert_string_equal(hex, row[i].hex);
    }
    char *million = malloc(1000000);
    assert_non_null(million);
    memset(million, 'a', 1000000);
    digest(million, 1000000, hex);
    free(million);
    assert_string_equal(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static void test_pieces_of_any_size_give_the_digest_of_the_whole(void **state) {
    unsigned char data[300];
    for (size_t i = 0; i < sizeof data; i++) {
        data[i] = (unsigned char)(i * 31 + 7);
    }
    for (size_t length = 0; length <= sizeof data; length++) { /* every residue of the padding */
        char whole[CPL_SHA256_HEX], parts[CPL_SHA256_HEX];
        digest(data, length, whole);
        for (size_t piece = 1; piece < 130; piece += 21) {
            cpl_sha256 h;
            cpl_sha256_init(&h);
            for (size_t at = 0; at < length; at += piece) {
                cpl_sha256_add(&h, data + at, length - at < piece ? length - at : piece);
                cpl_sha256_add(&h, data, 0);
            }
            cpl_sha256_end(&h, parts);
            assert_string_equal(parts, whole);
        }
    }
}

static void test_texts_are_kept_apart(void **state) {
    cpl_sha256 a, b;
    char ha[CPL_SHA256_HEX], hb[CPL_SHA256_HEX];
    cpl_sha256_init(&a);
    cpl_sha256_init(&b);
    cpl_sha256_add_text(&a, "ab");
    cpl_sha256_add_text(&a, "c");
    cpl_sha256_add_text(&b, "a");
    cpl_sha256_add_text(&b, "bc");
    cpl_sha256_end(&a, ha);
    cpl_sha256_end(&b, hb);
    assert_string_not_equal(ha, hb);
}

static void test_the_processors_own_instructions_give_the_same_states(void **state) {
    enum { BLOCKS = 5 };
    if (!cpl_sha256_has_x86()) {
        skip();
    }
    for (uint32_t round = 0; round < 200; round++) {
        uint32_t portable[8], x86[8], words[BLOCKS * 16 + 12];
        for (uint64_t i = 0; i < sizeof words / 16; i++) {
            cpl_rng_block(3, CPL_RNG_TEST, round, i, words + 4 * i);
        }
        const unsigned char *data = (const unsigned char *)words + round % 16; /* aligned and not */
        memcpy(portable, words + BLOCKS * 16 + 4, sizeof portable);
        memcpy(x86, portable, sizeof x86);
        cpl_sha256_compress_portable(portable, data, round % (BLOCKS + 1));
        cpl_sha256_compress_x86(x86, data, round % (BLOCKS + 1));
        assert_memory_equal(portable, x86, sizeof x86);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published_digests),
        cmocka_unit_test(test_pieces_of_any_size_give_the_digest_of_the_whole),
        cmocka_unit_test(test_texts_are_kept_apart),
        cmocka_unit_test(test_the_processors_own_instructions_give_the_same_states),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

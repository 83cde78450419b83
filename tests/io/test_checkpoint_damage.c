/* Proves that no damage to a checkpoint passes for data, and that a failed write leaves the older file and a process that can go
 * on. Refuses mounts it may not make: a full disk is played by a limit on the size of files, and by writes that fail. */
#include "tests/io/checkpoint_rig.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>

/* Reads a damaged file in every way. True if it was refused; what is not refused must be what was written. */
static bool refused(const char *path, const cpl_ckpt_array *want, bool must) {
    cpl_ckpt_array got[SMALL];
    fill_small(got, 999);
    cpl_arena *arena = NULL;
    assert_ok(cpl_arena_create(&arena));
    cpl_ckpt_attr attr = {.name = "tokenizer", .type = CPL_T_TEXT};
    cpl_status verified = cpl_checkpoint_verify(path);
    cpl_status read = cpl_checkpoint_read(path, NULL, got, SMALL, &attr, 1, arena);
    assert_true(verified == CPL_OK || verified == CPL_DAMAGED);
    assert_true(read == CPL_OK || read == CPL_DAMAGED);
    if (verified != CPL_OK) {
        assert_non_null(strstr(cpl_status_message(), path));
    }
    if (read == CPL_OK) {
        assert_same(want, got, SMALL);
        assert_string_equal(attr.text, "bytes");
    }
    if (must && (verified == CPL_OK || read == CPL_OK)) {
        fail_msg("damage passed for whole");
    }
    cpl_arena_destroy(&arena);
    drop(got, SMALL);
    return verified != CPL_OK;
}

static void test_checkpoint_random_damage_is_refused_or_harmless(void **state) {
    (void)state;
    cpl_ckpt_array a[SMALL];
    fill_small(a, 50);
    assert_ok(cpl_checkpoint_write(path_of("m.h5"), NULL, a, SMALL, &small_attr, 1));
    content whole = slurp(path_of("m.h5"));
    unsigned char *bytes = malloc(whole.n);
    assert_non_null(bytes);
    const char *rounds_asked = getenv("CUPEL_MUTATIONS");
    const int rounds = rounds_asked != NULL ? atoi(rounds_asked) : 400;
    int noticed = 0;
    for (int i = 0; i < rounds; i++) {
        uint32_t r[4];
        cpl_rng_block(1, CPL_RNG_TEST, 0, (uint64_t)i, r);
        memcpy(bytes, whole.bytes, whole.n);
        size_t at = r[0] % whole.n;
        size_t n = whole.n;
        size_t run = 1 + r[1] % 64 < n - at ? 1 + r[1] % 64 : n - at;
        switch (i % 4) {
        case 0: /* one bit */
            bytes[at] ^= (unsigned char)(1u << (r[1] % 8));
            break;
        case 1: /* a few other bytes */
            for (size_t k = 0; k < run; k++) {
                bytes[at + k] = (unsigned char)(r[2] >> (k % 25));
            }
            break;
        case 2: /* a lost block */
            memset(bytes + at, 0, run * 8 < n - at ? run * 8 : n - at);
            break;
        default: /* a piece from elsewhere in the file */
            memmove(bytes + at, whole.bytes + r[2] % (n - run), run);
        }
        spill(path_of("damaged.h5"), bytes, n);
        noticed += refused(path_of("damaged.h5"), a, false);
    }
    assert_true(noticed > rounds / 4); /* the rest hit bytes that no object uses */
    free(bytes);
    free(whole.bytes);
    drop(a, SMALL);
}

static void test_checkpoint_cut_anywhere_is_refused(void **state) {
    (void)state;
    cpl_ckpt_array a[SMALL];
    fill_small(a, 60);
    assert_ok(cpl_checkpoint_write(path_of("c.h5"), NULL, a, SMALL, &small_attr, 1));
    content whole = slurp(path_of("c.h5"));
    for (size_t n = 0; n < whole.n; n += n < 128 ? 1 : 97) {
        spill(path_of("cut.h5"), whole.bytes, n);
        refused(path_of("cut.h5"), a, true);
    }
    spill(path_of("cut.h5"), whole.bytes, whole.n - 1);
    refused(path_of("cut.h5"), a, true);
    free(whole.bytes);
    drop(a, SMALL);
}

/* Where the bytes of an array lie: all of them are random or found by their length. */
static size_t find(const content *c, const void *bytes, size_t n) {
    const unsigned char *at = memmem(c->bytes, c->n, bytes, n);
    assert_non_null(at);
    return (size_t)(at - c->bytes);
}

static void test_checkpoint_every_bit_of_an_array_is_guarded(void **state) {
    (void)state;
    cpl_ckpt_array a[SMALL];
    fill_small(a, 70);
    assert_ok(cpl_checkpoint_write(path_of("b.h5"), NULL, a, SMALL, &small_attr, 1));
    content whole = slurp(path_of("b.h5"));
    size_t at = find(&whole, a[2].data, 99);
    for (size_t bit = 0; bit < 99 * 8; bit++) {
        whole.bytes[at + bit / 8] ^= (unsigned char)(1u << (bit % 8));
        spill(path_of("bit.h5"), whole.bytes, whole.n);
        refused(path_of("bit.h5"), a, true);
        whole.bytes[at + bit / 8] ^= (unsigned char)(1u << (bit % 8));
    }
    expect(CPL_OK, cpl_checkpoint_verify(path_of("b.h5")), "");
    whole.bytes[at] ^= 1;
    spill(path_of("bit.h5"), whole.bytes, whole.n);
    expect(CPL_DAMAGED, cpl_checkpoint_verify(path_of("bit.h5")), "bit.h5: array \"mask\"");
    free(whole.bytes);
    drop(a, SMALL);
}

/* Fletcher32 alone would let both pass. */
static void test_checkpoint_lost_and_erased_blocks_are_noticed(void **state) {
    (void)state;
    cpl_ckpt_array a[SMALL];
    fill_small(a, 80);
    assert_ok(cpl_checkpoint_write(path_of("z.h5"), NULL, a, SMALL, &small_attr, 1));
    content whole = slurp(path_of("z.h5"));
    size_t at = find(&whole, a[0].data, 2800);
    unsigned char *bytes = malloc(whole.n);
    assert_non_null(bytes);
    memcpy(bytes, whole.bytes, whole.n);
    memset(bytes + at - 7, 0, 7 + 2800 + 4 + 4); /* zlib's header, the data, Adler-32, Fletcher32 */
    spill(path_of("lost.h5"), bytes, whole.n);
    refused(path_of("lost.h5"), a, true);
    memcpy(bytes, whole.bytes, whole.n);
    size_t zeros = find(&whole, a[1].data, 2000);
    memset(bytes + zeros + 100, 0xFF, 512);
    spill(path_of("erased.h5"), bytes, whole.n);
    refused(path_of("erased.h5"), a, true);
    free(bytes);
    free(whole.bytes);
    drop(a, SMALL);
}

/* --- a full disk --- */

static void test_checkpoint_full_disk_leaves_the_older_file(void **state) {
    (void)state;
    cpl_ckpt_array a[ARRAYS];
    cpl_ckpt_array b[ARRAYS];
    fill(a, 90);
    fill(b, 190);
    const cpl_ckpt_attr put = {.name = "step", .type = CPL_T_I64, .i = 1};
    assert_ok(cpl_checkpoint_write(path_of("d.h5"), NULL, a, ARRAYS, &put, 1));
    content before = slurp(path_of("d.h5"));
    struct rlimit old;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit = 0; limit < before.n; limit = limit == 0 ? 100 : 5 * limit) {
        struct rlimit tight = {limit, old.rlim_max};
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
        cpl_status st = cpl_checkpoint_write(path_of("d.h5"), NULL, b, ARRAYS, &put, 1);
        assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
        expect(CPL_IO, st, "d.h5.part");
        expect(CPL_IO, st, "File too large");
        assert_int_equal(access(path_of("d.h5.part"), F_OK), -1);
        content after = slurp(path_of("d.h5"));
        assert_int_equal(before.n, after.n);
        assert_memory_equal(before.bytes, after.bytes, before.n);
        free(after.bytes);
    }
    signal(SIGXFSZ, handler);
    assert_ok(cpl_checkpoint_write(path_of("d.h5"), NULL, b, ARRAYS, &put, 1));
    assert_ok(cpl_checkpoint_read(path_of("d.h5"), NULL, a, ARRAYS, NULL, 0, NULL));
    assert_same(a, b, ARRAYS);
    free(before.bytes);
    drop(a, ARRAYS);
    drop(b, ARRAYS);
}

static void test_checkpoint_any_failing_write_is_an_error_and_no_crash(void **state) {
    (void)state;
    cpl_ckpt_array a[ARRAYS];
    fill(a, 290);
    const cpl_ckpt_attr put = {.name = "step", .type = CPL_T_I64, .i = 1};
    assert_ok(cpl_checkpoint_write(path_of("w.h5"), NULL, a, ARRAYS, &put, 1));
    content before = slurp(path_of("w.h5"));
    long failures = 0;
    for (;; failures++) {
        writes_left = failures;
        cpl_status st = cpl_checkpoint_write(path_of("w.h5"), NULL, a, ARRAYS, &put, 1);
        writes_left = -1;
        if (st == CPL_OK) {
            break;
        }
        expect(CPL_IO, st, "Disk quota exceeded");
        assert_int_equal(access(path_of("w.h5.part"), F_OK), -1);
        content after = slurp(path_of("w.h5"));
        assert_int_equal(before.n, after.n);
        assert_memory_equal(before.bytes, after.bytes, before.n);
        free(after.bytes);
    }
    assert_true(failures >= 10); /* a write for each chunk and the metadata */
    free(before.bytes);
    drop(a, ARRAYS);
}

static int open_files(void) {
    int n = 0;
    for (int file = 0; file < 1024; file++) {
        n += fcntl(file, F_GETFD) >= 0;
    }
    return n;
}
static int open_before;

static void test_checkpoint_no_failure_left_a_file_open(void **state) {
    (void)state;
    assert_int_equal(open_files(), open_before);
}

int main(void) {
    open_before = open_files();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_checkpoint_random_damage_is_refused_or_harmless),
        cmocka_unit_test(test_checkpoint_cut_anywhere_is_refused),
        cmocka_unit_test(test_checkpoint_every_bit_of_an_array_is_guarded),
        cmocka_unit_test(test_checkpoint_lost_and_erased_blocks_are_noticed),
        cmocka_unit_test(test_checkpoint_full_disk_leaves_the_older_file),
        cmocka_unit_test(test_checkpoint_any_failing_write_is_an_error_and_no_crash),
        cmocka_unit_test(test_checkpoint_no_failure_left_a_file_open),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}

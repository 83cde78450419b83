/* Proves that checkpoints come back bit by bit, that what does not fit is named, and which file of a folder is taken.
 * Refuses files of other tests: it works in a folder of its own. */
#include "tests/io/checkpoint_rig.h"
#include <sys/stat.h>

static void test_checkpoint_comes_back_bit_by_bit(void **state) {
    (void)state;
    cpl_ckpt_array a[ARRAYS];
    cpl_ckpt_array b[ARRAYS];
    fill(a, 10);
    fill(b, 100);
    char *text = malloc(200001);
    assert_non_null(text);
    memset(text, 'j', 200000);
    text[200000] = '\0';
    const cpl_ckpt_attr put[] = {{.name = "step", .type = CPL_T_I64, .i = -7},
                                 {.name = "scale", .type = CPL_T_F64, .f = 0.1},
                                 {.name = "empty", .type = CPL_T_TEXT, .text = ""},
                                 {.name = "job", .type = CPL_T_TEXT, .text = text},
                                 {.name = "title", .type = CPL_T_TEXT, .text = "Küpelle"}};
    assert_ok(cpl_checkpoint_write(path_of("a.h5"), NULL, a, ARRAYS, put, 5));
    assert_int_equal(access(path_of("a.h5.part"), F_OK), -1);

    cpl_arena *arena = NULL;
    assert_ok(cpl_arena_create(&arena));
    cpl_ckpt_attr got[] = {{.name = "title", .type = CPL_T_TEXT},
                           {.name = "job", .type = CPL_T_TEXT},
                           {.name = "empty", .type = CPL_T_TEXT},
                           {.name = "scale", .type = CPL_T_F64},
                           {.name = "step", .type = CPL_T_I64}};
    assert_ok(cpl_checkpoint_read(path_of("a.h5"), NULL, b, ARRAYS, got, 5, arena));
    assert_same(a, b, ARRAYS);
    assert_string_equal(got[0].text, "Küpelle");
    assert_string_equal(got[1].text, text);
    assert_string_equal(got[2].text, "");
    assert_true(got[3].f == 0.1);
    assert_int_equal(got[4].i, -7);
    assert_ok(cpl_checkpoint_verify(path_of("a.h5")));

    cpl_type type = CPL_T_TEXT;
    int64_t total = -1;
    assert_ok(cpl_checkpoint_array_info(path_of("a.h5"), "counts", &type, &total));
    assert_int_equal(type, CPL_T_I64);
    assert_int_equal(total, 65537);
    cpl_arena_destroy(&arena);
    free(text);
    drop(a, ARRAYS);
    drop(b, ARRAYS);
}

static void test_checkpoint_any_part_can_be_read_alone(void **state) {
    (void)state;
    cpl_ckpt_array a[ARRAYS];
    fill(a, 20);
    assert_ok(cpl_checkpoint_write(path_of("p.h5"), NULL, a, ARRAYS, NULL, 0));
    static const int64_t cuts[] = {0, 1, 4096, 65535, 65536, 65537, 131072, 150000, 150001};
    float *x = malloc(150001 * sizeof *x);
    assert_non_null(x);
    for (size_t i = 0; i < 9; i++) {
        for (size_t j = i; j < 9; j++) {
            cpl_ckpt_array part = shapes[0];
            part.begin = cuts[i];
            part.n = cuts[j] - cuts[i];
            part.data = x;
            assert_ok(cpl_checkpoint_read(path_of("p.h5"), NULL, &part, 1, NULL, 0, NULL));
            assert_memory_equal(x, (float *)a[0].data + cuts[i], (size_t)part.n * sizeof *x);
        }
    }
    free(x);
    drop(a, ARRAYS);
}

static void test_checkpoint_same_content_gives_the_same_bytes(void **state) {
    (void)state;
    cpl_ckpt_array a[ARRAYS];
    fill(a, 30);
    const cpl_ckpt_attr put = {.name = "step", .type = CPL_T_I64, .i = 3};
    assert_ok(cpl_checkpoint_write(path_of("s1.h5"), NULL, a, ARRAYS, &put, 1));
    sleep(1); /* a time of writing would show */
    assert_ok(cpl_checkpoint_write(path_of("s2.h5"), NULL, a, ARRAYS, &put, 1));
    content x = slurp(path_of("s1.h5"));
    content y = slurp(path_of("s2.h5"));
    assert_int_equal(x.n, y.n);
    assert_memory_equal(x.bytes, y.bytes, x.n);
    free(x.bytes);
    free(y.bytes);
    drop(a, ARRAYS);
}

static void test_checkpoint_names_what_does_not_fit(void **state) {
    (void)state;
    cpl_ckpt_array a[ARRAYS];
    fill(a, 40);
    const cpl_ckpt_attr put = {.name = "step", .type = CPL_T_I64, .i = 3};
    assert_ok(cpl_checkpoint_write(path_of("f.h5"), NULL, a, ARRAYS, &put, 1));
    cpl_arena *arena = NULL;
    assert_ok(cpl_arena_create(&arena));

    cpl_ckpt_array w = a[3];
    w.name = "absent";
    expect(CPL_DAMAGED, cpl_checkpoint_read(path_of("f.h5"), NULL, &w, 1, NULL, 0, NULL), "f.h5: array \"absent\"");
    w = a[3];
    w.total = w.n = 4096;
    expect(CPL_DAMAGED, cpl_checkpoint_read(path_of("f.h5"), NULL, &w, 1, NULL, 0, NULL), "has 4097 elements i32, expected 4096");
    w = a[3];
    w.type = CPL_T_U32;
    expect(CPL_DAMAGED, cpl_checkpoint_read(path_of("f.h5"), NULL, &w, 1, NULL, 0, NULL), "expected 4097 elements u32");
    cpl_ckpt_attr attr = {.name = "absent", .type = CPL_T_I64};
    expect(CPL_DAMAGED, cpl_checkpoint_read(path_of("f.h5"), NULL, NULL, 0, &attr, 1, arena), "attribute \"absent\"");
    attr = (cpl_ckpt_attr){.name = "step", .type = CPL_T_TEXT};
    expect(CPL_DAMAGED, cpl_checkpoint_read(path_of("f.h5"), NULL, NULL, 0, &attr, 1, arena),
           "attribute \"step\" is i64, expected text");
    expect(CPL_NOT_FOUND, cpl_checkpoint_verify(path_of("nowhere.h5")), "nowhere.h5");
    spill(path_of("text.h5"), "no HDF5 at all, but some text", 29);
    expect(CPL_DAMAGED, cpl_checkpoint_verify(path_of("text.h5")), "text.h5: expected a whole HDF5 file");
    spill(path_of("empty.h5"), "", 0);
    expect(CPL_DAMAGED, cpl_checkpoint_verify(path_of("empty.h5")), "empty.h5");

    w = a[0];
    w.n -= 70000; /* the last chunk belongs to nobody */
    expect(CPL_INTERNAL, cpl_checkpoint_write(path_of("f.h5"), NULL, &w, 1, NULL, 0), "leave out elements of array \"weights\"");
    w.n = w.total + 1;
    expect(CPL_INTERNAL, cpl_checkpoint_write(path_of("f.h5"), NULL, &w, 1, NULL, 0), "array \"weights\"");
    w = a[0];
    w.name = "a/b";
    expect(CPL_INTERNAL, cpl_checkpoint_write(path_of("f.h5"), NULL, &w, 1, NULL, 0), "no name");
    expect(CPL_IO, cpl_checkpoint_write(path_of("no/folder.h5"), NULL, a, ARRAYS, NULL, 0), "No such file");
    assert_ok(cpl_checkpoint_verify(path_of("f.h5"))); /* the older file, after four failures */
    cpl_arena_destroy(&arena);
    drop(a, ARRAYS);
}

static void test_checkpoint_newest_passes_over_damaged_and_foreign(void **state) {
    (void)state;
    cpl_ckpt_array a[SMALL];
    fill_small(a, 95);
    char path[256];
    int64_t step = 5;
    assert_int_equal(mkdir(path_of("steps"), 0777), 0);
    char steps[256];
    strcpy(steps, path_of("steps"));
    assert_ok(cpl_checkpoint_newest(path_of("nowhere"), path, sizeof path, &step));
    assert_int_equal(step, -1);
    assert_ok(cpl_checkpoint_newest(steps, path, sizeof path, &step));
    assert_int_equal(step, -1);
    static const char *const names[] = {"step-2.h5",       "step-10.h5", "step-100.h5",  "step-200.h5",
                                        "step-7x.h5",      "step-.h5",   "step-0300.h5", "step-99999999999999999999.h5",
                                        "step-400.h5.bak", "best.h5"};
    char name[128];
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        snprintf(name, sizeof name, "steps/%s", names[i]);
        assert_ok(cpl_checkpoint_write(path_of(name), NULL, a, SMALL, &small_attr, 1));
    }
    assert_ok(cpl_checkpoint_newest(steps, path, sizeof path, &step));
    assert_int_equal(step, 200);
    assert_string_equal(strrchr(path, '/'), "/step-200.h5");
    assert_int_equal(truncate(path, 500), 0);
    spill(path_of("steps/step-100.h5"), "", 0);
    spill(path_of("steps/step-500.h5.part"), "half", 4);
    assert_ok(cpl_checkpoint_newest(steps, path, sizeof path, &step));
    assert_int_equal(step, 10);
    expect(CPL_INPUT, cpl_checkpoint_newest(steps, path, 5, &step), "longer than 4 bytes");

    assert_ok(cpl_checkpoint_prune(steps, 3));
    assert_int_equal(access(path_of("steps/step-2.h5"), F_OK), -1);
    assert_int_equal(access(path_of("steps/step-500.h5.part"), F_OK), -1);
    static const char *const kept[] = {"step-10.h5", "step-100.h5", "step-200.h5", "step-7x.h5", "best.h5", "step-400.h5.bak"};
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        snprintf(name, sizeof name, "steps/%s", kept[i]);
        assert_int_equal(access(path_of(name), F_OK), 0);
    }
    assert_ok(cpl_checkpoint_prune(path_of("nowhere"), 1));
    drop(a, SMALL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_checkpoint_comes_back_bit_by_bit),
        cmocka_unit_test(test_checkpoint_any_part_can_be_read_alone),
        cmocka_unit_test(test_checkpoint_same_content_gives_the_same_bytes),
        cmocka_unit_test(test_checkpoint_names_what_does_not_fit),
        cmocka_unit_test(test_checkpoint_newest_passes_over_damaged_and_foreign),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}

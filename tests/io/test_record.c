/* Proves that records and results.h5 come back as they were told, that scales hold in every copy, and that damage is refused.
 * Refuses Python: what h5py and xarray need of the file (scales, types, orders) is asked of HDF5 itself. */
#include "io/base/rng.h"
#include "io/record.h"
#include "io/results_read.h"
#include "tests/io/file_rig.h"
#include <hdf5.h>
#include <hdf5_hl.h>
#include <math.h>

static const double losses[6] = {1, 2, 3, NAN, -0.0, 1e300};

/* A small sweep: two axes, one dimension without a coordinate, text of one letter, nothing along "event", a scalar, tables. */
static cpl_record *sweep(void) {
    static const char *const methods[] = {"magnitude", "größer"}, *const letters[] = {"a", "b"},
                             *const status[] = {"done", "", "failed"};
    static const double sparsity[] = {0, 0.5, 0.9};
    static const int64_t d[] = {2, 3, 4}, none = 0, answer = 42, trial[] = {0, 1, 2};
    static const char *const axes[] = {"method", "sparsity", "layer"}, *const letter = "letter", *const event = "event";
    static const float sqnr[24] = {[23] = 7.5F};
    cpl_record *r = NULL;
    assert_ok(cpl_record_create(&r));
    assert_ok(cpl_record_text(r, "kind", "draft"));
    assert_ok(cpl_record_f64(r, "wall_s", 1.5));
    assert_ok(cpl_record_i64(r, "key", -3));
    assert_ok(cpl_record_text(r, "kind", "sweep"));
    assert_ok(cpl_record_text(r, "empty", ""));
    assert_ok(
        cpl_record_array(r, "val_loss", CPL_T_F64, 2, d, axes, losses, "nat", "validation loss")); /* before its coordinates */
    assert_ok(cpl_record_array(r, "method", CPL_T_TEXT, 1, d, axes, methods, "", "how weights are chosen"));
    assert_ok(cpl_record_array(r, "sparsity", CPL_T_F64, 1, d + 1, axes + 1, sparsity, "1", "share removed"));
    assert_ok(cpl_record_array(r, "letter", CPL_T_TEXT, 1, d, &letter, letters, "", NULL));
    assert_ok(cpl_record_array(r, "sqnr_db", CPL_T_F32, 3, d, axes, sqnr, "dB", "per layer"));
    assert_ok(cpl_record_array(r, "event", CPL_T_I64, 1, &none, &event, NULL, NULL, "none happened"));
    assert_ok(cpl_record_array(r, "event_kind", CPL_T_TEXT, 1, &none, &event, NULL, "", "none happened"));
    assert_ok(cpl_record_array(r, "tokens", CPL_T_I64, 0, NULL, NULL, &answer, "token", "a scalar"));
    assert_ok(cpl_record_table_column(r, "trials", "trial", CPL_T_I64, 3, trial));
    assert_ok(cpl_record_table_column(r, "trials", "status", CPL_T_TEXT, 3, status));
    assert_ok(cpl_record_table_column(r, "trials", "val_loss", CPL_T_F64, 3, losses + 1));
    assert_ok(cpl_record_table_column(r, "events", "step", CPL_T_I64, 0, NULL));
    return r;
}

static void write_sweep(const char *path) {
    cpl_record *r = sweep();
    assert_ok(cpl_record_write(r, path));
    cpl_record_destroy(&r);
    assert_null(r);
}

static void write_results(const char *path) {
    cpl_record *root = NULL;
    write_sweep(path_of("part.h5"));
    char part[256];
    strcpy(part, path_of("part.h5"));
    const cpl_results_part parts[] = {{"corpus", part}, {"stages/teacher", part}, {"stages/grid", part}};
    assert_ok(cpl_record_create(&root));
    assert_ok(cpl_record_text(root, "schema_version", "1"));
    assert_ok(cpl_results_assemble(path, root, parts, 3));
    cpl_record_destroy(&root);
}

static void test_record_comes_back_as_it_was_told(void **state) {
    (void)state;
    write_sweep(path_of("r.h5"));
    assert_int_equal(access(path_of("r.h5.part"), F_OK), -1);
    cpl_arena *arena = NULL;
    char *text = NULL;
    char **texts = NULL;
    double number = 0;
    double *x = NULL;
    int64_t n = 0;
    assert_ok(cpl_arena_create(&arena));
    assert_ok(cpl_record_read_text(path_of("r.h5"), "kind", &text, arena));
    assert_string_equal(text, "sweep");
    assert_ok(cpl_record_read_text(path_of("r.h5"), "empty", &text, arena));
    assert_string_equal(text, "");
    assert_ok(cpl_record_read_f64(path_of("r.h5"), "wall_s", &number));
    assert_true(number == 1.5);
    assert_ok(cpl_record_read_f64(path_of("r.h5"), "key", &number));
    assert_true(number == -3);
    assert_ok(cpl_record_read_array(path_of("r.h5"), "val_loss", &x, &n, arena));
    assert_int_equal(n, 6);
    assert_memory_equal(x, losses, sizeof losses); /* NaN and -0 with their bits */
    assert_ok(cpl_record_read_array(path_of("r.h5"), "sqnr_db", &x, &n, arena));
    assert_int_equal(n, 24);
    assert_true(x[23] == 7.5);
    assert_ok(cpl_record_read_array(path_of("r.h5"), "tokens", &x, &n, arena));
    assert_int_equal(n, 1);
    assert_true(x[0] == 42);
    assert_ok(cpl_record_read_texts(path_of("r.h5"), "method", &texts, &n, arena));
    assert_int_equal(n, 2);
    assert_string_equal(texts[0], "magnitude");
    assert_string_equal(texts[1], "größer");
    assert_ok(cpl_record_read_texts(path_of("r.h5"), "event_kind", &texts, &n, arena));
    assert_int_equal(n, 0);

    expect(CPL_NOT_FOUND, cpl_record_read_text(path_of("nowhere.h5"), "kind", &text, arena), "nowhere.h5");
    expect(CPL_NOT_FOUND, cpl_record_read_text(path_of("r.h5"), "colour", &text, arena), "\"colour\"");
    expect(CPL_DAMAGED, cpl_record_read_text(path_of("r.h5"), "wall_s", &text, arena), "wall_s");
    expect(CPL_DAMAGED, cpl_record_read_f64(path_of("r.h5"), "kind", &number), "kind");
    expect(CPL_NOT_FOUND, cpl_record_read_array(path_of("r.h5"), "colour", &x, &n, arena), "colour");
    expect(CPL_DAMAGED, cpl_record_read_array(path_of("r.h5"), "method", &x, &n, arena), "text");
    expect(CPL_DAMAGED, cpl_record_read_texts(path_of("r.h5"), "val_loss", &texts, &n, arena), "text");
    cpl_arena_destroy(&arena);
}

static void test_record_a_name_told_again_replaces(void **state) {
    (void)state;
    cpl_record *r = NULL;
    cpl_arena *arena = NULL;
    double *x = NULL;
    int64_t n = 2;
    const char *dim = "step";
    const double first[] = {1, 2}, again[] = {3, 4, 5};
    assert_ok(cpl_arena_create(&arena));
    assert_ok(cpl_record_create(&r));
    assert_ok(cpl_record_array(r, "loss", CPL_T_F64, 1, &n, &dim, first, "nat", "loss"));
    n = 3; /* no other data set lies along step */
    assert_ok(cpl_record_array(r, "loss", CPL_T_F64, 1, &n, &dim, again, "nat", "loss"));
    assert_ok(cpl_record_write(r, path_of("again.h5")));
    assert_ok(cpl_record_read_array(path_of("again.h5"), "loss", &x, &n, arena));
    assert_int_equal(n, 3);
    assert_memory_equal(x, again, sizeof again);
    cpl_record_destroy(&r);
    cpl_arena_destroy(&arena);
}

static void test_record_contradictions_are_refused(void **state) {
    (void)state;
    cpl_record *r = sweep();
    const char *dim = "sparsity", *axis = "axis", *both[] = {"val_loss", "axis"};
    int64_t four = 4, minus = -1, nine[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, huge[2] = {INT64_MAX, 2}, two[2] = {2, 2};
    const char *nines[9] = {"a", "b", "c", "d", "e", "f", "g", "h", "i"};
    expect(CPL_INTERNAL, cpl_record_array(r, "x", CPL_T_F64, 1, &four, &dim, losses, "", ""), "4 elements along sparsity");
    expect(CPL_INTERNAL, cpl_record_array(r, "x", CPL_T_F64, 1, &minus, &axis, losses, "", ""), "-1 elements along axis");
    expect(CPL_INTERNAL, cpl_record_array(r, "x", CPL_T_F64, 9, nine, nines, losses, "", ""), "9 dimensions");
    expect(CPL_INTERNAL, cpl_record_array(r, "x", CPL_T_F64, 2, huge, nines, losses, "", ""), "x has");
    expect(CPL_INTERNAL, cpl_record_table_column(r, "trials", "late", CPL_T_I64, 2, losses), "2 rows");
    assert_ok(cpl_record_array(r, "x", CPL_T_F64, 2, two, both, losses, "", "")); /* val_loss is 2-D: no coordinate */
    expect(CPL_INTERNAL, cpl_record_write(r, path_of("c.h5")), "dimension val_loss has the name of a data set");
    assert_int_equal(access(path_of("c.h5"), F_OK), -1);
    assert_int_equal(access(path_of("c.h5.part"), F_OK), -1);
    cpl_record_destroy(&r);
    cpl_record_destroy(NULL);
}

/* --- what the tools of others look for --- */

static herr_t count_scale(hid_t set, unsigned dim, hid_t scale, void *name) {
    (void)set;
    (void)dim;
    return H5Iget_name(scale, name, 256) > 0 ? 0 : -1;
}

static void assert_scale(hid_t group, const char *set_name, unsigned dim, const char *want) {
    char found[256] = "";
    char full[600] = "";
    char inside[256] = "";
    hid_t set = H5Dopen2(group, set_name, H5P_DEFAULT);
    assert_true(set > 0);
    assert_int_equal(H5DSget_num_scales(set, dim), 1);
    assert_true(H5DSiterate_scales(set, dim, NULL, count_scale, found) >= 0);
    assert_true(H5Iget_name(group, inside, sizeof inside) > 0);
    snprintf(full, sizeof full, "%s/%s", inside[1] == '\0' ? "" : inside, want);
    assert_string_equal(found, full); /* in the same group, not in another copy */
    H5Dclose(set);
}

static void assert_like_netcdf(hid_t group) {
    static const char *const order[] = {"val_loss", "method", "sparsity", "letter", "sqnr_db",    "event",     "event_kind",
                                        "tokens",   "trials", "events",   "layer",  "trials_row", "events_row"};
    H5G_info_t about;
    assert_true(H5Gget_info(group, &about) >= 0);
    assert_int_equal(about.nlinks, 13);
    for (hsize_t i = 0; i < 13; i++) {
        char name[64];
        assert_true(H5Lget_name_by_idx(group, ".", H5_INDEX_CRT_ORDER, H5_ITER_INC, i, name, sizeof name, H5P_DEFAULT) > 0);
        assert_string_equal(name, order[i]);
        hid_t set = H5Dopen2(group, name, H5P_DEFAULT);
        hid_t plist = H5Dget_create_plist(set);
        unsigned flags = 0;
        assert_true(H5Pget_attr_creation_order(plist, &flags) >= 0);
        assert_int_equal(flags, H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED);
        if (strcmp(name, "tokens") == 0) {
            assert_int_equal(H5Pget_layout(plist), H5D_COMPACT);
        } else {
            assert_int_equal(H5Pget_nfilters(plist), 1);
            size_t none = 0;
            assert_int_equal(H5Pget_filter2(plist, 0, NULL, &none, NULL, 0, NULL, NULL), H5Z_FILTER_FLETCHER32);
        }
        H5Pclose(plist);
        H5Dclose(set);
    }
    assert_scale(group, "val_loss", 0, "method");
    assert_scale(group, "val_loss", 1, "sparsity");
    assert_scale(group, "sqnr_db", 0, "method");
    assert_scale(group, "sqnr_db", 1, "sparsity");
    assert_scale(group, "sqnr_db", 2, "layer");
    assert_scale(group, "event_kind", 0, "event");
    assert_scale(group, "trials", 0, "trials_row");
    char name[80] = "";
    hid_t layer = H5Dopen2(group, "layer", H5P_DEFAULT);
    assert_true(H5DSget_scale_name(layer, name, sizeof name) > 0);
    assert_string_equal(name, "This is a netCDF dimension but not a netCDF variable.         4");
    H5Dclose(layer);
}

static void assert_text(hid_t object, const char *name, const char *want) {
    hid_t attribute = H5Aopen(object, name, H5P_DEFAULT);
    hid_t type = H5Aget_type(attribute);
    assert_true(H5Tis_variable_str(type) > 0);
    assert_int_equal(H5Tget_cset(type), H5T_CSET_UTF8);
    char *text = NULL;
    assert_true(H5Aread(attribute, type, &text) >= 0);
    assert_string_equal(text, want);
    H5free_memory(text);
    H5Tclose(type);
    H5Aclose(attribute);
}

static void test_results_every_group_has_its_own_scales(void **state) {
    (void)state;
    write_results(path_of("results.h5"));
    hid_t file = H5Fopen(path_of("results.h5"), H5F_ACC_RDONLY, H5P_DEFAULT);
    assert_true(file > 0);
    static const char *const groups[] = {"corpus", "stages/teacher", "stages/grid"};
    for (size_t i = 0; i < 3; i++) {
        hid_t group = H5Gopen2(file, groups[i], H5P_DEFAULT);
        assert_true(group > 0);
        assert_like_netcdf(group);
        assert_text(group, "kind", "sweep");
        hid_t set = H5Dopen2(group, "val_loss", H5P_DEFAULT);
        assert_text(set, "units", "nat");
        assert_text(set, "long_name", "validation loss");
        double x[6];
        assert_true(H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, x) >= 0);
        assert_memory_equal(x, losses, sizeof x);
        H5Dclose(set);
        set = H5Dopen2(group, "letter", H5P_DEFAULT);
        assert_text(set, "_Encoding", "utf-8");
        hid_t type = H5Dget_type(set);
        assert_int_equal(H5Tget_size(type), 2); /* S1 would be a character dimension to xarray */
        H5Tclose(type);
        H5Dclose(set);
        H5Gclose(group);
    }
    hid_t root = H5Gopen2(file, "/", H5P_DEFAULT);
    assert_text(root, "schema_version", "1");
    H5Gclose(root);
    H5Fclose(file);
    hid_t part = H5Fopen(path_of("part.h5"), H5F_ACC_RDONLY, H5P_DEFAULT);
    hid_t group = H5Gopen2(part, "/", H5P_DEFAULT);
    assert_like_netcdf(group);
    H5Gclose(group);
    H5Fclose(part);
}

static void test_results_tables_and_arrays_are_read_back(void **state) {
    (void)state;
    write_results(path_of("results.h5"));
    cpl_arena *arena = NULL;
    cpl_results_table t = {0};
    double *x = NULL;
    int64_t n = 0;
    assert_ok(cpl_arena_create(&arena));
    assert_ok(cpl_results_table_read(path_of("results.h5"), "stages/grid/trials", &t, arena));
    assert_int_equal(t.rows, 3);
    assert_int_equal(t.n_columns, 3);
    assert_string_equal(cpl_results_column_find(&t, "status")->text[2], "failed");
    assert_string_equal(cpl_results_column_find(&t, "status")->text[1], "");
    assert_true(isnan(cpl_results_column_find(&t, "val_loss")->number[2]));
    assert_ok(cpl_results_array(path_of("results.h5"), "stages/grid/val_loss", &x, &n, arena));
    assert_int_equal(n, 6);
    assert_memory_equal(x, losses, sizeof losses);
    cpl_arena_destroy(&arena);
}

/* --- damage and failures --- */

static void test_record_same_content_gives_the_same_bytes(void **state) {
    (void)state;
    write_results(path_of("one.h5"));
    sleep(1); /* a time of writing would show */
    write_results(path_of("two.h5"));
    content one = slurp(path_of("one.h5"));
    content two = slurp(path_of("two.h5"));
    assert_int_equal(one.n, two.n);
    assert_memory_equal(one.bytes, two.bytes, one.n);
    free(one.bytes);
    free(two.bytes);
}

/* Flips are noticed anywhere, also in the heap of variable-length text, which HDF5 does not guard. */
static void test_record_flipped_bits_and_cuts_are_refused(void **state) {
    (void)state;
    write_sweep(path_of("d.h5"));
    content whole = slurp(path_of("d.h5"));
    cpl_arena *arena = NULL;
    char *text = NULL;
    double *x = NULL;
    int64_t n = 0;
    assert_ok(cpl_arena_create(&arena));
    const size_t line = strlen("\ncupel-sha256 ") + 64 + 1;
    const size_t found = (size_t)((unsigned char *)memmem(whole.bytes, whole.n, "sweep", 5) - whole.bytes);
    for (int i = 0; i < 300; i++) {
        uint32_t r[4];
        cpl_rng_block(2, CPL_RNG_TEST, 0, (uint64_t)i, r);
        size_t at = i == 0 ? found : r[0] % (whole.n - line);
        whole.bytes[at] ^= (unsigned char)(1u << (r[1] % 8));
        spill(path_of("bit.h5"), whole.bytes, whole.n);
        whole.bytes[at] ^= (unsigned char)(1u << (r[1] % 8));
        expect(CPL_DAMAGED, cpl_record_read_text(path_of("bit.h5"), "kind", &text, arena), "bit.h5: ");
        expect(CPL_DAMAGED, cpl_record_read_array(path_of("bit.h5"), "val_loss", &x, &n, arena), "bit.h5: ");
    }
    for (size_t cut = 0; cut < whole.n - line; cut += 211) {
        spill(path_of("cut.h5"), whole.bytes, cut);
        expect(CPL_DAMAGED, cpl_record_read_text(path_of("cut.h5"), "kind", &text, arena), "cut.h5: ");
    }
    spill(path_of("cut.h5"), whole.bytes, whole.n - line); /* as another program leaves it after a change */
    assert_ok(cpl_record_read_text(path_of("cut.h5"), "kind", &text, arena));
    assert_string_equal(text, "sweep");

    cpl_record *root = NULL;
    whole.bytes[found] ^= 1;
    spill(path_of("bit.h5"), whole.bytes, whole.n);
    char bad[256];
    strcpy(bad, path_of("bit.h5"));
    const cpl_results_part part = {"stages/grid", bad};
    assert_ok(cpl_record_create(&root));
    write_results(path_of("results.h5"));
    content before = slurp(path_of("results.h5"));
    expect(CPL_DAMAGED, cpl_results_assemble(path_of("results.h5"), root, &part, 1), "bit.h5: ");
    content after = slurp(path_of("results.h5"));
    assert_int_equal(before.n, after.n);
    assert_memory_equal(before.bytes, after.bytes, before.n);
    cpl_record_destroy(&root);
    cpl_arena_destroy(&arena);
    free(before.bytes);
    free(after.bytes);
    free(whole.bytes);
}

static void test_results_any_failing_write_leaves_the_older_file(void **state) {
    (void)state;
    write_results(path_of("w.h5"));
    char part[256];
    strcpy(part, path_of("part.h5"));
    const cpl_results_part parts[] = {{"corpus", part}, {"stages/grid", part}};
    content before = slurp(path_of("w.h5"));
    cpl_record *root = sweep();
    long failures = 0;
    for (;; failures++) {
        writes_left = failures;
        cpl_status st = cpl_results_assemble(path_of("w.h5"), root, parts, 2);
        writes_left = -1;
        if (st == CPL_OK) {
            break;
        }
        expect(CPL_IO, st, "w.h5.part: cannot be written: Disk quota exceeded");
        assert_int_equal(access(path_of("w.h5.part"), F_OK), -1);
        content after = slurp(path_of("w.h5"));
        assert_int_equal(before.n, after.n);
        assert_memory_equal(before.bytes, after.bytes, before.n);
        free(after.bytes);
    }
    assert_true(failures >= 5);
    cpl_record_destroy(&root);
    free(before.bytes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_record_comes_back_as_it_was_told),
        cmocka_unit_test(test_record_a_name_told_again_replaces),
        cmocka_unit_test(test_record_contradictions_are_refused),
        cmocka_unit_test(test_results_every_group_has_its_own_scales),
        cmocka_unit_test(test_results_tables_and_arrays_are_read_back),
        cmocka_unit_test(test_record_same_content_gives_the_same_bytes),
        cmocka_unit_test(test_record_flipped_bits_and_cuts_are_refused),
        cmocka_unit_test(test_results_any_failing_write_leaves_the_older_file),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}

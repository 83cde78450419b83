/* Option tables: exact values in, canonical text out, errors that name what was expected.
 * Refuses to compare messages by a part of them: the whole line is the contract with people. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/fields.h"
#include "io/base/number.h"
#include "io/base/rng.h"
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ANY 1e308
#define DEMO_FIELDS(X)                                                                                                             \
    X(INT, steps, NULL, 1, 1e6, "steps", "optimizer steps")                                                                        \
    X(INT, batch, "8", 1, ANY, "", "sequences a step")                                                                             \
    X(INT, tokens, "1", 1, 1e18, "", "tokens in all")                                                                              \
    X(INT, shift, "0", -ANY, ANY, "", "any integer")                                                                               \
    X(REAL, lr, "6e-4", 0, 1, "", "peak learning rate")                                                                            \
    X(REAL, wide, "0", -ANY, ANY, "", "any number")                                                                                \
    X(BOOL, tied, "yes", 0, 0, "", "share the embedding")                                                                          \
    X(TEXT, name, NULL, 0, 0, "", "name of the stage")                                                                             \
    X(CHOICE, precision, "fp32", 0, 0, "fp32|bf16|fp16", "storage format")                                                         \
    X(DECIMAL, sparsity, "0.7", 0, 1, "", "share of the weights that become zero")                                                 \
    X(DECIMAL, free_ratio, "1/3", -ANY, ANY, "", "any fraction")                                                                   \
    X(INTS, layers, "0,2,5", 0, 96, "layer", "teacher layers kept")                                                                \
    X(TEXTS, train, "", 0, 0, "file", "training text")
typedef struct {
    DEMO_FIELDS(CPL_FIELD_MEMBER)
} demo;
#define CPL_FIELD_OWNER demo
static const cpl_field fields[] = {DEMO_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
enum { FIELDS = sizeof fields / sizeof *fields };

static cpl_arena *arena;
static demo options;

static int setup(void **state) {
    return cpl_arena_create(&arena) != CPL_OK || cpl_fields_default(fields, FIELDS, &options, arena) != CPL_OK;
}

static int teardown(void **state) {
    cpl_arena_destroy(&arena);
    return 0;
}

static cpl_status set(const char *name, const char *text) {
    const cpl_field *f = cpl_field_find(fields, FIELDS, name);
    assert_non_null(f);
    return cpl_field_set(f, &options, text, arena);
}

static const char *text_of(const char *name) {
    char *text;
    assert_int_equal(cpl_field_text(cpl_field_find(fields, FIELDS, name), &options, &text, arena), CPL_OK);
    return text;
}

static void refuses(const char *name, const char *text, const char *message) {
    demo before = options;
    assert_int_equal(set(name, text), CPL_USAGE);
    assert_string_equal(cpl_status_message(), message);
    assert_memory_equal(&before, &options, sizeof before); /* left as it was */
}

static void test_defaults_come_from_the_table(void **state) {
    assert_int_equal(options.steps, 0);
    assert_int_equal(options.batch, 8);
    assert_true(options.lr == 6e-4 && options.tied);
    assert_string_equal(options.name, "");
    assert_int_equal(options.precision, 0);
    assert_true(options.sparsity.num == 7 && options.sparsity.den == 10);
    assert_int_equal(options.layers.count, 3);
    assert_int_equal(options.layers.value[2], 5);
    assert_int_equal(options.train.count, 0);
}

static void test_a_wrong_default_is_our_error_and_names_the_option(void **state) {
    const cpl_field bad = {"heads", CPL_FIELD_INT, 0, "many", 1, 8, "", ""};
    int64_t heads;
    assert_int_equal(cpl_fields_default(&bad, 1, &heads, arena), CPL_INTERNAL);
    assert_non_null(strstr(cpl_status_message(), "default of option heads: expected an integer from 1 to 8, got 'many'"));
}

static void test_integers_are_exact_with_suffixes_and_powers(void **state) {
    static const struct {
        const char *text;
        int64_t value;
    } row[] = {{"7", 7},
               {"+7", 7},
               {"-12", -12},
               {"007", 7},
               {"64k", 64000},
               {"4Ki", 4096},
               {"3M", 3000000},
               {"2Mi", 2097152},
               {"1G", 1000000000},
               {"1Gi", 1073741824},
               {"1.5k", 1500},
               {"1e6", 1000000},
               {"25e-1k", 2500},
               {"120e-1", 12},
               {"1.000", 1},
               {"0e99999", 0},
               {"0.5Ki", 512},
               {"9223372036854775807", INT64_MAX},
               {"-9223372036854775808", INT64_MIN}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        assert_int_equal(set("shift", row[i].text), CPL_OK);
        assert_int_equal(options.shift, row[i].value);
    }
    static const char *const bad[] = {"",
                                      "x",
                                      "1x",
                                      "1.5",
                                      "1e-1",
                                      "--1",
                                      "1 2",
                                      "0x10",
                                      "1e",
                                      "e5",
                                      ".",
                                      "1..",
                                      "1k5",
                                      "k",
                                      "10%",
                                      "4/2",
                                      "1_000",
                                      "nan",
                                      "1e19",
                                      "9223372036854775808",
                                      "-9223372036854775809",
                                      "1e99999999999",
                                      "99999999999999999999999999999999999999999999",
                                      " 7"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int64_t v;
        assert_false(cpl_number_integer(bad[i], &v));
    }
}

static void test_decimals_are_the_fraction_that_was_written(void **state) {
    static const struct {
        const char *text;
        int64_t num, den;
    } row[] = {{"0.7", 7, 10},
               {"70%", 7, 10},
               {"7/10", 7, 10},
               {"14/20", 7, 10},
               {"1e-3", 1, 1000},
               {"0", 0, 1},
               {"-0.25", -1, 4},
               {"1", 1, 1},
               {"1.10", 11, 10},
               {"0.5/0.25", 2, 1},
               {"12.5%", 1, 8},
               {"0.0%", 0, 1},
               {"-3/9", -1, 3},
               {"2e3", 2000, 1},
               {".5", 1, 2},
               {"0/5", 0, 1},
               {"1e-18", 1, 1000000000000000000},
               {"0.100000000000000000000000000000000", 1, 10},
               {"9223372036854775807", INT64_MAX, 1}};
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        assert_int_equal(set("free_ratio", row[i].text), CPL_OK);
        assert_int_equal(options.free_ratio.num, row[i].num);
        assert_int_equal(options.free_ratio.den, row[i].den);
    }
    static const char *const bad[] = {"", "x", "1/0", "1/", "/2", "1/-2", "1//2", "50%%", "1/2%", "0.7k", "1e-19", "1e19", "inf"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        cpl_decimal v;
        assert_false(cpl_number_decimal(bad[i], &v));
    }
}

static void test_a_decimal_on_the_bound_is_inside_it(void **state) {
    cpl_decimal v;
    const cpl_field bounded = {"share", CPL_FIELD_DECIMAL, 0, "0.1", 0.1, 0.7, "", ""};
    assert_int_equal(cpl_field_set(&bounded, &v, "0.7", arena), CPL_OK);
    assert_int_equal(cpl_field_set(&bounded, &v, "10%", arena), CPL_OK);
    assert_int_equal(cpl_field_set(&bounded, &v, "0.7000001", arena), CPL_USAGE);
}

static void test_reals_refuse_what_is_no_finite_decimal_number(void **state) {
    static const char *const bad[] = {"", "x", "inf", "nan", "0x1p3", "1e400", "1e-400", "1,5", "1.5 ", " 1", "1e", "--1", "1k"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double v;
        assert_false(cpl_number_real(bad[i], &v));
    }
    assert_int_equal(set("wide", "0e5"), CPL_OK);
    assert_int_equal(set("wide", "4.9406564584124654e-324"), CPL_OK); /* the smallest denormal is a value */
    assert_true(options.wide > 0);
}

static void test_every_real_comes_back_bit_for_bit_from_its_text(void **state) {
    for (uint64_t i = 0; i < 20000; i++) {
        uint32_t word[4];
        cpl_rng_block(5, CPL_RNG_TEST, 0, i, word);
        uint64_t bits = (uint64_t)word[1] << 32 | word[0];
        double value, back;
        memcpy(&value, &bits, sizeof value);
        if (!isfinite(value)) {
            continue;
        }
        char text[CPL_NUMBER_TEXT];
        cpl_number_real_text(value, text);
        assert_true(cpl_number_real(text, &back));
        assert_memory_equal(&value, &back, sizeof value);
    }
    assert_int_equal(set("lr", "0.1"), CPL_OK);
    assert_string_equal(text_of("lr"), "0.1"); /* the shortest, not 0.10000000000000001 */
    assert_int_equal(set("wide", "-0"), CPL_OK);
    assert_string_equal(text_of("wide"), "-0");
}

static void test_every_value_comes_back_from_its_canonical_text(void **state) {
    static const char *const row[][3] = {
        {"steps", "4Ki", "4096"},
        {"shift", "-9223372036854775808", "-9223372036854775808"},
        {"tied", "OFF", "false"},
        {"name", "a, b\\c", "a, b\\c"},
        {"precision", "fp16", "fp16"},
        {"sparsity", "70%", "0.7"},
        {"free_ratio", "-1/8", "-0.125"},
        {"free_ratio", "2/7", "2/7"},
        {"free_ratio", "-12", "-12"},
        {"free_ratio", "1e-18", "0.000000000000000001"},
        {"layers", "1, 2k ,3", NULL},
        {"layers", "1, 2 ,3", "1,2,3"},
        {"layers", "", ""},
        {"train", "a.txt,b c.txt", "a.txt,b c.txt"},
        {"train", "a\\,b,c\\\\,d\\e", "a\\,b,c\\\\,d\\\\e"},
        {"train", "", ""},
    };
    for (size_t i = 0; i < sizeof row / sizeof *row; i++) {
        cpl_status st = set(row[i][0], row[i][1]);
        if (row[i][2] == NULL) {
            assert_int_equal(st, CPL_USAGE);
            continue;
        }
        assert_int_equal(st, CPL_OK);
        const char *text = text_of(row[i][0]);
        assert_string_equal(text, row[i][2]);
        assert_int_equal(set(row[i][0], text), CPL_OK);
        assert_string_equal(text_of(row[i][0]), row[i][2]);
    }
}

static void test_commas_inside_texts_survive(void **state) {
    const char *const parts[] = {"a,b", "c\\", ",", "\\,"};
    const cpl_field *f = cpl_field_find(fields, FIELDS, "train");
    assert_int_equal(cpl_field_set_list(f, &options, parts, 4, arena), CPL_OK);
    const char *text = text_of("train");
    assert_int_equal(set("train", text), CPL_OK);
    assert_int_equal(options.train.count, 4);
    for (size_t i = 0; i < 4; i++) {
        assert_string_equal(options.train.value[i], parts[i]);
    }
}

static void test_errors_say_what_was_expected_and_leave_the_value(void **state) {
    refuses("steps", "x", "expected an integer from 1 to 1000000, got 'x'");
    refuses("steps", "0", "expected an integer from 1 to 1000000, got '0'");
    refuses("steps", "1000001", "expected an integer from 1 to 1000000, got '1000001'");
    refuses("batch", "0", "expected an integer of at least 1, got '0'");
    refuses("tokens", "2e18", "expected an integer from 1 to 1e18, got '2e18'");
    refuses("shift", "1.5", "expected an integer, got '1.5'");
    refuses("lr", "2", "expected a number from 0 to 1, got '2'");
    refuses("wide", "nan", "expected a number, got 'nan'");
    refuses("tied", "2", "expected true or false, got '2'");
    refuses("precision", "fp61", "expected one of fp32, bf16, fp16, got 'fp61'; did you mean 'fp16'?");
    refuses("precision", "double", "expected one of fp32, bf16, fp16, got 'double'");
    refuses("precision", "", "expected one of fp32, bf16, fp16, got ''");
    refuses("sparsity", "1.5", "expected a fraction from 0 to 1 (such as 0.7, 70% or 7/10), got '1.5'");
    refuses("layers", "1,97", "expected a list of integers from 0 to 96, got '97'");
    refuses("layers", "1,,2", "expected a list of integers from 0 to 96, got ''");
    refuses("layers", "1 2", "expected a list of integers from 0 to 96, got '1 2'");
    refuses("train", "a,,b", "expected a list of texts, none of them empty, got ''");
    refuses("steps", "1\n2", "expected an integer from 1 to 1000000, got '1 2'");
    refuses("steps", "123456789012345678901234567890123456789012345678901234567890x",
            "expected an integer from 1 to 1000000, got '123456789012345678901234567890123456789012345678901234567890...'");
}

static void test_a_list_is_refused_where_one_value_belongs(void **state) {
    const char *const parts[] = {"1", "2"};
    const cpl_field *f = cpl_field_find(fields, FIELDS, "steps");
    assert_int_equal(cpl_field_set_list(f, &options, parts, 2, arena), CPL_USAGE);
    assert_string_equal(cpl_status_message(), "expected an integer from 1 to 1000000, got a list");
    f = cpl_field_find(fields, FIELDS, "precision");
    assert_int_equal(cpl_field_set_list(f, &options, parts, 2, arena), CPL_USAGE);
    assert_string_equal(cpl_status_message(), "expected one of fp32, bf16, fp16, got a list");
}

static void test_names_are_found_with_either_dash_and_near_misses_are_named(void **state) {
    assert_ptr_equal(cpl_field_find(fields, FIELDS, "free-ratio"), cpl_field_find(fields, FIELDS, "free_ratio"));
    assert_null(cpl_field_find(fields, FIELDS, "free"));
    assert_null(cpl_field_find(fields, FIELDS, "free_ratios"));
    assert_string_equal(cpl_field_nearest(fields, FIELDS, "stpes"), "steps");
    assert_string_equal(cpl_field_nearest(fields, FIELDS, "Sparcity"), "sparsity");
    assert_string_equal(cpl_field_nearest(fields, FIELDS, "free-rato"), "free_ratio");
    assert_null(cpl_field_nearest(fields, FIELDS, "temperature"));
    assert_null(cpl_field_nearest(fields, FIELDS, ""));
    char huge[1000];
    memset(huge, 'l', sizeof huge - 1);
    huge[sizeof huge - 1] = '\0';
    assert_null(cpl_field_nearest(fields, FIELDS, huge));
    const char *const words[] = {"train", "trail", "rain"};
    assert_string_equal(cpl_nearest_word(words, 3, "tarin"), "train");
    assert_string_equal(cpl_nearest_word(words, 3, "trail"), "trail");
    assert_null(cpl_nearest_word(words, 0, "train"));
}

static void hash_of(char hex[CPL_SHA256_HEX]) {
    cpl_sha256 h;
    cpl_sha256_init(&h);
    assert_int_equal(cpl_fields_hash(fields, FIELDS, &options, &h), CPL_OK);
    cpl_sha256_end(&h, hex);
}

static void test_hash_depends_on_values_and_not_on_spelling(void **state) {
    char first[CPL_SHA256_HEX], again[CPL_SHA256_HEX];
    hash_of(first);
    assert_int_equal(set("sparsity", "70%"), CPL_OK);
    assert_int_equal(set("lr", "0.0006"), CPL_OK);
    assert_int_equal(set("tied", "true"), CPL_OK);
    hash_of(again);
    assert_string_equal(first, again);
    static const char *const change[][2] = {
        {"steps", "2"}, {"batch", "9"},        {"lr", "0.0006000000000000001"},      {"tied", "no"},
        {"name", "x"},  {"precision", "bf16"}, {"sparsity", "0.700000000000000001"}, {"layers", "0,2"},
        {"train", "a"}};
    for (size_t i = 0; i < sizeof change / sizeof *change; i++) {
        assert_int_equal(set(change[i][0], change[i][1]), CPL_OK);
        hash_of(again);
        assert_string_not_equal(first, again);
        strcpy(first, again);
    }
}

static void test_help_is_aligned_and_fits_100_columns(void **state) {
    static const cpl_field many[] = {
        {
            "micro_batch",
            CPL_FIELD_INT,
            0,
            "8",
            1,
            4096,
            "sequences",
            "sequences a rank puts through the model at once",
        },
        {"a_very_long_option_name_indeed_too_long", CPL_FIELD_TEXT, 0, NULL, 0, 0, "", "its help begins on a line of its own"},
        {"schedule", CPL_FIELD_CHOICE, 0, "cosine", 0, 0, "constant|cosine|linear|warmup_stable_decay",
         "how the learning rate moves after the warm-up, over all the steps that were asked for"},
        {"precision", CPL_FIELD_CHOICE, 0, "fp32", 0, 0, "fp32|bf16|fp16", "storage format"},
        {"seed", CPL_FIELD_INT, 0, "42", 0, ANY, "", "of everything random"},
        {"width", CPL_FIELD_INT, 0, NULL, 1, ANY, "", "hidden size"}};
    static const char *const expected =
        "  --micro-batch SEQUENCES     sequences a rank puts through the model at once (1 to 4096; default 8)\n"
        "  --a-very-long-option-name-indeed-too-long TEXT\n"
        "                              its help begins on a line of its own (required)\n"
        "  --schedule WORD             how the learning rate moves after the warm-up, over all the steps that\n"
        "                              were asked for: constant, cosine, linear, warmup_stable_decay (default\n"
        "                              cosine)\n"
        "  --precision fp32|bf16|fp16  storage format (default fp32)\n"
        "  --seed N                    of everything random (default 42)\n"
        "  --width N                   hidden size (at least 1; required)\n";
    FILE *file = tmpfile();
    assert_non_null(file);
    fflush(stdout);
    int kept = dup(STDOUT_FILENO);
    assert_true(kept >= 0 && dup2(fileno(file), STDOUT_FILENO) >= 0);
    cpl_fields_help(many, sizeof many / sizeof *many);
    fflush(stdout);
    assert_true(dup2(kept, STDOUT_FILENO) >= 0);
    close(kept);
    char text[4096];
    rewind(file);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    for (const char *line = text; *line != '\0'; line += strcspn(line, "\n") + 1) {
        assert_true(strcspn(line, "\n") <= 100);
    }
    assert_string_equal(text, expected);
}

int main(void) {
#define EACH(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        EACH(test_defaults_come_from_the_table),
        EACH(test_a_wrong_default_is_our_error_and_names_the_option),
        EACH(test_integers_are_exact_with_suffixes_and_powers),
        EACH(test_decimals_are_the_fraction_that_was_written),
        EACH(test_a_decimal_on_the_bound_is_inside_it),
        EACH(test_reals_refuse_what_is_no_finite_decimal_number),
        EACH(test_every_real_comes_back_bit_for_bit_from_its_text),
        EACH(test_every_value_comes_back_from_its_canonical_text),
        EACH(test_commas_inside_texts_survive),
        EACH(test_errors_say_what_was_expected_and_leave_the_value),
        EACH(test_a_list_is_refused_where_one_value_belongs),
        EACH(test_names_are_found_with_either_dash_and_near_misses_are_named),
        EACH(test_hash_depends_on_values_and_not_on_spelling),
        EACH(test_help_is_aligned_and_fits_100_columns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

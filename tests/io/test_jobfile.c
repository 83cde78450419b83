/* Job files: every refusal with its whole line, and no crash on any bytes.
 * Refuses to compare messages by a part of them: file, line and column are what they are for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "io/base/rng.h"
#include "io/jobfile.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STAGE_FIELDS(X)                                                                                                            \
    X(INT, layers, NULL, 1, 96, "", "")                                                                                            \
    X(INT, micro_batch, "8", 1, 4096, "", "")                                                                                      \
    X(REAL, lr, "6e-4", 0, 1, "", "")                                                                                              \
    X(CHOICE, precision, "fp32", 0, 0, "fp32|bf16|fp16", "")                                                                       \
    X(DECIMAL, sparsity, "0", 0, 1, "", "")                                                                                        \
    X(BOOL, tied, "yes", 0, 0, "", "")                                                                                             \
    X(TEXT, name, NULL, 0, 0, "", "")                                                                                              \
    X(INTS, bits, "8", 2, 8, "", "")                                                                                               \
    X(TEXTS, files, "", 0, 0, "", "")
typedef struct {
    STAGE_FIELDS(CPL_FIELD_MEMBER)
} stage;
#define CPL_FIELD_OWNER stage
static const cpl_field fields[] = {STAGE_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
enum { FIELDS = sizeof fields / sizeof *fields };

static const char *const good = "name: kjv\n"
                                "seed: 42   # of everything\n"
                                "corpus: {train: [kjv.txt, 'two, three.txt'], tokenizer: {kind: bpe, vocab: 4096}}\n"
                                "stages:\n"
                                "  - train:   {name: teacher, layers: 6, lr: 6e-4,\n"
                                "              precision: fp16}\n"
                                "  - sweep:\n"
                                "      name: \"gr\\u0069d\"\n"
                                "      quantize: {scheme: [uniform, log], bits: [8, 4, 3, 2]}\n"
                                "      note: |\n"
                                "        two\n"
                                "        lines\n";

static cpl_arena *arena;
static cpl_node *root;

static int setup(void **state) {
    return cpl_arena_create(&arena) != CPL_OK;
}

static int teardown(void **state) {
    cpl_arena_destroy(&arena);
    return 0;
}

static cpl_status parse(const char *text) {
    return cpl_jobfile_parse(text, strlen(text), "job.yaml", &root, arena);
}

static void refuses_bytes(const char *text, size_t bytes, const char *message) {
    assert_int_equal(cpl_jobfile_parse(text, bytes, "job.yaml", &root, arena), CPL_USAGE);
    assert_null(root);
    assert_string_equal(cpl_status_message(), message);
}

static void refuses(const char *text, const char *message) {
    refuses_bytes(text, strlen(text), message);
}

static void stands_at(const cpl_node *node, int line, int column) {
    assert_non_null(node);
    assert_int_equal(node->line, line);
    assert_int_equal(node->column, column);
    assert_string_equal(node->file, "job.yaml");
}

static void test_a_good_file_is_a_tree_with_places(void **state) {
    assert_int_equal(parse(good), CPL_OK);
    assert_int_equal(root->kind, CPL_NODE_MAPPING);
    assert_int_equal(root->count, 4);
    assert_string_equal(cpl_node_get(root, "name")->text, "kjv");
    stands_at(cpl_node_get(root, "seed"), 2, 7);
    stands_at(root->key[1], 2, 1);
    const cpl_node *train = cpl_node_get(cpl_node_get(root, "corpus"), "train");
    assert_int_equal(train->kind, CPL_NODE_SEQUENCE);
    assert_string_equal(train->item[1]->text, "two, three.txt");
    stands_at(train->item[1], 3, 27);
    const cpl_node *stages = cpl_node_get(root, "stages");
    assert_int_equal(stages->count, 2);
    stands_at(stages->item[0], 5, 5);
    stands_at(cpl_node_get(cpl_node_get(stages->item[0], "train"), "precision"), 6, 26);
    const cpl_node *sweep = cpl_node_get(stages->item[1], "sweep");
    assert_string_equal(cpl_node_get(sweep, "name")->text, "grid");
    assert_string_equal(cpl_node_get(sweep, "note")->text, "two\nlines\n");
    assert_null(cpl_node_get(root, "nothing"));
    assert_null(cpl_node_get(train, "name")); /* no mapping */
}

static void test_columns_count_characters_and_windows_files_count_lines_once(void **state) {
    assert_int_equal(parse("\xEF\xBB\xBFname: caf\xC3\xA9 # \xE2\x82\xAC\r\nk\xC3\xA9y: v\r\n"), CPL_OK);
    stands_at(root->key[1], 2, 1);
    stands_at(root->item[1], 2, 6);
    assert_string_equal(cpl_node_get(root, "name")->text, "caf\xC3\xA9");
}

static void test_empty_text_is_an_empty_value(void **state) {
    static const char *const empty[] = {"", "\n\n", "# only a comment\n"};
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(parse(empty[i]), CPL_OK);
        assert_int_equal(root->kind, CPL_NODE_SCALAR);
        assert_string_equal(root->text, "");
    }
}

static void test_what_yaml_has_and_job_files_have_not(void **state) {
    refuses("a: 1\nb: &x 2\n", "job.yaml:2:4: anchor &x: job files have no anchors and aliases, write the value out");
    refuses("b: &x [1]\n", "job.yaml:1:4: anchor &x: job files have no anchors and aliases, write the value out");
    refuses("&root\na: 1\n", "job.yaml:1:1: anchor &root: job files have no anchors and aliases, write the value out");
    refuses("a: 1\nb: *x\n", "job.yaml:2:4: alias *x: job files have no anchors and aliases, write the value out");
    refuses("*x : 1\n", "job.yaml:1:1: alias *x: job files have no anchors and aliases, write the value out");
    refuses("a: !!int 3\n", "job.yaml:1:4: tag tag:yaml.org,2002:int: job files have no tags, the option says which type it wants");
    refuses("a:\n  - !mine {b: 1}\n", "job.yaml:2:5: tag !mine: job files have no tags, the option says which type it wants");
    refuses("a: {b: 1}\nc:\n  <<: {d: 1}\n", "job.yaml:3:3: merge key <<: job files have no merges, write the options out");
    refuses("a: 1\n---\nb: 2\n", "job.yaml:2:1: a second document begins here; a job file is one");
    refuses("? [1, 2]\n: 3\n", "job.yaml:1:3: expected a key (one word), got a list");
    refuses("{a: 1}: 3\n", "job.yaml:1:1: expected a key (one word), got a mapping");
}

static void test_duplicate_keys_name_the_first(void **state) {
    refuses("lr: 1\nsteps: 2\nlr: 3\n", "job.yaml:3:1: key 'lr' stands twice; the first is in line 1");
    refuses("a:\n  - {lr: 1,\n     lr: 2}\n", "job.yaml:3:6: key 'lr' stands twice; the first is in line 2");
    refuses("'lr': 1\n\"l\\u0072\": 3\n", "job.yaml:2:1: key 'lr' stands twice; the first is in line 1");
    assert_int_equal(parse("a: {lr: 1}\nb: {lr: 1}\n"), CPL_OK);
}

static void test_syntax_errors_stand_where_they_are(void **state) {
    refuses("a: [1, 2\nb: 3\n",
            "job.yaml:2:2: did not find expected ',' or ']' (while parsing a flow sequence that began in line 1)");
    refuses("a: 1\n b: 2\n", "job.yaml:2:3: mapping values are not allowed in this context");
    refuses("a: 1\n\tb: 2\n", "job.yaml:2:1: a tab: YAML is indented with spaces");
    refuses("a: \xC3\xA9\nb:\n\t- x\n", "job.yaml:3:1: a tab: YAML is indented with spaces");
    refuses("a: 'open\n", "job.yaml:2:1: found unexpected end of stream (while scanning a quoted scalar that began in line 1)");
    refuses("a: @x\n", "job.yaml:1:4: found character that cannot start any token (while scanning for the next token)");
    refuses("a: \"\\q\"\n", "job.yaml:1:5: found unknown escape character (while parsing a quoted scalar)");
    refuses("a: 1\nb\nc: 2\n", "job.yaml:3:1: could not find expected ':' (while scanning a simple key that began in line 2)");
    refuses("a: 1\n- b\n", "job.yaml:2:1: did not find expected key (while parsing a block mapping that began in line 1)");
    refuses("%YAML 9.9\n---\na: 1\n", "job.yaml:1:1: found incompatible YAML document");
}

static void test_bytes_that_are_no_text(void **state) {
    refuses("a: 1\nb: x\xFF\n", "job.yaml:2:5: byte 0xFF is not UTF-8");
    refuses("b: \xC3\xA9\xC0\x80\n", "job.yaml:1:5: byte 0xC0 is not UTF-8");
    refuses("b: \xED\xA0\x80\n", "job.yaml:1:4: byte 0xED is not UTF-8"); /* a surrogate */
    refuses("b: \xE2\x82", "job.yaml:1:4: byte 0xE2 is not UTF-8");
    refuses("a: 1\r\nb: \x07\n", "job.yaml:2:4: character U+0007 is not allowed here");
    refuses("b: \xC2\x81\n", "job.yaml:1:4: character U+0081 is not allowed here");
    refuses("b: \xEF\xBF\xBE\n", "job.yaml:1:4: character U+FFFE is not allowed here");
    refuses("b: \x7F\n", "job.yaml:1:4: character U+007F is not allowed here");
    refuses_bytes("a: 1\nb: \0 2\n", 12, "job.yaml:2:4: a 0 byte: this is no text file");
    refuses_bytes("\xFF\xFE"
                  "a\0:\0",
                  6, "job.yaml:1:1: byte 0xFF is not UTF-8"); /* UTF-16 */
    refuses("a: \"x\\0y\"\n", "job.yaml:1:4: a text with a \\0 in it");
}

static void test_too_deep_too_large_too_many(void **state) {
    char text[200] = "a: ";
    memset(text + 3, '[', 31);
    memset(text + 34, ']', 31);
    assert_int_equal(parse(text), CPL_OK);
    memset(text + 3, '[', 32);
    memset(text + 35, ']', 32);
    refuses(text, "job.yaml:1:35: nested deeper than 32");
    static char big[(1 << 20) + 2];
    memset(big, '[', sizeof big - 1);
    refuses_bytes(big, 1 << 20, "job.yaml:1:33: nested deeper than 32");
    refuses_bytes(big, (1 << 20) + 1, "job.yaml: over 1048576 bytes: this is no job file");
    size_t used = 0;
    for (int i = 0; i < 1025; i++) {
        used += (size_t)snprintf(big + used, sizeof big - used, "k%d: 1\n", i);
    }
    refuses_bytes(big, used, "job.yaml:1025:1: over 1024 keys in one mapping");
    for (used = 0; used + 4 < 1 << 20; used += 4) {
        memcpy(big + used, "- 1\n", 4);
    }
    assert_int_equal(cpl_jobfile_parse(big, used, "job.yaml", &root, arena), CPL_OK);
    assert_int_equal(root->count, used / 4);
}

static stage bound;

static cpl_status bind_text(const char *text) {
    static const char *const others[] = {"model", "finetune"};
    cpl_status st = cpl_fields_default(fields, FIELDS, &bound, arena);
    assert_int_equal(st, CPL_OK);
    st = parse(text);
    assert_int_equal(st, CPL_OK);
    return cpl_node_bind(root, fields, FIELDS, &bound, others, 2, "stage train", arena);
}

static void bind_refuses(const char *text, const char *message) {
    assert_int_equal(bind_text(text), CPL_USAGE);
    assert_string_equal(cpl_status_message(), message);
}

static void test_binding_sets_what_is_named_and_leaves_the_rest(void **state) {
    assert_int_equal(bind_text("name: t\nlayers: 6\nmicro-batch: 4Ki\nprecision: bf16\nsparsity: 70%\ntied: off\nbits: [8, 4]\n"
                               "files: ['a,b.txt', c.txt]\nmodel: {any: thing}\nfinetune: [1]\n"),
                     CPL_OK);
    assert_string_equal(bound.name, "t");
    assert_int_equal(bound.layers, 6);
    assert_int_equal(bound.micro_batch, 4096);
    assert_int_equal(bound.precision, 1);
    assert_true(bound.sparsity.num == 7 && bound.sparsity.den == 10 && !bound.tied && bound.lr == 6e-4);
    assert_true(bound.bits.count == 2 && bound.bits.value[1] == 4);
    assert_int_equal(bound.files.count, 2);
    assert_string_equal(bound.files.value[0], "a,b.txt");
    assert_int_equal(bind_text("{name: t, layers: 6, bits: '8,4,2', files: one.txt}"), CPL_OK);
    assert_int_equal(bound.bits.count, 3);
    assert_string_equal(bound.files.value[0], "one.txt");
    assert_int_equal(bind_text("{name: t, layers: 6, bits: [], files: []}"), CPL_OK);
    assert_int_equal(bound.bits.count, 0);
}

static void test_unknown_options_name_the_nearest(void **state) {
    bind_refuses("name: t\nlayres: 6\n", "job.yaml:2:1: stage train: unknown option 'layres'; did you mean 'layers'?");
    bind_refuses("{name: t, precission: fp16}\n",
                 "job.yaml:1:11: stage train: unknown option 'precission'; did you mean 'precision'?");
    bind_refuses("modle: 1\n", "job.yaml:1:1: stage train: unknown option 'modle'; did you mean 'model'?");
    bind_refuses(
        "  temperature: 1\n",
        "job.yaml:1:3: stage train: unknown option 'temperature'; expected one of layers, micro_batch, lr, precision, sparsity, "
        "tied, name, bits, files, model, finetune");
}

static void test_wrong_values_name_the_option_and_the_place(void **state) {
    bind_refuses("name: t\nlayers: 0\n", "job.yaml:2:9: stage train: layers: expected an integer from 1 to 96, got '0'");
    bind_refuses("layers: six\n", "job.yaml:1:9: stage train: layers: expected an integer from 1 to 96, got 'six'");
    bind_refuses("layers:\n", "job.yaml:1:8: stage train: layers: expected an integer from 1 to 96, got ''");
    bind_refuses("layers: [6]\n", "job.yaml:1:9: stage train: layers: expected an integer from 1 to 96, got a list");
    bind_refuses("layers: {a: 6}\n", "job.yaml:1:9: stage train: layers: expected a value, got a mapping");
    bind_refuses("precision: fp61\n",
                 "job.yaml:1:12: stage train: precision: expected one of fp32, bf16, fp16, got 'fp61'; did you mean 'fp16'?");
    bind_refuses("bits: [8, 4,\n  9]\n", "job.yaml:2:3: stage train: bits: expected a list of integers from 2 to 8, got '9'");
    bind_refuses("bits: [8, [4]]\n", "job.yaml:1:11: stage train: bits: expected a single value in the list, got a list");
    bind_refuses("files: [a, {b: c}]\n", "job.yaml:1:12: stage train: files: expected a single value in the list, got a mapping");
    bind_refuses("files: [a, '']\n", "job.yaml:1:12: stage train: files: expected a list of texts, none of them empty, got ''");
    bind_refuses("- layers: 3\n", "job.yaml:1:1: stage train: expected a mapping (option: value), got a list");
    bind_refuses("layers\n", "job.yaml:1:1: stage train: expected a mapping (option: value), got a single value");
}

static void test_required_options_are_asked_for_together(void **state) {
    bind_refuses("lr: 0.1\n", "job.yaml:1:1: stage train: options 'layers', 'name' are required");
    bind_refuses("  name: t\n", "job.yaml:1:3: stage train: option 'layers' is required");
}

static void test_two_spellings_of_one_option_are_refused(void **state) {
    bind_refuses("name: t\nmicro_batch: 8\nmicro-batch: 4\n",
                 "job.yaml:3:1: stage train: option 'micro_batch' stands twice; the first is in line 2");
}

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static void test_files_that_are_missing_empty_or_no_mapping(void **state) {
    char path[] = "test_jobfile_XXXXXX", message[256];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    write_file(path, good);
    assert_int_equal(cpl_jobfile_read(path, &root, arena), CPL_OK);
    assert_string_equal(root->file, path);
    static const char *const bad[][2] = {{"", "expected a mapping (name: value), got nothing: the file is empty"},
                                         {"- a\n", "expected a mapping (name: value), got a list"},
                                         {"word\n", "expected a mapping (name: value), got a text"}};
    for (size_t i = 0; i < 3; i++) {
        write_file(path, bad[i][0]);
        assert_int_equal(cpl_jobfile_read(path, &root, arena), CPL_USAGE);
        snprintf(message, sizeof message, "%s:1:1: %s", path, bad[i][1]);
        assert_string_equal(cpl_status_message(), message);
        assert_null(root);
    }
    assert_int_equal(truncate(path, (1 << 20) + 1), 0);
    assert_int_equal(cpl_jobfile_read(path, &root, arena), CPL_USAGE);
    snprintf(message, sizeof message, "%s: over 1048576 bytes: this is no job file", path);
    assert_string_equal(cpl_status_message(), message);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(cpl_jobfile_read(path, &root, arena), CPL_NOT_FOUND);
    snprintf(message, sizeof message, "%s: cannot be opened: No such file or directory", path);
    assert_string_equal(cpl_status_message(), message);
    assert_int_equal(cpl_jobfile_read("/", &root, arena), CPL_IO);
    assert_string_equal(cpl_status_message(), "/: cannot be read: Is a directory");
}

/* Replaces, inserts, deletes or copies a few bytes of a good file; each mutation is a function of its number. */
static size_t mutate(char *text, size_t bytes, uint64_t number) {
    static const char odd[] = "{}[]:,-#&*!|>'\"%@`?<~ \n\t\r\\0\x80\xFF\xC3";
    uint32_t w[4];
    cpl_rng_block(11, CPL_RNG_TEST, 0, number, w);
    for (uint32_t edit = 0; edit <= w[3] % 6; edit++) {
        cpl_rng_block(11, CPL_RNG_TEST, edit + 1, number, w);
        size_t at = w[0] % bytes;
        char c = w[1] % 4 == 0 ? (char)(w[2] >> 8) : odd[w[2] % (sizeof odd - 1)];
        size_t run = 1 + w[2] % 20, left = bytes - at;
        switch (w[1] / 4 % 4) {
        case 0:
            text[at] = c;
            break;
        case 1:
            memmove(text + at + 1, text + at, left);
            text[at] = c;
            bytes++;
            break;
        case 2:
            run = run < left ? run : left - 1;
            memmove(text + at, text + at + run, left - run);
            bytes -= run;
            break;
        default:
            memmove(text + at, text + w[2] % bytes, run < left && w[2] % bytes + run < bytes ? run : 0);
            break;
        }
    }
    return bytes;
}

static void test_no_mutation_of_a_good_file_crashes_or_fails_without_a_place(void **state) {
    int refused = 0;
    for (uint64_t number = 0; number < 6000; number++) {
        char text[2048];
        size_t bytes = strlen(good);
        memcpy(text, good, bytes);
        bytes = mutate(text, bytes, number);
        char *exact = malloc(bytes); /* so that the sanitizer sees a read past the end */
        cpl_arena *own = NULL;
        assert_non_null(exact);
        memcpy(exact, text, bytes);
        assert_int_equal(cpl_arena_create(&own), CPL_OK);
        cpl_status st = cpl_jobfile_parse(exact, bytes, "job.yaml", &root, own);
        if (st != CPL_OK) {
            int line = 0, column = 0;
            assert_int_equal(st, CPL_USAGE);
            assert_int_equal(sscanf(cpl_status_message(), "job.yaml:%d:%d: ", &line, &column), 2);
            assert_true(line >= 1 && column >= 1);
            refused++;
        } else {
            stage s;
            assert_int_equal(cpl_fields_default(fields, FIELDS, &s, own), CPL_OK);
            cpl_node_bind(root, fields, FIELDS, &s, NULL, 0, "", own);
        }
        cpl_arena_destroy(&own);
        free(exact);
    }
    assert_true(refused > 1000 && refused < 5900); /* the mutations reach both sides */
}

int main(void) {
#define EACH(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
    const struct CMUnitTest tests[] = {
        EACH(test_a_good_file_is_a_tree_with_places),
        EACH(test_columns_count_characters_and_windows_files_count_lines_once),
        EACH(test_empty_text_is_an_empty_value),
        EACH(test_what_yaml_has_and_job_files_have_not),
        EACH(test_duplicate_keys_name_the_first),
        EACH(test_syntax_errors_stand_where_they_are),
        EACH(test_bytes_that_are_no_text),
        EACH(test_too_deep_too_large_too_many),
        EACH(test_binding_sets_what_is_named_and_leaves_the_rest),
        EACH(test_unknown_options_name_the_nearest),
        EACH(test_wrong_values_name_the_option_and_the_place),
        EACH(test_required_options_are_asked_for_together),
        EACH(test_two_spellings_of_one_option_are_refused),
        EACH(test_files_that_are_missing_empty_or_no_mapping),
        EACH(test_no_mutation_of_a_good_file_crashes_or_fails_without_a_place),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

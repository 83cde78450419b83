/* Jobs: from file and settings to options, and back to a file that gives the same job; what is refused, and where.
 * Refuses a resolved job that differs from its source in one key. */
#include "tests/jobs/study/job_rig.h"
#include "io/base/rng.h"
#include <stdlib.h>

static const char whole[] =
    "name: kjv\n"
    "seed: 7\n"
    "corpus: {train: [\"a,b.txt\", \"c\\\\d \\\"e\\\".txt\", ü.txt], held_out: 0.05}\n"
    "run: {threads: 3, checkpoint_every: 50}\n"
    "stages:\n"
    "  - train: {name: teacher, layers: 2, heads: 2, width: 64, context: 32, steps: 10, precision: fp16, lr: 1e-3}\n"
    "  - distill: {name: student, teacher: teacher, teacher_layers: [0, 1], temperature: 3.7, alpha: 0.1}\n"
    "  - prune: {name: pruned, model: teacher, sparsity: 1/3, finetune_steps: 5}\n"
    "  - quantize: {name: int4, model: pruned, bits: 4, granularity: group16}\n"
    "  - eval: {model: int4}\n"
    "  - sweep:\n"
    "      model: [teacher, student]\n"
    "      prune: {sparsity: [0, 0.7], lr: 1e-4}\n"
    "      quantize: {bits: [16, 8, 4], granularity: [channel, group64]}\n"
    "      objective: {memory: 0.1, latency: 0.25}\n"
    "      pareto: [val_loss, latency]\n";
#define HEAD   "corpus: {train: [a.txt]}\nstages:\n"
#define SIMPLE HEAD "  - train: {name: teacher, steps: 10}\n"

static void test_a_job_file_sets_options_and_leaves_the_rest_at_their_defaults(void **state) {
    cpl_job *job = rig_job(whole);
    assert_string_equal(job->name, "kjv");
    assert_int_equal(job->seed, 7);
    assert_int_equal(job->corpus.train.count, 3);
    assert_string_equal(job->corpus.train.value[0], "a,b.txt");
    assert_string_equal(job->corpus.train.value[1], "c\\d \"e\".txt");
    assert_true(job->corpus.held_out == 0.05 && job->corpus.vocab == 0);
    assert_int_equal(job->run.threads, 3);
    assert_int_equal(job->run.keep_checkpoints, 2);
    assert_int_equal(job->n_stages, 6);
    const cpl_train_options *t = job->stage[0].options;
    assert_int_equal(t->shape.layers, 2);
    assert_int_equal(t->steps, 10);
    assert_int_equal(t->training.precision, CPL_PRECISION_FP16);
    assert_int_equal(t->training.global_batch, 64);
    assert_true(t->training.beta2 == 0.95);
    assert_string_equal(job->stage[4].name, "eval"); /* after its kind */
    assert_int_equal(job->stage[5].n_inputs, 2);
    assert_string_equal(job->stage[5].input[1].name, "student");
    const cpl_prune_options *p = job->stage[2].options;
    assert_true(p->sparsity.num == 1 && p->sparsity.den == 3);
    cpl_job_destroy(&job);
}

static void test_the_resolved_job_reads_back_to_the_same_keys(void **state) {
    cpl_job *job = rig_job(whole), *again = NULL;
    char *text = NULL, *twice = NULL, a[CPL_SHA256_HEX], b[CPL_SHA256_HEX];
    assert_int_equal(cpl_job_resolved(job, &text), CPL_OK);
    again = rig_job(text);
    assert_string_equal(again->name, job->name);
    assert_int_equal(again->seed, job->seed);
    assert_int_equal(again->n_stages, job->n_stages);
    assert_int_equal(again->corpus.train.count, job->corpus.train.count);
    for (size_t i = 0; i < job->corpus.train.count; i++) {
        assert_string_equal(again->corpus.train.value[i], job->corpus.train.value[i]);
    }
    assert_true(memcmp(&again->run, &job->run, sizeof job->run) == 0);
    for (size_t i = 0; i < job->n_stages; i++) {
        assert_string_equal(again->stage[i].name, job->stage[i].name);
        rig_stage_hash(&job->stage[i], a);
        rig_stage_hash(&again->stage[i], b);
        assert_string_equal(a, b);
    }
    assert_int_equal(cpl_job_resolved(again, &twice), CPL_OK);
    assert_string_equal(text, twice);
    cpl_job_destroy(&job);
    cpl_job_destroy(&again);
}

/* Far longer than any buffer, and than a quadratic way of writing it would bear. */
static void test_jobs_of_many_files_and_stages_are_resolved_whole(void **state) {
    enum { FILES = 3000, STAGES = 300 };
    size_t size = 1 << 19;
    char *source = malloc(size), *text = NULL;
    assert_non_null(source);
    size_t at = (size_t)snprintf(source, size, "corpus:\n  train:\n");
    for (int i = 0; i < FILES; i++) {
        at += (size_t)snprintf(source + at, size - at, "    - folder-of-shards/shard_%06d.bin\n", i);
    }
    at += (size_t)snprintf(source + at, size - at, "stages:\n");
    for (int i = 0; i < STAGES; i++) {
        at += (size_t)snprintf(source + at, size - at, "  - train: {name: t%d, steps: %d}\n", i, i + 1);
    }
    cpl_job *job = rig_job(source), *again = NULL;
    assert_int_equal(cpl_job_resolved(job, &text), CPL_OK);
    again = rig_job(text);
    assert_int_equal(again->corpus.train.count, FILES);
    assert_string_equal(again->corpus.train.value[FILES - 1], job->corpus.train.value[FILES - 1]);
    assert_int_equal(again->n_stages, STAGES);
    assert_int_equal(((const cpl_train_options *)again->stage[STAGES - 1].options)->steps, STAGES);
    cpl_job_destroy(&job);
    cpl_job_destroy(&again);
    free(source);
}

static void test_settings_win_over_the_file(void **state) {
    const cpl_setting settings[] = {{"teacher.steps", "25"},
                                    {"seed", "9"},
                                    {"name", "other"},
                                    {"corpus.train", "x.txt,y.txt"},
                                    {"run.threads", "1"},
                                    {"sweep.prune.sparsity", "[0.1, 0.2, 0.3]"},
                                    {"sweep.quantize.bits", "3"},
                                    {"sweep.objective.latency", "0"},
                                    {"student.alpha", "0.9"},
                                    {"teacher.steps", "26"}};
    cpl_job *job = NULL;
    assert_int_equal(rig_read(whole, settings, sizeof settings / sizeof settings[0], &job), CPL_OK);
    assert_int_equal(((const cpl_train_options *)job->stage[0].options)->steps, 26); /* of two the last */
    assert_int_equal(job->seed, 9);
    assert_string_equal(job->name, "other");
    assert_int_equal(job->corpus.train.count, 2);
    assert_string_equal(job->corpus.train.value[1], "y.txt");
    assert_int_equal(job->run.threads, 1);
    assert_true(((const cpl_distill_options *)job->stage[1].options)->alpha == 0.9);
    const cpl_grid *g = job->stage[5].extra;
    assert_int_equal(g->trials, 2 * 3 * 2); /* bits are no axis any more */
    assert_true(g->objective.latency == 0 && g->objective.memory == 0.1);
    cpl_job_destroy(&job);
}

static void test_a_setting_that_leads_nowhere_is_refused_with_the_nearest_name(void **state) {
    rig_refuse(whole, &(cpl_setting){"techer.steps", "3"}, 1,
               "--set techer.steps: the job has no stage or section 'techer'; did you mean 'teacher'?");
    rig_refuse(whole, &(cpl_setting){"teacher.stepss", "3"}, 1,
               "--set teacher.stepss:1:1: train 'teacher': unknown option 'stepss'; did you mean 'steps'?");
    rig_refuse(whole, &(cpl_setting){"teacher.steps", "0"}, 1,
               "--set teacher.steps:1:1: train 'teacher': steps: expected an integer from 1 to 1073741824, got '0'");
    rig_refuse(whole, &(cpl_setting){"sed", "3"}, 1, "--set sed:1:1: job: unknown option 'sed'; did you mean 'seed'?");
    rig_refuse(whole, &(cpl_setting){"teacher.steps.more", "3"}, 1, "--set teacher.steps.more: 'steps' is no mapping of options");
    rig_refuse(whole, &(cpl_setting){"stages", "3"}, 1,
               "--set stages:1:1: expected 'stages:' with 1 to 1000 stages, '- train: {...}' and so on");
}

static void test_what_is_wrong_with_a_job_is_told_with_its_place(void **state) {
    rig_refuse("stages: []\n", NULL, 0, "job.yaml:1:1: expected a section 'corpus:'");
    rig_refuse("corpus: {train: [a.txt]}\n", NULL, 0,
               "job.yaml:1:1: expected 'stages:' with 1 to 1000 stages, '- train: {...}' and so on");
    rig_refuse("corpus: {train: [a.txt]}\nstages: []\n", NULL, 0,
               "job.yaml:2:9: expected 'stages:' with 1 to 1000 stages, '- train: {...}' and so on");
    rig_refuse("corpus: a.txt\nstages: []\n", NULL, 0, "job.yaml:1:9: corpus: expected a mapping of options");
    rig_refuse("corpus: {}\nstages: []\n", NULL, 0, "job.yaml:1:9: corpus: option 'train' is required");
    rig_refuse(HEAD "  - trian: {}\n", NULL, 0, "job.yaml:3:5: unknown stage 'trian'; did you mean 'train'?");
    rig_refuse(HEAD "  - train\n", NULL, 0,
               "job.yaml:3:5: stage: expected one of train, distill, prune, quantize, sweep, eval with its options");
    rig_refuse(HEAD "  - train: {width: 100, heads: 3}\n", NULL, 0,
               "job.yaml:3:12: train 'train': option width: expected a multiple of heads (3), got 100");
    rig_refuse(HEAD "  - train: {name: a}\n  - train: {name: a}\n", NULL, 0,
               "job.yaml:4:19: train 'a': name: another stage has that name already");
    rig_refuse(HEAD "  - train: {name: ../a}\n", NULL, 0,
               "job.yaml:3:19: stage name: expected up to 60 letters, digits, '_' and '-'");
    rig_refuse(HEAD "  - train: {loss_scale: 1000}\n", NULL, 0,
               "job.yaml:3:12: train 'train': loss_scale: expected a power of two, got 1000");
    rig_refuse(HEAD "  - train: {precision: fp16, loss_scale: 4, min_scale: 8}\n", NULL, 0,
               "job.yaml:3:12: train 'train': loss_scale: 4 is not between min_scale 8 and max_scale 1.67772e+07");
    rig_refuse(HEAD "  - distill: {name: s}\n", NULL, 0, "job.yaml:3:14: distill 's': option 'teacher' is required");
    rig_refuse(HEAD "  - distill: {teacher: t, width: 8}\n", NULL, 0,
               "job.yaml:3:34: distill 'distill': width: copied teacher layers keep their size; use start: scratch");
    rig_refuse(HEAD "  - distill: {teacher: t, teacher_layers: [0, 2], layers: 3}\n", NULL, 0,
               "job.yaml:3:59: distill 'distill': layers: 3, but teacher_layers names 2");
    rig_refuse(HEAD "  - distill: {teacher: t, divergence: jsd, beta: 1}\n", NULL, 0,
               "job.yaml:3:50: distill 'distill': beta: expected a number strictly between 0 and 1 for jsd, got 1");
    rig_refuse(HEAD "  - quantize: {model: t, bits: 9}\n", NULL, 0,
               "job.yaml:3:15: quantize 'quantize': bits: expected 2 to 8, or 16 for no quantization, got 9");
}

static void test_a_job_of_one_stage_comes_from_the_command_line(void **state) {
    const cpl_setting settings[] = {{"corpus.train", "a.txt"}, {"finetune-steps", "4"}, {"model", "x.h5"},   {"seed", "3"},
                                    {"sparsity", "0.25"},      {"name", "p"},           {"run.threads", "2"}};
    cpl_job *job = NULL;
    assert_int_equal(cpl_job_single(&job, cpl_stage_kind_find("prune"), settings, 7), CPL_OK);
    const cpl_prune_options *o = job->stage[0].options;
    assert_int_equal(job->n_stages, 1);
    assert_true(job->single);
    assert_string_equal(job->stage[0].name, "p");
    assert_int_equal(o->finetune_steps, 4);
    assert_string_equal(o->model, "x.h5");
    assert_int_equal(job->seed, 3);
    assert_int_equal(job->run.threads, 2);
    cpl_job_destroy(&job);
    const cpl_setting sweep[] = {
        {"corpus.train", "a.txt"}, {"model", "x.h5,y.h5"}, {"prune.sparsity", "0.1,0.2"}, {"quantize.bits", "8"}};
    assert_int_equal(cpl_job_single(&job, cpl_stage_kind_find("sweep"), sweep, 4), CPL_OK);
    assert_int_equal(((const cpl_grid *)job->stage[0].extra)->trials, 4);
    cpl_job_destroy(&job);
    assert_int_equal(cpl_job_single(&job, cpl_stage_kind_find("prune"), settings, 1), CPL_USAGE);
    assert_string_equal(cpl_status_message(), "command line:1:40: prune 'prune': option 'model' is required");
}

static void test_a_changed_option_changes_its_stage_and_no_other(void **state) {
    cpl_job *a = rig_job(whole), *b = NULL;
    char x[CPL_SHA256_HEX], y[CPL_SHA256_HEX];
    assert_int_equal(rig_read(whole, &(cpl_setting){"pruned.lr", "0.123"}, 1, &b), CPL_OK);
    for (size_t i = 0; i < a->n_stages; i++) {
        rig_stage_hash(&a->stage[i], x);
        rig_stage_hash(&b->stage[i], y);
        assert_int_equal(strcmp(x, y) != 0, i == 2);
    }
    cpl_job_destroy(&b);
    assert_int_equal(rig_read(whole, &(cpl_setting){"run.threads", "12"}, 1, &b), CPL_OK); /* outside every key */
    for (size_t i = 0; i < a->n_stages; i++) {
        rig_stage_hash(&a->stage[i], x);
        rig_stage_hash(&b->stage[i], y);
        assert_string_equal(x, y);
    }
    cpl_job_destroy(&a);
    cpl_job_destroy(&b);
}

/* A valid job with bytes changed, removed and doubled: read or refused, never more. */
static void test_damaged_jobs_are_refused_or_read_and_nothing_else(void **state) {
    enum { ROUNDS = 3000 };
    char text[sizeof whole + 64];
    for (uint32_t round = 0; round < ROUNDS; round++) {
        uint32_t r[4];
        memcpy(text, whole, sizeof whole);
        for (uint32_t edit = 0; edit < 1 + round % 4; edit++) {
            size_t n = strlen(text);
            cpl_rng_block(3, CPL_RNG_TEST, round, edit, r);
            size_t at = r[0] % n, length = r[1] % 12;
            if (r[2] % 3 == 0) {
                text[at] = (char)(1 + r[3] % 255);
            } else if (at + length < n) {
                memmove(text + at, text + at + length, n - at - length + 1);
            }
        }
        cpl_job *job = NULL;
        cpl_status st = rig_read(text, NULL, 0, &job);
        assert_true((st == CPL_OK) == (job != NULL));
        if (st != CPL_OK) {
            assert_int_equal(st, CPL_USAGE);
            assert_true(strncmp(cpl_status_message(), "job.yaml", 8) == 0);
        }
        cpl_job_destroy(&job);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_job_file_sets_options_and_leaves_the_rest_at_their_defaults),
        cmocka_unit_test(test_the_resolved_job_reads_back_to_the_same_keys),
        cmocka_unit_test(test_jobs_of_many_files_and_stages_are_resolved_whole),
        cmocka_unit_test(test_settings_win_over_the_file),
        cmocka_unit_test(test_a_setting_that_leads_nowhere_is_refused_with_the_nearest_name),
        cmocka_unit_test(test_what_is_wrong_with_a_job_is_told_with_its_place),
        cmocka_unit_test(test_a_job_of_one_stage_comes_from_the_command_line),
        cmocka_unit_test(test_a_changed_option_changes_its_stage_and_no_other),
        cmocka_unit_test(test_damaged_jobs_are_refused_or_read_and_nothing_else),
    };
    return cmocka_run_group_tests_name("jobs", tests, NULL, NULL);
}

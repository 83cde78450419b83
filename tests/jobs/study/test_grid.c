/* The grid of a sweep: its axes, the place of each trial, keys that say what a trial does and nothing else, and what is refused.
 * Refuses grids whose trials could be told apart by how their values were written. */
#include "tests/jobs/study/job_rig.h"

#define HEAD                                                                                                                       \
    "corpus: {train: [a.txt]}\nstages:\n  - train: {name: teacher}\n  - train: {name: other}\n  - sweep:\n      name: grid\n"

static const cpl_grid *grid_of(const cpl_job *job) {
    return job->stage[job->n_stages - 1].extra;
}

/* Key of a trial of the only sweep of a job of that text. */
static void key_of(const char *text, int64_t trial, const char *model, const char *common, char key[CPL_SHA256_HEX]) {
    cpl_job *job = rig_job(text);
    cpl_trial t;
    assert_int_equal(cpl_grid_trial(grid_of(job), trial, &t, job->arena), CPL_OK);
    assert_int_equal(cpl_grid_key(&t, model, common, key), CPL_OK);
    cpl_job_destroy(&job);
}

static void expect_same(const char *a, int64_t i, const char *b, int64_t j, int same) {
    char x[CPL_SHA256_HEX], y[CPL_SHA256_HEX];
    key_of(a, i, "model", "common", x);
    key_of(b, j, "model", "common", y);
    if ((strcmp(x, y) == 0) != same) {
        fail_msg("trial %lld of\n%s\nand %lld of\n%s\nhave %s key", (long long)i, a, (long long)j, b,
                 same ? "not the same" : "the same");
    }
}

static void test_axes_are_the_models_and_every_option_given_as_a_list(void **state) {
    cpl_job *job = rig_job(HEAD "      model: [teacher, other]\n"
                                "      prune: {sparsity: [0, 0.5, 0.9], scope: tensor, finetune_steps: [0, 10]}\n"
                                "      quantize: {scheme: [symmetric, asymmetric], bits: [8], granularity: group16}\n");
    const cpl_grid *g = grid_of(job);
    static const char *const names[] = {"model", "sparsity", "finetune_steps", "scheme", "bits"};
    static const int64_t counts[] = {2, 3, 2, 2, 1};
    assert_int_equal(g->n_axes, 5);
    for (int a = 0; a < 5; a++) {
        assert_string_equal(g->axis[a].name, names[a]);
        assert_int_equal(g->axis[a].count, counts[a]);
    }
    assert_int_equal(g->trials, 24);
    assert_string_equal(g->axis[1].value[2], "0.9");
    cpl_job_destroy(&job);
}

static void test_trials_are_all_combinations_once_with_the_last_axis_fastest(void **state) {
    cpl_job *job = rig_job(
        HEAD "      model: [teacher, other]\n      prune: {sparsity: [0, 0.5, 0.9]}\n      quantize: {bits: [16, 8, 4, 2]}\n");
    const cpl_grid *g = grid_of(job);
    static const double sparsity[] = {0, 0.5, 0.9};
    static const int64_t bits[] = {16, 8, 4, 2};
    for (int64_t i = 0; i < 24; i++) {
        cpl_trial t;
        assert_int_equal(cpl_grid_trial(g, i, &t, job->arena), CPL_OK);
        assert_int_equal(t.index, i);
        assert_int_equal(t.model, i / 12);
        assert_true((double)t.prune.sparsity.num / (double)t.prune.sparsity.den == sparsity[i / 4 % 3]);
        assert_int_equal(t.quantize.bits, bits[i % 4]);
        assert_int_equal(t.prunes, i / 4 % 3 != 0);
        assert_int_equal(t.quantizes, i % 4 != 0);
        assert_int_equal(cpl_grid_position(g, i, 0), i / 12);
        assert_int_equal(cpl_grid_position(g, i, 1), i / 4 % 3);
        assert_int_equal(cpl_grid_position(g, i, 2), i % 4);
    }
    char text[256];
    cpl_grid_describe(g, 23, text, sizeof text);
    assert_string_equal(text, "other sparsity=0.9 bits=2");
    cpl_grid_describe(g, -1, text, sizeof text);
    assert_string_equal(text, "teacher unchanged");
    char cut[8];
    cpl_grid_describe(g, 23, cut, sizeof cut);
    assert_string_equal(cut, "other s");
    cpl_job_destroy(&job);
}

static void test_the_reference_is_the_first_model_unchanged(void **state) {
    cpl_job *job = rig_job(HEAD "      model: [other, teacher]\n      prune: {sparsity: 0.5}\n      quantize: {bits: [4, 2]}\n");
    cpl_trial t;
    assert_int_equal(cpl_grid_trial(grid_of(job), -1, &t, job->arena), CPL_OK);
    assert_int_equal(t.index, -1);
    assert_int_equal(t.model, 0);
    assert_true(!t.prunes && !t.quantizes);
    assert_int_equal(cpl_grid_trial(grid_of(job), 0, &t, job->arena), CPL_OK);
    assert_true(t.prunes && t.quantizes); /* a single value holds for all trials */
    cpl_job_destroy(&job);
}

static void test_equal_values_written_differently_have_one_key(void **state) {
    const char *a = HEAD "      model: [teacher]\n      prune: {sparsity: [0.5, 0.25]}\n";
    const char *b = HEAD "      model: teacher\n      prune: {sparsity: [1/4, 50%]}\n";
    const char *c = HEAD "      model: teacher\n      prune: {sparsity: '0.50,2.5e-1'}\n";
    const char *d = HEAD "      model: teacher\n      quantize: {granularity: channel}\n      prune: {sparsity: 0.5}\n";
    expect_same(a, 0, b, 1, 1);
    expect_same(a, 1, b, 0, 1);
    expect_same(a, 0, c, 0, 1);
    expect_same(a, 1, c, 1, 1);
    expect_same(a, 0, a, 1, 0);
    expect_same(a, 0, d, 0, 0); /* 8 bits are the default where a sweep quantizes */
}

static void test_options_without_effect_are_not_in_the_key(void **state) {
    const char *plain = HEAD "      model: [teacher]\n      quantize: {bits: [16, 4], granularity: channel}\n";
    const char *other = HEAD "      model: [teacher]\n      quantize: {bits: [16, 4], granularity: tensor}\n";
    const char *zero = HEAD "      model: [teacher]\n      prune: {sparsity: [0], scope: tensor, lr: 1e-2}\n";
    expect_same(plain, 0, other, 0, 1); /* 16 bits: not quantized, whatever the granularity */
    expect_same(plain, 1, other, 1, 0);
    expect_same(plain, -1, plain, 0, 1);
    expect_same(plain, -1, zero, 0, 1);
    expect_same(plain, -1, zero, -1, 1);
}

static void test_every_option_with_effect_is_in_the_key(void **state) {
    const char *base =
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3}\n      quantize: {bits: 4}\n";
    const char *changed[] = {
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.51], finetune_steps: 3}\n      quantize: {bits: 4}\n",
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 4}\n      quantize: {bits: 4}\n",
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3, lr: 1e-3}\n      quantize: {bits: 4}\n",
        HEAD
        "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3, scope: tensor}\n      quantize: {bits: 4}\n",
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3}\n      quantize: {bits: 3}\n",
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3}\n      quantize: {bits: 4, scheme: "
             "asymmetric}\n",
        HEAD
        "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3}\n      quantize: {bits: 4, scale_type: fp32}\n",
        HEAD "      model: [teacher]\n      prune: {sparsity: [0.5], finetune_steps: 3}\n      quantize: {bits: 4, weights: all}\n",
    };
    for (size_t i = 0; i < sizeof changed / sizeof changed[0]; i++) {
        expect_same(base, 0, changed[i], 0, 0);
    }
    char a[CPL_SHA256_HEX], b[CPL_SHA256_HEX];
    key_of(base, 0, "model", "common", a);
    key_of(base, 0, "model 2", "common", b);
    assert_string_not_equal(a, b);
    key_of(base, 0, "model", "common 2", b);
    assert_string_not_equal(a, b);
    key_of(base, 0, "modelc", "ommon", b); /* the texts do not run together */
    assert_string_not_equal(a, b);
}

static void test_what_no_trial_could_do_is_refused_at_its_place(void **state) {
    rig_refuse(HEAD "      prune: {sparsity: [0]}\n", NULL, 0,
               "job.yaml:6:7: sweep 'grid': expected 'model:' with one or more stages");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {sparsty: [0]}\n", NULL, 0,
               "job.yaml:8:15: sweep 'grid': prune has no option 'sparsty'; did you mean 'sparsity'?");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {model: other}\n", NULL, 0,
               "job.yaml:8:15: sweep 'grid': the models stand beside 'prune', not in it");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {sparsity: [0, 2]}\n", NULL, 0,
               "job.yaml:8:25: sparsity: expected a fraction from 0 to 1 (such as 0.7, 70% or 7/10), got '2'");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {sparsity: []}\n", NULL, 0,
               "job.yaml:8:25: sparsity: expected at least one value");
    rig_refuse(HEAD "      model: [teacher]\n      quantize: {bits: [8, [4]]}\n", NULL, 0,
               "job.yaml:8:28: bits: expected a single value");
    rig_refuse(HEAD "      model: [teacher]\n      quantize: {bits: [8, 12]}\n", NULL, 0,
               "job.yaml:6:7: sweep 'grid': trial 'teacher bits=12': bits: expected 2 to 8, or 16 for no quantization, got 12");
    rig_refuse(
        HEAD "      model: [teacher]\n      quantize: {granularity: [rows]}\n", NULL, 0,
        "job.yaml:6:7: sweep 'grid': trial 'teacher granularity=rows': granularity: expected tensor, channel or groupN such as "
        "group64, got 'rows'");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {sparsity: 0.5, finetune_steps: 1, micro_batch: [8, 24]}\n", NULL, 0,
               "job.yaml:6:7: sweep 'grid': trial 'teacher micro_batch=24': global_batch: 64 is not a multiple of micro_batch 24");
    rig_refuse(HEAD "      model: [teacher]\n      pareto: [val_loss, speed]\n", NULL, 0,
               "job.yaml:8:15: sweep 'grid': pareto: expected val_loss, bytes, latency or energy, got 'speed'");
    rig_refuse(HEAD "      model: [teacher]\n      latency_runs: 0\n      objective: {latency: 1}\n", NULL, 0,
               "job.yaml:9:18: sweep 'grid': objective: latency is not measured with latency_runs: 0");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {lr: [1,2], beta1: [0,0.1], beta2: [0,0.1], clip: [1,2], eps: [0.1,0.2], "
                    "warmup: [1,2], seed: 1}\n",
               NULL, 0, "job.yaml:8:102: sweep 'grid': prune has no option 'seed'");
    rig_refuse(HEAD "      model: [teacher]\n      prune: {lr: [1,2], beta1: [0,0.1], beta2: [0,0.1], clip: [1,2], eps: [0.1,0.2], "
                    "warmup: [1,2], decay: [0,1]}\n",
               NULL, 0, "job.yaml:8:109: a sweep can vary at most 6 options beside the model");
}

static void test_a_grid_of_more_than_a_million_trials_is_refused(void **state) {
    char text[20000] = HEAD "      model: [teacher]\n";
    static const char *const names[] = {"lr", "weight_decay"};
    strcat(text, "      prune: {");
    for (int a = 0; a < 2; a++) {
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s: [", a > 0 ? ", " : "", names[a]);
        for (int i = 0; i < 1001; i++) {
            snprintf(text + strlen(text), sizeof text - strlen(text), "%s.%d", i > 0 ? "," : "", i);
        }
        strcat(text, "]");
    }
    strcat(text, "}\n");
    rig_refuse(text, NULL, 0, "job.yaml:6:7: sweep 'grid': the grid has more than 1000000 trials");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_axes_are_the_models_and_every_option_given_as_a_list),
        cmocka_unit_test(test_trials_are_all_combinations_once_with_the_last_axis_fastest),
        cmocka_unit_test(test_the_reference_is_the_first_model_unchanged),
        cmocka_unit_test(test_equal_values_written_differently_have_one_key),
        cmocka_unit_test(test_options_without_effect_are_not_in_the_key),
        cmocka_unit_test(test_every_option_with_effect_is_in_the_key),
        cmocka_unit_test(test_what_no_trial_could_do_is_refused_at_its_place),
        cmocka_unit_test(test_a_grid_of_more_than_a_million_trials_is_refused),
    };
    return cmocka_run_group_tests_name("grid of a sweep", tests, NULL, NULL);
}

/* What passes are foretold to take on a GPU, where none is needed to ask; beside what they take: tests/jobs/cuda/test_cuda_pass.c.
 * Refuses nothing. */
#include "tests/support/support.h"
#include <stdlib.h>

/* Heads of 128: for those of 64 our own kernel is taken without a look at cuDNN's. */
static int64_t foretold(int64_t B, const char *attention, bool training) {
    const cpl_pass pass = {.dt = CPL_BF16, .B = B, .T = 1024, .C = 768, .H = 6, .flat = 1000, .training = training};
    int64_t bytes = -1;
    if (attention == NULL) {
        unsetenv("CUPEL_ATTENTION");
    } else {
        setenv("CUPEL_ATTENTION", attention, 1);
    }
    cpl_device_pass_bytes("cuda", &pass, &bytes);
    assert_true(bytes > 0);
    return bytes;
}

/* Scores of 32 sequences are 403 MB; a larger batch goes in slices, whose scores are at the most 1 GiB. Without cuDNN: none. */
static void test_a_batch_in_slices_keeps_the_scores_of_one(void **state) {
    int64_t one = foretold(32, NULL, true) - foretold(32, "own", true), scores = 2ll * 32 * 6 * 1024 * 1024;
    assert_true(one == 0 || one == scores);
    for (int64_t B = 64; B <= 256; B *= 2) {
        int64_t most = foretold(B, NULL, true) - foretold(B, "own", true), deltas = 4 * B * 6 * 1024;
        assert_true(one == 0 ? most == 0 : most <= 1ll << 30 && most >= scores - deltas);
    }
}

static void test_training_takes_more_and_grows_with_the_batch(void **state) {
    assert_true(foretold(8, "own", true) > foretold(8, "own", false));
    assert_true(foretold(16, "own", true) > foretold(8, "own", true));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_batch_in_slices_keeps_the_scores_of_one),
        cmocka_unit_test(test_training_takes_more_and_grows_with_the_batch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

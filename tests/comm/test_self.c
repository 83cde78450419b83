/* One process without MPI: who started us, the group of one, and the watchdog.
 * Refuses to start MPI. */
#include "comm/internal.h"
#include "tests/comm/coded_device.h"
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static const char *const launcher_variables[] = {
    "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",  "PMI_RANK",    "PMI_ID", "PMI_SIZE", "PMIX_RANK",
    "SLURM_STEP_ID",        "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"};

static int clear_environment(void **state) {
    for (size_t i = 0; i < sizeof launcher_variables / sizeof launcher_variables[0]; i++) {
        unsetenv(launcher_variables[i]);
    }
    return 0;
}

static void test_launcher_is_known_by_its_variables(void **state) {
    cpl_launcher found;
    assert_int_equal(cpl_launcher_find(&found), CPL_OK);
    assert_null(found.name);
    setenv("PMIX_RANK", "0", 1);
    setenv("SLURM_STEP_NUM_TASKS", "4", 1);
    assert_int_equal(cpl_launcher_find(&found), CPL_OK);
    assert_non_null(found.name);
    assert_int_equal(found.ranks, 4);
    setenv("OMPI_COMM_WORLD_SIZE", "3", 1);
    assert_int_equal(cpl_launcher_find(&found), CPL_OK);
    assert_int_equal(found.ranks, 3);
    clear_environment(state);
    setenv("PMI_RANK", "1", 1);
    assert_int_equal(cpl_launcher_find(&found), CPL_OK);
    assert_non_null(found.name);
    assert_int_equal(found.ranks, 0);
}

static void test_srun_without_pmix_is_wrong_usage_and_says_what_to_do(void **state) {
    cpl_launcher found;
    setenv("SLURM_STEP_ID", "0", 1);
    setenv("SLURM_STEP_NUM_TASKS", "2", 1);
    assert_int_equal(cpl_launcher_find(&found), CPL_USAGE);
    assert_non_null(strstr(cpl_status_message(), "2 tasks"));
    assert_non_null(strstr(cpl_status_message(), "srun --mpi=pmix"));
    cpl_comm *world = NULL;
    assert_int_equal(cpl_world_init(&world, NULL, NULL), CPL_USAGE);
    assert_null(world);
    cpl_world_finish(&world);
}

static void test_batch_script_and_step_of_one_task_are_one_process(void **state) {
    cpl_launcher found;
    setenv("SLURM_NTASKS", "4", 1);
    assert_int_equal(cpl_launcher_find(&found), CPL_OK);
    assert_null(found.name);
    setenv("SLURM_STEP_ID", "0", 1);
    setenv("SLURM_STEP_NUM_TASKS", "1", 1);
    assert_int_equal(cpl_launcher_find(&found), CPL_OK);
    assert_null(found.name);
}

static void test_group_of_one_does_everything_alone(void **state) {
    cpl_comm *world = NULL, *group = NULL;
    cpl_arena *arena = NULL;
    char *names = NULL;
    int64_t i = 5, before = -1, begin[] = {1, 3};
    double f = 0.5;
    float x[3] = {1, 2, 3};
    uint32_t word = CPL_WORD_STOP;
    cpl_device dev = coded_device(-1);
    assert_int_equal(cpl_world_init(&world, NULL, NULL), CPL_OK);
    assert_string_equal(cpl_comm_kind(world), "self");
    assert_null(cpl_comm_mpi(world));
    assert_int_equal(cpl_comm_rank(world) + cpl_comm_local_rank(world), 0);
    assert_int_equal(cpl_comm_size(world) * cpl_comm_local_size(world), 1);
    assert_int_equal(cpl_comm_split(world, 3, &group), CPL_OK);
    assert_int_equal(cpl_comm_size(group), 1);
    assert_int_equal(cpl_comm_barrier(group), CPL_OK);
    assert_int_equal(cpl_comm_bcast(group, &i, sizeof i, 0), CPL_OK);
    assert_int_equal(cpl_comm_allreduce_i64(group, &i, 1, CPL_SUM), CPL_OK);
    assert_int_equal(cpl_comm_allreduce_f64(group, &f, 1, CPL_MIN), CPL_OK);
    assert_int_equal(cpl_comm_exscan_i64(group, i, &before), CPL_OK);
    assert_int_equal(cpl_comm_agree_word(group, &word), CPL_OK);
    assert_int_equal(cpl_comm_reduce_scatter(group, &dev, x, begin), CPL_OK);
    assert_int_equal(cpl_comm_allgather(group, &dev, x, sizeof *x, begin), CPL_OK);
    assert_true(i == 5 && before == 0 && f == 0.5 && word == CPL_WORD_STOP && x[0] == 1 && x[2] == 3 && coded_copies(&dev) == 0);
    assert_int_equal(cpl_arena_create(&arena), CPL_OK);
    assert_int_equal(cpl_comm_hostnames(group, &names, arena), CPL_OK);
    assert_true(names[0] != '\0');
    assert_int_equal(cpl_agree(group, cpl_fail(CPL_IO, __FILE__, __LINE__, "full")), CPL_IO);
    assert_string_equal(cpl_status_message(), "full");
    cpl_comm_progress(world);
    cpl_arena_destroy(&arena);
    cpl_comm_destroy(&group);
    cpl_world_finish(&world);
    assert_null(world);
}

static void test_counter_of_one_counts_from_its_start(void **state) {
    cpl_comm *world = NULL;
    cpl_counter *counter = NULL;
    assert_int_equal(cpl_world_init(&world, NULL, NULL), CPL_OK);
    assert_int_equal(cpl_counter_create(&counter, world, 7), CPL_OK);
    for (int64_t expected = 7, value = 0; expected < 10; expected++) {
        assert_int_equal(cpl_counter_next(counter, &value), CPL_OK);
        assert_int_equal(value, expected);
    }
    cpl_counter_destroy(&counter);
    cpl_counter_destroy(&counter);
    cpl_world_finish(&world);
}

/* --- watchdog: each case is a child, whose exit status and messages are looked at --- */

typedef struct {
    pid_t pid;
    int messages; /* its stderr */
} child;

static child start_child(int (*work)(cpl_comm *world)) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        cpl_comm *world = NULL;
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        int failed = cpl_world_init(&world, NULL, NULL) != CPL_OK || cpl_watchdog_start(world, 1) != CPL_OK || work(world) != 0;
        cpl_world_finish(&world);
        _exit(failed ? 3 : 0);
    }
    close(ends[1]);
    return (child){pid, ends[0]};
}

static int end_child(child c, char *text, size_t size) {
    int status = -1;
    size_t used = 0;
    ssize_t n;
    while (used + 1 < size && (n = read(c.messages, text + used, size - 1 - used)) > 0) {
        used += (size_t)n;
    }
    text[used] = '\0';
    close(c.messages);
    assert_int_equal(waitpid(c.pid, &status, 0), c.pid);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static int hang(cpl_comm *world) {
    cpl_watchdog_beat("the long wait");
    sleep(30);
    return 0;
}

static void test_watchdog_ends_a_process_that_makes_no_progress_and_says_where(void **state) {
    char text[512], host[65] = "", expected[256];
    gethostname(host, sizeof host - 1);
    assert_int_equal(end_child(start_child(hang), text, sizeof text), 1);
    snprintf(expected, sizeof expected, "cupel: rank 0 on %s: no progress for 1 s in phase 'the long wait'\n", host);
    assert_string_equal(text, expected);
}

static int beat_for_2_s(cpl_comm *world) {
    for (int i = 0; i < 40; i++) {
        cpl_watchdog_beat("a short step");
        usleep(50000);
    }
    return cpl_watchdog_start(world, 1) == CPL_INTERNAL ? 0 : 1; /* a second one is refused */
}

static void test_watchdog_leaves_a_process_that_beats_alone(void **state) {
    char text[512];
    assert_int_equal(end_child(start_child(beat_for_2_s), text, sizeof text), 0);
    assert_string_equal(text, "");
}

static void test_watchdog_forgives_the_time_in_which_the_job_was_suspended(void **state) {
    char text[512];
    child c = start_child(beat_for_2_s);
    usleep(500000);
    kill(c.pid, SIGSTOP);
    usleep(2500000);
    kill(c.pid, SIGCONT);
    assert_int_equal(end_child(c, text, sizeof text), 0);
    assert_string_equal(text, "");
}

static void test_watchdog_of_0_s_is_none(void **state) {
    cpl_comm *world = NULL;
    assert_int_equal(cpl_world_init(&world, NULL, NULL), CPL_OK);
    assert_int_equal(cpl_watchdog_start(world, 0), CPL_OK);
    assert_int_equal(cpl_watchdog_start(world, -1), CPL_INTERNAL);
    cpl_watchdog_stop();
    cpl_world_finish(&world);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_launcher_is_known_by_its_variables, clear_environment),
        cmocka_unit_test_setup(test_srun_without_pmix_is_wrong_usage_and_says_what_to_do, clear_environment),
        cmocka_unit_test_setup(test_batch_script_and_step_of_one_task_are_one_process, clear_environment),
        cmocka_unit_test_setup(test_group_of_one_does_everything_alone, clear_environment),
        cmocka_unit_test_setup(test_counter_of_one_counts_from_its_start, clear_environment),
        cmocka_unit_test_setup(test_watchdog_ends_a_process_that_makes_no_progress_and_says_where, clear_environment),
        cmocka_unit_test_setup(test_watchdog_leaves_a_process_that_beats_alone, clear_environment),
        cmocka_unit_test_setup(test_watchdog_forgives_the_time_in_which_the_job_was_suspended, clear_environment),
        cmocka_unit_test_setup(test_watchdog_of_0_s_is_none, clear_environment),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

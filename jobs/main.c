/* Finds the command and calls it; the only place that ends the process.
 * Refuses to do anything else. */
#include "cupel_version.h"
#include "io/base/log.h"
#include "jobs/commands.h"
#include <stdio.h>
#include <string.h>

static void usage(FILE *to) {
    fprintf(to, "cupel %s: train, distil, prune, quantize and measure language models over MPI\n\n", CUPEL_VERSION);
    for (const cpl_command *c = cpl_commands; c->name != NULL; c++) {
        fprintf(to, "  %-9s %s\n", c->name, c->help);
    }
    fprintf(to, "\ncupel COMMAND --help tells the options; mpirun -n 4 cupel COMMAND ... runs on 4 ranks.\n"
                "Exit status: 0 done, 1 failed, 2 wrong usage, 75 stopped on purpose, run again to resume.\n");
}

static cpl_status no_command(const char *name) {
    const char *words[32], *near;
    size_t n = 0;
    for (const cpl_command *c = cpl_commands; c->name != NULL && n < 32; c++) {
        words[n++] = c->name;
    }
    near = cpl_nearest_word(words, n, name);
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "unknown command '%s'%s%s%s", name,
                    near ? "; did you mean '" : "; see cupel --help", near ? near : "", near ? "'?" : "");
}

static cpl_status dispatch(cpl_comm *world, int argc, char **argv) {
    bool root = cpl_comm_rank(world) == 0;
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        if (root) {
            usage(argc < 2 ? stderr : stdout);
        }
        return argc < 2 ? cpl_fail(CPL_USAGE, __FILE__, __LINE__, "expected a command") : CPL_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        if (root) {
            printf("cupel %s (%s)\n", CUPEL_VERSION, CUPEL_GIT_REVISION);
        }
        return CPL_OK;
    }
    const cpl_command *command = cpl_command_find(argv[1]);
    return command == NULL ? no_command(argv[1]) : command->run(command, world, argc - 1, argv + 1);
}

static void remember_command_line(int argc, char **argv) {
    size_t at = 0;
    for (int i = 0; i < argc && at < sizeof cpl_command_line; i++) {
        at += (size_t)snprintf(cpl_command_line + at, sizeof cpl_command_line - at, "%s%s", i > 0 ? " " : "", argv[i]);
    }
}

int main(int argc, char **argv) {
    cpl_comm *world = NULL;
    remember_command_line(argc, argv);
    cpl_status st = cpl_world_init(&world, &argc, &argv);
    bool root = st != CPL_OK || cpl_comm_rank(world) == 0;
    cpl_log_init(root ? 0 : 1, false);
    if (st == CPL_OK) {
        st = dispatch(world, argc, argv);
    }
    if (st != CPL_OK && root) {
        fprintf(stderr, "cupel: %s\n", cpl_status_message());
    }
    int status = cpl_status_exit(st);
    cpl_world_finish(&world);
    return status;
}

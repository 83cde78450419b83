/* The commands of cupel, one row each.
 * Refuses to do a command's work: main finds the row and calls it. */
#ifndef CPL_JOBS_COMMANDS_H
#define CPL_JOBS_COMMANDS_H

#include "comm/comm.h"
#include "jobs/study/job.h"
#include <signal.h>

typedef struct cpl_command cpl_command;
struct cpl_command {
    const char *name, *usage, *help;
    /* argv[0] is the command's name. Collective over world; the status returned is the same on all ranks. */
    cpl_status (*run)(const cpl_command *self, cpl_comm *world, int argc, char **argv);
};
extern const cpl_command cpl_commands[]; /* ends with a NULL name */
const cpl_command *cpl_command_find(const char *name);

/* Raised by SIGUSR1, SIGUSR2, SIGHUP and SIGTERM once cpl_signals_catch was called: a study saves and ends with status 75. */
extern volatile sig_atomic_t cpl_stop_requested;
void cpl_signals_catch(void);
/* The command line as one text, for the results. Set by main. */
extern char cpl_command_line[4096];

cpl_status cpl_command_run(const cpl_command *self, cpl_comm *world, int argc, char **argv);
cpl_status cpl_command_stage(const cpl_command *self, cpl_comm *world, int argc, char **argv); /* train, distill, ... */
cpl_status cpl_command_plan(const cpl_command *self, cpl_comm *world, int argc, char **argv);
cpl_status cpl_command_prepare(const cpl_command *self, cpl_comm *world, int argc, char **argv);
cpl_status cpl_command_report(const cpl_command *self, cpl_comm *world, int argc, char **argv);
cpl_status cpl_command_bench(const cpl_command *self, cpl_comm *world, int argc, char **argv);
cpl_status cpl_command_info(const cpl_command *self, cpl_comm *world, int argc, char **argv);

/* What `run`, `plan` and the stage commands take: [FILE] --set PATH=VALUE --out DIR --quiet --help, and for a stage its options as
 * --name VALUE. */
typedef struct {
    const char *file;      /* borrowed; NULL */
    const char *out;       /* borrowed; NULL: the job's name */
    cpl_setting *settings; /* owned */
    size_t n_settings;
    bool quiet, help;
    int64_t ranks; /* plan: --ranks N; 0: not given */
    bool list;     /* plan: --list */
} cpl_arguments;
/* kind: NULL for run and plan. Errors: CPL_USAGE. */
cpl_status cpl_arguments_parse(cpl_arguments *a, const cpl_stage_kind *kind, bool plan, int argc, char **argv);
void cpl_arguments_free(cpl_arguments *a);

#endif

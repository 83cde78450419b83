/* Command lines of the commands that run no stages: [ARGUMENT]... [--OPTION VALUE]... by an option table.
 * Refuses unknown options, with the nearest right one. */
#ifndef CPL_JOBS_COMMAND_OPTIONS_H
#define CPL_JOBS_COMMAND_OPTIONS_H

#include "jobs/commands.h"

typedef struct {
    char **argument; /* owned by the arena: what is no option, in order */
    size_t count;
    bool help;
} cpl_command_arguments;
/* Sets `options` (table; a NULL table has none) to its defaults and then as given; --NAME VALUE, --NAME=VALUE, yes|no options also
 * as --NAME alone. Errors: CPL_USAGE. */
cpl_status cpl_command_options(const cpl_command *self, const cpl_options_table *table, void *options,
                               cpl_command_arguments *arguments, cpl_arena *arena, int argc, char **argv);
/* --help to stdout, from rank 0. more: further lines, or NULL. */
void cpl_command_help(const cpl_command *self, cpl_comm *world, const cpl_options_table *table, const char *more);

#endif

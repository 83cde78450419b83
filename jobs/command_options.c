/* Command lines by an option table.
 * Refuses unknown options, with the nearest right one. */
#include "jobs/command_options.h"
#include <stdio.h>
#include <string.h>

static cpl_status set_option(const cpl_command *self, const cpl_options_table *table, void *options, char *name, char *next,
                             bool *took, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *equals = strchr(name, '='), *value = next;
    size_t count = table == NULL ? 0 : table->count;
    *took = equals == NULL;
    if (equals != NULL) {
        *equals = '\0';
        value = equals + 1;
    }
    const cpl_field *f = count == 0 ? NULL : cpl_field_find(table->fields, count, name);
    if (f == NULL) {
        const char *near = count == 0 ? NULL : cpl_field_nearest(table->fields, count, name);
        CPL_FAIL(CPL_USAGE, "%s: unknown option --%s%s%s%s", self->name, name, near ? "; did you mean --" : "; see --help",
                 near ? near : "", near ? "?" : "");
    }
    if (f->type == CPL_FIELD_BOOL && equals == NULL && (next == NULL || strncmp(next, "--", 2) == 0)) {
        *took = false;
        value = "yes";
    }
    if (value == NULL) {
        CPL_FAIL(CPL_USAGE, "%s: --%s needs a value", self->name, name);
    }
    st = cpl_field_set(f, options, value, arena);
    if (st != CPL_OK) {
        st = cpl_fail_context(st, "%s: --%s", self->name, name);
    }
done:
    return st;
}

cpl_status cpl_command_options(const cpl_command *self, const cpl_options_table *table, void *options,
                               cpl_command_arguments *arguments, cpl_arena *arena, int argc, char **argv) {
    cpl_status st = CPL_OK;
    *arguments = (cpl_command_arguments){0};
    CPL_TRY(cpl_arena_alloc(arena, &arguments->argument, (size_t)argc + 1, sizeof *arguments->argument));
    if (table != NULL) {
        CPL_TRY(cpl_fields_default(table->fields, table->count, options, arena));
    }
    for (int i = 1; i < argc; i++) {
        bool took = false;
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            arguments->help = true;
        } else if (strncmp(argv[i], "--", 2) != 0) {
            arguments->argument[arguments->count++] = argv[i];
        } else {
            CPL_TRY(set_option(self, table, options, argv[i] + 2, i + 1 < argc ? argv[i + 1] : NULL, &took, arena));
            i += took;
        }
    }
done:
    return st;
}

void cpl_command_help(const cpl_command *self, cpl_comm *world, const cpl_options_table *table, const char *more) {
    if (cpl_comm_rank(world) != 0) {
        return;
    }
    printf("cupel %s %s\n  %s\n", self->name, self->usage, self->help);
    if (table != NULL && table->count > 0) {
        printf("\n");
        cpl_fields_help(table->fields, table->count);
    }
    if (more != NULL) {
        printf("\n%s\n", more);
    }
}

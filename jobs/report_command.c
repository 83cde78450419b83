/* The command report DIR.
 * Refuses to look for results anywhere but where it is told. */
#include "jobs/command_options.h"
#include "jobs/report.h"
#include "jobs/report_sweep.h"
#include <string.h>
#include <sys/stat.h>

#define REPORT_FIELDS(X) X(INT, rows, "40", 0, 1 << 30, "rows", "trials shown of a sweep, the best first; 0: all")
typedef struct {
    REPORT_FIELDS(CPL_FIELD_MEMBER)
} report_options;
#define CPL_FIELD_OWNER report_options
static const cpl_field fields[] = {REPORT_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
static const cpl_options_table table = {fields, sizeof fields / sizeof fields[0]};

/* given: a study's folder, or the results file itself. */
static cpl_status print_report(const char *given, int64_t rows) {
    cpl_status st = CPL_OK;
    char path[4096], folder[4096];
    struct stat about;
    if (stat(given, &about) != 0) {
        CPL_FAIL(CPL_NOT_FOUND, "%s: %m", given);
    }
    bool is_folder = S_ISDIR(about.st_mode);
    size_t length = strlen(given);
    while (is_folder && length > 1 && given[length - 1] == '/') {
        length--;
    }
    snprintf(folder, sizeof folder, "%.*s", (int)length, given);
    if ((size_t)snprintf(path, sizeof path, is_folder ? "%s/results.h5" : "%s", folder) >= sizeof path) {
        CPL_FAIL(CPL_USAGE, "%.60s...: expected a shorter path", given);
    }
    if (is_folder && stat(path, &about) != 0) {
        CPL_FAIL(CPL_NOT_FOUND, "%s: no results yet: %m", path);
    }
    CPL_TRY(cpl_report_rows(path, path, stdout, rows));
done:
    return st;
}

cpl_status cpl_command_report(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    report_options options;
    cpl_command_arguments a;
    cpl_status local = cpl_arena_create(&arena);
    local = local == CPL_OK ? cpl_command_options(self, &table, &options, &a, arena, argc, argv) : local;
    CPL_TRY(cpl_agree(world, local));
    if (a.help) {
        cpl_command_help(self, world, &table, NULL);
        goto done;
    }
    if (a.count != 1) {
        CPL_TRY(cpl_agree(world, cpl_fail(CPL_USAGE, __FILE__, __LINE__, "report: expected one study folder, cupel report DIR")));
    }
    CPL_TRY(cpl_agree(world, cpl_comm_rank(world) == 0 ? print_report(a.argument[0], options.rows) : CPL_OK));
done:
    cpl_arena_destroy(&arena);
    return st;
}

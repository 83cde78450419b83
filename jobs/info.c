/* The command info: what this program is made of and what it finds on this machine.
 * Refuses to say of a library what it was built with where what it runs with can be asked. */
#include "cupel_version.h"
#include "jobs/command_options.h"
#include "jobs/device.h"
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void print_line(const char *key, const char *value, void *to) {
    fprintf(to, " %-16s %s\n", key, value);
}

static void print_program(FILE *to) {
    char text[200];
    print_line("cupel", CUPEL_VERSION, to);
    print_line("revision", CUPEL_GIT_REVISION, to);
#if defined(__clang__)
    const char *compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
    const char *compiler = "gcc " __VERSION__;
#else
    const char *compiler = "C compiler";
#endif
#ifdef __OPTIMIZE__
    const char *optimized = ", optimized";
#else
    const char *optimized = ", not optimized";
#endif
#ifdef __SANITIZE_ADDRESS__
    const char *sanitized = ", address sanitizer: slow";
#else
    const char *sanitized = "";
#endif
    snprintf(text, sizeof text, "%s%s%s", compiler, optimized, sanitized);
    print_line("build", text, to);
}

/* Collective: what each rank runs on, equal neighbours together. */
static cpl_status print_ranks(cpl_comm *world, const cpl_device *dev, cpl_arena *arena, FILE *to) {
    cpl_status st = CPL_OK;
    char *hosts = NULL, host[65] = "";
    int size = cpl_comm_size(world), first = 0;
    char mine[256], before[256] = "", text[256], key[40];
    CPL_TRY(cpl_comm_hostnames(world, &hosts, arena));
    gethostname(host, sizeof host - 1);
    snprintf(mine, sizeof mine, "%s: %s, %d thread%s", host, dev->name, cpl_device_threads(dev),
             cpl_device_threads(dev) == 1 ? "" : "s");
    snprintf(text, sizeof text, "%d on %s", size, hosts);
    if (to != NULL) {
        print_line("ranks", text, to);
    }
    for (int r = 0; r <= size; r++) {
        snprintf(text, sizeof text, "%s", r == cpl_comm_rank(world) ? mine : "");
        if (r < size) {
            CPL_TRY(cpl_comm_bcast(world, text, sizeof text, r));
        }
        if (r > 0 && strcmp(text, before) != 0) {
            snprintf(key, sizeof key, first == r - 1 ? "rank %d" : "ranks %d to %d", first, r - 1);
            if (to != NULL) {
                print_line(key, before, to);
            }
            first = r;
        }
        memcpy(before, text, sizeof before);
    }
done:
    return st;
}

static cpl_status print_info(cpl_comm *world, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_device *dev = NULL;
    char text[200], library[128];
    FILE *to = cpl_comm_rank(world) == 0 ? stdout : NULL;
    CPL_TRY(cpl_job_device(world, 0, 0, &dev));
    if (to != NULL) {
        print_program(to);
        cpl_comm_library(library, sizeof library);
        snprintf(text, sizeof text, "%s%s", library,
                 strcmp(cpl_comm_kind(world), "self") == 0 ? ", not used by one process without mpirun" : "");
        print_line("MPI", text, to);
        cpl_comm_nccl(text, sizeof text);
        print_line("NCCL", text, to);
        cpl_h5_library(text, sizeof text);
        print_line("HDF5", text, to);
        snprintf(text, sizeof text, "%.1f GiB",
                 (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / (double)(1 << 30));
        print_line("memory", text, to);
        cpl_device_describe(dev, print_line, to);
    }
    CPL_TRY(print_ranks(world, dev, arena, to));
    CPL_TRY(cpl_comm_route(world, dev, text, sizeof text));
    if (to != NULL) {
        print_line("exchange", text, to);
    }
done:
    cpl_job_device_close(world, &dev);
    return st;
}

cpl_status cpl_command_info(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    cpl_command_arguments a;
    cpl_status local = cpl_arena_create(&arena);
    local = local == CPL_OK ? cpl_command_options(self, NULL, NULL, &a, arena, argc, argv) : local;
    CPL_TRY(cpl_agree(world, local));
    if (a.help) {
        cpl_command_help(self, world, NULL, NULL);
        goto done;
    }
    if (a.count > 0) {
        CPL_TRY(cpl_agree(world, cpl_fail(CPL_USAGE, __FILE__, __LINE__, "info: unexpected argument '%s'", a.argument[0])));
    }
    CPL_TRY(print_info(world, arena));
done:
    cpl_arena_destroy(&arena);
    return st;
}

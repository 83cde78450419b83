/* The command info: what this program is made of and what it finds on this machine.
 * Refuses to say of a library what it was built with where what it runs with can be asked. */
#include "cupel_version.h"
#include "jobs/command_options.h"
#include "jobs/device.h"
#include "kernels/gpus.h"
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { CPL_INFO_RANKS_PER_GPU = 1 << 20 }; /* it looks at how they come to share one, and computes nothing */

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

/* "NVLink to 1, 2; PCI to 3": how GPU `from` reads the others' memory. */
static void links_text(const cpl_gpu *list, int count, int from, char *text, size_t size) {
    static const struct {
        cpl_gpu_link link;
        const char *name;
    } kinds[] = {{CPL_LINK_NVLINK, "NVLink to"}, {CPL_LINK_PCI, "PCI to"}, {CPL_LINK_NONE, "through host memory to"}};
    cpl_gpu_link link[CPL_GPUS_MAX];
    size_t used = 0;
    text[0] = '\0';
    for (int to = 0; to < count; to++) {
        link[to] = to == from ? CPL_LINK_NONE : cpl_gpus_link(&list[from], &list[to]);
    }
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        bool any = false;
        for (int to = 0; to < count && used < size; to++) {
            if (to != from && link[to] == kinds[k].link) {
                used += any ? (size_t)snprintf(text + used, size - used, ", %d", to)
                            : (size_t)snprintf(text + used, size - used, "%s%s %d", used > 0 ? "; " : "", kinds[k].name, to);
                any = true;
            }
        }
    }
}

/* The GPUs that rank 0 sees. */
static cpl_status print_gpus(FILE *to) {
    cpl_status st = CPL_OK;
    cpl_gpu *list = NULL;
    char key[40], text[512];
    CPL_TRY(cpl_alloc(&list, CPL_GPUS_MAX, sizeof *list, "list of GPUs"));
    int count = cpl_gpus(list);
    for (int i = 0; i < count; i++) {
        const cpl_gpu *gpu = &list[i];
        snprintf(key, sizeof key, "GPU %d", i);
        snprintf(text, sizeof text, "%s, %.1f GiB, %d multiprocessors, sm_%d, %.12s at %s", gpu->name, (double)gpu->memory / 0x1p30,
                 gpu->sm_count, gpu->capability, gpu->uuid, gpu->bus);
        print_line(key, text, to);
    }
    for (int i = 0; i < count && count > 1; i++) {
        snprintf(key, sizeof key, "links of GPU %d", i);
        links_text(list, count, i, text, sizeof text);
        print_line(key, text, to);
    }
done:
    cpl_free(&list);
    return st;
}

/* Collective: what each rank runs on, equal neighbours together. */
static cpl_status print_ranks(cpl_comm *world, const cpl_device *dev, cpl_arena *arena, FILE *to) {
    cpl_status st = CPL_OK;
    char *hosts = NULL, host[65] = "";
    int size = cpl_comm_size(world), first = 0;
    char mine[300], before[300] = "", text[300], key[40];
    CPL_TRY(cpl_comm_hostnames(world, &hosts, arena));
    gethostname(host, sizeof host - 1);
    snprintf(mine, sizeof mine, "%s: %s%s%s, %d thread%s", host, dev->name, dev->where[0] == '\0' ? "" : ", ", dev->where,
             cpl_device_threads(dev), cpl_device_threads(dev) == 1 ? "" : "s");
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
    CPL_TRY(cpl_job_device(world, 0, 0, CPL_INFO_RANKS_PER_GPU, &dev));
    if (to != NULL) {
        print_program(to);
        cpl_comm_library(library, sizeof library);
        snprintf(text, sizeof text, "%s%s", library,
                 strcmp(cpl_comm_kind(world), "self") == 0 ? ", not used by one process without mpirun" : "");
        print_line("MPI", text, to);
        cpl_h5_library(text, sizeof text);
        print_line("HDF5", text, to);
        snprintf(text, sizeof text, "%.1f GiB",
                 (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / (double)(1 << 30));
        print_line("memory", text, to);
        cpl_device_describe(dev, print_line, to);
        cpl_comm_nccl(text, sizeof text);
        print_line("NCCL", text, to);
        st = print_gpus(to);
    }
    CPL_TRY(cpl_agree(world, st));
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

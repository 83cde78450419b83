/* The device of a rank.
 * Refuses to let the ranks of a host start more threads together than it has cores for them, or share GPUs unasked. */
#include "jobs/device.h"
#include "io/base/hash.h"
#include "io/base/number.h"
#include "jobs/assign.h"
#include "jobs/options.h"
#include "kernels/gpus.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { HOST_SIZE = 256 };
static const char *const names[] = {"auto", "cpu", "cuda"};

static void host_name(char host[HOST_SIZE]) {
    memset(host, 0, HOST_SIZE);
    if (gethostname(host, HOST_SIZE - 1) != 0) {
        strcpy(host, "unknown");
    }
}

int64_t cpl_identity(const char *host, const void *what, size_t bytes) {
    char hex[CPL_SHA256_HEX];
    cpl_sha256 h;
    cpl_sha256_init(&h);
    cpl_sha256_add_text(&h, host);
    cpl_sha256_add(&h, what, bytes);
    cpl_sha256_end(&h, hex);
    hex[15] = 0;
    return (int64_t)strtoull(hex, NULL, 16);
}

/* --- threads --- */

static cpl_status share_of_cores(cpl_comm *world, int64_t *threads) {
    cpl_status st = CPL_OK;
    int64_t *identity = NULL, sharing = 0;
    int size = cpl_comm_size(world), rank = cpl_comm_rank(world);
    char host[HOST_SIZE];
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPL_TRY(cpl_agree(world, cpl_alloc(&identity, (size_t)size, sizeof *identity, "ranks of the host")));
    int64_t count = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    host_name(host);
    identity[rank] = cpl_identity(host, &cores, sizeof cores);
    CPL_TRY(cpl_comm_allreduce_i64(world, identity, (size_t)size, CPL_SUM));
    for (int r = 0; r < size; r++) {
        sharing += identity[r] == identity[rank];
    }
    *threads = count > sharing ? count / sharing : 1;
done:
    cpl_free(&identity);
    return st;
}

/* --- GPUs --- */

/* What every rank sees, known to all. */
typedef struct {
    int most;          /* GPUs that a rank sees at the most */
    int64_t *host;     /* owned [size] */
    int64_t *visible;  /* owned [size] */
    int64_t *id;       /* owned [size][most] */
    int64_t *of_host;  /* owned [size]: visible of this host's ranks, in order; and their ids */
    int64_t *id_there; /* owned [size][most] */
    int *gpu;          /* owned [size]: of this host's ranks */
} sight;

static void sight_free(sight *s) {
    cpl_free(&s->host);
    cpl_free(&s->visible);
    cpl_free(&s->id);
    cpl_free(&s->of_host);
    cpl_free(&s->id_there);
    cpl_free(&s->gpu);
}

static cpl_status sight_allocate(sight *s, int size) {
    cpl_status st = CPL_OK;
    size_t ids = (size_t)size * (size_t)s->most;
    CPL_TRY(cpl_alloc(&s->host, (size_t)size, sizeof *s->host, "ranks of the host"));
    CPL_TRY(cpl_alloc(&s->visible, (size_t)size, sizeof *s->visible, "ranks of the host"));
    CPL_TRY(cpl_alloc(&s->of_host, (size_t)size, sizeof *s->of_host, "ranks of the host"));
    CPL_TRY(cpl_alloc(&s->gpu, (size_t)size, sizeof *s->gpu, "ranks of the host"));
    CPL_TRY(cpl_alloc(&s->id, ids, sizeof *s->id, "GPUs of all hosts"));
    CPL_TRY(cpl_alloc(&s->id_there, ids, sizeof *s->id_there, "GPUs of all hosts"));
done:
    return st;
}

/* Collective. list [count]: what this rank sees. */
static cpl_status sight_gather(sight *s, cpl_comm *world, const cpl_gpu *list, int count) {
    cpl_status st = CPL_OK;
    int size = cpl_comm_size(world), rank = cpl_comm_rank(world);
    char host[HOST_SIZE];
    int64_t most = count;
    CPL_TRY(cpl_comm_allreduce_i64(world, &most, 1, CPL_MAX));
    s->most = (int)most;
    CPL_TRY(cpl_agree(world, sight_allocate(s, size)));
    host_name(host);
    s->host[rank] = cpl_identity(host, "", 0);
    s->visible[rank] = count;
    for (int i = 0; i < count; i++) {
        s->id[rank * s->most + i] = cpl_identity(host, list[i].uuid, strlen(list[i].uuid));
    }
    CPL_TRY(cpl_comm_allreduce_i64(world, s->host, (size_t)size, CPL_SUM));
    CPL_TRY(cpl_comm_allreduce_i64(world, s->visible, (size_t)size, CPL_SUM));
    CPL_TRY(cpl_comm_allreduce_i64(world, s->id, (size_t)size * (size_t)s->most, CPL_SUM));
done:
    return st;
}

/* This rank's GPU. Errors: CPL_USAGE where more ranks would share one than may. */
static cpl_status settle(sight *s, cpl_comm *world, int64_t ranks_per_gpu, int *gpu) {
    cpl_status st = CPL_OK;
    int size = cpl_comm_size(world), rank = cpl_comm_rank(world), ranks = 0, own = 0, distinct = 0, shared = 0;
    char host[HOST_SIZE];
    host_name(host);
    for (int r = 0; r < size; r++) {
        if (s->host[r] == s->host[rank]) {
            own = r == rank ? ranks : own;
            s->of_host[ranks] = s->visible[r];
            memcpy(s->id_there + (int64_t)ranks * s->most, s->id + (int64_t)r * s->most, (size_t)s->most * sizeof *s->id);
            ranks++;
        }
    }
    CPL_TRY(cpl_gpus_assign(ranks, s->of_host, s->id_there, s->most, s->gpu, &distinct, &shared));
    *gpu = s->gpu[own];
    if (*gpu < 0) {
        CPL_FAIL(CPL_UNSUPPORTED,
                 "host %s: no GPU is visible to this rank, but to others: start ranks only where there are GPUs, or "
                 "let all compute on the CPU with device: cpu",
                 host);
    }
    if (shared > ranks_per_gpu) {
        CPL_FAIL(CPL_USAGE,
                 "host %s: %d ranks see %d GPU%s, so that %d ranks would share one: start at most %lld there (mpirun --map-by "
                 "ppr:%lld:node, Slurm --ntasks-per-node), or let them share with ranks_per_gpu: %d or CUPEL_RANKS_PER_GPU=%d",
                 host, ranks, distinct, distinct == 1 ? "" : "s", shared, (long long)(distinct * ranks_per_gpu),
                 (long long)(distinct * ranks_per_gpu), shared, shared);
    }
done:
    return st;
}

/* 0: what CUPEL_RANKS_PER_GPU says. */
static cpl_status sharing_allowed(int64_t *ranks_per_gpu) {
    const char *text = getenv("CUPEL_RANKS_PER_GPU");
    if (*ranks_per_gpu == 0 && (text == NULL || text[0] == '\0')) {
        *ranks_per_gpu = 1;
    } else if (*ranks_per_gpu == 0 && (!cpl_number_integer(text, ranks_per_gpu) || *ranks_per_gpu < 1)) {
        return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "CUPEL_RANKS_PER_GPU=%s in the environment: expected a number of ranks",
                        text);
    }
    return CPL_OK;
}

/* Collective. *backend, *gpu: where "auto" or "cuda" leads to. */
static cpl_status choose(cpl_comm *world, int64_t ranks_per_gpu, const char **backend, int *gpu) {
    cpl_status st = CPL_OK;
    cpl_gpu *list = NULL;
    sight s = {0};
    CPL_TRY(cpl_agree(world, cpl_alloc(&list, CPL_GPUS_MAX, sizeof *list, "list of GPUs")));
    CPL_TRY(sight_gather(&s, world, list, cpl_gpus(list)));
    *gpu = 0;
    if (s.most == 0) { /* the back end says what is missing */
        *backend = strcmp(*backend, "auto") == 0 ? "cpu" : *backend;
        goto done;
    }
    *backend = "cuda";
    CPL_TRY(cpl_agree(world, settle(&s, world, ranks_per_gpu, gpu)));
done:
    sight_free(&s);
    cpl_free(&list);
    return st;
}

/* Collective: auto is what CUPEL_DEVICE says, the same on all ranks. */
static cpl_status preferred(cpl_comm *world, const char **backend) {
    cpl_status st = CPL_OK;
    const char *said = cpl_device_backend(*backend);
    int64_t least = 0, most = 0;
    while (most < 3 && strcmp(said, names[most]) != 0) {
        most++;
    }
    if (most == 3) {
        st = cpl_fail(CPL_USAGE, __FILE__, __LINE__, "CUPEL_DEVICE=%s in the environment: expected auto, cpu or cuda", said);
    }
    CPL_TRY(cpl_agree(world, st));
    least = most;
    CPL_TRY(cpl_comm_allreduce_i64(world, &least, 1, CPL_MIN));
    CPL_TRY(cpl_comm_allreduce_i64(world, &most, 1, CPL_MAX));
    if (least != most) {
        CPL_FAIL(CPL_USAGE, "CUPEL_DEVICE in the environment: %s for some ranks, %s for others", names[least], names[most]);
    }
    *backend = names[most];
done:
    return st;
}

cpl_status cpl_job_device(cpl_comm *world, int choice, int64_t threads, int64_t ranks_per_gpu, cpl_device **dev) {
    cpl_status st = CPL_OK;
    const char *omp = getenv("OMP_NUM_THREADS"), *backend = names[choice];
    int64_t unset = omp == NULL || omp[0] == '\0';
    int gpu = 0;
    CPL_TRY(cpl_comm_allreduce_i64(world, &unset, 1, CPL_MAX));
    if (threads == 0 && unset) {
        CPL_TRY(share_of_cores(world, &threads));
    }
    CPL_TRY(preferred(world, &backend));
    if (strcmp(backend, "cpu") != 0) {
        CPL_TRY(cpl_agree(world, sharing_allowed(&ranks_per_gpu)));
        CPL_TRY(choose(world, ranks_per_gpu, &backend, &gpu));
    }
    CPL_TRY(cpl_agree(world, cpl_device_create(dev, backend, gpu, (int)threads)));
done:
    return st;
}

void cpl_job_device_close(cpl_comm *world, cpl_device **dev) {
    cpl_comm_detach(world);
    cpl_device_destroy(dev);
}

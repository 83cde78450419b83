/* The world: finds out who started this process, makes the first group, and gives what is the same for every group.
 * Refuses to run as many lone copies where several ranks were meant. */
#include "comm/internal.h"
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { HOST_BYTES = 65 }; /* HOST_NAME_MAX of Linux and the final 0 */

static int64_t env_count(const char *name) {
    const char *text = getenv(name);
    if (text == NULL || text[0] == '\0') {
        return 0;
    }
    char *end = NULL;
    long long n = strtoll(text, &end, 10);
    return *end == '\0' && n > 0 ? n : 0;
}

cpl_status cpl_launcher_find(cpl_launcher *out) {
    /* Variables by which each launcher tells a process that it has peers. */
    static const struct {
        const char *sign, *ranks, *name;
    } known[] = {
        {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "mpirun of Open MPI"},
        {"MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "mpirun of MVAPICH"},
        {"PMI_RANK", "PMI_SIZE", "a PMI launcher"},
        {"PMI_ID", "PMI_SIZE", "a PMI launcher"},
        {"PMIX_RANK", "SLURM_STEP_NUM_TASKS", "a PMIx launcher"},
    };
    cpl_status st = CPL_OK;
    *out = (cpl_launcher){NULL, 1};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (getenv(known[i].sign) != NULL) {
            *out = (cpl_launcher){known[i].name, env_count(known[i].ranks)};
            return CPL_OK;
        }
    }
    /* Slurm sets SLURM_NTASKS in the batch script too, where one process is right; SLURM_STEP_ID is set under srun only. */
    int64_t tasks = env_count("SLURM_STEP_NUM_TASKS");
    if (tasks == 0) {
        tasks = env_count("SLURM_NTASKS");
    }
    if (getenv("SLURM_STEP_ID") != NULL && tasks > 1) {
        CPL_FAIL(CPL_USAGE, "srun started %lld tasks that cannot find each other: start them by `srun --mpi=pmix` or by mpirun",
                 (long long)tasks);
    }
done:
    return st;
}

cpl_status cpl_comm_alloc(cpl_comm **out, const cpl_comm_ops *ops) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_alloc(out, 1, sizeof **out, "a group of ranks"));
    **out = (cpl_comm){.ops = ops, .size = 1, .local_size = 1, .stage_limit = CPL_STAGE_LIMIT, .direct_limit = INT_MAX};
done:
    return st;
}

cpl_status cpl_comm_alloc_arrays(cpl_comm *c) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_alloc(&c->pieces, 2 * (size_t)c->size, sizeof *c->pieces, "a group of ranks"));
    CPL_TRY(cpl_alloc(&c->offset, (size_t)c->size + 1, sizeof *c->offset, "a group of ranks"));
    CPL_TRY(cpl_alloc(&c->first, (size_t)c->size, sizeof *c->first, "a group of ranks"));
    CPL_TRY(cpl_alloc(&c->count, (size_t)c->size, sizeof *c->count, "a group of ranks"));
done:
    return st;
}

void cpl_comm_destroy(cpl_comm **c) {
    if (*c == NULL) {
        return;
    }
    cpl_comm_detach(*c);
    (*c)->ops->destroy(*c);
    cpl_free(&(*c)->pieces);
    cpl_free(&(*c)->offset);
    cpl_free(&(*c)->first);
    cpl_free(&(*c)->count);
    cpl_free(&(*c)->stage);
    cpl_free(c);
}

cpl_status cpl_world_init(cpl_comm **world, int *argc, char ***argv) {
    cpl_status st = CPL_OK;
    cpl_launcher launcher;
    *world = NULL;
    CPL_TRY(cpl_launcher_find(&launcher));
    if (launcher.name == NULL) {
        CPL_TRY(cpl_comm_self_create(world));
    } else {
        CPL_TRY(cpl_comm_mpi_create(world, argc, argv, launcher.ranks, launcher.name));
    }
done:
    return st;
}

void cpl_world_finish(cpl_comm **world) {
    if (*world != NULL && cpl_comm_mpi(*world) != NULL) {
        if (cpl_comm_mpi_broken()) {
            /* Rank 0's main has spoken already; here nobody else can. */
            if ((*world)->rank != 0) {
                fprintf(stderr, "cupel: rank %d: %s\n", (*world)->rank, cpl_status_message());
            }
            cpl_world_abort(*world, cpl_status_exit(CPL_COMM));
        }
        cpl_comm_mpi_finish(world);
    }
    cpl_watchdog_stop();
    cpl_comm_destroy(world);
}

void cpl_world_abort(cpl_comm *world, int exit_status) {
    if (world != NULL && cpl_comm_mpi(world) != NULL) {
        cpl_comm_mpi_abort(exit_status);
    }
    _exit(exit_status);
}

int cpl_comm_rank(const cpl_comm *c) {
    return c->rank;
}
int cpl_comm_size(const cpl_comm *c) {
    return c->size;
}
int cpl_comm_local_rank(const cpl_comm *c) {
    return c->local_rank;
}
int cpl_comm_local_size(const cpl_comm *c) {
    return c->local_size;
}
const char *cpl_comm_kind(const cpl_comm *c) {
    return c->ops->kind;
}
const void *cpl_comm_mpi(const cpl_comm *c) {
    return c->ops->handle(c);
}

cpl_status cpl_comm_split(cpl_comm *c, int color, cpl_comm **out) {
    cpl_status st = CPL_OK;
    *out = NULL;
    st = color >= 0 ? cpl_comm_alloc(out, c->ops)
                    : cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "a group's color must be 0 or more, got %d", color);
    CPL_TRY(cpl_agree(c, st));
    (*out)->world_rank = c->world_rank;
    (*out)->local_rank = c->local_rank;
    (*out)->local_size = c->local_size;
    (*out)->stage_limit = c->stage_limit;
    (*out)->direct_limit = c->direct_limit;
    CPL_TRY(c->ops->split(c, color, *out));
    CPL_TRY(cpl_agree(c, cpl_comm_alloc_arrays(*out)));
done:
    if (st != CPL_OK) {
        cpl_comm_destroy(out);
    }
    return st;
}

cpl_status cpl_comm_barrier(cpl_comm *c) {
    return c->ops->barrier(c);
}
cpl_status cpl_comm_bcast(cpl_comm *c, void *data, size_t bytes, int root) {
    return c->ops->bcast(c, data, bytes, root);
}
cpl_status cpl_comm_allreduce_i64(cpl_comm *c, int64_t *x, size_t count, cpl_reduce_op op) {
    return c->ops->allreduce_i64(c, x, count, op);
}
cpl_status cpl_comm_allreduce_f64(cpl_comm *c, double *x, size_t count, cpl_reduce_op op) {
    return c->ops->allreduce_f64(c, x, count, op);
}
cpl_status cpl_comm_exscan_i64(cpl_comm *c, int64_t x, int64_t *before) {
    return c->ops->exscan_i64(c, x, before);
}
void cpl_comm_progress(cpl_comm *c) {
    c->ops->progress(c);
}

/* Names of all ranks [size][HOST_BYTES] into one list without repetitions. */
static cpl_status join_names(const char *names, int size, char **out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *text = NULL;
    size_t used = 0;
    CPL_TRY(cpl_alloc(&text, (size_t)size, HOST_BYTES + 1, "host names"));
    for (int r = 0; r < size; r++) {
        const char *name = names + (size_t)r * HOST_BYTES;
        bool known = false;
        for (int q = 0; q < r && !known; q++) {
            known = strcmp(names + (size_t)q * HOST_BYTES, name) == 0;
        }
        if (!known) {
            used += (size_t)sprintf(text + used, "%s%s", used > 0 ? "," : "", name);
        }
    }
    CPL_TRY(cpl_arena_strdup(arena, out, text));
done:
    cpl_free(&text);
    return st;
}

cpl_status cpl_comm_hostnames(cpl_comm *c, char **out, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char *names = NULL;
    CPL_TRY(cpl_agree(c, cpl_alloc(&names, (size_t)c->size, HOST_BYTES, "host names")));
    char *own = names + (size_t)c->rank * HOST_BYTES;
    if (gethostname(own, HOST_BYTES - 1) != 0 || own[0] == '\0') {
        strcpy(own, "unknown");
    }
    for (int r = 0; r <= c->size; r++) {
        c->offset[r] = (int64_t)r * HOST_BYTES;
    }
    CPL_TRY(c->ops->allgather(c, names, c->offset));
    CPL_TRY(cpl_agree(c, join_names(names, c->size, out, arena)));
done:
    cpl_free(&names);
    return st;
}

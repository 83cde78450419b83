/* What the files of comm share: a group and the table of what its back end can do.
 * Refuses to be included by other folders than comm and its tests, and to need mpi.h. */
#ifndef CPL_COMM_INTERNAL_H
#define CPL_COMM_INTERNAL_H

#include "comm/comm.h"
#include <stdatomic.h>
#include <string.h>

/* A piece of host memory that goes to, or comes from, one rank. */
typedef struct {
    void *data; /* borrowed */
    size_t bytes;
} cpl_piece;

/* All are collective over the group; counts and bytes of one call are at most INT_MAX where said "small". */
typedef struct {
    const char *kind;
    cpl_status (*barrier)(cpl_comm *c);
    cpl_status (*bcast)(cpl_comm *c, void *data, size_t bytes, int root);
    cpl_status (*allreduce_i64)(cpl_comm *c, int64_t *x, size_t count, cpl_reduce_op op);
    cpl_status (*allreduce_f64)(cpl_comm *c, double *x, size_t count, cpl_reduce_op op);
    cpl_status (*or_u32)(cpl_comm *c, uint32_t *word);
    cpl_status (*exscan_i64)(cpl_comm *c, int64_t x, int64_t *before);
    /* to[q] goes to rank q, from[q] comes from it [size each, small]; own entries are not looked at. Both sides know the sizes. */
    cpl_status (*exchange)(cpl_comm *c, const cpl_piece *to, const cpl_piece *from);
    /* Rank r has bytes [offset[r], offset[r+1]) of base, everybody gets all. offset [size+1], the whole small. */
    cpl_status (*allgather)(cpl_comm *c, void *base, const int64_t *offset);
    cpl_status (*split)(cpl_comm *c, int color, cpl_comm *group); /* fills rank, size, impl of the group */
    void (*progress)(cpl_comm *c);
    void (*destroy)(cpl_comm *c); /* frees impl */
    const void *(*handle)(const cpl_comm *c);
} cpl_comm_ops;

struct cpl_comm {
    const cpl_comm_ops *ops; /* borrowed, static */
    void *impl;              /* owned by the back end */
    int rank, size;
    int world_rank;             /* what messages call this rank, in every group */
    int local_rank, local_size; /* of the world: two groups of one host must not take the same GPU */
    cpl_piece *pieces;          /* owned [2*size] */
    int64_t *offset;            /* owned [size+1] */
    char *stage;                /* owned, host memory through which the data plane goes, made at its first use */
    size_t stage_size;          /* bytes of it now */
    size_t stage_limit;         /* bytes of it at the most, but at least CPL_STAGE_PIECE for each rank */
    size_t direct_limit;        /* an allgather of more bytes goes through the stage; at most INT_MAX, the counts of MPI 3 */
};

enum { CPL_STAGE_LIMIT = 4 << 20, CPL_STAGE_PIECE = 1 << 10 };

/* Device memory is host memory: no staging copy, and upload and download cannot fail. */
static inline bool cpl_on_host(const cpl_device *dev) {
    return strcmp(dev->kind, "cpu") == 0;
}

/* A group without back end: size-independent parts only. */
cpl_status cpl_comm_alloc(cpl_comm **out, const cpl_comm_ops *ops);
/* The arrays that depend on c->size. Not collective: agree afterwards. */
cpl_status cpl_comm_alloc_arrays(cpl_comm *c);
cpl_status cpl_comm_self_create(cpl_comm **out);
/* Starts MPI. launched: ranks that the launcher says it started, 0 if it does not say. */
cpl_status cpl_comm_mpi_create(cpl_comm **out, int *argc, char ***argv, int64_t launched, const char *launcher);
/* A group over MPI without its communicator; then the communicator of the world and all that depends on its size, after MPI_Init.
 */
cpl_status cpl_comm_mpi_alloc(cpl_comm **out);
cpl_status cpl_comm_mpi_open(cpl_comm *world);
/* Ends MPI (collective) after an agreed end. */
void cpl_comm_mpi_finish(cpl_comm **world);
_Noreturn void cpl_comm_mpi_abort(int exit_status);
/* True once an MPI call failed: from then on nothing collective may be tried. */
bool cpl_comm_mpi_broken(void);
/* False: this MPI has no one-sided calls over the hosts of the world (Debian's Open MPI over TCP); then rank 0 serves shared
 * counters. */
bool cpl_comm_mpi_one_sided(void);
/* Answers the questions that have come for counters of this process. */
cpl_status cpl_counter_serve(void);
/* Waits for requests (MPI_Request [count]), serving counters meanwhile where that is needed. */
cpl_status cpl_mpi_wait(int count, void *requests, const char *doing);
/* The one wrapper of MPI's return codes. `doing` completes "cannot ...". Errors: CPL_COMM, CPL_NO_MEMORY. */
cpl_status cpl_mpi_status(int code, const char *file, int line, const char *doing);
#define CPL_MPI(doing, call) CPL_TRY(cpl_mpi_status((call), __FILE__, __LINE__, (doing)))

/* Who started this process, by its environment. */
typedef struct {
    const char *name; /* "mpirun (Open MPI)", ..., NULL: nobody, one process */
    int64_t ranks;    /* 0: unknown */
} cpl_launcher;
/* Errors: CPL_USAGE where Slurm started several tasks without PMIx or PMI. */
cpl_status cpl_launcher_find(cpl_launcher *out);

/* One line a rank of this host in memory that all of them map, so that a watchdog can name a rank that was stopped. */
typedef struct {
    _Atomic int64_t seen_ms; /* monotonic; 0: its watchdog does not run */
    _Atomic int rank;
    _Atomic int claimed; /* of slot 0: somebody of this host speaks already */
} cpl_watch_slot;
/* slots [count], borrowed until called with NULL. */
void cpl_watchdog_board(cpl_watch_slot *slots, int count, int mine);

#endif

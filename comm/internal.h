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

/* What moves device memory between the ranks of a group by itself, on a stream beside the device's: NCCL. The calls enqueue, in one
 * order, the same on all ranks. Parts [size each, of the whole group]: rank r's begins at first[r] and has count[r] elements or,
 * for gather, bytes; a part may be empty. Where a call fails on one of several ranks the job ends here (cpl_comm_end). */
typedef struct cpl_plane cpl_plane;
typedef struct {
    cpl_status (*fork)(cpl_plane *p); /* what follows here waits for what the device has in its order now */
    cpl_status (*join)(cpl_plane *p); /* what follows on the device waits for what is enqueued here */
    cpl_status (*max_u32)(cpl_plane *p, uint32_t *word);
    cpl_status (*reduce)(cpl_plane *p, float *x, const int64_t *first, const int64_t *count); /* rank r gets the sum of its part */
    cpl_status (*gather)(cpl_plane *p, char *x, const int64_t *first, const int64_t *count);  /* everybody gets every part */
    cpl_status (*exchange)(cpl_plane *p, const cpl_piece *to, const cpl_piece *from); /* as of cpl_comm_ops; device memory */
    cpl_status (*check)(cpl_plane *p); /* an error that came after a call had returned */
    void (*close)(cpl_plane *p);       /* collective; frees p */
} cpl_plane_ops;
struct cpl_plane {
    const cpl_plane_ops *ops; /* borrowed, static */
    cpl_comm *comm;           /* borrowed */
    cpl_device *dev;          /* borrowed */
    float *stage;             /* owned, device memory: parts of other ranks in a sum by tree */
    size_t stage_size;        /* elements of it */
    bool early;               /* sums begin while the device still works: cpl_comm_sums_early */
    cpl_reach board;          /* of cpl_device_meet; count 0: the ranks' devices do not reach each other's memory */
};
/* comm/reach.c. Collective: makes the board where all devices reach each other, or says in why what is missing; close comes before
 * the device ends. Errors: CPL_COMM, agreed. */
cpl_status cpl_reach_open(cpl_comm *c, const char *const *gpu, char *why, size_t size);
void cpl_reach_close(cpl_comm *c);
/* Collective, after all agreed to take it. Ends the job where NCCL does not come up on all ranks. */
cpl_status cpl_nccl_open(cpl_plane **out, cpl_comm *c, cpl_device *dev);
bool cpl_nccl_built(void);
void cpl_nccl_library(char *out, size_t size); /* "2.28.9", or that it is not in this build */

/* Who a rank is when the plane is chosen. */
typedef enum { CPL_NCCL_AUTO, CPL_NCCL_NEVER, CPL_NCCL_ALWAYS } cpl_nccl_wish; /* an environment variable: unset, 0, 1 */
typedef struct {
    char host[65], gpu[63]; /* cpl_device_identity */
    int8_t wish, built;
    int8_t overlap, reach; /* CUPEL_OVERLAP, CUPEL_REACH; of rank 0 they count */
} cpl_place;
/* Whether the ranks at place [size] exchange through NCCL; why not: in why. */
bool cpl_plane_chosen(const cpl_place *place, int size, char *why, size_t bytes);
/* Whether their sums begin early: as CUPEL_OVERLAP of rank 0 says, else where they are on several hosts. */
bool cpl_plane_early(const cpl_place *place, int size);
/* Whether it is tried, or demanded, that their devices reach each other's memory: as CUPEL_REACH of rank 0 says; never where they
 * are one, too many, on several hosts, or where sums begin early. */
cpl_nccl_wish cpl_plane_reach(const cpl_place *place, int size);
/* Sum and collection by the plane of c, of parts that have been checked. */
cpl_status cpl_plane_reduce_scatter(cpl_comm *c, float *x, const int64_t *begin);
/* What of elements [first, last) each rank owns, summed to it; enqueued on the plane alone. */
cpl_status cpl_plane_reduce(cpl_comm *c, float *x, const int64_t *begin, int64_t first, int64_t last);
/* Elements of a slice of a part, for a sum by tree over more than 2 ranks through device memory. longest: part, elements. */
int64_t cpl_plane_slice(int64_t longest, int ranks);

struct cpl_comm {
    const cpl_comm_ops *ops; /* borrowed, static */
    void *impl;              /* owned by the back end */
    cpl_plane *plane;        /* owned, NULL: device memory goes through the host's */
    bool told;               /* which way the data goes */
    int64_t *first, *count;  /* owned [size]: parts of one call of the plane */
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

/* Parts that rise and fit the address space: CPL_INTERNAL otherwise. */
cpl_status cpl_parts_check(const cpl_comm *c, const int64_t *begin, size_t element);
/* Elements of slice k of part r, where a whole slice has `slice`; *first: where it begins. How many slices the longest part has. */
int64_t cpl_parts_slice(const int64_t *begin, int r, int64_t k, int64_t slice, int64_t *first);
int64_t cpl_parts_rounds(const cpl_comm *c, const int64_t *begin, int64_t slice);

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

/* Whether the plane carries data of this device. */
static inline bool cpl_by_plane(const cpl_comm *c, const cpl_device *dev) {
    return c->plane != NULL && c->plane->dev == dev;
}

/* One line a rank of this host in memory that all of them map, so that a watchdog can name a rank that was stopped. */
typedef struct {
    _Atomic int64_t seen_ms; /* monotonic; 0: its watchdog does not run */
    _Atomic int rank;
    _Atomic int pid;
    _Atomic int claimed; /* of slot 0: somebody of this host speaks already */
} cpl_watch_slot;
/* slots [count], borrowed until called with NULL. */
void cpl_watchdog_board(cpl_watch_slot *slots, int count, int mine);
/* A rank of this host whose process has ended, -1: none is known to. */
int cpl_watchdog_gone(void);

#endif

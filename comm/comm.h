/* Groups of ranks: who is here, how they agree, and how flat buffers are summed over them.
 * Refuses to let a rank leave a phase before the others know why. */
#ifndef CPL_COMM_H
#define CPL_COMM_H

#include "io/base/status.h"
#include "kernels/kernels.h"
#include <stdbool.h>
#include <stdint.h>

typedef struct cpl_comm cpl_comm;

/* The world: MPI where a launcher started us (Open MPI, PMIx, PMI variables), else one process without MPI.
 * Errors: CPL_COMM; CPL_USAGE where Slurm started several tasks that cannot find each other (no PMIx). */
cpl_status cpl_world_init(cpl_comm **world, int *argc, char ***argv);
/* Collective. Ends MPI too, and the watchdog after it. Accepts NULL inside. Where an MPI call has failed the ranks cannot agree any
 * more: then this is cpl_world_abort with exit status 1, after the message of a rank other than 0. */
void cpl_world_finish(cpl_comm **world);
/* The last resort when ranks cannot agree any more: ends all processes of the job with this exit status, at once. */
_Noreturn void cpl_world_abort(cpl_comm *world, int exit_status);

int cpl_comm_rank(const cpl_comm *c);
int cpl_comm_size(const cpl_comm *c);
int cpl_comm_local_rank(const cpl_comm *c); /* among the world's ranks of this host, in every group: it picks the GPU */
int cpl_comm_local_size(const cpl_comm *c);
const char *cpl_comm_kind(const cpl_comm *c);  /* "self" or "mpi" */
const void *cpl_comm_mpi(const cpl_comm *c);   /* MPI_Comm * for parallel HDF5, NULL for self */
void cpl_comm_library(char *out, size_t size); /* "Open MPI 4.1.4" */
cpl_status cpl_comm_hostnames(cpl_comm *c, char **out,
                              cpl_arena *arena); /* collective; distinct names, comma separated, in rank order */

/* Collective. Ranks with the same color form a group, ordered by their rank. */
cpl_status cpl_comm_split(cpl_comm *c, int color, cpl_comm **out);
void cpl_comm_destroy(cpl_comm **c);

/* --- control plane: small host values, collective over the group, blocking --- */
typedef enum { CPL_SUM, CPL_MAX, CPL_MIN } cpl_reduce_op;
cpl_status cpl_comm_barrier(cpl_comm *c);
cpl_status cpl_comm_bcast(cpl_comm *c, void *data, size_t bytes, int root);
cpl_status cpl_comm_allreduce_i64(cpl_comm *c, int64_t *x, size_t count, cpl_reduce_op op);
/* For values that only one rank sets and the others leave 0 this is an exact gather. */
cpl_status cpl_comm_allreduce_f64(cpl_comm *c, double *x, size_t count, cpl_reduce_op op);
/* *before = sum of x over the ranks below this one. */
cpl_status cpl_comm_exscan_i64(cpl_comm *c, int64_t x, int64_t *before);

/* Collective decision about a failure: every rank gives its status and gets the worst; of equal ones the lowest rank's. The message
 * of that rank, with "rank N: " (N: its rank in the world) before it where the group has more than one, becomes the message of all.
 * A status that passes through several agreements keeps one "rank N: ". Source of the idea: style rule 4 of this project; use it
 * before any collective that a failed rank would not enter. */
cpl_status cpl_agree(cpl_comm *c, cpl_status st);

/* One word of a step, decided by all at once: bitwise or over the ranks. */
enum { CPL_WORD_OVERFLOW = 1, CPL_WORD_ERROR = 2, CPL_WORD_STOP = 4 };
cpl_status cpl_comm_agree_word(cpl_comm *c, uint32_t *word);

/* --- data plane: device buffers over the flat layout --- */
/* Collective. Where every rank of the group has a CUDA GPU of its own, its device memory from now on goes through NCCL; otherwise
 * (ranks that share a GPU, which NCCL refuses; the CPU; a build without NCCL) through host memory over MPI, and the log says why.
 * Environment: CUPEL_NCCL=0 takes MPI; CUPEL_NCCL=1 demands NCCL, also for a group of one rank; CUPEL_REACH of rank 0, 0 or 1:
 * cpl_comm_reaches is never so, or demanded. Does nothing where this device is attached already. Errors: CPL_UNSUPPORTED where what
 * is demanded is impossible; CPL_USAGE for another value. */
cpl_status cpl_comm_attach(cpl_comm *c, cpl_device *dev);
/* Collective: before the device is destroyed, after all graphs that hold calls of this group. cpl_comm_destroy does it too. */
void cpl_comm_detach(cpl_comm *c);
/* Collective: the way that cpl_comm_attach would take, for people: "NCCL", "host memory over MPI: ranks 0 and 1 share a GPU". */
cpl_status cpl_comm_route(cpl_comm *c, cpl_device *dev, char *out, size_t size);
void cpl_comm_nccl(char *out, size_t size); /* "2.28.9", or that NCCL is not in this build */

/* Whether these calls only enqueue on the device, so that they can be part of a recorded graph: a group of one rank, or NCCL.
 * Whether an operation is recorded must then be the same on all ranks. */
bool cpl_comm_enqueues(const cpl_comm *c);
/* Whether these calls can run beside the device's other work: NCCL. */
bool cpl_comm_overlaps(const cpl_comm *c);
/* Whether the sum of a gradient over the ranks should begin while the backward pass still runs: between hosts, whose network is
 * slow. Within a host the multiprocessors that NCCL takes away from the matrix products, which fill the GPU, cost about the time
 * that NVLink needs for the sum afterwards (124M on 2 H100: 60.2 against 59.9 ms a step). Environment: CUPEL_OVERLAP=0 or 1 on rank
 * 0 decides. */
bool cpl_comm_sums_early(const cpl_comm *c);
/* Waits for a mark (cpl_device_wait) behind which such calls may be. Where NCCL reports an error, the device fails or a rank of
 * this host has ended, several ranks cannot free a GPU that waits for another: then the process ends here (cpl_comm_end). doing:
 * static, for people. */
cpl_status cpl_comm_wait(cpl_comm *c, cpl_device *dev, int slot, const char *doing);
/* cpl_agree for calls that may have enqueued some of these. Over NCCL nothing is agreed: a rank that failed ends the job, for the
 * others' GPUs wait for it. */
cpl_status cpl_comm_enqueued(cpl_comm *c, cpl_status own, const char *doing);
/* Ends the job at once, with the calling thread's message, naming rank and host: when other ranks' GPUs wait for this one. Frees
 * nothing, for a GPU that waits cannot be freed (nccl#829: ncclCommAbort may hang too); the end of the process stops its kernels.
 */
_Noreturn void cpl_comm_end(const cpl_comm *c, const char *doing);

/* --- memory of each rank that all ranks' devices read and write --- */
/* Whether they do: several ranks of one host, at most CPL_REACH_MOST, that exchange through NCCL, have GPUs which change each
 * other's memory atomically (NVLink) and see each other's (Slurm must not hide them), and do not sum early. */
bool cpl_comm_reaches(const cpl_comm *c);
/* Collective. memory: of cpl_device_alloc, at least CPL_SHARED_LEAST bytes on each rank, borrowed. unshare, collective too, comes
 * before it is freed; of what was not shared it does nothing. Errors, agreed: CPL_DEVICE, CPL_COMM. */
cpl_status cpl_comm_share(cpl_comm *c, cpl_device *dev, void *memory, cpl_reach *out);
void cpl_comm_unshare(cpl_comm *c, cpl_device *dev, cpl_reach *at);
/* So many bytes further on. */
cpl_reach cpl_reach_at(const cpl_reach *base, size_t bytes);
/* cpl_device_meet of the group's devices, word as there; collective, enqueued, only where cpl_comm_reaches. Errors: CPL_DEVICE;
 * then the others' devices wait (cpl_comm_enqueued). */
cpl_status cpl_comm_meet(cpl_comm *c, uint32_t *word);

/* Or over the ranks of one word in device memory that is 0 or 1: the overflow consensus. */
cpl_status cpl_comm_or_flag(cpl_comm *c, cpl_device *dev, uint32_t *flag);
/* Rank r owns elements [begin[r], begin[r+1]) of a flat buffer (begin: host, size+1 values; a part may be empty).
 * Sum over ranks, each rank's own part of x gets the result, the rest of x is then undefined. The sum is a balanced binary tree
 * over the rank numbers (halves, recursively), so for 2^k ranks it continues a tree over micro-batches: its bits depend on the
 * values alone. f32. */
cpl_status cpl_comm_reduce_scatter(cpl_comm *c, cpl_device *dev, float *x, const int64_t *begin);
/* Every rank gets every part. element: bytes of one. */
cpl_status cpl_comm_allgather(cpl_comm *c, cpl_device *dev, void *x, size_t element, const int64_t *begin);
/* The same in slices, k = 0 .. slices-1 in this order: slice k of every part (cpl_comm_slice) is final on the device now. Over NCCL
 * it goes its way beside what follows; the last one waits on the device for all. */
cpl_status cpl_comm_allgather_slice(cpl_comm *c, cpl_device *dev, void *x, size_t element, const int64_t *begin, int k, int slices);
void cpl_comm_slice(int64_t begin, int64_t end, int k, int slices, int64_t *first, int64_t *last);

/* cpl_comm_reduce_scatter of a buffer that becomes final range by range, summed beside the rest of the work where
 * cpl_comm_overlaps. The ranges and their order are the same on all ranks and cover the buffer once. A plain value, all borrowed.
 * exact: the sum is that of cpl_comm_reduce_scatter; else its order over more than 2 ranks may be NCCL's, which depends on the
 * number of ranks, the ranges and how the GPUs are connected. */
typedef struct {
    cpl_comm *comm;
    cpl_device *dev;
    float *x;
    const int64_t *begin;
    bool exact;
    int64_t first, last; /* announced, not on its way */
    int64_t covered;     /* elements announced */
} cpl_reduction;
enum { CPL_BUCKET = 1 << 20 }; /* elements that neighbouring ranges are gathered to at the least: 4 MiB */
void cpl_reduction_begin(cpl_reduction *r, cpl_comm *comm, cpl_device *dev, float *x, const int64_t *begin, bool exact);
/* Elements [first, last) of x are final on the device from here on, and nobody reads them before cpl_reduction_end. */
cpl_status cpl_reduction_add(cpl_reduction *r, int64_t first, int64_t last);
/* What follows on the device finds the sum. Errors: CPL_INTERNAL where the ranges did not cover the buffer. */
cpl_status cpl_reduction_end(cpl_reduction *r);
/* Device memory that the sum takes beside the buffer over NCCL; longest: part, elements. */
int64_t cpl_reduction_bytes(int64_t longest, int ranks, bool exact);

/* --- a shared counter, for handing out trials --- */
typedef struct cpl_counter cpl_counter;
cpl_status cpl_counter_create(cpl_counter **out, cpl_comm *c, int64_t start); /* collective */
void cpl_counter_destroy(cpl_counter **counter);                              /* collective */
/* One-sided: takes the next value without the help of other ranks' code (MPI_Fetch_and_op). Where MPI has no one-sided calls
 * between the hosts (Debian's Open MPI over TCP) rank 0 of the group answers, whenever it is in a call of comm.h that waits or in
 * cpl_comm_progress: it must not wait for the others elsewhere (a collective HDF5 call over all ranks, say) while they may still
 * take numbers. */
cpl_status cpl_counter_next(cpl_counter *counter, int64_t *value);
/* Lets MPI make progress on behalf of others and answers for shared counters; cheap; called between steps of long work. */
void cpl_comm_progress(cpl_comm *c);

/* --- watchdog: a rank that stops or hangs must not keep the others for ever --- */
/* Starts a thread that ends this process (message naming host, rank, phase and a stopped rank of this host; exit status 1) when no
 * beat came for `seconds`; 0: none. The launcher then ends the other ranks. Time in which the process itself was suspended does not
 * count. */
cpl_status cpl_watchdog_start(cpl_comm *world, int seconds);
void cpl_watchdog_beat(const char *phase); /* phase: static text */
void cpl_watchdog_stop(void);

#endif

/* NCCL: one communicator a group, on a stream of its own beside the device's; the one place that maps NCCL's return codes.
 * Refuses to wait for ever for a rank that does not come, and to go on where one of several ranks could not enqueue. */
#include "comm/internal.h"
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>

enum { START_SECONDS = 120 }; /* NCCL on hundreds of hosts takes some ten seconds */

typedef struct {
    cpl_plane base; /* first */
    ncclComm_t comm;
    cudaStream_t stream;      /* owned */
    cudaEvent_t forked, join; /* owned */
} nccl_plane;

static nccl_plane *of(cpl_plane *p) {
    return (nccl_plane *)p;
}

static cpl_status cuda_status(cudaError_t error, const char *file, int line, const char *doing) {
    if (error == cudaSuccess) {
        return CPL_OK;
    }
    return cpl_fail(CPL_DEVICE, file, line, "cannot %s: CUDA: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}

static cpl_status nccl_status(ncclComm_t comm, ncclResult_t result, const char *file, int line, const char *doing) {
    if (result == ncclSuccess) {
        return CPL_OK;
    }
    const char *last = ncclGetLastError(comm);
    return cpl_fail(CPL_COMM, file, line, "cannot %s: NCCL: %s%s%s", doing, ncclGetErrorString(result),
                    last != NULL && last[0] != '\0' ? ": " : "", last != NULL ? last : "");
}

/* A rank that could not enqueue leaves the others' GPUs waiting for it. */
static cpl_status all_or_none(cpl_plane *p, cpl_status st, const char *doing) {
    if (st != CPL_OK && p->comm->size > 1) {
        cpl_comm_end(p->comm, doing);
    }
    return st;
}
#define CUDA_TRY(p, doing, call) CPL_TRY(all_or_none((p), cuda_status((call), __FILE__, __LINE__, (doing)), (doing)))
#define NCCL_TRY(p, doing, call) CPL_TRY(all_or_none((p), nccl_status(of(p)->comm, (call), __FILE__, __LINE__, (doing)), (doing)))

/* --- what is enqueued --- */

static cpl_status nccl_fork(cpl_plane *p) {
    cpl_status st = CPL_OK;
    CUDA_TRY(p, "order NCCL after the device", cudaEventRecord(of(p)->forked, cpl_device_stream(p->dev)));
    CUDA_TRY(p, "order NCCL after the device", cudaStreamWaitEvent(of(p)->stream, of(p)->forked, 0));
done:
    return st;
}

static cpl_status nccl_join(cpl_plane *p) {
    cpl_status st = CPL_OK;
    CUDA_TRY(p, "order the device after NCCL", cudaEventRecord(of(p)->join, of(p)->stream));
    CUDA_TRY(p, "order the device after NCCL", cudaStreamWaitEvent(cpl_device_stream(p->dev), of(p)->join, 0));
done:
    return st;
}

static cpl_status nccl_max_u32(cpl_plane *p, uint32_t *word) {
    cpl_status st = CPL_OK;
    NCCL_TRY(p, "combine a flag", ncclAllReduce(word, word, 1, ncclUint32, ncclMax, of(p)->comm, of(p)->stream));
done:
    return st;
}

static cpl_status nccl_reduce(cpl_plane *p, float *x, const int64_t *first, const int64_t *count) {
    cpl_status st = CPL_OK;
    NCCL_TRY(p, "sum over ranks", ncclGroupStart());
    for (int r = 0; r < p->comm->size; r++) {
        if (count[r] > 0) {
            float *part = x + first[r];
            NCCL_TRY(p, "sum over ranks",
                     ncclReduce(part, part, (size_t)count[r], ncclFloat32, ncclSum, r, of(p)->comm, of(p)->stream));
        }
    }
    NCCL_TRY(p, "sum over ranks", ncclGroupEnd());
done:
    return st;
}

/* Equal parts one after another, as ncclAllGather has them. */
static bool are_equal(const int64_t *first, const int64_t *count, int size) {
    bool equal = true;
    for (int r = 0; r < size; r++) {
        equal = equal && count[r] == count[0] && first[r] == first[0] + r * count[0];
    }
    return equal;
}

static cpl_status nccl_gather(cpl_plane *p, char *x, const int64_t *first, const int64_t *count) {
    cpl_status st = CPL_OK;
    int rank = p->comm->rank;
    if (are_equal(first, count, p->comm->size)) {
        NCCL_TRY(p, "collect parts",
                 ncclAllGather(x + first[rank], x + first[0], (size_t)count[rank], ncclUint8, of(p)->comm, of(p)->stream));
        return CPL_OK;
    }
    NCCL_TRY(p, "collect parts", ncclGroupStart());
    for (int r = 0; r < p->comm->size; r++) {
        if (count[r] > 0) {
            char *part = x + first[r];
            NCCL_TRY(p, "collect parts", ncclBroadcast(part, part, (size_t)count[r], ncclUint8, r, of(p)->comm, of(p)->stream));
        }
    }
    NCCL_TRY(p, "collect parts", ncclGroupEnd());
done:
    return st;
}

static cpl_status nccl_exchange(cpl_plane *p, const cpl_piece *to, const cpl_piece *from) {
    cpl_status st = CPL_OK;
    NCCL_TRY(p, "exchange slices", ncclGroupStart());
    for (int i = 1; i < p->comm->size; i++) {
        int q = (p->comm->rank + i) % p->comm->size, r = (p->comm->rank + p->comm->size - i) % p->comm->size;
        if (to[q].bytes > 0) {
            NCCL_TRY(p, "exchange slices", ncclSend(to[q].data, to[q].bytes, ncclUint8, q, of(p)->comm, of(p)->stream));
        }
        if (from[r].bytes > 0) {
            NCCL_TRY(p, "exchange slices", ncclRecv(from[r].data, from[r].bytes, ncclUint8, r, of(p)->comm, of(p)->stream));
        }
    }
    NCCL_TRY(p, "exchange slices", ncclGroupEnd());
done:
    return st;
}

static cpl_status nccl_check(cpl_plane *p) {
    cpl_status st = CPL_OK;
    ncclResult_t later = ncclSuccess;
    CPL_TRY(nccl_status(of(p)->comm, ncclCommGetAsyncError(of(p)->comm, &later), __FILE__, __LINE__, "look for errors"));
    CPL_TRY(nccl_status(of(p)->comm, later, __FILE__, __LINE__, "exchange device memory"));
done:
    return st;
}

/* --- beginning and end --- */

/* Where MPI has failed the process is about to end, and NCCL's own end would wait for ranks that may be gone. */
static void nccl_close(cpl_plane *p) {
    nccl_plane *n = of(p);
    if (n->comm != NULL && !cpl_comm_mpi_broken()) {
        cpl_watchdog_beat("the end of NCCL");
        ncclCommDestroy(n->comm);
    }
    if (n->stream != NULL) {
        cudaStreamDestroy(n->stream);
    }
    if (n->forked != NULL) {
        cudaEventDestroy(n->forked);
    }
    if (n->join != NULL) {
        cudaEventDestroy(n->join);
    }
    cpl_free(&n);
}

static const cpl_plane_ops nccl_ops = {.fork = nccl_fork,
                                       .join = nccl_join,
                                       .max_u32 = nccl_max_u32,
                                       .reduce = nccl_reduce,
                                       .gather = nccl_gather,
                                       .exchange = nccl_exchange,
                                       .check = nccl_check,
                                       .close = nccl_close};

/* What the thread that starts NCCL and the one that waits for it share; left to the thread where the wait is over. */
typedef struct {
    pthread_mutex_t mutex; /* guards over */
    pthread_cond_t wake;
    bool over;
    int ordinal, size, rank;
    ncclUniqueId id;
    ncclComm_t comm;
    ncclResult_t result;
    cudaError_t error;
} starting;

static void *start_thread(void *context) {
    starting *s = context;
    s->error = cudaSetDevice(s->ordinal);
    if (s->error == cudaSuccess) {
        s->result = ncclCommInitRank(&s->comm, s->size, s->id, s->rank);
    }
    pthread_mutex_lock(&s->mutex);
    s->over = true;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->mutex);
    return NULL;
}

/* NCCL's threads are made by that thread and inherit its mask: signals that ask for an early end are the main thread's. */
static bool start_and_wait(starting *s) {
    pthread_t thread;
    sigset_t all, before;
    struct timespec until;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, NULL, start_thread, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed != 0) {
        s->result = ncclSystemError;
        return true;
    }
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += START_SECONDS;
    pthread_mutex_lock(&s->mutex);
    for (int waited = 0; !s->over && waited == 0;) {
        waited = pthread_cond_timedwait(&s->wake, &s->mutex, &until);
    }
    bool over = s->over;
    pthread_mutex_unlock(&s->mutex);
    if (over) {
        pthread_join(thread, NULL);
    } else {
        pthread_detach(thread);
    }
    return over;
}

/* All ranks come here together; who cannot go on ends the job, for the others wait inside NCCL. */
static cpl_status start(nccl_plane *n, starting *s) {
    cpl_status st = CPL_OK;
    static const char doing[] = "start NCCL (CUPEL_NCCL=0 does without)";
    cpl_watchdog_beat("the start of NCCL");
    if (!start_and_wait(s)) {
        (void)cpl_fail(CPL_COMM, __FILE__, __LINE__, "not all of %d ranks came within %d s", s->size, START_SECONDS);
        cpl_comm_end(n->base.comm, doing);
    }
    n->comm = s->comm;
    CUDA_TRY(&n->base, doing, s->error);
    NCCL_TRY(&n->base, doing, s->result);
done:
    return st;
}

static cpl_status prepare(nccl_plane *n, starting *s) {
    cpl_status st = CPL_OK;
    int least = 0, greatest = 0;
    CPL_TRY(cuda_status(cudaGetDevice(&s->ordinal), __FILE__, __LINE__, "find the GPU"));
    /* Its few blocks go first when a multiprocessor is free: they mostly wait for the other GPU. */
    CPL_TRY(cuda_status(cudaDeviceGetStreamPriorityRange(&least, &greatest), __FILE__, __LINE__, "make a stream for NCCL"));
    CPL_TRY(cuda_status(cudaStreamCreateWithPriority(&n->stream, cudaStreamNonBlocking, greatest), __FILE__, __LINE__,
                        "make a stream for NCCL"));
    CPL_TRY(cuda_status(cudaEventCreateWithFlags(&n->forked, cudaEventDisableTiming), __FILE__, __LINE__, "make an event"));
    CPL_TRY(cuda_status(cudaEventCreateWithFlags(&n->join, cudaEventDisableTiming), __FILE__, __LINE__, "make an event"));
    if (s->rank == 0) {
        CPL_TRY(nccl_status(NULL, ncclGetUniqueId(&s->id), __FILE__, __LINE__, "start NCCL"));
    }
done:
    return st;
}

cpl_status cpl_nccl_open(cpl_plane **out, cpl_comm *c, cpl_device *dev) {
    cpl_status st = CPL_OK;
    nccl_plane *n = NULL;
    starting *s = NULL;
    cpl_status local = cpl_alloc(&n, 1, sizeof *n, "NCCL");
    local = local == CPL_OK ? cpl_alloc(&s, 1, sizeof *s, "NCCL") : local;
    if (local == CPL_OK) {
        n->base = (cpl_plane){.ops = &nccl_ops, .comm = c, .dev = dev};
        *s = (starting){.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .size = c->size, .rank = c->rank};
        local = prepare(n, s);
    }
    CPL_TRY(cpl_agree(c, local));
    CPL_TRY(c->ops->bcast(c, &s->id, sizeof s->id, 0));
    CPL_TRY(start(n, s));
    *out = &n->base;
    n = NULL;
done:
    if (n != NULL) {
        nccl_close(&n->base);
    }
    cpl_free(&s);
    return st;
}

bool cpl_nccl_built(void) {
    return true;
}

void cpl_nccl_library(char *out, size_t size) {
    int version = 0;
    if (ncclGetVersion(&version) != ncclSuccess) {
        snprintf(out, size, "of unknown version");
        return;
    }
    snprintf(out, size, "%d.%d.%d", version / 10000, version / 100 % 100, version % 100);
}

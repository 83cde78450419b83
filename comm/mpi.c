/* The back end over MPI, for buffers in host memory; the one place that maps MPI's return codes.
 * Refuses MPI's default of ending the process on an error, and every collective after a first one failed. */
#include "comm/internal.h"
#include <mpi.h>
#include <stdio.h>
#include <string.h>

enum { LARGEST = 1 << 30, EXCHANGE_TAG = 1 }; /* bytes or elements of one MPI call */

typedef struct {
    MPI_Comm comm;         /* owned: a duplicate, so that HDF5 and others cannot match our messages */
    MPI_Request *requests; /* owned [2*size] */
    int *counts, *displs;  /* owned [size] */
} mpi_group;

static bool broken;

bool cpl_comm_mpi_broken(void) {
    return broken;
}

cpl_status cpl_mpi_status(int code, const char *file, int line, const char *doing) {
    if (code == MPI_SUCCESS) {
        return CPL_OK;
    }
    broken = true;
    char text[MPI_MAX_ERROR_STRING + 1] = "";
    int length = 0, class = MPI_ERR_OTHER;
    if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
        snprintf(text, sizeof text, "MPI error %d", code);
    }
    for (char *p = text; *p != '\0'; p++) {
        *p = *p == '\n' ? ' ' : *p;
    }
    MPI_Error_class(code, &class);
    return cpl_fail(class == MPI_ERR_NO_MEM ? CPL_NO_MEMORY : CPL_COMM, file, line, "cannot %s: %s", doing, text);
}

static mpi_group *group_of(const cpl_comm *c) {
    return c->impl;
}

/* Before every collective call: where counters are served, nobody may block while another rank of the group still waits for a
 * number. */
static cpl_status enter(cpl_comm *c) {
    cpl_status st = CPL_OK;
    if (broken) {
        return CPL_COMM;
    }
    if (!cpl_comm_mpi_one_sided()) {
        MPI_Request met = MPI_REQUEST_NULL;
        CPL_MPI("meet all ranks", MPI_Ibarrier(group_of(c)->comm, &met));
        CPL_TRY(cpl_mpi_wait(1, &met, "meet all ranks"));
    }
done:
    return st;
}

static cpl_status mpi_barrier(cpl_comm *c) {
    cpl_status st = CPL_OK;
    CPL_TRY(enter(c));
    CPL_MPI("wait for all ranks", MPI_Barrier(group_of(c)->comm));
done:
    return st;
}

static cpl_status mpi_bcast(cpl_comm *c, void *data, size_t bytes, int root) {
    cpl_status st = CPL_OK;
    CPL_TRY(enter(c));
    for (size_t first = 0; first < bytes; first += LARGEST) {
        size_t n = bytes - first < LARGEST ? bytes - first : LARGEST;
        CPL_MPI("send a value to all ranks", MPI_Bcast((char *)data + first, (int)n, MPI_BYTE, root, group_of(c)->comm));
    }
done:
    return st;
}

static cpl_status allreduce(cpl_comm *c, void *x, size_t count, MPI_Datatype type, MPI_Op op) {
    cpl_status st = CPL_OK;
    CPL_TRY(enter(c));
    for (size_t first = 0; first < count; first += LARGEST) {
        size_t n = count - first < LARGEST ? count - first : LARGEST;
        CPL_MPI("combine values of all ranks",
                MPI_Allreduce(MPI_IN_PLACE, (char *)x + first * 8, (int)n, type, op, group_of(c)->comm));
    }
done:
    return st;
}

static MPI_Op op_of(cpl_reduce_op op) {
    return op == CPL_SUM ? MPI_SUM : op == CPL_MAX ? MPI_MAX : MPI_MIN;
}

static cpl_status mpi_allreduce_i64(cpl_comm *c, int64_t *x, size_t count, cpl_reduce_op op) {
    return allreduce(c, x, count, MPI_INT64_T, op_of(op));
}

static cpl_status mpi_allreduce_f64(cpl_comm *c, double *x, size_t count, cpl_reduce_op op) {
    return allreduce(c, x, count, MPI_DOUBLE, op_of(op));
}

static cpl_status mpi_or_u32(cpl_comm *c, uint32_t *word) {
    cpl_status st = CPL_OK;
    CPL_TRY(enter(c));
    CPL_MPI("agree on the word of a step", MPI_Allreduce(MPI_IN_PLACE, word, 1, MPI_UINT32_T, MPI_BOR, group_of(c)->comm));
done:
    return st;
}

static cpl_status mpi_exscan_i64(cpl_comm *c, int64_t x, int64_t *before) {
    cpl_status st = CPL_OK;
    *before = 0;
    CPL_TRY(enter(c));
    CPL_MPI("sum over the lower ranks", MPI_Exscan(&x, before, 1, MPI_INT64_T, MPI_SUM, group_of(c)->comm));
    if (c->rank == 0) {
        *before = 0; /* MPI leaves it undefined there */
    }
done:
    return st;
}

static cpl_status mpi_exchange(cpl_comm *c, const cpl_piece *to, const cpl_piece *from) {
    cpl_status st = CPL_OK;
    mpi_group *g = c->impl;
    int n = 0;
    for (int i = 1; i < c->size; i++) {
        int q = (c->rank + c->size - i) % c->size;
        if (from[q].bytes > 0) {
            CPL_MPI("receive a slice",
                    MPI_Irecv(from[q].data, (int)from[q].bytes, MPI_BYTE, q, EXCHANGE_TAG, g->comm, &g->requests[n]));
            n++;
        }
    }
    for (int i = 1; i < c->size; i++) {
        int q = (c->rank + i) % c->size;
        if (to[q].bytes > 0) {
            CPL_MPI("send a slice", MPI_Isend(to[q].data, (int)to[q].bytes, MPI_BYTE, q, EXCHANGE_TAG, g->comm, &g->requests[n]));
            n++;
        }
    }
    CPL_TRY(cpl_mpi_wait(n, g->requests, "exchange slices"));
done:
    return st;
}

static cpl_status mpi_allgather(cpl_comm *c, void *base, const int64_t *offset) {
    cpl_status st = CPL_OK;
    mpi_group *g = c->impl;
    CPL_TRY(enter(c));
    for (int r = 0; r < c->size; r++) {
        g->counts[r] = (int)(offset[r + 1] - offset[r]);
        g->displs[r] = (int)offset[r];
    }
    CPL_MPI("collect the parts of all ranks",
            MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, base, g->counts, g->displs, MPI_BYTE, g->comm));
done:
    return st;
}

/* A failure is found again, and told, by the next call that can return it. */
static void mpi_progress(cpl_comm *c) {
    int flag = 0;
    if (broken) {
        return;
    }
    if (!cpl_comm_mpi_one_sided()) {
        cpl_counter_serve();
        return;
    }
    cpl_mpi_status(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, group_of(c)->comm, &flag, MPI_STATUS_IGNORE), __FILE__, __LINE__,
                   "make progress");
}

static const void *mpi_handle(const cpl_comm *c) {
    return &group_of(c)->comm;
}

static void mpi_destroy(cpl_comm *c) {
    mpi_group *g = c->impl;
    if (g == NULL) {
        return;
    }
    if (!broken && g->comm != MPI_COMM_NULL) {
        MPI_Comm_free(&g->comm);
    }
    cpl_free(&g->requests);
    cpl_free(&g->counts);
    cpl_free(&g->displs);
    cpl_free(&c->impl);
}

/* impl of c without its arrays: nothing collective has happened yet. */
static cpl_status group_alloc(cpl_comm *c) {
    cpl_status st = CPL_OK;
    mpi_group *g = NULL;
    CPL_TRY(cpl_alloc(&g, 1, sizeof *g, "a group of ranks"));
    g->comm = MPI_COMM_NULL;
    c->impl = g;
done:
    return st;
}

/* Rank, size and the arrays over ranks; not collective. */
static cpl_status group_fill(cpl_comm *c) {
    cpl_status st = CPL_OK;
    mpi_group *g = c->impl;
    CPL_MPI("find this rank", MPI_Comm_rank(g->comm, &c->rank));
    CPL_MPI("count the ranks", MPI_Comm_size(g->comm, &c->size));
    CPL_TRY(cpl_alloc(&g->requests, 2 * (size_t)c->size, sizeof *g->requests, "requests of a group of ranks"));
    CPL_TRY(cpl_alloc(&g->counts, (size_t)c->size, sizeof *g->counts, "counts of a group of ranks"));
    CPL_TRY(cpl_alloc(&g->displs, (size_t)c->size, sizeof *g->displs, "counts of a group of ranks"));
done:
    return st;
}

static cpl_status mpi_split(cpl_comm *c, int color, cpl_comm *group) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(c, group_alloc(group)));
    CPL_MPI("split the ranks into groups", MPI_Comm_split(group_of(c)->comm, color, c->rank, &group_of(group)->comm));
    CPL_TRY(cpl_agree(c, group_fill(group)));
done:
    return st;
}

static const cpl_comm_ops mpi_ops = {
    .kind = "mpi",
    .barrier = mpi_barrier,
    .bcast = mpi_bcast,
    .allreduce_i64 = mpi_allreduce_i64,
    .allreduce_f64 = mpi_allreduce_f64,
    .or_u32 = mpi_or_u32,
    .exscan_i64 = mpi_exscan_i64,
    .exchange = mpi_exchange,
    .allgather = mpi_allgather,
    .split = mpi_split,
    .progress = mpi_progress,
    .destroy = mpi_destroy,
    .handle = mpi_handle,
};

cpl_status cpl_comm_mpi_alloc(cpl_comm **out) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_comm_alloc(out, &mpi_ops));
    CPL_TRY(group_alloc(*out));
done:
    return st;
}

cpl_status cpl_comm_mpi_open(cpl_comm *world) {
    cpl_status st = CPL_OK;
    CPL_MPI("duplicate the world", MPI_Comm_dup(MPI_COMM_WORLD, &group_of(world)->comm));
    st = group_fill(world);
    world->world_rank = world->rank;
    if (st == CPL_OK) {
        st = cpl_comm_alloc_arrays(world);
    }
    CPL_TRY(cpl_agree(world, st));
done:
    return st;
}

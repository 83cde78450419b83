/* The group of one: a process that no launcher started, or a group of one rank without MPI.
 * Refuses to touch MPI, so that cupel runs where no MPI can start. */
#include "comm/internal.h"

static cpl_status self_barrier(cpl_comm *c) {
    return CPL_OK;
}
static cpl_status self_bcast(cpl_comm *c, void *data, size_t bytes, int root) {
    return CPL_OK;
}
static cpl_status self_allreduce_i64(cpl_comm *c, int64_t *x, size_t count, cpl_reduce_op op) {
    return CPL_OK;
}
static cpl_status self_allreduce_f64(cpl_comm *c, double *x, size_t count, cpl_reduce_op op) {
    return CPL_OK;
}
static cpl_status self_or_u32(cpl_comm *c, uint32_t *word) {
    return CPL_OK;
}
static cpl_status self_exchange(cpl_comm *c, const cpl_piece *to, const cpl_piece *from) {
    return CPL_OK;
}
static cpl_status self_allgather(cpl_comm *c, void *base, const int64_t *offset) {
    return CPL_OK;
}
static cpl_status self_split(cpl_comm *c, int color, cpl_comm *group) {
    return CPL_OK;
}
static void self_progress(cpl_comm *c) {}
static void self_destroy(cpl_comm *c) {}
static const void *self_handle(const cpl_comm *c) {
    return NULL;
}

static cpl_status self_exscan_i64(cpl_comm *c, int64_t x, int64_t *before) {
    *before = 0;
    return CPL_OK;
}

static const cpl_comm_ops self_ops = {
    .kind = "self",
    .barrier = self_barrier,
    .bcast = self_bcast,
    .allreduce_i64 = self_allreduce_i64,
    .allreduce_f64 = self_allreduce_f64,
    .or_u32 = self_or_u32,
    .exscan_i64 = self_exscan_i64,
    .exchange = self_exchange,
    .allgather = self_allgather,
    .split = self_split,
    .progress = self_progress,
    .destroy = self_destroy,
    .handle = self_handle,
};

cpl_status cpl_comm_self_create(cpl_comm **out) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_comm_alloc(out, &self_ops));
    CPL_TRY(cpl_comm_alloc_arrays(*out));
done:
    if (st != CPL_OK) {
        cpl_comm_destroy(out);
    }
    return st;
}

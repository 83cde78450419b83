/* Device memory that all ranks of a group reach: names are handed round, others' memory is mapped, and a board to meet at is made.
 * Refuses to take a mapping on trust: what each rank writes must arrive at every other before the first use. */
#include "comm/internal.h"
#include "io/base/log.h"
#include <stdio.h>

bool cpl_comm_reaches(const cpl_comm *c) {
    return c->plane != NULL && c->plane->board.count > 0;
}

static void unmap(cpl_device *dev, cpl_reach *at) {
    for (int r = 0; r < at->count; r++) {
        if (r != at->own) {
            cpl_device_unmap(dev, at->at[r]);
        }
    }
}

/* Maps what the others have; what was mapped before a failure is in *at. */
static cpl_status map(cpl_device *dev, const cpl_shared_name *name, cpl_reach *at) {
    cpl_status st = CPL_OK;
    for (int r = 0; r < at->count; r++) {
        if (r != at->own) {
            CPL_TRY(cpl_device_map(dev, &name[r], &at->at[r]));
        }
    }
done:
    return st;
}

cpl_status cpl_comm_share(cpl_comm *c, cpl_device *dev, void *memory, cpl_reach *out) {
    cpl_status st = CPL_OK;
    cpl_shared_name name[CPL_REACH_MOST];
    cpl_reach at = {.count = c->size, .own = c->rank};
    *out = (cpl_reach){.count = 0};
    at.at[c->rank] = memory;
    CPL_TRY(cpl_agree(c, cpl_device_share(dev, memory, &name[c->rank])));
    for (int r = 0; r <= c->size; r++) {
        c->offset[r] = r * (int64_t)sizeof name[0];
    }
    CPL_TRY(c->ops->allgather(c, name, c->offset));
    st = cpl_agree(c, map(dev, name, &at));
    if (st == CPL_OK) {
        *out = at;
    } else {
        cpl_comm_unshare(c, dev, &at);
    }
done:
    return st;
}

void cpl_comm_unshare(cpl_comm *c, cpl_device *dev, cpl_reach *at) {
    if (at->count == 0) {
        return;
    }
    unmap(dev, at);
    at->count = 0;
    if (!cpl_comm_mpi_broken() && cpl_comm_barrier(c) != CPL_OK) {
        cpl_log_warn("%s", cpl_status_message());
    }
}

cpl_reach cpl_reach_at(const cpl_reach *base, size_t bytes) {
    cpl_reach at = *base;
    for (int r = 0; r < at.count; r++) {
        at.at[r] = (char *)at.at[r] + bytes;
    }
    return at;
}

cpl_status cpl_comm_meet(cpl_comm *c, uint32_t *word) {
    return cpl_device_meet(c->plane->dev, &c->plane->board, word);
}

/* --- the board --- */

static cpl_status all_reached(const cpl_device *dev, int size, int rank, const char *const *gpu) {
    cpl_status st = CPL_OK;
    for (int r = 0; r < size; r++) {
        if (r != rank && !cpl_device_reaches(dev, gpu[r])) {
            CPL_FAIL(CPL_UNSUPPORTED, "GPU %s does not reach GPU %s, or does not see it", gpu[rank], gpu[r]);
        }
    }
done:
    return st;
}

/* Each rank leaves its number at every other's board. */
static cpl_status write_there(cpl_device *dev, const cpl_reach *board) {
    cpl_status st = CPL_OK;
    uint32_t mark = 1000 + (uint32_t)board->own;
    for (int r = 0; r < board->count; r++) {
        CPL_TRY(CPL_OPS(dev, upload, (uint32_t *)board->at[r] + board->own, &mark, sizeof mark));
    }
    CPL_TRY(dev->ops->synchronize(dev));
done:
    return st;
}

static cpl_status read_here(cpl_device *dev, const cpl_reach *board) {
    cpl_status st = CPL_OK;
    uint32_t word[CPL_BOARD_WORDS];
    CPL_TRY(CPL_OPS(dev, download, word, board->at[board->own], sizeof word));
    for (int r = 0; r < board->count; r++) {
        if (word[r] != 1000 + (uint32_t)r) {
            CPL_FAIL(CPL_UNSUPPORTED, "what rank %d's GPU wrote did not arrive", r);
        }
    }
    CPL_TRY(CPL_OPS(dev, zero, board->at[board->own], sizeof word));
    CPL_TRY(dev->ops->synchronize(dev));
done:
    return st;
}

static cpl_status try_board(cpl_comm *c, cpl_device *dev, const char *const *gpu, void **memory, cpl_reach *board) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_agree(c, all_reached(dev, c->size, c->rank, gpu)));
    CPL_TRY(cpl_agree(c, cpl_device_alloc(dev, memory, CPL_SHARED_LEAST, 1, "the board where ranks' devices meet")));
    CPL_TRY(cpl_comm_share(c, dev, *memory, board));
    CPL_TRY(cpl_agree(c, write_there(dev, board)));
    CPL_TRY(cpl_agree(c, read_here(dev, board)));
done:
    return st;
}

cpl_status cpl_reach_open(cpl_comm *c, const char *const *gpu, char *why, size_t size) {
    cpl_plane *p = c->plane;
    void *memory = NULL;
    cpl_reach board = {.count = 0};
    cpl_status st = try_board(c, p->dev, gpu, &memory, &board);
    if (st == CPL_OK) {
        p->board = board;
        return CPL_OK;
    }
    snprintf(why, size, "%s", cpl_status_message());
    cpl_comm_unshare(c, p->dev, &board);
    cpl_device_free(p->dev, &memory);
    return st == CPL_UNSUPPORTED || st == CPL_DEVICE ? CPL_OK : st;
}

void cpl_reach_close(cpl_comm *c) {
    cpl_plane *p = c->plane;
    if (p->board.count > 0) {
        void *memory = p->board.at[p->board.own];
        cpl_comm_unshare(c, p->dev, &p->board);
        cpl_device_free(p->dev, &memory);
    }
}

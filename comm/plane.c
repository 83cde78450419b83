/* Which way device memory goes between the ranks of a group, and what waits for it.
 * Refuses to choose in silence, and to wait for a rank that has ended. */
#include "comm/internal.h"
#include "io/base/log.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

bool cpl_plane_chosen(const cpl_place *place, int size, char *why, size_t bytes) {
    bool demanded = false;
    why[0] = '\0';
    for (int r = 0; r < size; r++) {
        demanded = demanded || place[r].wish == CPL_NCCL_ALWAYS;
    }
    if (size == 1 && !demanded) {
        snprintf(why, bytes, "one rank has nothing to exchange");
        return false;
    }
    for (int r = 0; r < size; r++) {
        if (place[r].wish == CPL_NCCL_NEVER) {
            snprintf(why, bytes, "CUPEL_NCCL=0");
            return false;
        }
    }
    for (int r = 0; r < size; r++) {
        if (place[r].gpu[0] == '\0') {
            snprintf(why, bytes, "rank %d computes on the CPU", r);
            return false;
        }
        if (!place[r].built) {
            snprintf(why, bytes, "NCCL is not in this build");
            return false;
        }
        for (int q = 0; q < r; q++) {
            if (strcmp(place[q].host, place[r].host) == 0 && strcmp(place[q].gpu, place[r].gpu) == 0) {
                snprintf(why, bytes, "ranks %d and %d share a GPU", q, r);
                return false;
            }
        }
    }
    return true;
}

static bool on_one_host(const cpl_place *place, int size) {
    for (int r = 1; r < size; r++) {
        if (strcmp(place[r].host, place[0].host) != 0) {
            return false;
        }
    }
    return true;
}

bool cpl_plane_early(const cpl_place *place, int size) {
    return place[0].overlap == CPL_NCCL_AUTO ? !on_one_host(place, size) : place[0].overlap == CPL_NCCL_ALWAYS;
}

cpl_nccl_wish cpl_plane_reach(const cpl_place *place, int size) {
    bool can = size > 1 && size <= CPL_REACH_MOST && on_one_host(place, size) && !cpl_plane_early(place, size);
    return can ? (cpl_nccl_wish)place[0].reach : CPL_NCCL_NEVER;
}

static cpl_status find_wish(const char *name, int8_t *wish) {
    cpl_status st = CPL_OK;
    const char *text = getenv(name);
    *wish = CPL_NCCL_AUTO;
    if (text == NULL || text[0] == '\0') {
        return CPL_OK;
    }
    if (strcmp(text, "0") != 0 && strcmp(text, "1") != 0) {
        CPL_FAIL(CPL_USAGE, "%s=%s: expected 0 (never), 1 (demanded) or nothing", name, text);
    }
    *wish = text[0] == '0' ? CPL_NCCL_NEVER : CPL_NCCL_ALWAYS;
done:
    return st;
}

/* Which way the data goes. */
typedef struct {
    cpl_place *place;      /* owned [size] */
    bool chosen, demanded; /* NCCL */
    char why[128];         /* not by NCCL */
} route;

/* Collective: the same answer on all ranks, for it is made of the same table. */
static cpl_status choose(cpl_comm *c, cpl_device *dev, route *to) {
    cpl_status st = CPL_OK;
    *to = (route){.place = NULL};
    CPL_TRY(cpl_agree(c, cpl_alloc(&to->place, (size_t)c->size, sizeof *to->place, "places of the ranks")));
    cpl_place *own = &to->place[c->rank];
    if (gethostname(own->host, sizeof own->host - 1) != 0) {
        strcpy(own->host, "unknown");
    }
    if (!cpl_on_host(dev)) {
        cpl_device_identity(dev, own->gpu, sizeof own->gpu);
    }
    own->built = cpl_nccl_built();
    cpl_status wishes = find_wish("CUPEL_NCCL", &own->wish);
    wishes = wishes == CPL_OK ? find_wish("CUPEL_OVERLAP", &own->overlap) : wishes;
    CPL_TRY(cpl_agree(c, wishes == CPL_OK ? find_wish("CUPEL_REACH", &own->reach) : wishes));
    for (int r = 0; r <= c->size; r++) {
        c->offset[r] = (int64_t)r * (int64_t)sizeof *to->place;
    }
    CPL_TRY(c->ops->allgather(c, to->place, c->offset));
    to->chosen = cpl_plane_chosen(to->place, c->size, to->why, sizeof to->why);
    for (int r = 0; r < c->size; r++) {
        to->demanded = to->demanded || to->place[r].wish == CPL_NCCL_ALWAYS;
    }
done:
    return st;
}

cpl_status cpl_comm_route(cpl_comm *c, cpl_device *dev, char *out, size_t size) {
    cpl_status st = CPL_OK;
    route r;
    CPL_TRY(choose(c, dev, &r));
    snprintf(out, size, "%s%s", r.chosen ? "NCCL" : c->size > 1 ? "host memory over MPI: " : "", r.why);
done:
    cpl_free(&r.place);
    return st;
}

void cpl_comm_nccl(char *out, size_t size) {
    cpl_nccl_library(out, size);
}

/* The plane is there. */
static cpl_status open_reach(cpl_comm *c, const cpl_place *place) {
    cpl_status st = CPL_OK;
    const char *gpu[CPL_REACH_MOST];
    char why[CPL_MESSAGE_MAX] = "the ranks are too many, or on several hosts, or their sums begin early";
    cpl_nccl_wish wish = cpl_plane_reach(place, c->size);
    if (wish != CPL_NCCL_NEVER) {
        for (int r = 0; r < c->size; r++) {
            gpu[r] = place[r].gpu;
        }
        CPL_TRY(cpl_reach_open(c, gpu, why, sizeof why));
    }
    if (!cpl_comm_reaches(c) && c->size > 1 && place[0].reach == CPL_NCCL_ALWAYS) {
        CPL_FAIL(CPL_UNSUPPORTED, "CUPEL_REACH=1 demands GPUs that reach each other's memory: %s", why);
    }
    if (!cpl_comm_reaches(c) && wish != CPL_NCCL_NEVER) {
        cpl_log_info("sums go through NCCL alone: %s", why);
    }
done:
    return st;
}

/* What people are told, once a group. */
static void tell(cpl_comm *c, const route *r) {
    char version[64];
    cpl_nccl_library(version, sizeof version);
    if (r->chosen) {
        cpl_log_info("%d rank%s device memory through NCCL %s%s", c->size, c->size == 1 ? " exchanges" : "s exchange", version,
                     cpl_comm_reaches(c) ? "; gradients and weights from GPU to GPU" : "");
    } else {
        cpl_log_info("%d ranks exchange device memory over MPI: %s", c->size, r->why);
    }
    c->told = true;
}

cpl_status cpl_comm_attach(cpl_comm *c, cpl_device *dev) {
    cpl_status st = CPL_OK;
    route r = {.place = NULL};
    if (cpl_by_plane(c, dev)) {
        return CPL_OK;
    }
    cpl_comm_detach(c);
    CPL_TRY(choose(c, dev, &r));
    if (!r.chosen && r.demanded) {
        CPL_FAIL(CPL_UNSUPPORTED, "CUPEL_NCCL=1 demands NCCL, which cannot be used: %s", r.why);
    }
    if (r.chosen) {
        CPL_TRY(cpl_nccl_open(&c->plane, c, dev));
        c->plane->comm = c;
        c->plane->dev = dev;
        c->plane->early = cpl_plane_early(r.place, c->size);
        CPL_TRY(open_reach(c, r.place));
    }
    if (!c->told && !cpl_on_host(dev) && (c->size > 1 || r.chosen)) {
        tell(c, &r);
    }
done:
    cpl_free(&r.place);
    return st;
}

void cpl_comm_detach(cpl_comm *c) {
    if (c->plane == NULL) {
        return;
    }
    cpl_reach_close(c);
    cpl_device_free(c->plane->dev, &c->plane->stage);
    c->plane->ops->close(c->plane);
    c->plane = NULL;
}

bool cpl_comm_enqueues(const cpl_comm *c) {
    return c->size == 1 || c->plane != NULL;
}

bool cpl_comm_overlaps(const cpl_comm *c) {
    return c->plane != NULL;
}

bool cpl_comm_sums_early(const cpl_comm *c) {
    return c->plane != NULL && c->plane->early;
}

/* --- what waits --- */

void cpl_comm_end(const cpl_comm *c, const char *doing) {
    char host[65] = "", line[CPL_MESSAGE_MAX + 256];
    if (gethostname(host, sizeof host - 1) != 0) {
        strcpy(host, "unknown");
    }
    cpl_log_close();
    int n = snprintf(line, sizeof line, "cupel: rank %d on %s: %s: %s\n", c->world_rank, host, doing, cpl_status_message());
    size_t size = n < (int)sizeof line ? (size_t)n : sizeof line - 1;
    if (write(STDERR_FILENO, line, size) < 0) {
        _exit(cpl_status_exit(CPL_COMM));
    }
    if (cpl_comm_mpi(c) != NULL) {
        cpl_comm_mpi_abort(cpl_status_exit(CPL_COMM));
    }
    _exit(cpl_status_exit(CPL_COMM));
}

static cpl_status look_around(cpl_comm *c) {
    cpl_status st = CPL_OK;
    CPL_TRY(c->plane->ops->check(c->plane));
    int rank = cpl_watchdog_gone();
    if (rank >= 0) {
        CPL_FAIL(CPL_COMM, "rank %d of this host has ended", rank);
    }
done:
    return st;
}

cpl_status cpl_comm_wait(cpl_comm *c, cpl_device *dev, int slot, const char *doing) {
    static const struct timespec pause = {0, 50000}; /* ns; the host runs steps ahead of the device */
    if (!cpl_by_plane(c, dev)) {
        return cpl_device_wait(dev, slot);
    }
    double next = 0;
    for (bool over = false;;) {
        cpl_status st = cpl_device_over(dev, slot, &over);
        if (st == CPL_OK && over) {
            return CPL_OK;
        }
        if (st == CPL_OK && cpl_now() >= next) {
            st = look_around(c);
            next = cpl_now() + 0.1;
        }
        if (st != CPL_OK && c->size > 1) {
            cpl_comm_end(c, doing);
        } else if (st != CPL_OK) {
            return st;
        }
        nanosleep(&pause, NULL);
    }
}

cpl_status cpl_comm_enqueued(cpl_comm *c, cpl_status own, const char *doing) {
    if (c->plane == NULL || c->size == 1) {
        return cpl_agree(c, own);
    }
    if (own != CPL_OK) {
        cpl_comm_end(c, doing);
    }
    return CPL_OK;
}

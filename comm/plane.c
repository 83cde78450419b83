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

bool cpl_plane_early(const cpl_place *place, int size) {
    if (place[0].overlap != CPL_NCCL_AUTO) {
        return place[0].overlap == CPL_NCCL_ALWAYS;
    }
    for (int r = 1; r < size; r++) {
        if (strcmp(place[r].host, place[0].host) != 0) {
            return true;
        }
    }
    return false;
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

/* Collective: the same answer on all ranks, for it is made of the same table. */
static cpl_status choose(cpl_comm *c, cpl_device *dev, bool *chosen, bool *demanded, bool *early, char *why, size_t size) {
    cpl_status st = CPL_OK;
    cpl_place *place = NULL;
    CPL_TRY(cpl_agree(c, cpl_alloc(&place, (size_t)c->size, sizeof *place, "places of the ranks")));
    cpl_place *own = &place[c->rank];
    if (gethostname(own->host, sizeof own->host - 1) != 0) {
        strcpy(own->host, "unknown");
    }
    if (!cpl_on_host(dev)) {
        cpl_device_identity(dev, own->gpu, sizeof own->gpu);
    }
    own->built = cpl_nccl_built();
    cpl_status wishes = find_wish("CUPEL_NCCL", &own->wish);
    CPL_TRY(cpl_agree(c, wishes == CPL_OK ? find_wish("CUPEL_OVERLAP", &own->overlap) : wishes));
    for (int r = 0; r <= c->size; r++) {
        c->offset[r] = (int64_t)r * (int64_t)sizeof *place;
    }
    CPL_TRY(c->ops->allgather(c, place, c->offset));
    *chosen = cpl_plane_chosen(place, c->size, why, size);
    *early = cpl_plane_early(place, c->size);
    *demanded = false;
    for (int r = 0; r < c->size; r++) {
        *demanded = *demanded || place[r].wish == CPL_NCCL_ALWAYS;
    }
done:
    cpl_free(&place);
    return st;
}

cpl_status cpl_comm_route(cpl_comm *c, cpl_device *dev, char *out, size_t size) {
    cpl_status st = CPL_OK;
    bool chosen = false, demanded = false, early = false;
    char why[128];
    CPL_TRY(choose(c, dev, &chosen, &demanded, &early, why, sizeof why));
    snprintf(out, size, "%s%s", chosen ? "NCCL" : c->size > 1 ? "host memory over MPI: " : "", why);
done:
    return st;
}

void cpl_comm_nccl(char *out, size_t size) {
    cpl_nccl_library(out, size);
}

cpl_status cpl_comm_attach(cpl_comm *c, cpl_device *dev) {
    cpl_status st = CPL_OK;
    bool chosen = false, demanded = false, early = false;
    char why[128], version[64];
    if (cpl_by_plane(c, dev)) {
        return CPL_OK;
    }
    cpl_comm_detach(c);
    CPL_TRY(choose(c, dev, &chosen, &demanded, &early, why, sizeof why));
    if (!chosen && demanded) {
        CPL_FAIL(CPL_UNSUPPORTED, "CUPEL_NCCL=1 demands NCCL, which cannot be used: %s", why);
    }
    if (chosen) {
        CPL_TRY(cpl_nccl_open(&c->plane, c, dev));
        c->plane->comm = c;
        c->plane->dev = dev;
        c->plane->early = early;
    }
    if (!c->told && !cpl_on_host(dev) && (c->size > 1 || chosen)) {
        cpl_nccl_library(version, sizeof version);
        cpl_log_info(chosen ? "%d ranks exchange device memory through NCCL %s" : "%d ranks exchange device memory over MPI: %s",
                     c->size, chosen ? version : why);
        c->told = true;
    }
done:
    return st;
}

void cpl_comm_detach(cpl_comm *c) {
    if (c->plane == NULL) {
        return;
    }
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

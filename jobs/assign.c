/* See assign.h.
 * Refuses to depend on anything but its arguments: every rank computes the same for all. */
#include "jobs/assign.h"
#include "io/base/arena.h"

typedef struct {
    int count;
    int64_t *id; /* owned [count] */
    int *ranks;  /* owned [count]: on it so far */
} pool;

static int find(const pool *p, int64_t id) {
    for (int g = 0; g < p->count; g++) {
        if (p->id[g] == id) {
            return g;
        }
    }
    return -1;
}

/* The first of a rank's GPUs that has room; where none has, the one that fewest share. */
static int choose(const pool *p, const int64_t *id, int64_t visible, int room) {
    int best = -1;
    for (int i = 0; i < visible; i++) {
        int on = p->ranks[find(p, id[i])];
        if (on < room) {
            return i;
        }
        best = best < 0 || on < p->ranks[find(p, id[best])] ? i : best;
    }
    return best;
}

cpl_status cpl_gpus_assign(int ranks, const int64_t *visible, const int64_t *id, int most, int *gpu, int *distinct, int *shared) {
    cpl_status st = CPL_OK;
    pool p = {0};
    int with = 0;
    *distinct = *shared = 0;
    CPL_TRY(cpl_alloc(&p.id, (size_t)ranks * (size_t)most + 1, sizeof *p.id, "GPUs of the host"));
    CPL_TRY(cpl_alloc(&p.ranks, (size_t)ranks * (size_t)most + 1, sizeof *p.ranks, "GPUs of the host"));
    for (int r = 0; r < ranks; r++) {
        gpu[r] = -1;
        with += visible[r] > 0;
        for (int i = 0; i < visible[r]; i++) {
            if (find(&p, id[r * most + i]) < 0) {
                p.id[p.count++] = id[r * most + i];
            }
        }
    }
    int room = p.count == 0 ? 0 : (with + p.count - 1) / p.count;
    for (int64_t choices = 1; choices <= most; choices++) { /* who sees fewer chooses first */
        for (int r = 0; r < ranks; r++) {
            if (visible[r] == choices) {
                gpu[r] = choose(&p, id + (int64_t)r * most, choices, room);
                int *on = &p.ranks[find(&p, id[(int64_t)r * most + gpu[r]])];
                *shared = ++*on > *shared ? *on : *shared;
            }
        }
    }
    *distinct = p.count;
done:
    cpl_free(&p.id);
    cpl_free(&p.ranks);
    return st;
}

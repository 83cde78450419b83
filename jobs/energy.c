/* See energy.h.
 * Refuses a counter that went backwards: it was reset. */
#include "jobs/energy.h"
#include "jobs/device.h"
#include <math.h>
#include <string.h>

enum { NVML = 1, RAPL = 2 }; /* bits of the source */

void cpl_energy_begin(cpl_energy_phase *phase, cpl_device *dev) {
    cpl_device_energy(dev, &phase->start);
}

static int64_t meter_identity(const cpl_energy *e) {
    return e->source == NULL ? 0 : cpl_identity(e->source, e->meter, strlen(e->meter));
}

/* Collective. identity [size]: every rank's meter, 0 where it has none. */
static cpl_status gather_meters(cpl_comm *c, const cpl_energy *own, int64_t *identity) {
    identity[cpl_comm_rank(c)] = meter_identity(own);
    return cpl_comm_allreduce_i64(c, identity, (size_t)cpl_comm_size(c), CPL_SUM);
}

/* Of ranks that share a meter the most: they did not read it at the same instant. */
static double sum_distinct(int ranks, const int64_t *identity, const double *joules) {
    double sum = 0;
    for (int r = 0; r < ranks; r++) {
        double most = joules[r];
        bool first = true;
        for (int q = 0; q < ranks; q++) {
            first = first && (q >= r || identity[q] != identity[r]);
            most = identity[q] == identity[r] ? fmax(most, joules[q]) : most;
        }
        sum += first ? most : 0;
    }
    return sum;
}

cpl_status cpl_energy_end(const cpl_energy_phase *phase, cpl_comm *comm, cpl_device *dev, cpl_energy_drawn *drawn) {
    static const char *const sources[] = {"", "NVML", "RAPL", "NVML,RAPL"};
    cpl_status st = CPL_OK;
    cpl_energy now;
    int64_t *identity = NULL, missing = 0;
    double *joules = NULL;
    int size = cpl_comm_size(comm), rank = cpl_comm_rank(comm);
    *drawn = (cpl_energy_drawn){NAN, ""};
    cpl_device_energy(dev, &now);
    cpl_status local = cpl_alloc(&identity, (size_t)size, sizeof *identity, "energy meters");
    local = local == CPL_OK ? cpl_alloc(&joules, (size_t)size, sizeof *joules, "energy meters") : local;
    CPL_TRY(cpl_agree(comm, local));
    bool known = now.source != NULL && phase->start.source != NULL && strcmp(now.meter, phase->start.meter) == 0 &&
                 now.joules >= phase->start.joules;
    missing = !known;
    joules[rank] = known ? now.joules - phase->start.joules : 0;
    uint32_t word = !known ? 0u : strcmp(now.source, "NVML") == 0 ? NVML : RAPL;
    CPL_TRY(gather_meters(comm, &now, identity));
    CPL_TRY(cpl_comm_allreduce_f64(comm, joules, (size_t)size, CPL_SUM));
    CPL_TRY(cpl_comm_allreduce_i64(comm, &missing, 1, CPL_MAX));
    CPL_TRY(cpl_comm_agree_word(comm, &word));
    if (!missing) {
        *drawn = (cpl_energy_drawn){sum_distinct(size, identity, joules), sources[word & (NVML | RAPL)]};
    }
done:
    cpl_free(&identity);
    cpl_free(&joules);
    return st;
}

static int occurrences(const int64_t *identity, int ranks, int64_t of) {
    int n = 0;
    for (int r = 0; r < ranks; r++) {
        n += identity[r] == of;
    }
    return n;
}

cpl_status cpl_energy_meters(cpl_comm *world, cpl_comm *group, cpl_device *dev, cpl_meters *meters) {
    cpl_status st = CPL_OK;
    cpl_energy now;
    int64_t *all = NULL, *ours = NULL, worst = CPL_METERS_OWN;
    cpl_device_energy(dev, &now);
    cpl_status local = cpl_alloc(&all, (size_t)cpl_comm_size(world), sizeof *all, "energy meters");
    local = local == CPL_OK ? cpl_alloc(&ours, (size_t)cpl_comm_size(group), sizeof *ours, "energy meters") : local;
    CPL_TRY(cpl_agree(world, local));
    CPL_TRY(gather_meters(world, &now, all));
    CPL_TRY(gather_meters(group, &now, ours));
    int64_t own = meter_identity(&now);
    if (own == 0) {
        worst = CPL_METERS_MISSING;
    } else if (occurrences(all, cpl_comm_size(world), own) != occurrences(ours, cpl_comm_size(group), own)) {
        worst = CPL_METERS_SHARED;
    }
    CPL_TRY(cpl_comm_allreduce_i64(world, &worst, 1, CPL_MAX));
    *meters = (cpl_meters)worst;
done:
    cpl_free(&all);
    cpl_free(&ours);
    return st;
}

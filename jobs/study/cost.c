/* See cost.h.
 * Refuses to read a meter while the device still works: a stage ends with what it has fetched. */
#include "jobs/study/cost.h"
#include "io/base/log.h"
#include <math.h>

void cpl_stage_cost_begin(cpl_stage_cost *cost, cpl_device *dev) {
    *cost = (cpl_stage_cost){.started = cpl_now()};
    cpl_device_trim(dev);
    cpl_device_peak_restart(dev);
    cpl_energy_begin(&cost->phase, dev);
}

cpl_status cpl_stage_cost_end(cpl_stage_cost *cost, cpl_comm *world, cpl_device *dev) {
    cpl_status st = CPL_OK;
    size_t held = 0, peak = 0;
    cpl_device_memory(dev, &held, &peak);
    int64_t bytes[2] = {(int64_t)peak, (int64_t)cpl_device_memory_used(dev)};
    CPL_TRY(cpl_energy_end(&cost->phase, world, dev, &cost->energy));
    CPL_TRY(cpl_comm_allreduce_i64(world, bytes, 2, CPL_MAX));
    cost->bytes_peak = bytes[0];
    cost->bytes_used = bytes[1];
    cost->wall_s = cpl_now() - cost->started;
done:
    return st;
}

cpl_status cpl_stage_cost_record(cpl_record *rec, const cpl_stage_cost *cost) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_record_f64(rec, "wall_s", cost->wall_s));
    CPL_TRY(cpl_record_i64(rec, "device_bytes_peak", cost->bytes_peak));
    if (cost->bytes_used > 0) {
        CPL_TRY(cpl_record_i64(rec, "device_bytes_used", cost->bytes_used));
    }
    if (!isnan(cost->energy.joules)) {
        CPL_TRY(cpl_record_f64(rec, "energy_j", cost->energy.joules));
        CPL_TRY(cpl_record_text(rec, "energy_source", cost->energy.source));
    }
done:
    return st;
}

/* The overflow consensus on a device word.
 * Refuses to let the host decide with it: the word goes back to the device, where step_control reads it. */
#include "comm/internal.h"

cpl_status cpl_comm_or_flag(cpl_comm *c, cpl_device *dev, uint32_t *flag) {
    cpl_status st = CPL_OK;
    uint32_t word = 0;
    if (cpl_by_plane(c, dev) && cpl_comm_reaches(c)) {
        return cpl_comm_meet(c, flag);
    }
    if (cpl_by_plane(c, dev)) {
        CPL_TRY(c->plane->ops->fork(c->plane));
        CPL_TRY(c->plane->ops->max_u32(c->plane, flag));
        return c->plane->ops->join(c->plane);
    }
    if (c->size == 1) {
        return CPL_OK;
    }
    if (cpl_on_host(dev)) {
        return cpl_comm_agree_word(c, flag);
    }
    CPL_TRY(cpl_agree(c, CPL_OPS(dev, download, &word, flag, sizeof word)));
    CPL_TRY(cpl_comm_agree_word(c, &word));
    CPL_TRY(cpl_agree(c, CPL_OPS(dev, upload, flag, &word, sizeof word)));
done:
    return st;
}

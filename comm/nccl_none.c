/* NCCL in a build without it.
 * Refuses to open. */
#include "comm/internal.h"
#include <stdio.h>

bool cpl_nccl_built(void) {
    return false;
}

void cpl_nccl_library(char *out, size_t size) {
    snprintf(out, size, "not in this build");
}

cpl_status cpl_nccl_open(cpl_plane **out, cpl_comm *c, cpl_device *dev) {
    *out = NULL;
    return cpl_fail(CPL_UNSUPPORTED, __FILE__, __LINE__, "NCCL is not in this build");
}

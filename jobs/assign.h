/* Which rank of a host computes on which GPU.
 * Refuses nothing: the caller judges how many ranks came to share one. */
#ifndef CPL_JOBS_ASSIGN_H
#define CPL_JOBS_ASSIGN_H

#include "io/base/status.h"
#include <stdint.h>

/* ranks of one host in the order of the world. visible [ranks]: how many GPUs rank r sees, id [ranks][most]: what tells them apart,
 * in the order in which r numbers them. gpu [ranks]: r's number of the GPU it gets, -1 where it sees none. *distinct: GPUs of the
 * host that some rank sees; *shared: ranks on the GPU that most of them share.
 *
 * One GPU a rank where that can be; else blocks of neighbours share one, for neighbours are what is split and summed together: the
 * groups of a sweep, the halves of the tree of a reduction. Errors: CPL_NO_MEMORY. */
cpl_status cpl_gpus_assign(int ranks, const int64_t *visible, const int64_t *id, int most, int *gpu, int *distinct, int *shared);

#endif

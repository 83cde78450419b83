/* The GPUs that this process sees, and how they are linked.
 * Refuses to list a GPU that no rank could compute on. */
#ifndef CPL_KERNELS_GPUS_H
#define CPL_KERNELS_GPUS_H

#include <stdbool.h>
#include <stddef.h>

enum { CPL_GPUS_MAX = 64, CPL_GPU_UUID = 48, CPL_GPU_BUS = 20 };
typedef struct {
    char name[128];
    char uuid[CPL_GPU_UUID];  /* "GPU-" and 32 hexadecimal digits in groups: the same for every process of the host */
    char bus[CPL_GPU_BUS];    /* PCI address, "0000:1b:00.0" */
    int ordinal;              /* CUDA's number of it in this process */
    size_t memory;            /* bytes */
    int sm_count, capability; /* capability: 90 for sm_90 */
} cpl_gpu;

/* Those of sm_80 or newer, at most CPL_GPUS_MAX, in CUDA's order; how many there are. 0 also in a build without CUDA. */
int cpl_gpus(cpl_gpu list[CPL_GPUS_MAX]);

typedef enum { CPL_LINK_NONE, CPL_LINK_PCI, CPL_LINK_NVLINK } cpl_gpu_link; /* none: through host memory */
/* How the first reads the memory of the second. */
cpl_gpu_link cpl_gpus_link(const cpl_gpu *from, const cpl_gpu *to);

#endif

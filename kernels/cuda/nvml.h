/* NVML, NVIDIA's management library: energy counters, links, versions.
 * Refuses to be needed: it is opened at run time, and what it lacks is said to be unknown. */
#ifndef CPL_KERNELS_CUDA_NVML_H
#define CPL_KERNELS_CUDA_NVML_H

#include "io/base/status.h"
#include <stdbool.h>
#include <stddef.h>

typedef struct cpl_nvml cpl_nvml;
enum { CPL_NVML_TEXT = 96 };

/* libnvidia-ml.so.1, or $CUPEL_NVML. Where it cannot be opened *out stays NULL and `why` says so; that is no error.
 * Errors: CPL_NO_MEMORY. */
cpl_status cpl_nvml_open(cpl_nvml **out, char why[CPL_NVML_TEXT]);
void cpl_nvml_close(cpl_nvml **nvml);

/* What a GPU, by its PCI address, has drawn since its driver was loaded. False: not counted here (`why` says so).
 * uuid [CPL_GPU_UUID]: of the whole GPU, also where CUDA shows a part of it. */
bool cpl_nvml_energy(const cpl_nvml *nvml, const char *bus, double *joules, char *uuid, size_t uuid_size, char why[CPL_NVML_TEXT]);
/* Whether NVLink joins the two. False also where that is not known. */
bool cpl_nvml_nvlink(const cpl_nvml *nvml, const char *bus_a, const char *bus_b);
/* "580.82.07"; "" where it is not known. */
void cpl_nvml_driver(const cpl_nvml *nvml, char *text, size_t size);

#endif

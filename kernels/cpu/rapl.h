/* Energy of the host's processor packages: the kernel's powercap folder (Intel's and AMD's RAPL counters).
 * Refuses to count only some of the packages. */
#ifndef CPL_KERNELS_CPU_RAPL_H
#define CPL_KERNELS_CPU_RAPL_H

#include "kernels/kernels.h"

typedef struct cpl_rapl cpl_rapl;
/* Opens the counters at the first call, and from then on a thread reads them often enough to see each time that they begin anew.
 * out->source stays NULL where there are none, or they may not be read (Linux lets root alone since 2020). */
void cpl_rapl_read(cpl_rapl **rapl, cpl_energy *out);
void cpl_rapl_close(cpl_rapl **rapl);
/* "RAPL, 2 packages", or why not. */
void cpl_rapl_describe(char *text, size_t size);

#endif

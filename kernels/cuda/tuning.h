/* What was timed on this GPU before: kept in a file for each GPU and library version, so that later runs choose the same, and ranks
 * that share the file, too: who times holds its lock, and the others find the result. Refuses to fail where no file can be kept:
 * then each process times for itself. */
#ifndef CPL_KERNELS_CUDA_TUNING_H
#define CPL_KERNELS_CUDA_TUNING_H

#include "kernels/cuda/cuda.h"

typedef struct cpl_tuning cpl_tuning;

/* The file: $CUPEL_CACHE, else $XDG_CACHE_HOME/cupel, else $HOME/.cache/cupel, and in it "<gpu>-<version>.tuning". A damaged file
 * is begun anew. Errors: CPL_NO_MEMORY. */
cpl_status cpl_tuning_open(cpl_tuning **out, const char *gpu, int64_t version);
void cpl_tuning_close(cpl_tuning **tuning);

/* By name and key (key_bytes): its time and value (value_bytes, NULL for none), the latest kept. False: not there, not looked for
 * in the file. */
bool cpl_tuning_find(const cpl_tuning *tuning, const char *name, const void *key, size_t key_bytes, double *ms, void *value,
                     size_t value_bytes);
/* Before timing: waits for the file's lock and reads what others added meanwhile. The lock is held until cpl_tuning_release. */
cpl_status cpl_tuning_claim(cpl_tuning *tuning);
/* While claimed: to the table and the file. */
cpl_status cpl_tuning_keep(cpl_tuning *tuning, const char *name, const void *key, size_t key_bytes, double ms, const void *value,
                           size_t value_bytes);
void cpl_tuning_release(cpl_tuning *tuning);

enum { CPL_TUNING_ROUNDS = 7 }; /* that tell close times apart */
/* *ms = median over `rounds` of what body enqueues on the device's stream.   *ms = its mean over about timed_ms of runs in a row,
 * after lead_ms of them; about_ms > 0: what one takes. Errors: CPL_DEVICE, those of body. */
cpl_status cpl_tuning_time(cpl_device *dev, cpl_status (*body)(void *context), void *context, int rounds, double *ms);
cpl_status cpl_tuning_sustained(cpl_device *dev, cpl_status (*body)(void *context), void *context, double about_ms, double lead_ms,
                                double timed_ms, double *ms);

#endif

/* Calls of the CUDA driver by name, for machines without a GPU have no library of it to link with.
 * Refuses drivers older than CUDA 12.0. */
#ifndef CPL_KERNELS_CUDA_DRIVER_H
#define CPL_KERNELS_CUDA_DRIVER_H

#include <cuda_runtime_api.h>
#include <stddef.h>

/* NULL where the driver lacks it. */
static inline void *cpl_cuda_driver_call(const char *name) {
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    void *call = NULL;
#if CUDART_VERSION >= 12050
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &call, 12000, cudaEnableDefault, &found);
#else
    cudaError_t error = cudaGetDriverEntryPoint(name, &call, cudaEnableDefault, &found);
#endif
    (void)cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? call : NULL;
}

#endif

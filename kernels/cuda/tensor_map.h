/* Descriptions of matrices for the bulk tensor copy engine of sm_90.
 * Refuses types that are not of 16 bits. */
#ifndef CPL_KERNELS_CUDA_TENSOR_MAP_H
#define CPL_KERNELS_CUDA_TENSOR_MAP_H

#include "kernels/cuda/cuda.h"
#include <cuda.h>
#ifdef __cplusplus
extern "C" {
#endif

enum { CPL_BOX_COLUMNS = 64 }; /* of 16 bits: a row of a box is the 128 bytes that are swizzled */

/* Whether the driver can make them. */
bool cpl_tensor_map_found(void);
/* *map: boxes of CPL_BOX_COLUMNS columns and box_rows rows (<= 256) of x [rows, cols] of bf16 or f16, swizzled by 128 bytes, 0
 * outside. x and rows at multiples of 16 bytes. Errors: CPL_DEVICE. */
cpl_status cpl_tensor_map(CUtensorMap *map, cpl_dtype dt, const void *x, int64_t rows, int64_t cols, int box_rows);

#ifdef __cplusplus
}
#endif
#endif

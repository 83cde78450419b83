/* Descriptions of matrices for the bulk tensor copy engine, by the driver.
 * Refuses to link with the driver's library: machines without a GPU have none, so its one call is asked for. */
#include "kernels/cuda/tensor_map.h"

typedef CUresult (*encode_call)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                                const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static encode_call find_encode(void) {
    static bool asked;
    static void *call;
    if (!asked) {
        enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &call, 12000, cudaEnableDefault, &found);
#else
        cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &call, cudaEnableDefault, &found);
#endif
        (void)cudaGetLastError();
        call = error == cudaSuccess && found == cudaDriverEntryPointSuccess ? call : NULL;
        asked = true;
    }
    return (encode_call)(uintptr_t)call;
}

bool cpl_tensor_map_found(void) {
    return find_encode() != NULL;
}

cpl_status cpl_tensor_map(CUtensorMap *map, cpl_dtype dt, const void *x, int64_t rows, int64_t cols, int box_rows) {
    cpl_status st = CPL_OK;
    const cuuint64_t size[2] = {(cuuint64_t)cols, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)cols * 2};
    const cuuint32_t box[2] = {CPL_BOX_COLUMNS, (cuuint32_t)box_rows}, step[2] = {1, 1};
    CUtensorMapDataType type = dt == CPL_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    encode_call encode = find_encode();
    CUresult result =
        encode == NULL ? CUDA_ERROR_NOT_SUPPORTED
                       : encode(map, type, 2, (void *)(uintptr_t)x, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        CPL_FAIL(CPL_DEVICE, "describe a matrix of %lld x %lld: CUDA error %d", (long long)rows, (long long)cols, (int)result);
    }
done:
    return st;
}

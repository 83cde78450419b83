/* The table of operations of the CUDA back end.
 * Refuses to link where an operation is missing. */
#include "kernels/cuda/cuda.h"

extern const cpl_ops cpl_cuda_ops;
const cpl_ops cpl_cuda_ops = {
#define CPL_OP(name, parameters) .name = CPL_CUDA(name),
#include "kernels/ops.def"
#undef CPL_OP
};

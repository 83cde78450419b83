/* True sizes: the bytes a model's stored payload has, with what sparsity and quantization really save.
 * Refuses to count what would have to be stored as free. */
#ifndef CPL_JOBS_SIZE_H
#define CPL_JOBS_SIZE_H

#include "jobs/model/model.h"

/* One tensor in 16 bits of which `removed` weights are pruned: dense, or a bitmask and the remaining weights, whichever is smaller.
 */
int64_t cpl_tensor_bytes(const cpl_param *p, int64_t removed);
/* The same in codes: dense codes, or a bitmask and the remaining codes; scales and zero points in both. */
int64_t cpl_quantized_bytes(const cpl_quant_spec *spec, const cpl_param *p, int64_t removed);
/* A whole model in 16 bits. removed [layout->count], or NULL: nothing removed. */
int64_t cpl_sparse_bytes(const cpl_layout *layout, const int64_t *removed);

#endif

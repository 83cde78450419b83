/* True sizes of stored models.
 * Refuses to count what would have to be stored as free. */
#include "jobs/size.h"
#include "kernels/pack.h"

int64_t cpl_tensor_bytes(const cpl_param *p, int64_t removed) {
    int64_t n = cpl_param_count(p), dense = 2 * n, sparse = (n + 7) / 8 + 2 * (n - removed);
    return removed > 0 && sparse < dense ? sparse : dense;
}

int64_t cpl_quantized_bytes(const cpl_quant_spec *spec, const cpl_param *p, int64_t removed) {
    int64_t dense = cpl_quant_packed_bytes(spec, p->rows, p->cols), n = cpl_param_count(p);
    int64_t codes = cpl_pack_row_bytes(spec->bits, p->cols) * p->rows;
    int64_t sparse = dense - codes + (n + 7) / 8 + ((n - removed) * spec->bits + 7) / 8;
    return removed > 0 && sparse < dense ? sparse : dense;
}

int64_t cpl_sparse_bytes(const cpl_layout *layout, const int64_t *removed) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < layout->count; i++) {
        bytes += cpl_tensor_bytes(&layout->param[i], removed == NULL ? 0 : removed[i]);
    }
    return bytes;
}

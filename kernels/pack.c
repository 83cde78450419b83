/* Packing of quantized tensors: see pack.h.
 * Refuses to round a payload's size: rows are padded to bytes, and every padding bit is counted. */
#include "kernels/pack.h"
#include <math.h>

cpl_status cpl_quant_groups(const cpl_quant_spec *spec, int64_t rows, int64_t cols, int64_t *groups) {
    cpl_status st = CPL_OK;
    int64_t n, bits;
    *groups = 0;
    if (spec->bits < 2 || spec->bits > 8) {
        CPL_FAIL(CPL_USAGE, "quantization: %d bits, expected 2 to 8", spec->bits);
    }
    if (spec->scale_dtype != CPL_F32 && spec->scale_dtype != CPL_F16) {
        CPL_FAIL(CPL_USAGE, "quantization: scales of type %d, expected fp32 or fp16", (int)spec->scale_dtype);
    }
    /* 64 bits a weight: more than a code, its own scale and zero point take, so that no size below overflows */
    if (rows < 0 || cols < 0 || !cpl_mul_i64(rows, cols, &n) || !cpl_mul_i64(n, 64, &bits)) {
        CPL_FAIL(CPL_USAGE, "quantization: a tensor of %lld x %lld is too large", (long long)rows, (long long)cols);
    }
    if (n > 0 && (spec->group < 1 || (spec->group > cols && spec->group != n))) {
        CPL_FAIL(CPL_USAGE, "quantization: a group of %lld, expected 1 to %lld, or %lld for the tensor", (long long)spec->group,
                 (long long)cols, (long long)n);
    }
    *groups = n == 0 ? 0 : spec->group > cols ? 1 : rows * ((cols + spec->group - 1) / spec->group);
done:
    return st;
}

int64_t cpl_pack_row_bytes(int bits, int64_t cols) {
    return (cols * bits + 7) / 8;
}

int64_t cpl_quant_packed_bytes(const cpl_quant_spec *spec, int64_t rows, int64_t cols) {
    int64_t groups = 0;
    if (cpl_quant_groups(spec, rows, cols, &groups) != CPL_OK) {
        return -1;
    }
    int64_t group_bytes = (int64_t)cpl_dtype_size(spec->scale_dtype) + (spec->scheme == CPL_QUANT_ASYMMETRIC);
    return rows * cpl_pack_row_bytes(spec->bits, cols) + groups * group_bytes;
}

void cpl_pack_codes(int bits, uint8_t *packed, const uint8_t *codes, int64_t rows, int64_t cols) {
    uint32_t low = (1u << bits) - 1;
    for (int64_t r = 0; r < rows; r++) {
        uint32_t held = 0; /* bits not yet written, the oldest lowest */
        int count = 0;
        for (int64_t c = 0; c < cols; c++) {
            held |= (codes[r * cols + c] & low) << count;
            count += bits;
            if (count >= 8) {
                *packed++ = (uint8_t)held;
                held >>= 8;
                count -= 8;
            }
        }
        if (count > 0) {
            *packed++ = (uint8_t)held;
        }
    }
}

void cpl_unpack_codes(int bits, uint8_t *codes, const uint8_t *packed, int64_t rows, int64_t cols) {
    uint32_t low = (1u << bits) - 1;
    for (int64_t r = 0; r < rows; r++) {
        uint32_t held = 0;
        int count = 0;
        for (int64_t c = 0; c < cols; c++) {
            if (count < bits) {
                held |= (uint32_t)*packed++ << count;
                count += 8;
            }
            codes[r * cols + c] = (uint8_t)(held & low);
            held >>= bits;
            count -= bits;
        }
    }
}

double cpl_quant_entropy(const int64_t code_count[256]) {
    double total = 0, sum = 0;
    for (int i = 0; i < 256; i++) {
        total += (double)code_count[i];
    }
    for (int i = 0; i < 256; i++) {
        if (code_count[i] > 0) {
            double f = (double)code_count[i] / total;
            sum += f * log2(total / (double)code_count[i]);
        }
    }
    return sum;
}

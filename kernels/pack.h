/* Storage of quantized tensors on the host: codes of b bits packed into bytes, the sizes of a payload, the entropy of codes.
 * Refuses a grouping that does not fit the tensor. */
#ifndef CPL_KERNELS_PACK_H
#define CPL_KERNELS_PACK_H

#include "kernels/kernels.h"

/* *groups = number of scales of a tensor [rows,cols]. Errors: CPL_USAGE for bits outside 2..8, group outside 1..cols that is not
 * rows*cols, a scale_dtype that is neither f32 nor f16, and sizes that overflow. */
cpl_status cpl_quant_groups(const cpl_quant_spec *spec, int64_t rows, int64_t cols, int64_t *groups);

/* Bytes of one row of cols codes of `bits` bits, padded to a whole byte. */
int64_t cpl_pack_row_bytes(int bits, int64_t cols);

/* Bytes of a packed tensor: codes (each row padded to a whole byte) + scales + zero points (asymmetric: one byte each).
 * -1 where cpl_quant_groups refuses; the message says why. */
int64_t cpl_quant_packed_bytes(const cpl_quant_spec *spec, int64_t rows, int64_t cols);

/* codes [rows,cols] u8 <-> packed [rows, cpl_pack_row_bytes] u8, host memory. Within a row the codes follow one another, lowest bit
 * first; the padding bits of a row's last byte are 0. Bits of a code above `bits` are not packed. */
void cpl_pack_codes(int bits, uint8_t *packed, const uint8_t *codes, int64_t rows, int64_t cols);
void cpl_unpack_codes(int bits, uint8_t *codes, const uint8_t *packed, int64_t rows, int64_t cols);

/* Entropy of the codes in bits a weight, -sum f log2 f over the frequencies f; 0 for no codes. */
double cpl_quant_entropy(const int64_t code_count[256]);

#endif

/* How much scratch memory operations take, and the pieces it is made of: said once, for them and for plans made without a GPU.
 * Refuses to ask a device: how many multiprocessors it has is an argument. */
#ifndef CPL_KERNELS_CUDA_SCRATCH_H
#define CPL_KERNELS_CUDA_SCRATCH_H

#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum {
    CPL_NORM_ROWS = 8,       /* layernorm: rows that are worth a block */
    CPL_EMBED_PIECE = 16,    /* embed_bwd: sorted places of a block */
    CPL_GELU_TILE = 128,     /* product_gelu_bwd: rows of a tile */
    CPL_ATTENTION_PIECE = 64 /* attention_bwd on sm_90: rows that one partial sum is of */
};

/* Bytes. layernorm_bwd: partial sums [3][pieces][C] f32, a piece the rows of a block. */
int64_t cpl_scratch_norm_pieces(int64_t R, int64_t sm_count);
size_t cpl_scratch_norm(int64_t R, int64_t C, int64_t sm_count);
/* column_sums: [pieces][N] f32, a piece so many rows. */
int64_t cpl_scratch_column_rows(int64_t R);
size_t cpl_scratch_columns(int64_t R, int64_t N);
/* product_gelu_bwd: [tiles of rows][K] f32. */
size_t cpl_scratch_gelu(int64_t R, int64_t K);
/* attention_bwd on sm_90: partial column sums [2][pieces][C] f32 of dq and of dout. */
size_t cpl_scratch_attention_bias(int64_t R, int64_t C);
/* embed_bwd: parts of runs that cross the borders of pieces [pieces][2][C] f32, and three lists [n] i32; a sort takes its own
 * behind them, about that of cpl_scratch_sort: cub tells it where there is a GPU alone. */
size_t cpl_scratch_embed_edges(int64_t n, int64_t C);
size_t cpl_scratch_embed_list(int64_t n);
size_t cpl_scratch_sort(int64_t n);
/* linear_bwd_input: sums over rows [n] f32, made to time a way of making them. */
size_t cpl_scratch_linear(int64_t n);
/* sum_f32, mse: a partial sum f64 of every CPL_SUM_CHUNK of n elements. */
size_t cpl_scratch_flat(int64_t n);

#ifdef __cplusplus
}
#endif
#endif

/* What the operations take for themselves, foretold without a GPU: for cupel plan, and for what would fit.
 * Refuses to differ from what they take: tests/jobs/cuda/test_cuda_pass.c compares. */
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/attention.h"

enum { COLUMN_PIECES_MAX = 64, COLUMN_ROWS_LEAST = 64, ALIGNMENT = 256 };
/* An H100 or H200: what decides about a little of it, where no GPU can be asked. */
enum { USUAL_SM_COUNT = 132, USUAL_CAPABILITY = 90 };

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t pieces(int64_t n, int64_t each) {
    return (n + each - 1) / each;
}

static size_t aligned(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static size_t floats(int64_t rows, int64_t columns) {
    return (size_t)rows * (size_t)columns * sizeof(float);
}

int64_t cpl_scratch_norm_pieces(int64_t R, int64_t sm_count) {
    int64_t blocks = pieces(R, CPL_NORM_ROWS);
    return blocks < sm_count ? blocks : sm_count;
}
size_t cpl_scratch_norm(int64_t R, int64_t C, int64_t sm_count) {
    return floats(3 * cpl_scratch_norm_pieces(R, sm_count), C);
}

int64_t cpl_scratch_column_rows(int64_t R) {
    return larger(pieces(R, COLUMN_PIECES_MAX), COLUMN_ROWS_LEAST);
}
size_t cpl_scratch_columns(int64_t R, int64_t N) {
    return floats(pieces(R, cpl_scratch_column_rows(R)), N);
}

size_t cpl_scratch_gelu(int64_t R, int64_t K) {
    return floats(pieces(R, CPL_GELU_TILE), K);
}

size_t cpl_scratch_attention_bias(int64_t R, int64_t C) {
    return floats(2 * pieces(R, CPL_ATTENTION_PIECE), C);
}

size_t cpl_scratch_embed_edges(int64_t n, int64_t C) {
    return aligned(floats(2 * pieces(n, CPL_EMBED_PIECE), C));
}
size_t cpl_scratch_embed_list(int64_t n) {
    return aligned((size_t)n * sizeof(int32_t));
}
size_t cpl_scratch_sort(int64_t n) {
    return 8 * (size_t)n + (1 << 16); /* keys and values once more, and counts */
}

size_t cpl_scratch_linear(int64_t n) {
    return floats(1, n);
}

size_t cpl_scratch_flat(int64_t n) {
    return (size_t)pieces(n, CPL_SUM_CHUNK) * sizeof(double);
}

/* CPL_CUDA_SCRATCH_ROWS of a training step; the widest linear layer has 4C columns. */
static size_t rows_bytes(const cpl_pass *p, int64_t sm_count) {
    int64_t R = p->B * p->T, C = p->C;
    const size_t of[] = {cpl_scratch_norm(R, C, sm_count), cpl_scratch_columns(R, 4 * C),
                         cpl_dtype_size(p->dt) == 2 ? cpl_scratch_gelu(R, 4 * C) : 0,
                         cpl_dtype_size(p->dt) == 2 ? cpl_scratch_attention_bias(R, C) : 0,
                         cpl_scratch_embed_edges(R, C) + 3 * cpl_scratch_embed_list(R) + cpl_scratch_sort(R)};
    size_t most = 0;
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        most = of[i] > most ? of[i] : most;
    }
    return most;
}

int64_t cpl_cuda_pass_bytes(const cpl_pass *p) {
    cpl_gpu *list = NULL;
    int64_t sm_count = USUAL_SM_COUNT;
    int capability = USUAL_CAPABILITY;
    size_t bytes = CPL_CUDA_PRODUCT_WORKSPACE + cpl_scratch_flat(larger(p->flat, p->B * p->T * p->C));
    if (cpl_alloc(&list, CPL_GPUS_MAX, sizeof *list, "list of GPUs") == CPL_OK && cpl_cuda_gpus(list, CPL_GPUS_MAX) > 0) {
        sm_count = list[0].sm_count;
        capability = list[0].capability;
    }
    cpl_free(&list);
    if (p->B > 0) {
        const cpl_attention_shape attention = {.dt = p->dt, .B = p->B, .T = p->T, .H = p->H, .D = p->C / p->H};
        bytes += cpl_attention_scratch(&attention, p->training, capability);
        bytes += p->training ? rows_bytes(p, sm_count) + (cpl_dtype_size(p->dt) == 2 ? cpl_scratch_linear(4 * p->C) : 0) : 0;
    }
    return (int64_t)bytes;
}

/* Linear layers: products in tiles by the matrix library, with bias, GELU and rounding done to each tile while it is in cache.
 * Refuses to let the split depend on threads: tiles are a function of the shape alone, and each is one single-threaded product. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vector.h"
#include <omp.h>
#include <string.h>

/* Tiles of y and dx, which stay in the second-level cache until their epilogue is done, and of dw. */
enum { TILE_ROWS = 128, TILE_COLS = 512, WEIGHT_ROWS = 256, WEIGHT_COLS = 512 };
/* From this many rows on a transposed copy of w pays in the forward product. */
enum { TRANSPOSE_ROWS = 512 };

typedef struct {
    float *c; /* borrowed: [rows,cols] with leading dimension ld, the product; results of f32 stay there */
    int64_t ld, row, col, rows, cols;
} tile;
typedef void (*tile_finish)(const void *layer, const tile *t);

/* An operand as cpl_gemm takes it. */
typedef struct {
    const void *x; /* borrowed: an argument of the operation, or scratch */
    int64_t ld;
} operand;

static bool native_bf16(cpl_dtype dt) {
    return dt == CPL_BF16 && cpl_gemm_has_bf16();
}

/* Rows whose distance is a multiple of 512 bytes fall into few sets of the caches; libraries that read b, or a transposed, in place
 * then run at less than half their speed (measured: oneDNN 2.6, 37 instead of 86 GFLOP/s). A copy with longer rows costs 1 to 3 %.
 */
static bool bad_distance(int64_t cols) {
    return cols % 128 == 0;
}
static int64_t good_distance(int64_t cols) {
    return bad_distance(cols) ? cols + 16 : cols;
}

/* x [rows,cols] act as an operand: x itself where the library takes its type (and, if `strided`, its row distance is a good one),
 * else a copy in f32. */
static cpl_status straight(cpl_device *dev, cpl_dtype dt, bool strided, int slot, const void *x, int64_t rows, int64_t cols,
                           operand *out) {
    cpl_status st = CPL_OK;
    float *wide = NULL;
    *out = (operand){.x = x, .ld = cols};
    if (native_bf16(dt) || (dt == CPL_F32 && !(strided && bad_distance(cols)))) {
        return CPL_OK;
    }
    int64_t ld = good_distance(cols);
    CPL_TRY(cpl_cpu_scratch(dev, slot, (size_t)(rows * ld) * sizeof *wide, &wide));
    *out = (operand){.x = wide, .ld = ld};
#pragma omp parallel for num_threads(cpl_cpu_team(dev, rows *cols)) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        cpl_load_act(dt, wide + r * ld, x, r * cols, cols);
    }
done:
    return st;
}

/* The transpose [cols,rows] of x [rows,cols] act, in f32. */
static cpl_status transposed(cpl_device *dev, cpl_dtype dt, int slot, const void *x, int64_t rows, int64_t cols, operand *out) {
    cpl_status st = CPL_OK;
    enum { ROWS = 16, COLS = 64 };
    int64_t ld = good_distance(rows);
    float *wide = NULL;
    CPL_TRY(cpl_cpu_scratch(dev, slot, (size_t)(cols * ld) * sizeof *wide, &wide));
    *out = (operand){.x = wide, .ld = ld};
#pragma omp parallel for num_threads(cpl_cpu_team(dev, rows *cols)) schedule(static)
    for (int64_t r = 0; r < rows; r += ROWS) {
        float block[ROWS][COLS] = {{0}};
        int64_t m = cpl_min_i64(ROWS, rows - r);
        for (int64_t c = 0; c < cols; c += COLS) {
            int64_t n = cpl_min_i64(COLS, cols - c);
            for (int64_t l = 0; l < m; l++) {
                cpl_load_act(dt, block[l], x, (r + l) * cols + c, n);
            }
            for (int64_t j = 0; j < n; j++) {
                float *restrict to = wide + (c + j) * ld + r;
                if (m == ROWS) {
                    for (int l = 0; l < ROWS; l++) {
                        to[l] = block[l][j];
                    }
                    continue;
                }
                for (int64_t l = 0; l < m; l++) {
                    to[l] = block[l][j];
                }
            }
        }
    }
done:
    return st;
}

/* One product of two operands as tiles of at most rows x cols. whole->c NULL: each tile goes to a buffer of its thread. */
static cpl_status product(cpl_device *dev, const cpl_gemm_call *whole, const operand *a, const operand *b, int64_t rows,
                          int64_t cols, tile_finish finish, const void *layer) {
    cpl_status st = CPL_OK;
    int64_t across = cpl_ceil_div(whole->n, cols);
    int64_t tiles = cpl_ceil_div(whole->m, rows) * across;
    size_t element = cpl_dtype_size(whole->dt);
    float *buffers = NULL;
    int failure = 0;
    int team = (int)cpl_min_i64(cpl_cpu_team(dev, whole->m * whole->n), tiles);
    if (whole->c == NULL) {
        CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_TILES, (size_t)team * (size_t)(rows * cols) * sizeof *buffers, &buffers));
    }
#pragma omp parallel num_threads(team)
    {
        cpl_gemm_enter();
        float *own = buffers != NULL ? buffers + omp_get_thread_num() * rows * cols : NULL;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tiles; i++) {
            tile t = {.row = i / across * rows, .col = i % across * cols};
            t.rows = cpl_min_i64(rows, whole->m - t.row);
            t.cols = cpl_min_i64(cols, whole->n - t.col);
            t.c = own != NULL ? own : whole->c + t.row * whole->ldc + t.col;
            t.ld = own != NULL ? t.cols : whole->ldc;
            cpl_gemm_call part = *whole;
            part.a = (const char *)a->x + (size_t)(whole->a_trans ? t.row : t.row * a->ld) * element;
            part.b = (const char *)b->x + (size_t)(whole->b_trans ? t.col * b->ld : t.col) * element;
            part.lda = a->ld;
            part.ldb = b->ld;
            part.m = t.rows;
            part.n = t.cols;
            part.c = t.c;
            part.ldc = t.ld;
            int status = cpl_gemm(&part);
            if (status != 0) {
#pragma omp atomic write
                failure = status;
            } else if (finish != NULL) {
                finish(layer, &t);
            }
        }
    }
    if (failure != 0) {
        CPL_TRY(cpl_gemm_fail(failure));
    }
done:
    return st;
}

typedef struct {
    cpl_dtype dt;
    bool gelu;
    void *y, *pre;        /* borrowed [R,N] act; pre may be NULL */
    const float *bias;    /* borrowed [N], or NULL */
    const void *residual; /* borrowed [R,N] act, or NULL */
    int64_t N;
} forward;

/* v += x[at...] */
static void add_act(cpl_dtype dt, float *v, const void *x, int64_t at, int64_t n) {
    enum { BLOCK = 256 };
    float buffer[BLOCK];
    for (int64_t j = 0; j < n; j += BLOCK) {
        int64_t part = cpl_min_i64(BLOCK, n - j);
        const float *restrict from = cpl_view_act(dt, buffer, x, at + j, part);
        float *restrict to = v + j;
#pragma omp simd
        for (int64_t l = 0; l < part; l++) {
            to[l] += from[l];
        }
    }
}

static void finish_forward(const void *layer, const tile *t) {
    const forward *f = layer;
    for (int64_t i = 0; i < t->rows; i++) {
        float *restrict v = t->c + i * t->ld;
        int64_t at = (t->row + i) * f->N + t->col;
        if (f->bias != NULL) {
            const float *restrict bias = f->bias + t->col;
#pragma omp simd
            for (int64_t j = 0; j < t->cols; j++) {
                v[j] += bias[j];
            }
        }
        if (f->residual != NULL) {
            add_act(f->dt, v, f->residual, at, t->cols);
        }
        if (f->gelu) {
            cpl_round_act(f->dt, v, t->cols);
            if (f->pre != NULL) {
                cpl_store_act(f->dt, f->pre, at, v, t->cols);
            }
#pragma omp simd
            for (int64_t j = 0; j < t->cols; j++) {
                v[j] = cpl_geluf(v[j]);
            }
        }
        if (f->dt != CPL_F32 || v != (const float *)f->y + at) {
            cpl_store_act(f->dt, f->y, at, v, t->cols);
        }
    }
}

/* layer: but for its bias, which is act here. */
static cpl_status forward_product(cpl_device *dev, forward layer, const void *x, const void *w, const void *bias, int64_t R,
                                  int64_t K) {
    cpl_status st = CPL_OK;
    cpl_dtype dt = layer.dt;
    float *wide_bias = NULL;
    operand a;
    operand b;
    int64_t N = layer.N;
    /* y may be the residual, which is not to be overwritten by a product yet. */
    float *in_place = dt == CPL_F32 && layer.residual == NULL ? layer.y : NULL;
    cpl_gemm_call g = {.dt = native_bf16(dt) ? dt : CPL_F32, .m = R, .n = N, .k = K, .c = in_place, .ldc = N};
    CPL_TRY(straight(dev, dt, false, CPL_SCRATCH_X, x, R, K, &a));
    g.b_trans = g.dt != CPL_F32 || R < TRANSPOSE_ROWS;
    if (g.b_trans) {
        CPL_TRY(straight(dev, dt, false, CPL_SCRATCH_W, w, N, K, &b));
    } else {
        CPL_TRY(transposed(dev, dt, CPL_SCRATCH_W, w, N, K, &b));
    }
    if (bias != NULL) {
        CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_Y, (size_t)N * sizeof *wide_bias, &wide_bias));
        cpl_load_act(dt, wide_bias, bias, 0, N);
    }
    layer.bias = wide_bias;
    CPL_TRY(product(dev, &g, &a, &b, TILE_ROWS, TILE_COLS, finish_forward, &layer));
done:
    return st;
}

cpl_status CPL_CPU(linear_fwd)(cpl_device *dev, cpl_dtype dt, void *y, const void *x, const void *w, const void *bias,
                               const void *residual, int64_t R, int64_t N, int64_t K) {
    return forward_product(dev, (forward){.dt = dt, .y = y, .residual = residual, .N = N}, x, w, bias, R, K);
}

cpl_status CPL_CPU(linear_gelu_fwd)(cpl_device *dev, cpl_dtype dt, void *y, void *pre, const void *x, const void *w,
                                    const void *bias, int64_t R, int64_t N, int64_t K) {
    return forward_product(dev, (forward){.dt = dt, .gelu = true, .y = y, .pre = pre, .N = N}, x, w, bias, R, K);
}

typedef struct {
    cpl_dtype dt;
    void *dx;        /* borrowed [R,K] act */
    const void *pre; /* borrowed [R,K] act, or NULL */
    int64_t K;
} backward;

static void finish_backward(const void *layer, const tile *t) {
    enum { BLOCK = 256 };
    const backward *b = layer;
    float buffer[BLOCK];
    for (int64_t i = 0; i < t->rows; i++) {
        float *v = t->c + i * t->ld;
        int64_t at = (t->row + i) * b->K + t->col;
        for (int64_t j = 0; j < t->cols && b->pre != NULL; j += BLOCK) {
            int64_t n = cpl_min_i64(BLOCK, t->cols - j);
            const float *restrict pre = cpl_view_act(b->dt, buffer, b->pre, at + j, n);
            float *restrict part = v + j;
#pragma omp simd
            for (int64_t l = 0; l < n; l++) {
                part[l] *= cpl_gelu_slope(pre[l]);
            }
        }
        cpl_commit_act(b->dt, b->dx, at, v, t->cols);
    }
}

/* Sums over blocks of rows, then those in order. */
cpl_status CPL_CPU(column_sums)(cpl_device *dev, cpl_dtype dt, float *sums, const void *x, int64_t ld, int64_t R, int64_t N) {
    cpl_status st = CPL_OK;
    enum { ROWS = 32 };
    int64_t blocks = cpl_ceil_div(R, ROWS);
    int team = cpl_cpu_team(dev, R * N);
    float *partial = NULL; /* [blocks,N] sums, then [threads,N] a widened row */
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_Y, (size_t)((blocks + team) * N) * sizeof *partial, &partial));
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float *restrict sum = partial + block * N;
        float *buffer = partial + (blocks + omp_get_thread_num()) * N;
        memset(sum, 0, (size_t)N * sizeof *sum);
        for (int64_t r = block * ROWS; r < cpl_min_i64(R, (block + 1) * ROWS); r++) {
            const float *restrict row = cpl_view_act(dt, buffer, x, r * ld, N);
#pragma omp simd
            for (int64_t j = 0; j < N; j++) {
                sum[j] += row[j];
            }
        }
    }
#pragma omp parallel for num_threads(cpl_cpu_team(dev, blocks *N)) schedule(static)
    for (int64_t j0 = 0; j0 < N; j0 += 64) {
        for (int64_t block = 0; block < blocks; block++) {
            for (int64_t j = j0; j < cpl_min_i64(N, j0 + 64); j++) {
                sums[j] += partial[block * N + j];
            }
        }
    }
done:
    return st;
}

cpl_status CPL_CPU(linear_bwd_input)(cpl_device *dev, cpl_dtype dt, void *dx, float *dbias, const void *dy, const void *w,
                                     const void *pre, int64_t R, int64_t N, int64_t K) {
    cpl_status st = CPL_OK;
    operand a;
    operand b;
    cpl_gemm_call g = {.dt = native_bf16(dt) ? dt : CPL_F32, .m = R, .n = K, .k = N, .c = dt == CPL_F32 ? dx : NULL, .ldc = K};
    CPL_TRY(straight(dev, dt, false, CPL_SCRATCH_X, dy, R, N, &a));
    CPL_TRY(straight(dev, dt, true, CPL_SCRATCH_W, w, N, K, &b));
    const backward layer = {.dt = dt, .dx = dx, .pre = pre, .K = K};
    CPL_TRY(product(dev, &g, &a, &b, TILE_ROWS, TILE_COLS, finish_backward, &layer));
    if (dbias != NULL) {
        CPL_TRY(CPL_CPU(column_sums)(dev, dt, dbias, dx, K, R, K));
    }
done:
    return st;
}

cpl_status CPL_CPU(linear_bwd_weight)(cpl_device *dev, cpl_dtype dt, float *dw, const void *dy, const void *x, int64_t R, int64_t N,
                                      int64_t K, bool overwrites) {
    cpl_status st = CPL_OK;
    operand a;
    operand b;
    cpl_gemm_call g = {.dt = native_bf16(dt) ? dt : CPL_F32,
                       .a_trans = true,
                       .m = N,
                       .n = K,
                       .k = R,
                       .c = dw,
                       .ldc = K,
                       .beta = overwrites ? 0.0f : 1.0f};
    CPL_TRY(straight(dev, dt, true, CPL_SCRATCH_W, dy, R, N, &a));
    CPL_TRY(straight(dev, dt, true, CPL_SCRATCH_X, x, R, K, &b));
    CPL_TRY(product(dev, &g, &a, &b, WEIGHT_ROWS, WEIGHT_COLS, NULL, NULL));
done:
    return st;
}

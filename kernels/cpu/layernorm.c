/* LayerNorm, in the backward pass with the residual addition behind it.
 * Refuses one-pass variances: mean first, then squared deviations, in f32. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector.h"
#include <math.h>
#include <omp.h>
#include <string.h>

static const float variance_eps = 1e-5f;

/* Per thread: `rows` rows of C floats, each on its own cache lines; then the widened g and b, shared. */
static cpl_status row_buffers(cpl_device *dev, int64_t rows, int team, int64_t C, float **out, int64_t *stride) {
    *stride = cpl_ceil_div(C, 16) * 16;
    return cpl_cpu_scratch(dev, CPL_SCRATCH_TILES, (size_t)((rows * team + 2) * *stride) * sizeof **out, out);
}

/* Mean and 1/sqrt(var + eps) of a row. */
static void moments(const float *restrict x, int64_t C, float *restrict scratch, float *mean, float *rstd) {
    float m = cpl_sum(x, C) / (float)C;
#pragma omp simd
    for (int64_t j = 0; j < C; j++) {
        scratch[j] = x[j] - m;
    }
    *mean = m;
    *rstd = 1.0f / sqrtf(cpl_dot(scratch, scratch, C) / (float)C + variance_eps);
}

cpl_status CPL_CPU(layernorm_fwd)(cpl_device *dev, cpl_dtype dt, void *y, float *mean, float *rstd, const void *x, const void *g,
                                  const void *b, int64_t R, int64_t C) {
    cpl_status st = CPL_OK;
    int team = cpl_cpu_team(dev, R * C);
    int64_t stride;
    float *buffers = NULL;
    CPL_TRY(row_buffers(dev, 3, team, C, &buffers, &stride));
    float *restrict gain = buffers + 3 * team * stride;
    float *restrict bias = gain + stride;
    cpl_load_act(dt, gain, g, 0, C);
    cpl_load_act(dt, bias, b, 0, C);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t r = 0; r < R; r++) {
        float *own = buffers + 3 * omp_get_thread_num() * stride;
        float *scratch = own + stride;
        const float *row = cpl_view_act(dt, own, x, r * C, C);
        float m;
        float s;
        moments(row, C, scratch, &m, &s);
        mean[r] = m;
        rstd[r] = s;
        float *restrict out = cpl_target_act(dt, own + 2 * stride, y, r * C);
#pragma omp simd
        for (int64_t j = 0; j < C; j++) {
            out[j] = CPL_FMA(scratch[j] * s, gain[j], bias[j]);
        }
        cpl_commit_act(dt, y, r * C, out, C);
    }
done:
    return st;
}

/* One row: h = (x - mean) rstd, e = dy g;  dx = rstd (e - mean(e) - h mean(e h)) + dres;  dg += dy h, db += dy, dbias += dx. */
typedef struct {
    const float *gain;      /* borrowed [C] */
    float *h, *e;           /* borrowed [C], scratch */
    float *dg, *db, *dbias; /* borrowed [C], partial sums */
    int64_t C;
} backward_row;

static void row_backward(const backward_row *w, float *dx, const float *dy, const float *dres, const float *x, float mean,
                         float rstd) {
    float *restrict h = w->h;
    float *restrict e = w->e;
    float *restrict dg = w->dg;
    float *restrict db = w->db;
    float *restrict dbias = w->dbias;
    const float *restrict gain = w->gain;
#pragma omp simd
    for (int64_t j = 0; j < w->C; j++) {
        h[j] = (x[j] - mean) * rstd;
        e[j] = dy[j] * gain[j];
        dg[j] = CPL_FMA(dy[j], h[j], dg[j]);
        db[j] += dy[j];
    }
    float e_mean = cpl_sum(e, w->C) / (float)w->C;
    float eh_mean = cpl_dot(e, h, w->C) / (float)w->C;
#pragma omp simd
    for (int64_t j = 0; j < w->C; j++) {
        float d = (e[j] - e_mean - h[j] * eh_mean) * rstd;
        d = dres != NULL ? d + dres[j] : d;
        dbias[j] += d;
        dx[j] = d;
    }
}

cpl_status CPL_CPU(layernorm_bwd)(cpl_device *dev, cpl_dtype dt, void *dx, float *dg, float *db, float *dbias, const void *dy,
                                  const void *dres, const void *x, const float *mean, const float *rstd, const void *g, int64_t R,
                                  int64_t C) {
    cpl_status st = CPL_OK;
    enum { SUMS = 3 }; /* dg, db, dbias: partial sums over at most 64 blocks of rows, a function of R alone, added in order. */
    int64_t rows = cpl_ceil_div(R, 64) > 16 ? cpl_ceil_div(R, 64) : 16;
    int64_t blocks = cpl_ceil_div(R, rows);
    int team = (int)cpl_min_i64(cpl_cpu_team(dev, R * C), blocks > 0 ? blocks : 1);
    int64_t stride;
    float *buffers = NULL;
    float *partial = NULL; /* [blocks][SUMS][C] */
    CPL_TRY(row_buffers(dev, 6, team, C, &buffers, &stride));
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_Y, (size_t)(blocks * SUMS * C) * sizeof *partial, &partial));
    float *gain = buffers + 6 * team * stride;
    cpl_load_act(dt, gain, g, 0, C);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float *own = buffers + 6 * omp_get_thread_num() * stride;
        float *sums = partial + SUMS * block * C;
        backward_row w = {.gain = gain, .h = own, .e = own + stride, .dg = sums, .db = sums + C, .dbias = sums + 2 * C, .C = C};
        memset(sums, 0, (size_t)(SUMS * C) * sizeof *sums);
        for (int64_t r = block * rows; r < cpl_min_i64(R, (block + 1) * rows); r++) {
            const float *dy_row = cpl_view_act(dt, own + 2 * stride, dy, r * C, C);
            const float *x_row = cpl_view_act(dt, own + 3 * stride, x, r * C, C);
            const float *res_row = dres != NULL ? cpl_view_act(dt, own + 4 * stride, dres, r * C, C) : NULL;
            float *dx_row = cpl_target_act(dt, own + 5 * stride, dx, r * C);
            row_backward(&w, dx_row, dy_row, res_row, x_row, mean[r], rstd[r]);
            cpl_commit_act(dt, dx, r * C, dx_row, C);
        }
    }
#pragma omp parallel for num_threads(cpl_cpu_team(dev, blocks *C)) schedule(static)
    for (int64_t j = 0; j < C; j++) {
        float sum[SUMS] = {0};
        for (int64_t block = 0; block < blocks; block++) {
            for (int k = 0; k < SUMS; k++) {
                sum[k] += partial[(SUMS * block + k) * C + j];
            }
        }
        dg[j] += sum[0];
        db[j] += sum[1];
        if (dbias != NULL) {
            dbias[j] += sum[2];
        }
    }
done:
    return st;
}

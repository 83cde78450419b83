/* Causal self-attention, backward: probabilities are made again from log-sum-exp, block by block (Dao 2023, arXiv:2307.08691, alg.
 * 2). Refuses atomics: one thread owns a head and adds its blocks in a fixed order. */
#include "kernels/cpu/attention.h"

/* Scratch of one thread. Gradients over keys and values are of the whole head, in f32, rounded once at the end. */
typedef struct {
    float *keys_t, *values_t;                   /* [blocks][D][CPL_KEYS] */
    float *keys, *dkeys, *dvalues;              /* [padded, wide] */
    float *queries, *dout, *dqueries;           /* [CPL_QUERIES, wide]; queries times scale2 */
    float *probabilities, *dscores;             /* [CPL_QUERIES, CPL_KEYS] */
    float *rows;                                /* [8, wide] */
    float lse[CPL_QUERIES], delta[CPL_QUERIES]; /* delta = dout . out per row */
} backward_scratch;

static int64_t backward_floats(const head_shape *s) {
    return s->padded * (2 * s->D + 3 * s->wide) + CPL_QUERIES * (3 * s->wide + 2 * CPL_KEYS) + 8 * s->wide;
}

static backward_scratch backward_place(const head_shape *s, float *base) {
    backward_scratch f;
    f.keys_t = base;
    f.values_t = f.keys_t + s->padded * s->D;
    f.keys = f.values_t + s->padded * s->D;
    f.dkeys = f.keys + s->padded * s->wide;
    f.dvalues = f.dkeys + s->padded * s->wide;
    f.queries = f.dvalues + s->padded * s->wide;
    f.dout = f.queries + CPL_QUERIES * s->wide;
    f.dqueries = f.dout + CPL_QUERIES * s->wide;
    f.probabilities = f.dqueries + CPL_QUERIES * s->wide;
    f.dscores = f.probabilities + CPL_QUERIES * CPL_KEYS;
    f.rows = f.dscores + CPL_QUERIES * CPL_KEYS;
    return f;
}

/* p = 2^(scores - lse), ds = p (dp - delta); both 0 from key `valid` on, also a little past the padding, where the products over
 * groups of CPL_TILE_M keys read.   p: scores in; ds: dp in   [CPL_KEYS]   lse in powers of two */
static void row_gradients(float *p, float *ds, float lse, float delta, int64_t valid, int64_t padded) {
    cpl_vec shift = cpl_vec_all(lse);
    cpl_vec centre = cpl_vec_all(delta);
    valid = valid > 0 ? valid : 0;
    for (int64_t j = 0; j < valid; j += CPL_LANES) {
        cpl_vec v = cpl_vec_exp2_normal(cpl_vec_load(p + j) - shift);
        cpl_vec_store(p + j, v);
        cpl_vec_store(ds + j, v * (cpl_vec_load(ds + j) - centre));
    }
    int64_t end = cpl_min_i64(CPL_KEYS, padded + 8);
    for (int64_t j = valid; j < end; j++) {
        p[j] = 0.0f;
        ds[j] = 0.0f;
    }
}

/* Block of n queries from q0 against the block of keys from k0. */
static void backward_block(const head_shape *s, backward_scratch *f, int64_t q0, int64_t n, int64_t k0) {
    int64_t wide = s->wide;
    int64_t rows = cpl_ceil_div(n, CPL_TILE_M) * CPL_TILE_M;
    for (int64_t i = 0; i < rows; i += CPL_TILE_M) {
        int64_t keys = cpl_min_i64(CPL_KEYS, cpl_min_i64(q0 + i + CPL_TILE_M, s->T) - k0);
        if (keys <= 0) {
            continue;
        }
        int64_t padded = cpl_ceil_div(keys, 2 * CPL_LANES) * 2 * CPL_LANES;
        float *p = f->probabilities + i * CPL_KEYS;
        float *ds = f->dscores + i * CPL_KEYS;
        cpl_tile_rows(false, padded, s->D, f->queries + i * wide, wide, 1, f->keys_t + k0 * s->D, CPL_KEYS, p, CPL_KEYS);
        cpl_tile_rows(false, padded, s->D, f->dout + i * wide, wide, 1, f->values_t + k0 * s->D, CPL_KEYS, ds, CPL_KEYS);
        for (int64_t m = 0; m < CPL_TILE_M; m++) {
            int64_t valid = i + m < n ? cpl_min_i64(keys, q0 + i + m + 1 - k0) : 0;
            row_gradients(p + m * CPL_KEYS, ds + m * CPL_KEYS, f->lse[i + m], f->delta[i + m], valid, padded);
        }
        cpl_tile_rows(true, wide, keys, ds, CPL_KEYS, 1, f->keys + k0 * wide, wide, f->dqueries + i * wide, wide);
    }
    int64_t last = cpl_min_i64(CPL_KEYS, q0 + n - k0);
    for (int64_t j = 0; j < last; j += CPL_TILE_M) {
        int64_t past = k0 + j - q0; /* queries before key k0 + j do not see it */
        int64_t i = past > 0 ? past / CPL_TILE_M * CPL_TILE_M : 0;
        cpl_tile_rows(true, wide, rows - i, f->probabilities + i * CPL_KEYS + j, 1, CPL_KEYS, f->dout + i * wide, wide,
                      f->dvalues + (k0 + j) * wide, wide);
        cpl_tile_rows(true, wide, rows - i, f->dscores + i * CPL_KEYS + j, 1, CPL_KEYS, f->queries + i * wide, wide,
                      f->dkeys + (k0 + j) * wide, wide);
    }
}

typedef struct {
    head_shape shape;
    void *dqkv;                   /* borrowed [B,T,3C] act */
    const void *dout, *out, *qkv; /* borrowed [B,T,C], [B,T,C], [B,T,3C] act */
    const float *lse;             /* borrowed [B,H,T] */
} backward;

/* Reads the rows of a block of queries and delta; rows past n are 0. */
static void backward_load(const backward *w, backward_scratch *f, int64_t b, int64_t h, int64_t q0, int64_t n) {
    const head_shape *s = &w->shape;
    int64_t at = (b * s->T + q0) * s->C + h * s->D;
    pack_rows(s, f->queries, CPL_QUERIES, w->qkv, qkv_at(s, b, q0, 0, h), 3 * s->C, n, s->scale2);
    pack_rows(s, f->dout, CPL_QUERIES, w->dout, at, s->C, n, 1.0f);
    for (int64_t i = 0; i < CPL_QUERIES; i++) {
        f->lse[i] = i < n ? CPL_LOG2_E * w->lse[(b * s->H + h) * s->T + q0 + i] : 0.0f;
        f->delta[i] = 0.0f;
        if (i < n) {
            pack_rows(s, f->rows, 1, w->out, at + i * s->C, s->C, 1, 1.0f);
            f->delta[i] = cpl_dot(f->dout + i * s->wide, f->rows, s->D);
        }
    }
    memset(f->dqueries, 0, (size_t)(CPL_QUERIES * s->wide) * sizeof *f->dqueries);
}

static void backward_head(const backward *w, backward_scratch *f, int64_t b, int64_t h) {
    const head_shape *s = &w->shape;
    size_t bytes = (size_t)(cpl_ceil_div(s->T, CPL_TILE_M) * CPL_TILE_M * s->wide) * sizeof *f->dkeys;
    pack_transposed(s, f->keys_t, f->rows, w->qkv, qkv_at(s, b, 0, 1, h), 3 * s->C, s->T);
    pack_transposed(s, f->values_t, f->rows, w->qkv, qkv_at(s, b, 0, 2, h), 3 * s->C, s->T);
    pack_rows(s, f->keys, s->T, w->qkv, qkv_at(s, b, 0, 1, h), 3 * s->C, s->T, 1.0f);
    memset(f->dkeys, 0, bytes);
    memset(f->dvalues, 0, bytes);
    for (int64_t q0 = 0; q0 < s->T; q0 += CPL_QUERIES) {
        int64_t n = cpl_min_i64(CPL_QUERIES, s->T - q0);
        backward_load(w, f, b, h, q0, n);
        for (int64_t k0 = 0; k0 < q0 + n; k0 += CPL_KEYS) {
            backward_block(s, f, q0, n, k0);
        }
        for (int64_t i = 0; i < n; i++) {
            store_row(s, w->dqkv, qkv_at(s, b, q0 + i, 0, h), f->dqueries + i * s->wide, s->scale);
        }
    }
    for (int64_t t = 0; t < s->T; t++) {
        store_row(s, w->dqkv, qkv_at(s, b, t, 1, h), f->dkeys + t * s->wide, CPL_LN_2); /* queries carry log2(e) */
        cpl_store_act(s->dt, w->dqkv, qkv_at(s, b, t, 2, h), f->dvalues + t * s->wide, s->D);
    }
}

cpl_status CPL_CPU(attention_bwd)(cpl_device *dev, cpl_dtype dt, void *dqkv, float *dbias, const void *dout, const void *out,
                                  const float *lse, const void *qkv, int64_t B, int64_t T, int64_t H, int64_t D) {
    cpl_status st = CPL_OK;
    const backward w = {.shape = head_shape_of(dt, T, H, D), .dqkv = dqkv, .dout = dout, .out = out, .qkv = qkv, .lse = lse};
    int64_t floats = cpl_ceil_div(backward_floats(&w.shape), 16) * 16;
    int team = (int)cpl_min_i64(cpl_cpu_team(dev, B * H * T * T), B * H > 0 ? B * H : 1);
    float *base = NULL;
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_TILES, (size_t)(team * floats) * sizeof *base, &base));
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t i = 0; i < B * H; i++) {
        backward_scratch f = backward_place(&w.shape, base + omp_get_thread_num() * floats);
        backward_head(&w, &f, i / H, i % H);
    }
    if (dbias != NULL) {
        int64_t C = w.shape.C;
        CPL_TRY(CPL_CPU(column_sums)(dev, dt, dbias, dqkv, 3 * C, B * T, C));
        CPL_TRY(CPL_CPU(column_sums)(dev, dt, dbias + 2 * C, dout, C, B * T, C));
    }
done:
    return st;
}

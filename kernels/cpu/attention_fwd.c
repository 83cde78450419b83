/* Causal self-attention, forward: blocks of queries against blocks of keys with a running softmax (Dao 2023, arXiv:2307.08691, alg.
 * 1). Refuses to touch blocks of keys that lie wholly in the future. */
#include "kernels/cpu/attention.h"

/* Scratch of one thread; every part starts on a cache line. */
typedef struct {
    float *keys;    /* [blocks][D][CPL_KEYS] transposed */
    float *values;  /* [padded, wide] */
    float *queries; /* [CPL_QUERIES, wide], times scale2 */
    float *scores;  /* [CPL_QUERIES, CPL_KEYS], then probabilities */
    float *out;     /* [CPL_QUERIES, wide] */
    float *rows;    /* [8, wide] */
    float top[CPL_QUERIES], sum[CPL_QUERIES];
} forward_scratch;

static int64_t forward_floats(const head_shape *s) {
    return s->padded * (s->D + s->wide) + CPL_QUERIES * (2 * s->wide + CPL_KEYS) + 8 * s->wide;
}

static forward_scratch forward_place(const head_shape *s, float *base) {
    forward_scratch f;
    f.keys = base;
    f.values = f.keys + s->padded * s->D;
    f.queries = f.values + s->padded * s->wide;
    f.scores = f.queries + CPL_QUERIES * s->wide;
    f.out = f.scores + CPL_QUERIES * CPL_KEYS;
    f.rows = f.out + CPL_QUERIES * s->wide;
    return f;
}

/* One row of scores becomes probabilities relative to the row's running maximum; what was summed before is rescaled to it.
 * scores [padded]; keys from `valid` on are in the future. */
static void softmax_row(float *scores, int64_t valid, int64_t padded, float *top, float *sum, float *out, int64_t wide) {
    for (int64_t j = valid > 0 ? valid : 0; j < padded; j++) {
        scores[j] = -INFINITY;
    }
    if (valid <= 0) {
        memset(scores, 0, (size_t)padded * sizeof *scores);
        return;
    }
    cpl_vec high = cpl_vec_all(*top);
    for (int64_t j = 0; j < padded; j += CPL_LANES) {
        high = cpl_vec_max(cpl_vec_load(scores + j), high);
    }
    float next = cpl_vec_largest(high);
    cpl_vec shift = cpl_vec_all(next);
    cpl_vec total = {0};
    for (int64_t j = 0; j < padded; j += CPL_LANES) {
        cpl_vec p = cpl_vec_exp2_normal(cpl_vec_load(scores + j) - shift);
        cpl_vec_store(scores + j, p);
        total += p;
    }
    if (next == *top || *sum == 0.0f) { /* no rescaling: the same maximum, or the first block */
        *sum += cpl_vec_sum(total);
        *top = next;
        return;
    }
    float keep = cpl_exp2f_normal(*top - next);
    *sum = *sum * keep + cpl_vec_sum(total);
    *top = next;
    for (int64_t d = 0; d < wide; d += CPL_LANES) {
        cpl_vec_store(out + d, cpl_vec_load(out + d) * cpl_vec_all(keep));
    }
}

/* Queries [q0, q0 + n) of one head against all keys up to the last of them. */
static void forward_block(const head_shape *s, forward_scratch *f, int64_t q0, int64_t n) {
    for (int i = 0; i < CPL_QUERIES; i++) {
        f->top[i] = -INFINITY;
        f->sum[i] = 0.0f;
    }
    memset(f->out, 0, (size_t)(CPL_QUERIES * s->wide) * sizeof *f->out);
    for (int64_t k0 = 0; k0 < q0 + n; k0 += CPL_KEYS) {
        for (int64_t i = 0; i < n; i += CPL_TILE_M) {
            int64_t keys = cpl_min_i64(CPL_KEYS, cpl_min_i64(q0 + i + CPL_TILE_M, s->T) - k0);
            if (keys <= 0) {
                continue;
            }
            int64_t padded = cpl_ceil_div(keys, 2 * CPL_LANES) * 2 * CPL_LANES;
            float *scores = f->scores + i * CPL_KEYS;
            cpl_tile_rows(false, padded, s->D, f->queries + i * s->wide, s->wide, 1, f->keys + k0 * s->D, CPL_KEYS, scores,
                          CPL_KEYS);
            for (int64_t m = i; m < i + CPL_TILE_M; m++) {
                softmax_row(f->scores + m * CPL_KEYS, cpl_min_i64(q0 + m + 1 - k0, keys), padded, &f->top[m], &f->sum[m],
                            f->out + m * s->wide, s->wide);
            }
            cpl_tile_rows(true, s->wide, keys, scores, CPL_KEYS, 1, f->values + k0 * s->wide, s->wide, f->out + i * s->wide,
                          s->wide);
        }
    }
}

typedef struct {
    head_shape shape;
    void *out;       /* borrowed [B,T,C] act */
    float *lse;      /* borrowed [B,H,T] */
    const void *qkv; /* borrowed [B,T,3C] act */
} forward;

/* Queries [first, last) of head h of sequence b. */
static void forward_head(const forward *w, forward_scratch *f, int64_t b, int64_t h, int64_t first, int64_t last) {
    const head_shape *s = &w->shape;
    pack_transposed(s, f->keys, f->rows, w->qkv, qkv_at(s, b, 0, 1, h), 3 * s->C, last);
    pack_rows(s, f->values, last, w->qkv, qkv_at(s, b, 0, 2, h), 3 * s->C, last, 1.0f);
    for (int64_t q0 = first; q0 < last; q0 += CPL_QUERIES) {
        int64_t n = cpl_min_i64(CPL_QUERIES, last - q0);
        pack_rows(s, f->queries, CPL_QUERIES, w->qkv, qkv_at(s, b, q0, 0, h), 3 * s->C, n, s->scale2);
        forward_block(s, f, q0, n);
        for (int64_t i = 0; i < n; i++) {
            store_row(s, w->out, (b * s->T + q0 + i) * s->C + h * s->D, f->out + i * s->wide, 1.0f / f->sum[i]);
            w->lse[(b * s->H + h) * s->T + q0 + i] = CPL_FMA(f->top[i], CPL_LN_2, cpl_logf(f->sum[i]));
        }
    }
}

cpl_status CPL_CPU(attention_fwd)(cpl_device *dev, cpl_dtype dt, void *out, float *lse, const void *qkv, int64_t B, int64_t T,
                                  int64_t H, int64_t D) {
    cpl_status st = CPL_OK;
    const forward w = {.shape = head_shape_of(dt, T, H, D), .out = out, .lse = lse, .qkv = qkv};
    int64_t floats = cpl_ceil_div(forward_floats(&w.shape), 16) * 16;
    int team = cpl_cpu_team(dev, B * H * T * T);
    float *base = NULL;
    /* Few heads for many threads: the queries of a head are cut too. A row's bits do not depend on the cut. */
    int64_t groups = cpl_ceil_div(T, CPL_QUERIES);
    int64_t cuts = B * H >= 2 * team ? 1 : cpl_min_i64(groups, cpl_ceil_div(2 * team, B * H > 0 ? B * H : 1));
    int64_t span = cpl_ceil_div(groups, cuts > 0 ? cuts : 1) * CPL_QUERIES;
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_TILES, (size_t)(team * floats) * sizeof *base, &base));
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t i = 0; i < B * H * cuts; i++) {
        forward_scratch f = forward_place(&w.shape, base + omp_get_thread_num() * floats);
        int64_t first = cpl_min_i64(T, (cuts - 1 - i % cuts) * span); /* the longest pieces first */
        forward_head(&w, &f, i / cuts / H, i / cuts % H, first, cpl_min_i64(T, first + span));
    }
done:
    return st;
}

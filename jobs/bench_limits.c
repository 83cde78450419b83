/* What this machine can do at most, by the operations that do nothing else.
 * Refuses figures from data sheets. */
#include "io/base/rng.h"
#include "jobs/bench.h"
#include <stdio.h>
#include <string.h>

enum { COPY_BYTES = 1 << 28 };

typedef struct {
    cpl_device *dev;
    cpl_dtype dt;
    void *x, *w, *y; /* owned, device */
    int64_t R, N, K;
} product;

static cpl_status multiply(void *context) {
    const product *p = context;
    return CPL_OPS(p->dev, linear_fwd, p->dt, p->y, p->x, p->w, NULL, NULL, p->R, p->N, p->K);
}

static cpl_status backward(void *context) {
    const product *p = context;
    return CPL_OPS(p->dev, linear_bwd_input, p->dt, p->x, NULL, p->y, p->w, NULL, p->R, p->N, p->K);
}

cpl_status cpl_bench_normals(const cpl_bench *b, cpl_dtype dt, int64_t n, float scale, uint32_t stream, void *out) {
    cpl_status st = CPL_OK;
    enum { BLOCK = 4096 };
    float block[BLOCK];
    float *values = NULL;
    void *device = NULL, *rounded = NULL;
    for (int64_t i = 0; i < BLOCK; i++) {
        block[i] = scale * cpl_rng_normal(1, CPL_RNG_INIT, stream, (uint64_t)i);
    }
    CPL_TRY(cpl_device_alloc(b->dev, &device, (size_t)n, sizeof(float), "bench"));
    values = device;
    int64_t have = n < BLOCK ? n : BLOCK;
    CPL_TRY(CPL_OPS(b->dev, upload, values, block, (size_t)have * sizeof(float)));
    for (int64_t more; have < n; have += more) { /* the same block again and again, by twice as many each time */
        more = n - have < have ? n - have : have;
        CPL_TRY(CPL_OPS(b->dev, copy, values + have, values, (size_t)more * sizeof(float)));
    }
    if (dt != CPL_F32) {
        CPL_TRY(cpl_device_alloc(b->dev, &rounded, (size_t)n, cpl_dtype_size(dt), "bench"));
        CPL_TRY(CPL_OPS(b->dev, cast_from_f32, dt, rounded, values, n));
        CPL_TRY(b->dev->ops->synchronize(b->dev));
        cpl_device_free(b->dev, &device);
        device = rounded;
        rounded = NULL;
    }
    memcpy(out, &device, sizeof device);
    device = NULL;
done:
    cpl_device_free(b->dev, &device);
    cpl_device_free(b->dev, &rounded);
    return st;
}

/* The larger of what is there under this name and what was measured now. */
static cpl_status keep_larger(cpl_bench *b, cpl_bench_row *row, double *limit) {
    cpl_status st = CPL_OK;
    double rate = cpl_bench_rate(row);
    row->limit = true;
    for (int64_t i = 0; i < b->n_rows; i++) {
        cpl_bench_row *old = &b->row[i];
        if (strcmp(old->name, row->name) == 0) {
            int64_t larger = rate > cpl_bench_rate(old); /* rank 0's says which stays, on all ranks */
            CPL_TRY(cpl_comm_bcast(b->world, &larger, sizeof larger, 0));
            *limit = rate > *limit ? rate : *limit;
            if (larger) {
                double all = rate;
                CPL_TRY(cpl_comm_allreduce_f64(b->world, &all, 1, CPL_SUM));
                *old = *row;
                old->all = all;
            }
            return CPL_OK;
        }
    }
    *limit = rate;
    CPL_TRY(cpl_bench_keep(b, *row));
done:
    return st;
}

/* One shape, forward and with the weights transposed; the faster into *most. */
static cpl_status product_of(cpl_bench *b, cpl_dtype dt, int64_t n, int64_t k, int64_t m, cpl_bench_row *most) {
    cpl_status st = CPL_OK;
    product p = {.dev = b->dev, .dt = dt, .R = m, .N = n, .K = k};
    cpl_status local = cpl_bench_normals(b, cpl_dtype_storage(dt), m * k, 1, 1, &p.x);
    local = local == CPL_OK ? cpl_bench_normals(b, cpl_dtype_storage(dt), n * k, 0.02f, 2, &p.w) : local;
    local = local == CPL_OK ? cpl_device_alloc(b->dev, &p.y, (size_t)(m * n), cpl_dtype_size(dt), "bench") : local;
    CPL_TRY(cpl_agree(b->world, local));
    for (int transposed = 0; transposed < 2; transposed++) {
        cpl_bench_row row = {.flops = 2.0 * (double)m * (double)n * (double)k};
        snprintf(row.name, sizeof row.name, "limit: matrix product %s", cpl_dtype_name(dt));
        snprintf(row.shape, sizeof row.shape, "%lldx%lldx%lld", (long long)m, (long long)n, (long long)k);
        CPL_TRY(cpl_bench_time(b, transposed ? backward : multiply, &p, &row));
        *most = cpl_bench_rate(&row) > cpl_bench_rate(most) ? row : *most;
    }
done:
    cpl_device_free(b->dev, &p.x);
    cpl_device_free(b->dev, &p.w);
    cpl_device_free(b->dev, &p.y);
    return st;
}

static cpl_status products(cpl_bench *b, cpl_dtype dt) {
    cpl_status st = CPL_OK;
    /* The larger, the nearer to the limit and the slower: the last are left out where they would take too long. */
    static const int64_t shapes[][3] = {{512, 512, 512},    {1024, 1024, 1024}, {2048, 1024, 512},
                                        {2048, 2048, 2048}, {4096, 4096, 4096}, {8192, 8192, 8192}};
    enum { SHAPES = sizeof shapes / sizeof shapes[0], ALWAYS = 2 };
    cpl_bench_row most = {.flops = 1, .seconds = 1e30};
    int64_t enough = 0;
    for (int i = 0; i < SHAPES && !enough; i++) {
        CPL_TRY(product_of(b, dt, shapes[i][1], shapes[i][2], shapes[i][0], &most));
        if (i + 1 < SHAPES) {
            const int64_t *next = shapes[i + 1];
            double seconds = 2.0 * (double)next[0] * (double)next[1] * (double)next[2] / cpl_bench_rate(&most);
            enough = i + 1 >= ALWAYS && 5 * seconds > 10 * b->o->seconds;
        }
        CPL_TRY(cpl_comm_bcast(b->world, &enough, sizeof enough, 0));
    }
    CPL_TRY(keep_larger(b, &most, &b->products[dt]));
done:
    return st;
}

typedef struct {
    cpl_device *dev;
    void *to, *from; /* owned, device [COPY_BYTES] */
} copying;

static cpl_status copy(void *context) {
    const copying *c = context;
    return CPL_OPS(c->dev, copy, c->to, c->from, COPY_BYTES);
}

static cpl_status copies(cpl_bench *b) {
    cpl_status st = CPL_OK;
    copying c = {.dev = b->dev};
    cpl_bench_row row = {.name = "limit: copy, read and written", .bytes = 2.0 * COPY_BYTES};
    cpl_status local = cpl_device_alloc(b->dev, &c.to, COPY_BYTES, 1, "bench");
    local = local == CPL_OK ? cpl_device_alloc(b->dev, &c.from, COPY_BYTES, 1, "bench") : local;
    CPL_TRY(cpl_agree(b->world, local));
    snprintf(row.shape, sizeof row.shape, "%d MiB", COPY_BYTES >> 20);
    CPL_TRY(cpl_bench_time(b, copy, &c, &row));
    CPL_TRY(keep_larger(b, &row, &b->copy));
done:
    cpl_device_free(b->dev, &c.to);
    cpl_device_free(b->dev, &c.from);
    return st;
}

cpl_status cpl_bench_limits(cpl_bench *b) {
    cpl_status st = CPL_OK;
    CPL_TRY(products(b, CPL_F32));
    if (b->product != CPL_F32) {
        CPL_TRY(products(b, b->product));
    }
    CPL_TRY(copies(b));
done:
    return st;
}

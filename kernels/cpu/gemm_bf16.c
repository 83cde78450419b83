/* bf16 x bf16 -> f32 products by oneDNN matmul primitives, for processors that have them; oneDNN 2 and 3.
 * Refuses to start threads: primitives are made and run where omp_get_max_threads() is 1 (cpl_gemm_enter), with scratchpads of
 * their own. */
#include "kernels/cpu/gemm.h"
#include <dnnl.h>
#include <string.h>

/* oneDNN 2 passes memory descriptors by value, 3 by handle. */
#if DNNL_VERSION_MAJOR >= 3
typedef dnnl_memory_desc_t matrix;
typedef const_dnnl_memory_desc_t matrix_view;
static dnnl_status_t matrix_create(matrix *d, const dnnl_dims_t dims, dnnl_data_type_t type, const dnnl_dims_t strides) {
    return dnnl_memory_desc_create_with_strides(d, 2, dims, type, strides);
}
static void matrix_destroy(matrix *d) {
    if (*d != NULL) {
        dnnl_memory_desc_destroy(*d);
    }
}
static matrix_view view_of(const matrix *d) {
    return *d;
}
static dnnl_status_t append_sum(dnnl_post_ops_t ops) {
    return dnnl_post_ops_append_sum(ops, 1.0f, 0, dnnl_data_type_undef);
}
static dnnl_status_t describe(dnnl_primitive_desc_t *out, const matrix m[3], dnnl_primitive_attr_t attr, dnnl_engine_t engine) {
    return dnnl_matmul_primitive_desc_create(out, engine, m[0], m[1], NULL, m[2], attr);
}
#else
typedef dnnl_memory_desc_t matrix;
typedef const dnnl_memory_desc_t *matrix_view;
static dnnl_status_t matrix_create(matrix *d, const dnnl_dims_t dims, dnnl_data_type_t type, const dnnl_dims_t strides) {
    return dnnl_memory_desc_init_by_strides(d, 2, dims, type, strides);
}
static void matrix_destroy(matrix *d) {
    memset(d, 0, sizeof *d);
}
static matrix_view view_of(const matrix *d) {
    return d;
}
static dnnl_status_t append_sum(dnnl_post_ops_t ops) {
    return dnnl_post_ops_append_sum(ops, 1.0f);
}
static dnnl_status_t describe(dnnl_primitive_desc_t *out, const matrix m[3], dnnl_primitive_attr_t attr, dnnl_engine_t engine) {
    dnnl_matmul_desc_t desc;
    dnnl_status_t status = dnnl_matmul_desc_init(&desc, &m[0], &m[1], NULL, &m[2]);
    return status == dnnl_success ? dnnl_primitive_desc_create(out, &desc, attr, engine, NULL) : status;
}
#endif

/* What a primitive is made for; compared as a whole. */
typedef struct {
    int64_t m, n, k, lda, ldb, ldc;
    int64_t a_trans, b_trans, accumulate;
} shape;

typedef struct {
    shape key;
    dnnl_primitive_t primitive; /* owned; NULL: free entry */
    matrix operands[3];         /* owned: a, b, c */
    int users;                  /* calls that run it now */
    uint64_t last_use;
} entry;

/* One process-wide cache: a model has a few dozen shapes. Guarded by the critical section cpl_gemm_cache; entries in use stay. */
enum { ENTRIES = 128 };
static entry cache[ENTRIES];
static uint64_t clock_now;
static dnnl_engine_t engine; /* made once, lives as long as the process */

static void entry_clear(entry *e) {
    if (e->primitive != NULL) {
        dnnl_primitive_destroy(e->primitive);
    }
    for (int i = 0; i < 3; i++) {
        matrix_destroy(&e->operands[i]);
    }
    memset(e, 0, sizeof *e);
}

static dnnl_status_t entry_fill(entry *e, const shape *s) {
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t sum = NULL;
    const dnnl_dims_t dims[3] = {{s->m, s->k}, {s->k, s->n}, {s->m, s->n}};
    const dnnl_dims_t strides[3] = {
        {s->a_trans ? 1 : s->lda, s->a_trans ? s->lda : 1}, {s->b_trans ? 1 : s->ldb, s->b_trans ? s->ldb : 1}, {s->ldc, 1}};
    dnnl_status_t status = engine != NULL ? dnnl_success : dnnl_engine_create(&engine, dnnl_cpu, 0);
    for (int i = 0; i < 3 && status == dnnl_success; i++) {
        status = matrix_create(&e->operands[i], dims[i], i < 2 ? dnnl_bf16 : dnnl_f32, strides[i]);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_attr_create(&attr);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
    }
    if (status == dnnl_success && s->accumulate) {
        status = dnnl_post_ops_create(&sum);
        if (status == dnnl_success) {
            status = append_sum(sum);
        }
        if (status == dnnl_success) {
            status = dnnl_primitive_attr_set_post_ops(attr, sum);
        }
    }
    if (status == dnnl_success) {
        status = describe(&pd, e->operands, attr, engine);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_create(&e->primitive, pd);
    }
    if (pd != NULL) {
        dnnl_primitive_desc_destroy(pd);
    }
    if (sum != NULL) {
        dnnl_post_ops_destroy(sum);
    }
    if (attr != NULL) {
        dnnl_primitive_attr_destroy(attr);
    }
    e->key = *s;
    if (status != dnnl_success) {
        entry_clear(e);
    }
    return status;
}

/* *out = the entry for a shape, held for the caller; NULL with dnnl_success where every entry is in use by others. */
static dnnl_status_t entry_take(entry **out, const shape *s) {
    dnnl_status_t status = dnnl_success;
    *out = NULL;
#pragma omp critical(cpl_gemm_cache)
    {
        entry *oldest = NULL;
        for (int i = 0; i < ENTRIES && *out == NULL; i++) {
            entry *e = &cache[i];
            if (e->primitive != NULL && memcmp(&e->key, s, sizeof *s) == 0) {
                *out = e;
            } else if (e->users == 0 && (oldest == NULL || e->last_use < oldest->last_use)) {
                oldest = e;
            }
        }
        if (*out == NULL && oldest != NULL) {
            entry_clear(oldest);
            status = entry_fill(oldest, s);
            *out = status == dnnl_success ? oldest : NULL;
        }
        if (*out != NULL) {
            (*out)->users++;
            (*out)->last_use = ++clock_now;
        }
    }
    return status;
}

static void entry_release(entry *e) {
#pragma omp critical(cpl_gemm_cache)
    e->users--;
}

static dnnl_status_t entry_run(const entry *e, const cpl_gemm_call *g) {
    const_dnnl_primitive_desc_t pd = NULL;
    dnnl_stream_t stream = NULL;
    dnnl_exec_arg_t args[4] = {
        {.arg = DNNL_ARG_SRC}, {.arg = DNNL_ARG_WEIGHTS}, {.arg = DNNL_ARG_DST}, {.arg = DNNL_ARG_SCRATCHPAD}};
    void *const places[3] = {(void *)(uintptr_t)g->a, (void *)(uintptr_t)g->b, g->c};
    dnnl_status_t status = dnnl_stream_create(&stream, engine, dnnl_stream_default_flags);
    for (int i = 0; i < 3 && status == dnnl_success; i++) {
        status = dnnl_memory_create(&args[i].memory, view_of(&e->operands[i]), engine, places[i]);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_get_primitive_desc(e->primitive, &pd);
    }
    if (status == dnnl_success) {
        status = dnnl_memory_create(&args[3].memory, dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0), engine,
                                    DNNL_MEMORY_ALLOCATE);
    }
    if (status == dnnl_success) {
        status = dnnl_primitive_execute(e->primitive, stream, 4, args);
    }
    if (status == dnnl_success) {
        status = dnnl_stream_wait(stream);
    }
    for (int i = 0; i < 4; i++) {
        if (args[i].memory != NULL) {
            dnnl_memory_destroy(args[i].memory);
        }
    }
    if (stream != NULL) {
        dnnl_stream_destroy(stream);
    }
    return status;
}

int cpl_gemm_bf16(const cpl_gemm_call *g) {
    entry *e = NULL;
    shape s = {.m = g->m,
               .n = g->n,
               .k = g->k,
               .lda = g->lda,
               .ldb = g->ldb,
               .ldc = g->ldc,
               .a_trans = g->a_trans,
               .b_trans = g->b_trans,
               .accumulate = g->beta != 0.0f};
    dnnl_status_t status = entry_take(&e, &s);
    if (status == dnnl_success && e != NULL) {
        status = entry_run(e, g);
        entry_release(e);
    } else if (status == dnnl_success) { /* more threads and shapes at once than entries */
        entry once = {.primitive = NULL};
        status = entry_fill(&once, &s);
        if (status == dnnl_success) {
            status = entry_run(&once, g);
        }
        entry_clear(&once);
    }
    return (int)status;
}

/* What the tests of exact pruning on several ranks share: weights of all kinds, the oracle that sorts the whole model, a model on
 * all ranks, and their main. Refuses a mask that differs from the oracle's in one bit, whatever the ties. */
#ifndef CPL_TESTS_JOBS_SELECT_RIG_H
#define CPL_TESTS_JOBS_SELECT_RIG_H

#include "io/base/hash.h"
#include "io/base/rng.h"
#include "jobs/device.h"
#include "jobs/select.h"
#include "tests/support/expect.h"
#include <math.h>
#include <string.h>

static cpl_device *dev, *host; /* what selects; the CPU */
static cpl_sha256 seen;        /* of all masks: the same on any number of ranks */

/* --- weights --- */

typedef enum { NORMAL, EQUAL, ZERO, FEW, SIGNS, TINY, WIDE, INFINITE, NEIGHBOURS, FILLINGS } filling;

static inline float weight(filling what, int64_t i) {
    float z = cpl_rng_normal(11, CPL_RNG_TEST, (uint32_t)what, (uint64_t)i),
          u = cpl_rng_uniform(12, CPL_RNG_TEST, (uint32_t)what, (uint64_t)i);
    uint32_t bits = 0x3f800000u + (uint32_t)(u * 3);
    float near;
    memcpy(&near, &bits, sizeof near);
    switch (what) {
    case NORMAL:
        return z;
    case EQUAL:
        return z < 0 ? -0.25f : 0.25f; /* one magnitude: nothing but ties */
    case ZERO:
        return z < 0 ? -0.0f : 0.0f;
    case FEW:
        return floorf(3 * u) - 1; /* -1, 0, 1 */
    case SIGNS:
        return u < 0.5f ? -0.0f : z; /* half the population ties at zero */
    case TINY:
        return z * 1e-42f; /* subnormal */
    case WIDE:
        return ldexpf(z, (int)(250 * u) - 125); /* every exponent there is */
    case INFINITE:
        return u < 0.1f ? copysignf(INFINITY, z) : z;
    case NEIGHBOURS:
        return near; /* neighbouring floats: they part in the last pass only */
    case FILLINGS:
        break;
    }
    return 0;
}

/* --- the oracle: all candidates of one range of tensors, sorted --- */

typedef struct {
    uint32_t key;
    int64_t at;
} candidate;

static inline int by_key_then_place(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    return x->key != y->key ? (x->key > y->key) - (x->key < y->key) : (x->at > y->at) - (x->at < y->at);
}

typedef struct {
    int64_t population, removed, ties;
    double threshold;
} expectation;

static inline void remove_sorted(const cpl_layout *l, const cpl_prune_options *o, const float *w, int64_t first, int64_t last,
                                 uint8_t *mask, candidate *c, expectation *e) {
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) {
        const cpl_param *p = &l->param[i];
        if (!p->prunable && (o->include != CPL_INCLUDE_ALL || p->one_d)) {
            continue;
        }
        for (int64_t j = p->offset; j < p->offset + p->rows * p->cols; j++) {
            memcpy(&c[n].key, &w[j], sizeof c[n].key);
            c[n].key &= 0x7fffffffu;
            c[n].at = j;
            n++;
        }
    }
    qsort(c, (size_t)n, sizeof *c, by_key_then_place);
    int64_t k = (int64_t)((__int128)n * o->sparsity.num / o->sparsity.den);
    e->population += n;
    e->removed += k;
    for (int64_t i = 0; i < k; i++) {
        mask[c[i].at] = 0;
    }
    if (k > 0) {
        double threshold = fabsf(w[c[k - 1].at]);
        e->threshold = threshold > e->threshold ? threshold : e->threshold;
        e->ties = 0;
        for (int64_t i = 0; i < n; i++) {
            e->ties += c[i].key == c[k - 1].key;
        }
    }
}

/* --- one case --- */

typedef struct {
    cpl_layout *layout;
    float *w;          /* [total], the same on all ranks */
    uint8_t *mask;     /* [total] the oracle's */
    uint8_t *found;    /* [total] */
    float *pruned;     /* [total] */
    int64_t *begin;    /* [size+1] */
    candidate *sorted; /* [total] */
} model;

static inline void *array(int64_t count, size_t element) {
    void *x = calloc((size_t)count + 1, element);
    assert_non_null(x);
    return x;
}

static inline void model_create(model *m, const cpl_model_shape *shape) {
    assert_int_equal(cpl_layout_create(&m->layout, shape), CPL_OK);
    int64_t total = m->layout->total;
    m->w = array(total, sizeof(float));
    m->pruned = array(total, sizeof(float));
    m->mask = array(total, 1);
    m->found = array(total, 1);
    m->begin = array(size, sizeof(int64_t));
    m->sorted = array(total, sizeof(candidate));
    cpl_layout_shards(m->layout, size, m->begin);
}

static inline void model_destroy(model *m) {
    cpl_layout_destroy(&m->layout);
    free(m->w);
    free(m->pruned);
    free(m->mask);
    free(m->found);
    free(m->begin);
    free(m->sorted);
}

static inline void fill(model *m, filling what) {
    memset(m->w, 0, (size_t)m->layout->total * sizeof(float));
    for (int64_t i = 0; i < m->layout->count; i++) {
        const cpl_param *p = &m->layout->param[i];
        for (int64_t j = p->offset; j < p->offset + cpl_param_count(p); j++) {
            m->w[j] = weight(what, j);
        }
    }
}

static inline cpl_status prune(model *m, const cpl_prune_options *o, cpl_prune_report *r) {
    cpl_shard shard = {0};
    cpl_status st = cpl_shard_create(&shard, m->layout, world, false, true);
    if (st == CPL_OK) {
        memcpy(shard.param, m->w + shard.begin, (size_t)shard.n * sizeof(float));
        st = cpl_prune_weights(world, dev, m->layout, o, &shard, r);
    }
    if (st == CPL_OK) {
        memcpy(m->found + shard.begin, shard.mask, (size_t)shard.n);
        memcpy(m->pruned + shard.begin, shard.param, (size_t)shard.n * sizeof(float));
        EXPECT_OK(cpl_comm_allgather(world, host, m->found, 1, m->begin));
        EXPECT_OK(cpl_comm_allgather(world, host, m->pruned, sizeof(float), m->begin));
    }
    cpl_shard_free(&shard);
    return st;
}

static inline void check(model *m, const cpl_prune_options *o) {
    const cpl_layout *l = m->layout;
    cpl_prune_report r;
    expectation e = {0};
    memset(m->mask, 1, (size_t)l->total);
    if (o->scope == CPL_SCOPE_GLOBAL) {
        remove_sorted(l, o, m->w, 0, l->count, m->mask, m->sorted, &e);
    }
    for (int64_t i = 0; o->scope == CPL_SCOPE_TENSOR && i < l->count; i++) {
        remove_sorted(l, o, m->w, i, i + 1, m->mask, m->sorted, &e);
    }
    EXPECT_OK(prune(m, o, &r));
    EXPECT(memcmp(m->found, m->mask, (size_t)l->total) == 0);
    EXPECT(r.population == e.population && r.removed == e.removed);
    EXPECT(r.threshold == e.threshold);
    EXPECT(o->scope != CPL_SCOPE_GLOBAL || r.ties == e.ties);
    for (int64_t i = 0; i < l->total; i++) {
        float expected = m->mask[i] ? m->w[i] : 0;
        if (memcmp(&m->pruned[i], &expected, sizeof expected) != 0) {
            EXPECT(!"a kept weight changed, or a removed one is not +0");
            break;
        }
    }
    for (int64_t i = 0; i < l->count; i++) {
        int64_t gone = 0;
        for (int64_t j = 0; j < cpl_param_count(&l->param[i]); j++) {
            gone += m->mask[l->param[i].offset + j] == 0;
        }
        EXPECT(r.by_tensor[i] == gone);
    }
    cpl_sha256_add(&seen, m->found, (size_t)l->total);
    cpl_prune_report_free(&r);
}

#define TEST(name) cmocka_unit_test_teardown(name, test_all_ranks)

/* Prints a digest of all masks: the same on any number of ranks. */
#define SELECT_MAIN(tests, argc, argv) select_main(tests, sizeof tests / sizeof tests[0], argc, argv)
static inline int select_main(const struct CMUnitTest *tests, size_t n, int argc, char **argv) {
    if (cpl_world_init(&world, &argc, &argv) != CPL_OK || cpl_device_create(&host, "cpu", 0, 1) != CPL_OK ||
        cpl_job_device(world, getenv("CUPEL_DEVICE") == NULL ? 1 : 0, 1, 0, &dev) != CPL_OK) { /* cpu, else auto */
        fprintf(stderr, "%s\n", cpl_status_message());
        return 1;
    }
    rank = cpl_comm_rank(world);
    size = cpl_comm_size(world);
    cpl_sha256_init(&seen);
    int failed = _cmocka_run_group_tests("exact pruning over ranks", tests, n, NULL, NULL);
    char hex[CPL_SHA256_HEX];
    cpl_sha256_end(&seen, hex);
    if (rank == 0) {
        printf("masks %s\n", hex);
    }
    cpl_device_destroy(&dev);
    cpl_device_destroy(&host);
    cpl_world_finish(&world);
    return failed;
}

#endif

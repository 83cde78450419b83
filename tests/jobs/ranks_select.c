/* Exact pruning on as many ranks as mpirun starts (test_select_ranks.sh: 1, 2, 3, 4) against sorting the whole model.
 * Refuses a mask that differs from the oracle's in one bit, whatever the ties. */
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

static float weight(filling what, int64_t i) {
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

static int by_key_then_place(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    return x->key != y->key ? (x->key > y->key) - (x->key < y->key) : (x->at > y->at) - (x->at < y->at);
}

typedef struct {
    int64_t population, removed, ties;
    double threshold;
} expectation;

static void remove_sorted(const cpl_layout *l, const cpl_prune_options *o, const float *w, int64_t first, int64_t last,
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

static void *array(int64_t count, size_t element) {
    void *x = calloc((size_t)count + 1, element);
    assert_non_null(x);
    return x;
}

static void model_create(model *m, const cpl_model_shape *shape) {
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

static void model_destroy(model *m) {
    cpl_layout_destroy(&m->layout);
    free(m->w);
    free(m->pruned);
    free(m->mask);
    free(m->found);
    free(m->begin);
    free(m->sorted);
}

static void fill(model *m, filling what) {
    memset(m->w, 0, (size_t)m->layout->total * sizeof(float));
    for (int64_t i = 0; i < m->layout->count; i++) {
        const cpl_param *p = &m->layout->param[i];
        for (int64_t j = p->offset; j < p->offset + cpl_param_count(p); j++) {
            m->w[j] = weight(what, j);
        }
    }
}

static cpl_status prune(model *m, const cpl_prune_options *o, cpl_prune_report *r) {
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

static void check(model *m, const cpl_prune_options *o) {
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

/* All fillings, sparsities, scopes. shapes of 1 to some shards. */
static void check_all(const cpl_model_shape *shape) {
    static const cpl_decimal sparsities[] = {{0, 1},        {1, 1}, {1, 2}, {37, 100}, {1, 3}, {9999999, 10000000},
                                             {1, 10000000}, {7, 10}};
    model m = {0};
    model_create(&m, shape);
    for (filling what = 0; what < FILLINGS; what++) {
        fill(&m, what);
        for (size_t s = 0; s < sizeof sparsities / sizeof sparsities[0]; s++) {
            for (int scope = 0; scope < 2; scope++) {
                cpl_prune_options o = {.sparsity = sparsities[s], .scope = scope, .include = (int)(s + (size_t)what) % 2};
                check(&m, &o);
            }
        }
    }
    model_destroy(&m);
}

static void test_a_model_of_one_chunk_leaves_test_all_ranks_but_one_without_weights(void **state) {
    check_all(&(cpl_model_shape){.layers = 1, .heads = 1, .width = 5, .context = 3, .vocab = 7});
}

static void test_tensors_that_cross_shards_give_the_mask_of_sorting_the_whole(void **state) {
    check_all(&(cpl_model_shape){.layers = 3, .heads = 2, .width = 34, .context = 9, .vocab = 101});
}

static void test_a_model_of_two_chunks_leaves_some_ranks_without_weights(void **state) {
    check_all(&(cpl_model_shape){.layers = 2, .heads = 3, .width = 15, .context = 8, .vocab = 33});
}

/* Every k near the ends and around the number of zeros of a model half of whose weights tie. */
static void test_every_k_near_the_ends_and_at_the_ties_is_exact(void **state) {
    model m = {0};
    model_create(&m, &(cpl_model_shape){.layers = 1, .heads = 1, .width = 20, .context = 4, .vocab = 9});
    fill(&m, SIGNS);
    cpl_prune_options o = {.sparsity = {0, 1}};
    expectation e = {0};
    remove_sorted(m.layout, &o, m.w, 0, m.layout->count, m.mask, m.sorted, &e);
    int64_t zeros = 0, n = e.population;
    for (int64_t i = 0; i < n; i++) {
        zeros += m.sorted[i].key == 0;
    }
    assert_true(zeros > n / 4 && zeros < 3 * n / 4);
    const int64_t around[] = {0, zeros, n};
    for (int a = 0; a < 3; a++) {
        for (int64_t k = around[a] - 3; k <= around[a] + 3; k++) {
            if (k >= 0 && k <= n) {
                o.sparsity = (cpl_decimal){k, n};
                check(&m, &o);
            }
        }
    }
    model_destroy(&m);
}

/* Weights on the device, selected again and again: what the first run left behind decides nothing. */
static void test_a_selection_runs_again_to_the_same_mask(void **state) {
    model m = {0};
    model_create(&m, &(cpl_model_shape){.layers = 2, .heads = 2, .width = 34, .context = 9, .vocab = 101});
    int64_t begin = m.begin[rank], n = m.begin[rank + 1] - begin;
    cpl_prune_options o = {.sparsity = {1, 2}};
    cpl_prune_report r = {0}, again = {0};
    cpl_selection *s = NULL;
    float *w = NULL;
    uint8_t *mask = NULL, *first = array(n, 1), *second = array(n, 1);
    fill(&m, FEW);
    EXPECT_OK(cpl_device_alloc(dev, &w, (size_t)n, sizeof *w, "weights"));
    EXPECT_OK(cpl_device_alloc(dev, &mask, (size_t)n, 1, "mask"));
    EXPECT_OK(CPL_OPS(dev, upload, w, m.w + begin, (size_t)n * sizeof *w));
    EXPECT_OK(cpl_selection_create(&s, world, dev, m.layout, &o, begin, n, w, mask));
    EXPECT_OK(cpl_selection_run(s, &r));
    EXPECT_OK(CPL_OPS(dev, download, first, mask, (size_t)n));
    for (int i = 0; i < 3; i++) {
        EXPECT_OK(cpl_selection_run(s, &again));
    }
    EXPECT_OK(CPL_OPS(dev, download, second, mask, (size_t)n));
    EXPECT(memcmp(first, second, (size_t)n) == 0);
    EXPECT(r.population == again.population && r.threshold == again.threshold && r.ties == again.ties && r.ties > 1);
    cpl_selection_destroy(&s);
    cpl_device_free(dev, &w);
    cpl_device_free(dev, &mask);
    free(first);
    free(second);
    model_destroy(&m);
}

/* --- populations that are sampled --- */

/* 270 pieces of weights, of which every second is in the sample, behind others; with gaps between the tensors, and without. */
static const cpl_model_shape gaps = {.layers = 2, .heads = 1, .width = 430, .context = 4, .vocab = 1000};
static const cpl_model_shape large = {.layers = 2, .heads = 1, .width = 432, .context = 4, .vocab = 1000};

/* Without sorting: as many as asked for are gone, all of them before those that stay, by magnitude and then by place. */
static void check_large(model *m, cpl_decimal sparsity, bool narrowed) {
    const cpl_prune_options o = {.sparsity = sparsity};
    cpl_prune_report r;
    candidate last = {0, -1}, next = {UINT32_MAX, 0};
    int64_t n = 0, gone = 0, ties = 0;
    EXPECT_OK(prune(m, &o, &r));
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < m->layout->count; i++) {
            const cpl_param *p = &m->layout->param[i];
            for (int64_t j = p->offset; p->prunable && j < p->offset + cpl_param_count(p); j++) {
                candidate c = {.at = j};
                memcpy(&c.key, &m->w[j], sizeof c.key);
                c.key &= 0x7fffffffu;
                if (pass == 1) {
                    ties += c.key == last.key;
                } else if (m->found[j] == 0) {
                    gone++;
                    last = by_key_then_place(&c, &last) > 0 ? c : last;
                } else {
                    next = by_key_then_place(&c, &next) < 0 ? c : next;
                }
                n += pass;
            }
        }
    }
    int64_t k = (int64_t)((__int128)n * sparsity.num / sparsity.den);
    float threshold;
    memcpy(&threshold, &last.key, sizeof threshold);
    EXPECT(r.population == n && r.removed == k && gone == k);
    EXPECT(k == 0 || k == n || by_key_then_place(&last, &next) < 0);
    EXPECT(k == 0 || (r.threshold == threshold && r.ties == ties));
    EXPECT(narrowed ? r.searched > 0 && r.searched < n / 4 : r.searched == n);
    cpl_sha256_add(&seen, m->found, (size_t)m->layout->total);
    cpl_prune_report_free(&r);
}

static void test_a_window_of_a_large_population_gives_the_same_mask(void **state) {
    static const cpl_decimal sparsities[] = {{0, 1}, {1, 1}, {1, 2}, {9, 10}, {1, 100}, {1, 1000000}, {9999999, 10000000}};
    model m = {0};
    model_create(&m, &gaps);
    fill(&m, NORMAL);
    for (size_t i = 0; i < sizeof sparsities / sizeof sparsities[0]; i++) {
        check_large(&m, sparsities[i], i > 0);
    }
    for (int64_t i = 0; i < m.layout->total; i++) {
        m.w[i] = rintf(m.w[i] * 256) / 256; /* thousands of ties on every rank */
    }
    check_large(&m, (cpl_decimal){1, 2}, true);
    check_large(&m, (cpl_decimal){1, 100}, true);
    fill(&m, SIGNS); /* too many are equal: a list would not pay */
    check_large(&m, (cpl_decimal){1, 2}, false);
    check_large(&m, (cpl_decimal){8, 10}, true);
    model_destroy(&m);
}

/* The sampled pieces hold large weights, the others small ones. */
static void test_a_sample_that_misleads_changes_nothing(void **state) {
    model m = {0};
    const cpl_sha256 before = seen; /* these weights are not the same on any number of ranks */
    model_create(&m, &large);
    fill(&m, NORMAL);
    for (int64_t r = 0, end; r < size; r++) {
        end = m.begin[r + 1];
        for (int64_t i = 0, from = -1; i < m.layout->count; i++) { /* a rank's pieces begin with its first weight to prune */
            const cpl_param *p = &m.layout->param[i];
            int64_t stop = p->offset + cpl_param_count(p) < end ? p->offset + cpl_param_count(p) : end;
            for (int64_t j = p->offset > m.begin[r] ? p->offset : m.begin[r]; p->prunable && j < stop; j++) {
                from = from < 0 ? j : from;
                m.w[j] *= (j - from) / CPL_SELECT_PIECE % 2 == 0 ? 1024.0f : 1.0f;
            }
        }
    }
    check_large(&m, (cpl_decimal){1, 2}, false);
    check_large(&m, (cpl_decimal){1, 3}, false);
    seen = before;
    model_destroy(&m);
}

/* A tenth of all weights in one bin, and all of them on rank 0: as many as fit into the list of one rank of two. */
static void test_a_list_too_short_on_one_rank_changes_nothing(void **state) {
    model m = {0};
    model_create(&m, &large);
    fill(&m, NORMAL);
    int64_t from = cpl_layout_find(m.layout, "h.0.attn.qkv.weight")->offset;
    for (int64_t j = from; j < from + m.layout->total / 10; j++) {
        m.w[j] = 0.5f + 0.03f * cpl_rng_uniform(12, CPL_RNG_TEST, 1, (uint64_t)j);
    }
    check_large(&m, (cpl_decimal){42, 100}, size < 3);
    model_destroy(&m);
}

static void test_a_nan_in_or_beside_the_sample_is_refused_with_the_name_of_the_tensor(void **state) {
    model m = {0};
    cpl_prune_report r;
    model_create(&m, &large);
    fill(&m, NORMAL);
    for (int i = 0; i < 4; i++) {
        const cpl_param *p = cpl_layout_find(m.layout, i < 2 ? "h.1.mlp.out.weight" : "h.0.mlp.fc.weight");
        float *w = &m.w[p->offset + cpl_param_count(p) - 1 - i % 2 * CPL_SELECT_PIECE],
              kept = *w; /* the one piece or its neighbour */
        *w = NAN;
        EXPECT(prune(&m, &(cpl_prune_options){.sparsity = {1, 2}}, &r) == CPL_NUMERIC);
        EXPECT(strstr(cpl_status_message(), p->name) != NULL && strstr(cpl_status_message(), "1 NaN") != NULL);
        *w = kept;
    }
    model_destroy(&m);
}

static void test_a_nan_on_any_rank_is_refused_by_all_with_the_name_of_the_tensor(void **state) {
    model m = {0};
    cpl_prune_report r;
    model_create(&m, &(cpl_model_shape){.layers = 2, .heads = 2, .width = 34, .context = 9, .vocab = 101});
    const char *const names[] = {"h.0.attn.qkv.weight", "h.1.mlp.out.weight"};
    for (int i = 0; i < 2; i++) {
        for (int scope = 0; scope < 2; scope++) {
            for (int none = 0; none < 2; none++) {
                cpl_prune_options o = {.sparsity = {none ? 0 : 1, 2}, .scope = scope};
                const cpl_param *p = cpl_layout_find(m.layout, names[i]);
                fill(&m, NORMAL);
                m.w[p->offset + cpl_param_count(p) - 1] = i == 0 ? NAN : -NAN;
                EXPECT(prune(&m, &o, &r) == CPL_NUMERIC);
                EXPECT(strstr(cpl_status_message(), names[i]) != NULL && strstr(cpl_status_message(), "1 NaN") != NULL);
                EXPECT(r.by_tensor == NULL);
            }
        }
    }
    /* Outside the population a NaN is not looked at. */
    fill(&m, NORMAL);
    m.w[cpl_layout_wte(m.layout)->offset] = NAN;
    EXPECT_OK(prune(&m, &(cpl_prune_options){.sparsity = {1, 2}}, &r));
    cpl_prune_report_free(&r);
    model_destroy(&m);
}

#define TEST(name) cmocka_unit_test_teardown(name, test_all_ranks)

int main(int argc, char **argv) {
    if (cpl_world_init(&world, &argc, &argv) != CPL_OK || cpl_device_create(&host, "cpu", 0, 1) != CPL_OK ||
        cpl_job_device(world, getenv("CUPEL_DEVICE") == NULL ? 1 : 0, 1, 0, &dev) != CPL_OK) { /* cpu, else auto */
        fprintf(stderr, "%s\n", cpl_status_message());
        return 1;
    }
    rank = cpl_comm_rank(world);
    size = cpl_comm_size(world);
    cpl_sha256_init(&seen);
    const struct CMUnitTest tests[] = {
        TEST(test_a_model_of_one_chunk_leaves_test_all_ranks_but_one_without_weights),
        TEST(test_tensors_that_cross_shards_give_the_mask_of_sorting_the_whole),
        TEST(test_a_model_of_two_chunks_leaves_some_ranks_without_weights),
        TEST(test_every_k_near_the_ends_and_at_the_ties_is_exact),
        TEST(test_a_selection_runs_again_to_the_same_mask),
        TEST(test_a_window_of_a_large_population_gives_the_same_mask),
        TEST(test_a_sample_that_misleads_changes_nothing),
        TEST(test_a_list_too_short_on_one_rank_changes_nothing),
        TEST(test_a_nan_in_or_beside_the_sample_is_refused_with_the_name_of_the_tensor),
        TEST(test_a_nan_on_any_rank_is_refused_by_all_with_the_name_of_the_tensor),
    };
    int failed = cmocka_run_group_tests_name("exact pruning over ranks", tests, NULL, NULL);
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

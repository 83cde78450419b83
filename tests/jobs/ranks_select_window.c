/* Exact pruning of populations so large that a sample says where to look, on as many ranks as mpirun starts.
 * Refuses a run that did not go the way it is meant to go, over a window or over everything. */
#include "tests/jobs/select_rig.h"

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

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        TEST(test_a_window_of_a_large_population_gives_the_same_mask),
        TEST(test_a_sample_that_misleads_changes_nothing),
        TEST(test_a_list_too_short_on_one_rank_changes_nothing),
        TEST(test_a_nan_in_or_beside_the_sample_is_refused_with_the_name_of_the_tensor),
    };
    return SELECT_MAIN(tests, argc, argv);
}

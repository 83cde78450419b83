/* Exact pruning on as many ranks as mpirun starts (test_select_ranks.sh: 1, 2, 3, 4) against sorting the whole model.
 * Refuses nothing of its own: select_rig.h does. */
#include "tests/jobs/select_rig.h"

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

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
        TEST(test_a_model_of_one_chunk_leaves_test_all_ranks_but_one_without_weights),
        TEST(test_tensors_that_cross_shards_give_the_mask_of_sorting_the_whole),
        TEST(test_a_model_of_two_chunks_leaves_some_ranks_without_weights),
        TEST(test_every_k_near_the_ends_and_at_the_ties_is_exact),
        TEST(test_a_selection_runs_again_to_the_same_mask),
        TEST(test_a_nan_on_any_rank_is_refused_by_all_with_the_name_of_the_tensor),
    };
    return SELECT_MAIN(tests, argc, argv);
}

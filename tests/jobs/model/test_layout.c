/* Proves the table of parameters, its shards and initial values, and that a workspace takes exactly the memory it announces.
 * Refuses to repeat the table: it checks its properties. */
#include "tests/jobs/model/rig.h"
#include "tests/support/support.h"
#include <stdlib.h>

static const cpl_model_shape odd = {.layers = 3, .heads = 3, .width = 21, .context = 13, .vocab = 37};

static cpl_layout *layout_of(cpl_model_shape s) {
    cpl_layout *l = NULL;
    assert_ok(cpl_layout_create(&l, &s));
    return l;
}

static void test_layout_tensors_are_aligned_disjoint_and_in_order(void **state) {
    (void)state;
    cpl_layout *l = layout_of(odd);
    int64_t end = 0, parameters = 0;
    for (int64_t i = 0; i < l->count; i++) {
        const cpl_param *p = &l->param[i];
        assert_int_equal(p->offset % 64, 0);
        assert_true(p->offset >= end && p->offset - end < 64);
        assert_int_equal(l->begin[i], p->offset);
        assert_int_equal(p->one_d, p->cols == 1);
        assert_int_equal(p->decayed, !p->one_d);
        assert_int_equal(p->decayed, p->offset < l->decayed_end);
        end = p->offset + cpl_param_count(p);
        parameters += cpl_param_count(p);
    }
    assert_int_equal(l->begin[l->count], l->total);
    assert_true(l->total >= end && l->total - end < 64 && l->total % 64 == 0);
    assert_int_equal(l->parameters, parameters);
    int64_t L = 3, C = 21;
    assert_int_equal(parameters, 12 * L * C * C + 13 * L * C + (37 + 13) * C + 2 * C);
    cpl_layout_destroy(&l);
    cpl_layout_destroy(&l);
}

static void test_layout_counts_the_parameters_of_gpt2(void **state) {
    (void)state;
    cpl_layout *l = layout_of((cpl_model_shape){.layers = 12, .heads = 12, .width = 768, .context = 1024, .vocab = 50257});
    assert_int_equal(l->parameters, 124439808);
    cpl_layout_destroy(&l);
}

static void test_layout_prunable_tensors_are_one_range_of_the_blocks_matrices(void **state) {
    (void)state;
    cpl_layout *l = layout_of(odd);
    int64_t first = -1, last = -1, seen = 0;
    for (int64_t i = 0; i < l->count; i++) {
        const cpl_param *p = &l->param[i];
        assert_int_equal(p->prunable, p->layer >= 0 && !p->one_d);
        if (p->prunable) {
            first = first < 0 ? i : first;
            last = i;
            seen++;
        }
    }
    assert_int_equal(last - first + 1, seen);
    assert_int_equal(seen, 4 * odd.layers);
    assert_int_equal(l->begin[last + 1], l->decayed_end);
    cpl_layout_destroy(&l);
}

static void test_layout_roles_and_names_agree(void **state) {
    (void)state;
    static const struct {
        cpl_block_param role;
        const char *name;
        int64_t rows, cols;
        cpl_coupling coupling;
    } want[] = {{CPL_P_QKV_W, "h.2.attn.qkv.weight", 63, 21, CPL_COUPLE_HEADS},
                {CPL_P_PROJ_W, "h.2.attn.proj.weight", 21, 21, CPL_COUPLE_HEADS},
                {CPL_P_FC_W, "h.2.mlp.fc.weight", 84, 21, CPL_COUPLE_MLP},
                {CPL_P_OUT_W, "h.2.mlp.out.weight", 21, 84, CPL_COUPLE_MLP},
                {CPL_P_QKV_B, "h.2.attn.qkv.bias", 63, 1, CPL_COUPLE_HEADS},
                {CPL_P_FC_B, "h.2.mlp.fc.bias", 84, 1, CPL_COUPLE_MLP},
                {CPL_P_PROJ_B, "h.2.attn.proj.bias", 21, 1, CPL_COUPLE_NONE},
                {CPL_P_OUT_B, "h.2.mlp.out.bias", 21, 1, CPL_COUPLE_NONE},
                {CPL_P_LN1_G, "h.2.ln1.gain", 21, 1, CPL_COUPLE_NONE},
                {CPL_P_LN2_B, "h.2.ln2.bias", 21, 1, CPL_COUPLE_NONE}};
    cpl_layout *l = layout_of(odd);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        const cpl_param *p = cpl_layout_block(l, 2, want[i].role);
        assert_string_equal(p->name, want[i].name);
        assert_ptr_equal(cpl_layout_find(l, want[i].name), p);
        assert_int_equal(p->rows, want[i].rows);
        assert_int_equal(p->cols, want[i].cols);
        assert_int_equal(p->coupling, want[i].coupling);
        assert_int_equal(p->layer, 2);
    }
    assert_ptr_equal(cpl_layout_find(l, "wte"), cpl_layout_wte(l));
    assert_ptr_equal(cpl_layout_find(l, "wpe"), cpl_layout_wpe(l));
    assert_ptr_equal(cpl_layout_find(l, "ln_f.gain"), cpl_layout_final_gain(l));
    assert_ptr_equal(cpl_layout_find(l, "ln_f.bias"), cpl_layout_final_bias(l));
    assert_null(cpl_layout_find(l, "h.3.ln1.gain"));
    assert_null(cpl_layout_find(l, ""));
    cpl_layout_destroy(&l);
}

static void test_layout_shards_cover_the_buffer_in_whole_chunks(void **state) {
    (void)state;
    cpl_layout *l = layout_of(odd);
    for (int ranks = 1; ranks <= 20; ranks++) {
        int64_t begin[21];
        cpl_layout_shards(l, ranks, begin);
        assert_int_equal(begin[0], 0);
        assert_int_equal(begin[ranks], l->total);
        for (int r = 0; r < ranks; r++) {
            int64_t size = begin[r + 1] - begin[r];
            assert_true(size >= 0 && size <= begin[1]);
            assert_true(begin[r] % CPL_SUM_CHUNK == 0 || begin[r] == l->total);
            assert_true(size == begin[1] || begin[r + 1] == l->total);
        }
    }
    cpl_layout_destroy(&l);
}

static void test_layout_projection_leaves_the_plain_buffer_as_its_prefix(void **state) {
    (void)state;
    cpl_layout *plain = layout_of(odd), *l = NULL;
    assert_ok(cpl_layout_create_projected(&l, &odd, 40));
    assert_null(cpl_layout_projection(plain));
    assert_int_equal(l->count, plain->count + 1);
    assert_int_equal(l->parameters, plain->parameters);
    assert_memory_equal(l->param, plain->param, (size_t)plain->count * sizeof *l->param);
    const cpl_param *p = cpl_layout_projection(l);
    assert_ptr_equal(p, cpl_layout_find(l, "distill.projection"));
    assert_true(p->rows == 40 && p->cols == 21 && p->offset == plain->total && !p->decayed && !p->prunable && !p->one_d);
    assert_ptr_equal(cpl_layout_find(l, "ln_f.bias"), cpl_layout_final_bias(l));
    cpl_layout_destroy(&l);
    assert_int_equal(cpl_layout_create_projected(&l, &odd, 0), CPL_USAGE);
    cpl_layout_destroy(&plain);
}

static void refused(cpl_model_shape s, const char *option) {
    cpl_layout *l = NULL;
    assert_int_equal(cpl_layout_create(&l, &s), CPL_USAGE);
    assert_null(l);
    if (strstr(cpl_status_message(), option) == NULL) {
        fail_msg("'%s' does not name %s", cpl_status_message(), option);
    }
}

static void test_layout_impossible_shapes_are_refused_by_option(void **state) {
    (void)state;
    refused((cpl_model_shape){.layers = 0, .heads = 1, .width = 1, .context = 1, .vocab = 1}, "layers");
    refused((cpl_model_shape){.layers = INT64_MAX, .heads = 1, .width = 1, .context = 1, .vocab = 1}, "layers");
    refused((cpl_model_shape){.layers = 1, .heads = 0, .width = 1, .context = 1, .vocab = 1}, "heads");
    refused((cpl_model_shape){.layers = 1, .heads = 3, .width = 16, .context = 1, .vocab = 1}, "width");
    refused((cpl_model_shape){.layers = 1, .heads = 1, .width = -4, .context = 1, .vocab = 1}, "width");
    refused((cpl_model_shape){.layers = 1, .heads = 1, .width = 1, .context = 0, .vocab = 1}, "context");
    refused((cpl_model_shape){.layers = 1, .heads = 1, .width = 1, .context = 1, .vocab = INT64_MIN}, "vocab");
    refused((cpl_model_shape){.layers = 1, .heads = 1, .width = INT32_MAX, .context = 1, .vocab = 1}, "parameters");
    refused((cpl_model_shape){.layers = 65536, .heads = 1, .width = 1 << 20, .context = 1, .vocab = 1}, "parameters");
}

static void test_initialize_has_the_stated_moments_and_zero_gaps(void **state) {
    (void)state;
    cpl_layout *l = layout_of((cpl_model_shape){.layers = 2, .heads = 1, .width = 67, .context = 150, .vocab = 150});
    float *v = test_array(l->total, sizeof *v);
    for (int64_t i = 0; i < l->total; i++) {
        v[i] = NAN;
    }
    cpl_layout_initialize(l, 7, 1, 0, l->total, v);
    for (int64_t t = 0; t < l->count; t++) {
        const cpl_param *p = &l->param[t];
        int64_t n = cpl_param_count(p);
        double mean = 0.0, square = 0.0, std = t == 1 ? 0.01 : strstr(p->name, "proj.w") || strstr(p->name, "out.w") ? 0.01 : 0.02;
        for (int64_t i = 0; i < n; i++) {
            mean += v[p->offset + i] / (double)n;
            square += (double)v[p->offset + i] * v[p->offset + i] / (double)n;
        }
        for (int64_t i = p->offset + n; i < l->begin[t + 1]; i++) {
            assert_true(v[i] == 0.0f);
        }
        if (p->one_d) { /* constant */
            assert_true(fabs(mean - (strstr(p->name, ".gain") ? 1.0 : 0.0)) < 1e-12 && fabs(square - mean * mean) < 1e-12);
        } else { /* five standard errors of a mean and of a variance of n normals */
            assert_true(fabs(mean) < 5.0 * std / sqrt((double)n));
            assert_true(fabs(square / (std * std) - 1.0) < 5.0 * sqrt(2.0 / (double)n));
        }
    }
    test_release(&v);
    cpl_layout_destroy(&l);
}

static void test_initialize_depends_on_seed_tensor_and_index_alone(void **state) {
    (void)state;
    cpl_model_shape s = {.layers = 4, .heads = 3, .width = 21, .context = 13, .vocab = 37};
    cpl_layout *a = layout_of(odd), *b = layout_of(s);
    float *x = test_array(a->total, sizeof *x), *y = test_array(b->total, sizeof *y), *z = test_array(a->total, sizeof *z);
    cpl_layout_initialize(a, 11, 1, 0, a->total, x);
    cpl_layout_initialize(b, 11, 1, 0, b->total, y);
    cpl_layout_initialize(a, 12, 1, 0, a->total, z);
    for (int64_t t = 0; t < a->count; t++) {
        const cpl_param *p = &a->param[t], *q = cpl_layout_find(b, p->name);
        size_t bytes = (size_t)cpl_param_count(p) * sizeof *x;
        assert_non_null(q);
        bool scaled = strstr(p->name, "proj.w") != NULL || strstr(p->name, "out.w") != NULL; /* by the number of layers */
        assert_int_equal(memcmp(x + p->offset, y + q->offset, bytes) == 0, !scaled);
        assert_int_equal(memcmp(x + p->offset, z + p->offset, bytes) == 0, p->one_d);
    }
    test_release(&x);
    test_release(&y);
    test_release(&z);
    cpl_layout_destroy(&a);
    cpl_layout_destroy(&b);
}

/* A rank makes its own part, on its own threads. Tensors of more elements than are worth waking threads for. */
static void test_initialize_of_parts_has_the_bits_of_the_whole(void **state) {
    (void)state;
    cpl_layout *l = layout_of((cpl_model_shape){.layers = 1, .heads = 1, .width = 131, .context = 150, .vocab = 1000});
    float *whole = test_array(l->total, sizeof *whole), *parts = test_array(l->total, sizeof *parts);
    cpl_layout_initialize(l, 7, 1, 0, l->total, whole);
    for (int threads = 1; threads <= 3; threads++) {
        for (int ranks = 1; ranks <= 5; ranks++) {
            memset(parts, 0xff, (size_t)l->total * sizeof *parts);
            for (int r = 0; r < ranks; r++) { /* cuts within tensors, and an empty part where there is more than one */
                int64_t begin = r < 2 ? 0 : l->total * r / ranks - 1,
                        end = r == 0 && ranks > 1 ? 0 : l->total * (r + 1) / ranks - 1;
                end = r == ranks - 1 ? l->total : end;
                cpl_layout_initialize(l, 7, threads, begin, end, parts + begin);
            }
            test_same_bits("parts", whole, parts, (size_t)l->total * sizeof *whole);
        }
    }
    test_release(&whole);
    test_release(&parts);
    cpl_layout_destroy(&l);
}

static void test_workspace_takes_exactly_the_bytes_it_announces(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    cpl_layout *l = layout_of(odd);
    for (int variant = 0; variant < 2 * 3 * 3 * 2; variant++) {
        bool training = variant % 2;
        cpl_recompute recompute = (cpl_recompute)(variant / 2 % 3);
        cpl_dtype dt = (cpl_dtype)(variant / 6 % 3);
        int64_t loss_rows = variant / 18 * 5;
        cpl_workspace *ws = NULL;
        size_t before, held, peak;
        cpl_device_memory(dev, &before, &peak);
        assert_ok(cpl_workspace_create(&ws, dev, l, dt, 2, training, recompute, loss_rows));
        cpl_device_memory(dev, &held, &peak);
        assert_int_equal(held - before, cpl_workspace_bytes(l, dt, 2, training, recompute, loss_rows));
        assert_int_equal(cpl_workspace_loss_rows(ws), loss_rows == 0 ? 26 : loss_rows);
        cpl_workspace_destroy(&ws);
        cpl_workspace_destroy(&ws);
        cpl_device_memory(dev, &held, &peak);
        assert_int_equal(held, before);
    }
    cpl_layout_destroy(&l);
    cpl_device_destroy(&dev);
}

static void test_workspace_recomputation_and_inference_take_less(void **state) {
    (void)state;
    cpl_layout *l = layout_of((cpl_model_shape){.layers = 6, .heads = 6, .width = 192, .context = 256, .vocab = 256});
    size_t none = cpl_workspace_bytes(l, CPL_F32, 8, true, CPL_RECOMPUTE_NONE, 0);
    size_t gelu = cpl_workspace_bytes(l, CPL_F32, 8, true, CPL_RECOMPUTE_GELU, 0);
    size_t block = cpl_workspace_bytes(l, CPL_F32, 8, true, CPL_RECOMPUTE_BLOCK, 0);
    size_t forward = cpl_workspace_bytes(l, CPL_F32, 8, false, CPL_RECOMPUTE_NONE, 0);
    size_t row = (size_t)8 * 256 * 192 * 4; /* bytes of one [R,C] buffer */
    assert_true(none - gelu == 5 * 4 * row);
    assert_true(gelu - block > 5 * 10 * row && block < none / 3 && forward < block);
    cpl_layout_destroy(&l);
}

static void check_loss_rows(cpl_device *dev, cpl_model_shape shape, int64_t B, int64_t rows) {
    cpl_layout *l = layout_of(shape);
    cpl_workspace *ws = NULL;
    assert_ok(cpl_workspace_create(&ws, dev, l, CPL_F32, B, false, CPL_RECOMPUTE_NONE, 0));
    assert_int_equal(cpl_workspace_loss_rows(ws), rows);
    cpl_workspace_destroy(&ws);
    cpl_layout_destroy(&l);
}

static void test_workspace_logits_take_64_mebibytes_or_as_much_as_a_block(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    /* 279 rows fit: 600 in 3 chunks of 200, rounded up to 256. */
    check_loss_rows(dev, (cpl_model_shape){.layers = 1, .heads = 1, .width = 2, .context = 600, .vocab = 60000}, 1, 256);
    /* 16 buffers of [4096,512] are 128 MiB, of which 1677 rows fit: 4096 in 3 chunks of 1366, rounded up to 1408. */
    check_loss_rows(dev, (cpl_model_shape){.layers = 1, .heads = 8, .width = 512, .context = 512, .vocab = 20000}, 8, 1408);
    cpl_device_destroy(&dev);
}

static void test_workspace_sizes_that_overflow_are_refused(void **state) {
    (void)state;
    cpl_device *dev = rig_device(1);
    cpl_layout *l = layout_of(odd);
    cpl_workspace *ws = NULL;
    static const int64_t sequences[] = {0, -1, INT64_MAX, INT64_MAX / 13, INT64_MAX / 1000};
    for (size_t i = 0; i < sizeof sequences / sizeof *sequences; i++) {
        assert_true(cpl_workspace_bytes(l, CPL_F32, sequences[i], true, CPL_RECOMPUTE_NONE, 0) == SIZE_MAX);
        assert_int_equal(cpl_workspace_create(&ws, dev, l, CPL_F32, sequences[i], true, CPL_RECOMPUTE_NONE, 0), CPL_USAGE);
        assert_null(ws);
    }
    assert_int_equal(cpl_workspace_create(&ws, dev, l, CPL_F32, 1, true, CPL_RECOMPUTE_NONE, -1), CPL_USAGE);
    cpl_layout_destroy(&l);
    cpl_device_destroy(&dev);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout_tensors_are_aligned_disjoint_and_in_order),
        cmocka_unit_test(test_layout_counts_the_parameters_of_gpt2),
        cmocka_unit_test(test_layout_prunable_tensors_are_one_range_of_the_blocks_matrices),
        cmocka_unit_test(test_layout_roles_and_names_agree),
        cmocka_unit_test(test_layout_shards_cover_the_buffer_in_whole_chunks),
        cmocka_unit_test(test_layout_projection_leaves_the_plain_buffer_as_its_prefix),
        cmocka_unit_test(test_layout_impossible_shapes_are_refused_by_option),
        cmocka_unit_test(test_initialize_has_the_stated_moments_and_zero_gaps),
        cmocka_unit_test(test_initialize_depends_on_seed_tensor_and_index_alone),
        cmocka_unit_test(test_initialize_of_parts_has_the_bits_of_the_whole),
        cmocka_unit_test(test_workspace_takes_exactly_the_bytes_it_announces),
        cmocka_unit_test(test_workspace_recomputation_and_inference_take_less),
        cmocka_unit_test(test_workspace_logits_take_64_mebibytes_or_as_much_as_a_block),
        cmocka_unit_test(test_workspace_sizes_that_overflow_are_refused),
    };
    return test_main(tests, NULL, NULL);
}

/* Steps whose gradient is summed over the ranks, or goes to those who sum it, beside the backward pass, against those that sum it
 * afterwards: the same bits, a run that was stored and restored in its middle included.
 * Refuses a model so small that all of its gradient goes at the end. */
#include "jobs/model/model.h"
#include "jobs/optim/optimizer.h"
#include "tests/comm/fake_reach.h"
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { STEPS = 5, T = 8 };
static const cpl_model_shape shape = {.layers = 8, .heads = 2, .width = 128, .context = T, .vocab = 97};
static cpl_comm *world;
static cpl_device *dev;
static cpl_layout *layout;
static float *initial;
static uint8_t *kept; /* [total] mask */
static int rank, size;

typedef enum { BY_MPI, PLANE_AFTER, PLANE_BESIDE, PLANE_BESIDE_LATE, REACH_AFTER, REACH_BESIDE, REACH_BESIDE_LATE, WAYS } way;

/* What a run leaves: working copy, this rank's shard of weights and moments, own gradient's kinds of every step, state of every
 * step. */
typedef struct {
    char *work;
    float *stored[3];
    uint32_t *kinds;
    cpl_step_state state[STEPS];
} outcome;

static void put_batch(int32_t *tokens, int step) {
    for (int i = 0; i < T; i++) {
        tokens[i] = (int32_t)(((uint32_t)(step * size + rank) * 2654435761u + (uint32_t)i * 40503u) % (uint32_t)shape.vocab);
    }
}

static cpl_status one_step(cpl_optimizer *o, cpl_workspace *ws, const int32_t *tokens, float *losses, bool beside) {
    cpl_status st = CPL_OK;
    const cpl_grad_ready *ready = NULL;
    CPL_TRY(CPL_OPS(dev, zero, o->grad, (size_t)layout->total * sizeof(float)));
    if (beside) {
        assert_true(cpl_optimizer_overlaps(o));
        CPL_TRY(cpl_optimizer_overlap(o, &ready));
    }
    CPL_TRY(cpl_model_step(ws, o->work, tokens, tokens, NULL, o->state, o->grad, false, NULL, losses, ready));
    if (!beside) {
        CPL_TRY(cpl_optimizer_scan(o));
    }
    CPL_TRY(cpl_optimizer_step(o));
done:
    return st;
}

/* The shard as it is stored; with a new optimizer that got it back. */
static void store_and_restore(const cpl_training *t, cpl_optimizer **o, float *const stored[3], int64_t n, const uint8_t *mask) {
    cpl_step_state state;
    float *nothing = calloc((size_t)n, sizeof *nothing);
    static const float lr = 1e-3f;
    assert_non_null(nothing);
    assert_int_equal(cpl_optimizer_download(*o, stored[0], stored[1], stored[2], &state), CPL_OK);
    cpl_optimizer_destroy(o);
    assert_int_equal(cpl_optimizer_create(o, world, dev, layout, t, nothing, mask), CPL_OK);
    assert_int_equal(cpl_optimizer_feed_lr(*o, &lr), CPL_OK);
    assert_int_equal(cpl_optimizer_restore(*o, stored[0], stored[1], stored[2], &state), CPL_OK);
    free(nothing);
}

static bool by_reach(way how) {
    return how >= REACH_AFTER;
}
static bool beside(way how) {
    return how == PLANE_BESIDE || how == PLANE_BESIDE_LATE || how == REACH_BESIDE || how == REACH_BESIDE_LATE;
}
/* Devices reach each other only where there are several. What is replicated is summed by the plane there too, afterwards. */
static bool possible(const cpl_training *t, way how) {
    return !by_reach(how) || (size > 1 && (t->optimizer == CPL_OPTIMIZER_SHARDED || how == REACH_AFTER));
}

static void run(const cpl_training *t, way how, outcome *out) {
    cpl_optimizer *o = NULL;
    cpl_workspace *ws = NULL;
    int32_t tokens[T];
    float losses[T];
    static const float lr = 1e-3f;
    int64_t shard[FAKE_RANKS + 1];
    size_t before, held, peak;
    cpl_step_state state;
    fake_plane *f = NULL;
    if (by_reach(how)) {
        f = fake_reach_attach(world, dev, how == REACH_BESIDE_LATE);
    } else if (how != BY_MPI) {
        f = fake_attach(world, dev, how == PLANE_BESIDE_LATE);
    }
    cpl_layout_shards(layout, size, shard);
    const uint8_t *mask = kept + shard[rank];
    int64_t n = shard[rank + 1] - shard[rank];
    const bool shares = by_reach(how) && t->optimizer == CPL_OPTIMIZER_SHARDED;
    cpl_device_memory(dev, &before, &peak);
    assert_int_equal(cpl_optimizer_create(&o, world, dev, layout, t, initial + shard[rank], mask), CPL_OK);
    cpl_device_memory(dev, &held, &peak);
    assert_int_equal(held - before, cpl_optimizer_bytes(layout, t, size, rank, true, shares));
    assert_int_equal(cpl_workspace_create(&ws, dev, layout, o->dtype, 1, true, CPL_RECOMPUTE_NONE, 0), CPL_OK);
    assert_int_equal(cpl_optimizer_feed_lr(o, &lr), CPL_OK);
    size_t bytes = (size_t)layout->total * cpl_dtype_size(o->dtype), count = (size_t)layout->count;
    out->work = malloc(bytes);
    out->kinds = malloc(STEPS * count * sizeof *out->kinds);
    assert_true(out->work != NULL && out->kinds != NULL);
    for (int i = 0; i < 3; i++) {
        out->stored[i] = calloc((size_t)n, sizeof(float));
        assert_non_null(out->stored[i]);
    }
    for (int step = 0; step < STEPS; step++) {
        put_batch(tokens, step);
        if (step == STEPS / 2) {
            store_and_restore(t, &o, out->stored, n, mask);
        }
        if (one_step(o, ws, tokens, losses, beside(how)) != CPL_OK) {
            fail_msg("rank %d, way %d: %s", rank, (int)how, cpl_status_message());
        }
        out->state[step] = *o->state;
        memcpy(out->kinds + (size_t)step * count, o->kinds, count * sizeof *out->kinds);
    }
    if (shares) { /* from the later half of the blocks and the earlier one at least, where ranks have them */
        assert_true(f->reduces == 0 && fake_reach.sent >= (how == REACH_AFTER ? STEPS : 2 * STEPS));
    } else if (by_reach(how)) { /* by tree, which over two any order is */
        assert_true(size > 2 ? f->reduces == 0 && f->exchanges >= STEPS : f->reduces >= STEPS);
    } else {
        assert_true(f == NULL || f->reduces >= 2 * STEPS); /* a part of it before the end */
    }
    memcpy(out->work, o->work, bytes);
    assert_int_equal(cpl_optimizer_download(o, out->stored[0], out->stored[1], out->stored[2], &state), CPL_OK);
    assert_memory_equal(&state, &out->state[STEPS - 1], sizeof state);
    cpl_workspace_destroy(&ws);
    cpl_optimizer_destroy(&o);
    if (by_reach(how)) {
        fake_reach_detach(world, dev);
    } else {
        cpl_comm_detach(world);
    }
}

static void leave(outcome *out) {
    free(out->work);
    free(out->kinds);
    for (int i = 0; i < 3; i++) {
        free(out->stored[i]);
    }
}

static bool same_stored(const outcome *a, const outcome *b) {
    int64_t shard[FAKE_RANKS + 1];
    cpl_layout_shards(layout, size, shard);
    bool is = true;
    for (int i = 0; i < 3; i++) {
        is = is && memcmp(a->stored[i], b->stored[i], (size_t)(shard[rank + 1] - shard[rank]) * sizeof(float)) == 0;
    }
    return is;
}

static void same(const cpl_training *t, const outcome *a, const outcome *b, way how) {
    size_t bytes = (size_t)layout->total * cpl_dtype_size(cpl_precision_dtype(t->precision));
    if (memcmp(a->state, b->state, sizeof a->state) != 0 || memcmp(a->work, b->work, bytes) != 0 || !same_stored(a, b) ||
        memcmp(a->kinds, b->kinds, STEPS * (size_t)layout->count * sizeof *a->kinds) != 0) {
        fail_msg("rank %d of %d, precision %d, optimizer %d: way %d leaves other bits", rank, size, (int)t->precision,
                 (int)t->optimizer, (int)how);
    }
}

static void test_sum_beside_the_backward_pass_leaves_the_same_bits(void **state) {
    cpl_arena *arena = NULL;
    assert_int_equal(cpl_arena_create(&arena), CPL_OK);
    for (int precision = CPL_PRECISION_FP32; precision <= CPL_PRECISION_FP16; precision++) {
        for (int optimizer = CPL_OPTIMIZER_SHARDED; optimizer <= CPL_OPTIMIZER_REPLICATED; optimizer++) {
            cpl_training t = {0};
            outcome out[WAYS];
            assert_int_equal(cpl_fields_default(cpl_training_table.fields, cpl_training_table.count, &t, arena), CPL_OK);
            t.precision = precision;
            t.optimizer = optimizer;
            t.micro_batch = 1;
            t.global_batch = size;
            t.loss_scale = 1 << 24; /* overflows in fp16, then falls */
            t.scale_backoff = 0x1p-6;
            for (int how = BY_MPI; how < WAYS; how++) {
                if (possible(&t, (way)how)) {
                    run(&t, (way)how, &out[how]);
                }
            }
            int skipped = 0;
            for (int step = 0; step < STEPS; step++) {
                skipped += out[BY_MPI].state[step].skip != 0;
            }
            assert_true(precision == CPL_PRECISION_FP16 ? skipped > 0 && skipped < STEPS : skipped == 0);
            for (int how = PLANE_BESIDE; how < WAYS; how++) {
                if (possible(&t, (way)how)) { /* where devices reach each other the sum is the tree of MPI's */
                    same(&t, &out[by_reach((way)how) ? BY_MPI : PLANE_AFTER], &out[how], (way)how);
                }
            }
            if (size <= 2) {
                same(&t, &out[BY_MPI], &out[PLANE_AFTER], PLANE_AFTER);
            }
            for (int how = BY_MPI; how < WAYS; how++) {
                if (possible(&t, (way)how)) {
                    leave(&out[how]);
                }
            }
        }
    }
    cpl_arena_destroy(&arena);
}

int main(int argc, char **argv) {
    if (cpl_world_init(&world, &argc, &argv) != CPL_OK || cpl_device_create(&dev, "cpu", 0, 1) != CPL_OK ||
        cpl_layout_create(&layout, &shape) != CPL_OK) {
        fprintf(stderr, "%s\n", cpl_status_message());
        return 1;
    }
    rank = cpl_comm_rank(world);
    size = cpl_comm_size(world);
    initial = calloc((size_t)layout->total, sizeof *initial);
    cpl_layout_initialize(layout, 1, 1, 0, layout->total, initial);
    kept = malloc((size_t)layout->total);
    for (int64_t i = 0; i < layout->total; i++) {
        kept[i] = i * 2654435761u % 11 != 0;
        initial[i] = kept[i] ? initial[i] : 0;
    }
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_sum_beside_the_backward_pass_leaves_the_same_bits)};
    if (rank != 0 && freopen("/dev/null", "w", stdout) == NULL) {
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    free(initial);
    free(kept);
    cpl_layout_destroy(&layout);
    cpl_device_destroy(&dev);
    if (failed != 0) {
        cpl_world_abort(world, 1);
    }
    cpl_world_finish(&world);
    return 0;
}

/* The table of parameter tensors, its order in the flat buffers, and the initial values.
 * Refuses shapes whose sizes do not fit in 63 bits, so that no later product of them needs a check. */
#include "jobs/model/model.h"

#include "io/base/rng.h"
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { TENSOR_ALIGN = 64, OUTSIDE_FIRST = 2, BLOCK_MATRICES = CPL_P_LN1_G, BLOCK_VECTORS = CPL_P_BLOCK_COUNT - CPL_P_LN1_G };
static const int64_t max_layers = 65536;
/* Bytes of a flat f32 buffer, with room for the largest count of such buffers anyone adds up. */
static const int64_t max_elements = INT64_MAX / 256;

/* What is the same in every block: the name after "h.N.", the shape in multiples of C, and the flags. */
static const struct {
    const char *suffix;
    int rows, cols; /* cols 0: a vector */
    cpl_coupling coupling;
} block_tensor[CPL_P_BLOCK_COUNT] = {
    [CPL_P_QKV_W] = {"attn.qkv.weight", 3, 1, CPL_COUPLE_HEADS}, [CPL_P_PROJ_W] = {"attn.proj.weight", 1, 1, CPL_COUPLE_HEADS},
    [CPL_P_FC_W] = {"mlp.fc.weight", 4, 1, CPL_COUPLE_MLP},      [CPL_P_OUT_W] = {"mlp.out.weight", 1, 4, CPL_COUPLE_MLP},
    [CPL_P_LN1_G] = {"ln1.gain", 1, 0, CPL_COUPLE_NONE},         [CPL_P_LN1_B] = {"ln1.bias", 1, 0, CPL_COUPLE_NONE},
    [CPL_P_QKV_B] = {"attn.qkv.bias", 3, 0, CPL_COUPLE_HEADS},   [CPL_P_PROJ_B] = {"attn.proj.bias", 1, 0, CPL_COUPLE_NONE},
    [CPL_P_LN2_G] = {"ln2.gain", 1, 0, CPL_COUPLE_NONE},         [CPL_P_LN2_B] = {"ln2.bias", 1, 0, CPL_COUPLE_NONE},
    [CPL_P_FC_B] = {"mlp.fc.bias", 4, 0, CPL_COUPLE_MLP},        [CPL_P_OUT_B] = {"mlp.out.bias", 1, 0, CPL_COUPLE_NONE},
};

/* The table while it is made; with param NULL it only counts. */
typedef struct {
    cpl_param *param; /* borrowed */
    int64_t count, offset, parameters;
    bool overflow;
} table;

static void table_add(table *t, cpl_param p) {
    int64_t n, end;
    if (t->overflow || !cpl_mul_i64(p.rows, p.cols, &n) || n > max_elements || !cpl_add_i64(t->offset, n, &end) ||
        end > max_elements - TENSOR_ALIGN) {
        t->overflow = true;
        return;
    }
    p.offset = t->offset;
    if (t->param != NULL) {
        t->param[t->count] = p;
    }
    t->count++;
    t->parameters += n;
    t->offset = (end + TENSOR_ALIGN - 1) / TENSOR_ALIGN * TENSOR_ALIGN;
}

static void table_add_outside(table *t, const char *name, int64_t rows, int64_t cols, bool one_d) {
    cpl_param p = {.rows = rows, .cols = cols, .one_d = one_d, .decayed = !one_d, .layer = -1};
    snprintf(p.name, sizeof p.name, "%s", name);
    table_add(t, p);
}

static void table_add_block(table *t, const cpl_model_shape *s, int64_t layer, cpl_block_param role) {
    bool one_d = block_tensor[role].cols == 0;
    cpl_param p = {.rows = block_tensor[role].rows * s->width,
                   .cols = one_d ? 1 : block_tensor[role].cols * s->width,
                   .one_d = one_d,
                   .decayed = !one_d,
                   .prunable = !one_d,
                   .layer = (int)layer,
                   .coupling = block_tensor[role].coupling};
    snprintf(p.name, sizeof p.name, "h.%d.%s", p.layer, block_tensor[role].suffix);
    table_add(t, p);
}

/* teacher_width 0: no projection. decayed_end may be NULL. */
static void table_fill(table *t, const cpl_model_shape *s, int64_t teacher_width, int64_t *decayed_end) {
    table_add_outside(t, "wte", s->vocab, s->width, false);
    table_add_outside(t, "wpe", s->context, s->width, false);
    for (int64_t layer = 0; layer < s->layers; layer++) {
        for (int role = 0; role < BLOCK_MATRICES; role++) {
            table_add_block(t, s, layer, role);
        }
    }
    if (decayed_end != NULL) {
        *decayed_end = t->offset;
    }
    for (int64_t layer = 0; layer < s->layers; layer++) {
        for (int role = BLOCK_MATRICES; role < CPL_P_BLOCK_COUNT; role++) {
            table_add_block(t, s, layer, role);
        }
    }
    table_add_outside(t, "ln_f.gain", s->width, 1, true);
    table_add_outside(t, "ln_f.bias", s->width, 1, true);
    if (teacher_width > 0) {
        cpl_param p = {.name = "distill.projection", .rows = teacher_width, .cols = s->width, .layer = -1};
        int64_t of_the_model = t->parameters;
        table_add(t, p);
        t->parameters = of_the_model;
    }
}

static cpl_status check_range(const char *option, int64_t value, int64_t max) {
    if (value < 1 || value > max) {
        return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "option %s: expected an integer from 1 to %lld, got %lld", option,
                        (long long)max, (long long)value);
    }
    return CPL_OK;
}

static cpl_status shape_check(const cpl_model_shape *s, int64_t teacher_width) {
    cpl_status st = CPL_OK;
    table t = {0};
    CPL_TRY(check_range("layers", s->layers, max_layers));
    CPL_TRY(check_range("heads", s->heads, INT32_MAX));
    CPL_TRY(check_range("width", s->width, INT32_MAX));
    CPL_TRY(check_range("context", s->context, INT32_MAX));
    CPL_TRY(check_range("vocab", s->vocab, INT32_MAX));
    if (s->width % s->heads != 0) {
        CPL_FAIL(CPL_USAGE, "option width: expected a multiple of heads (%lld), got %lld", (long long)s->heads,
                 (long long)s->width);
    }
    table_fill(&t, s, teacher_width, NULL);
    if (t.overflow) {
        CPL_FAIL(CPL_USAGE, "options layers %lld, width %lld, context %lld, vocab %lld: expected fewer than %lld parameters in all",
                 (long long)s->layers, (long long)s->width, (long long)s->context, (long long)s->vocab, (long long)max_elements);
    }
done:
    return st;
}

cpl_status cpl_model_shape_check(const cpl_model_shape *s) {
    return shape_check(s, 0);
}

static cpl_status layout_create(cpl_layout **out, const cpl_model_shape *shape, int64_t teacher_width) {
    cpl_status st = CPL_OK;
    cpl_layout *l = NULL;
    table t = {0};
    *out = NULL;
    CPL_TRY(shape_check(shape, teacher_width));
    table_fill(&t, shape, teacher_width, NULL);
    CPL_TRY(cpl_alloc(&l, 1, sizeof *l, "model layout"));
    l->shape = *shape;
    l->count = t.count;
    CPL_TRY(cpl_alloc(&l->param, (size_t)l->count, sizeof *l->param, "table of parameters"));
    CPL_TRY(cpl_alloc(&l->begin, (size_t)l->count + 1, sizeof *l->begin, "offsets of parameters"));
    t = (table){.param = l->param};
    table_fill(&t, shape, teacher_width, &l->decayed_end);
    l->total = t.offset;
    l->parameters = t.parameters;
    for (int64_t i = 0; i < l->count; i++) {
        l->begin[i] = l->param[i].offset;
    }
    l->begin[l->count] = l->total;
    *out = l;
    l = NULL;
done:
    cpl_layout_destroy(&l);
    return st;
}

cpl_status cpl_layout_create(cpl_layout **out, const cpl_model_shape *shape) {
    return layout_create(out, shape, 0);
}

cpl_status cpl_layout_create_projected(cpl_layout **out, const cpl_model_shape *shape, int64_t teacher_width) {
    cpl_status st = CPL_OK;
    *out = NULL;
    CPL_TRY(check_range("width of the teacher", teacher_width, INT32_MAX));
    CPL_TRY(layout_create(out, shape, teacher_width));
done:
    return st;
}

void cpl_layout_destroy(cpl_layout **layout) {
    if (layout == NULL || *layout == NULL) {
        return;
    }
    cpl_free(&(*layout)->param);
    cpl_free(&(*layout)->begin);
    cpl_free(layout);
}

const cpl_param *cpl_layout_find(const cpl_layout *l, const char *name) {
    for (int64_t i = 0; i < l->count; i++) {
        if (strcmp(l->param[i].name, name) == 0) {
            return &l->param[i];
        }
    }
    return NULL;
}

const cpl_param *cpl_layout_wte(const cpl_layout *l) {
    return &l->param[0];
}
const cpl_param *cpl_layout_wpe(const cpl_layout *l) {
    return &l->param[1];
}
static const cpl_param *after_blocks(const cpl_layout *l, int64_t i) {
    return &l->param[OUTSIDE_FIRST + l->shape.layers * CPL_P_BLOCK_COUNT + i];
}
const cpl_param *cpl_layout_final_gain(const cpl_layout *l) {
    return after_blocks(l, 0);
}
const cpl_param *cpl_layout_final_bias(const cpl_layout *l) {
    return after_blocks(l, 1);
}
const cpl_param *cpl_layout_projection(const cpl_layout *l) {
    const cpl_param *p = after_blocks(l, 2);
    return p < l->param + l->count ? p : NULL;
}

const cpl_param *cpl_layout_block(const cpl_layout *l, int64_t layer, cpl_block_param role) {
    int64_t i = (int)role < BLOCK_MATRICES
                    ? OUTSIDE_FIRST + layer * BLOCK_MATRICES + role
                    : OUTSIDE_FIRST + l->shape.layers * BLOCK_MATRICES + layer * BLOCK_VECTORS + ((int)role - BLOCK_MATRICES);
    return &l->param[i];
}

int64_t cpl_layout_ranges(const cpl_layout *l) {
    return l->shape.layers + 2;
}

void cpl_layout_range(const cpl_layout *l, int64_t k, int64_t *first, int64_t *last) {
    int64_t layers = l->shape.layers, vectors = OUTSIDE_FIRST + layers * BLOCK_MATRICES;
    if (k < layers) {
        *first = OUTSIDE_FIRST + (layers - 1 - k) * BLOCK_MATRICES;
        *last = *first + BLOCK_MATRICES;
    } else {
        *first = k == layers ? vectors : 0;
        *last = k == layers ? l->count : OUTSIDE_FIRST;
    }
}

int64_t cpl_part_begin(int64_t first, int64_t last, int ranks, int rank) {
    int64_t chunks = (last - first + CPL_SUM_CHUNK - 1) / CPL_SUM_CHUNK, each = (chunks + ranks - 1) / ranks * CPL_SUM_CHUNK;
    return each * rank < last - first ? first + each * rank : last;
}

void cpl_layout_shards(const cpl_layout *l, int ranks, int64_t *begin) {
    for (int r = 0; r <= ranks; r++) {
        begin[r] = cpl_part_begin(0, l->total, ranks, r);
    }
}

static bool has_role(const cpl_layout *l, const cpl_param *p, cpl_block_param role) {
    return p->layer >= 0 && p == cpl_layout_block(l, p->layer, role);
}

/* The initial values of a tensor are N(mean, std). */
static void initial_distribution(const cpl_layout *l, const cpl_param *p, float *mean, float *std) {
    bool gain = p == cpl_layout_final_gain(l) || has_role(l, p, CPL_P_LN1_G) || has_role(l, p, CPL_P_LN2_G);
    bool residual = has_role(l, p, CPL_P_PROJ_W) || has_role(l, p, CPL_P_OUT_W);
    *mean = gain ? 1.0f : 0.0f;
    *std = 0.02f;
    if (p->one_d) {
        *std = 0.0f;
    } else if (p == cpl_layout_wpe(l)) {
        *std = 0.01f;
    } else if (residual) {
        *std = (float)(0.02 / sqrt(2.0 * (double)l->shape.layers));
    } else if (p == cpl_layout_projection(l)) {
        *std = (float)(1.0 / sqrt((double)l->shape.width));
    }
}

void cpl_layout_initialize(const cpl_layout *l, uint64_t seed, int threads, int64_t begin, int64_t end, float *values) {
    memset(values, 0, (size_t)(end - begin) * sizeof *values);
    for (int64_t i = 0; i < l->count; i++) {
        const cpl_param *p = &l->param[i];
        const int64_t past = p->offset + cpl_param_count(p);
        const int64_t first = p->offset > begin ? p->offset : begin, last = past < end ? past : end;
        float mean, std;
        initial_distribution(l, p, &mean, &std);
#pragma omp parallel for num_threads(last - first < 16384 ? 1 : threads) schedule(static)
        for (int64_t at = first; at < last; at++) {
            const uint64_t k = (uint64_t)(at - p->offset);
            values[at - begin] = std == 0.0f ? mean : mean + std * cpl_rng_normal(seed, CPL_RNG_INIT, (uint32_t)i, k);
        }
    }
}

/* Memory of the activations of one micro-batch: one piece of device memory, carved by the same code that counts it.
 * Refuses sizes that overflow. */
#include "jobs/model/internal.h"

enum { CARVE_ALIGN = 256, LOSS_ROWS_STEP = 64 };
static const size_t logits_least = (size_t)64 << 20; /* bytes, when loss_rows is left to us */

/* Hands out pieces of `base`, or only counts where base is NULL. */
typedef struct {
    char *base; /* borrowed */
    size_t used;
    bool overflow;
} carver;

/* rows * cols elements of `size` bytes; rows, cols >= 1. */
static void *carve(carver *c, int64_t rows, int64_t cols, size_t size) {
    size_t bytes, begin = c->used, end;
    if (!cpl_mul_size((size_t)rows, (size_t)cols, &bytes) || !cpl_mul_size(bytes, size, &bytes) ||
        !cpl_add_size(begin, bytes, &end) || !cpl_add_size(end, CARVE_ALIGN - 1, &end)) {
        c->overflow = true;
        return NULL;
    }
    c->used = end / CARVE_ALIGN * CARVE_ALIGN;
    return c->base == NULL ? NULL : c->base + begin;
}

/* Everything of a block but sum1 and act. */
static void carve_block(const cpl_workspace *ws, carver *c, cpl_block_activations *b) {
    int64_t R = ws->R, C = ws->layout->shape.width, H = ws->layout->shape.heads;
    size_t size = cpl_dtype_size(ws->dt);
    b->norm1 = carve(c, R, C, size);
    b->mean1 = carve(c, R, 1, sizeof(float));
    b->rstd1 = carve(c, R, 1, sizeof(float));
    b->qkv = carve(c, R, 3 * C, size);
    b->context = carve(c, R, C, size);
    b->lse = carve(c, R, H, sizeof(float));
    b->sum2 = carve(c, R, C, size);
    b->norm2 = carve(c, R, C, size);
    b->mean2 = carve(c, R, 1, sizeof(float));
    b->rstd2 = carve(c, R, 1, sizeof(float));
    b->pre = carve(c, R, 4 * C, size);
}

static void carve_training(cpl_workspace *ws, carver *c) {
    int64_t R = ws->R, C = ws->layout->shape.width;
    size_t size = cpl_dtype_size(ws->dt);
    cpl_block_activations shared = {0};
    if (ws->recompute != CPL_RECOMPUTE_NONE) {
        shared.act = carve(c, R, 4 * C, size);
    }
    if (ws->recompute == CPL_RECOMPUTE_BLOCK) {
        carve_block(ws, c, &shared);
    }
    for (int64_t layer = 0; layer < ws->layout->shape.layers && !c->overflow; layer++) {
        cpl_block_activations b = shared;
        if (ws->recompute != CPL_RECOMPUTE_BLOCK) {
            carve_block(ws, c, &b);
        }
        if (ws->recompute == CPL_RECOMPUTE_NONE) {
            b.act = carve(c, R, 4 * C, size);
        }
        b.sum1 = carve(c, R, C, size);
        if (ws->block != NULL) {
            ws->block[layer] = b;
        }
    }
    ws->sum = carve(c, R, C, size);
    ws->hidden = carve(c, R, C, size);
    ws->mean = carve(c, R, 1, sizeof(float));
    ws->rstd = carve(c, R, 1, sizeof(float));
    ws->dsum = carve(c, R, C, size);
    ws->dbranch = carve(c, R, C, size);
}

static void carve_inference(cpl_workspace *ws, carver *c) {
    int64_t R = ws->R, C = ws->layout->shape.width;
    size_t size = cpl_dtype_size(ws->dt);
    cpl_block_activations b = {0};
    b.sum1 = b.sum2 = ws->sum = carve(c, R, C, size);
    b.norm1 = b.context = b.norm2 = ws->hidden = carve(c, R, C, size);
    b.qkv = b.act = carve(c, R, 4 * C, size);
    b.mean1 = b.mean2 = ws->mean = carve(c, R, 1, sizeof(float));
    b.rstd1 = b.rstd2 = ws->rstd = carve(c, R, 1, sizeof(float));
    b.lse = carve(c, R, ws->layout->shape.heads, sizeof(float));
    for (int64_t layer = 0; ws->block != NULL && layer < ws->layout->shape.layers; layer++) {
        ws->block[layer] = b;
    }
}

static void carve_all(cpl_workspace *ws, carver *c) {
    if (ws->training) {
        carve_training(ws, c);
    } else {
        carve_inference(ws, c);
    }
    ws->logits = carve(c, ws->loss_rows, ws->layout->shape.vocab, cpl_dtype_size(ws->dt));
}

/* Logits as large as the activations of one block, or an eighth of all blocks', but at least logits_least, in even chunks: products
 * of few rows are slow, and each chunk reads and writes the gradient of wte. */
static int64_t default_loss_rows(const cpl_workspace *ws) {
    enum { BLOCK_ACTIVATIONS = 16, SHARE = 8 }; /* [R,C] buffers of a block: carve_training */
    size_t element = cpl_dtype_size(ws->dt), limit = 0, blocks = 0;
    if (!cpl_mul_size((size_t)ws->R, (size_t)ws->layout->shape.width, &limit) ||
        !cpl_mul_size(limit, BLOCK_ACTIVATIONS * element, &limit) ||
        !cpl_mul_size(limit, (size_t)ws->layout->shape.layers, &blocks) || limit < logits_least) {
        limit = blocks = logits_least;
    }
    limit = blocks / SHARE > limit ? blocks / SHARE : limit;
    int64_t most = (int64_t)(limit / ((size_t)ws->layout->shape.vocab * element));
    most = most < 1 ? 1 : most < ws->R ? most : ws->R;
    int64_t chunks = (ws->R - 1) / most + 1, rows = (ws->R - 1) / chunks + 1;
    int64_t even = (rows + LOSS_ROWS_STEP - 1) / LOSS_ROWS_STEP * LOSS_ROWS_STEP;
    return even <= most ? even : rows;
}

/* The sizes of a workspace without memory; false where they are impossible. */
static bool describe(cpl_workspace *ws, const cpl_layout *l, cpl_dtype dt, int64_t B, bool training, cpl_recompute recompute,
                     int64_t loss_rows) {
    *ws = (cpl_workspace){.layout = l,
                          .dt = cpl_dtype_storage(dt),
                          .product = dt,
                          .training = training,
                          .recompute = recompute,
                          .B = B,
                          .T = l->shape.context};
    if (B < 1 || loss_rows < 0 || !cpl_mul_i64(B, ws->T, &ws->R)) {
        return false;
    }
    ws->loss_rows = loss_rows == 0 ? default_loss_rows(ws) : loss_rows;
    ws->loss_rows = ws->loss_rows > ws->R ? ws->R : ws->loss_rows;
    return true;
}

size_t cpl_workspace_bytes(const cpl_layout *l, cpl_dtype dt, int64_t B, bool training, cpl_recompute recompute,
                           int64_t loss_rows) {
    cpl_workspace ws;
    carver c = {0};
    if (!describe(&ws, l, dt, B, training, recompute, loss_rows)) {
        return SIZE_MAX;
    }
    carve_all(&ws, &c);
    return c.overflow ? SIZE_MAX : c.used;
}

cpl_status cpl_workspace_create(cpl_workspace **out, cpl_device *dev, const cpl_layout *l, cpl_dtype dt, int64_t B, bool training,
                                cpl_recompute recompute, int64_t loss_rows) {
    cpl_status st = CPL_OK;
    cpl_workspace *ws = NULL;
    carver c = {0};
    *out = NULL;
    if (!cpl_device_has(dev, dt)) {
        CPL_FAIL(CPL_UNSUPPORTED, "precision %s needs a GPU, and this device is %s", cpl_dtype_name(dt), dev->name);
    }
    size_t bytes = cpl_workspace_bytes(l, dt, B, training, recompute, loss_rows);
    if (bytes == SIZE_MAX) {
        CPL_FAIL(CPL_USAGE, "micro-batch of %lld sequences of %lld tokens, %lld rows of logits: expected sizes that fit in memory",
                 (long long)B, (long long)l->shape.context, (long long)loss_rows);
    }
    CPL_TRY(cpl_alloc(&ws, 1, sizeof *ws, "workspace"));
    (void)describe(ws, l, dt, B, training, recompute, loss_rows);
    ws->dev = dev;
    ws->bytes = bytes;
    CPL_TRY(cpl_alloc(&ws->block, (size_t)l->shape.layers, sizeof *ws->block, "table of activations"));
    CPL_TRY(cpl_device_alloc(dev, &ws->memory, bytes, 1, "activations of a micro-batch"));
    c.base = ws->memory;
    carve_all(ws, &c);
    *out = ws;
    ws = NULL;
done:
    cpl_workspace_destroy(&ws);
    return st;
}

void cpl_workspace_destroy(cpl_workspace **ws) {
    if (ws == NULL || *ws == NULL) {
        return;
    }
    if ((*ws)->memory != NULL) {
        cpl_device_free((*ws)->dev, &(*ws)->memory);
    }
    cpl_free(&(*ws)->block);
    cpl_free(ws);
}

int64_t cpl_workspace_loss_rows(const cpl_workspace *ws) {
    return ws->loss_rows;
}
const void *cpl_workspace_hidden(const cpl_workspace *ws) {
    return ws->hidden;
}

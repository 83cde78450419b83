/* Models on disk.
 * Refuses to mix shapes: what is read must fit the layout. */
#include "jobs/store.h"
#include <stdio.h>
#include <string.h>

static cpl_status ranks_barrier(void *comm) {
    return cpl_comm_barrier(comm);
}
static cpl_status ranks_agree(void *comm, cpl_status st) {
    return cpl_agree(comm, st);
}

cpl_io_ranks cpl_store_ranks(cpl_comm *comm) {
    return (cpl_io_ranks){.rank = cpl_comm_rank(comm),
                          .size = cpl_comm_size(comm),
                          .mpi_comm = cpl_comm_mpi(comm),
                          .comm = comm,
                          .barrier = ranks_barrier,
                          .agree = ranks_agree};
}

cpl_status cpl_shard_create(cpl_shard *s, const cpl_layout *layout, cpl_comm *comm, bool moments, bool masked) {
    cpl_status st = CPL_OK;
    int64_t *begin = NULL;
    int ranks = cpl_comm_size(comm), rank = cpl_comm_rank(comm);
    *s = (cpl_shard){.moments = moments, .masked = masked};
    cpl_status local = cpl_alloc(&begin, (size_t)ranks + 1, sizeof *begin, "shard table");
    if (local == CPL_OK) {
        cpl_layout_shards(layout, ranks, begin);
        s->begin = begin[rank];
        s->n = begin[rank + 1] - begin[rank];
        local = cpl_alloc(&s->param, (size_t)s->n + 1, sizeof(float), "weights");
    }
    if (local == CPL_OK && moments) {
        local = cpl_alloc(&s->m, (size_t)s->n + 1, sizeof(float), "first moments");
    }
    if (local == CPL_OK && moments) {
        local = cpl_alloc(&s->v, (size_t)s->n + 1, sizeof(float), "second moments");
    }
    if (local == CPL_OK && masked) {
        local = cpl_alloc(&s->mask, (size_t)s->n + 1, 1, "mask");
    }
    CPL_TRY(cpl_agree(comm, local));
done:
    cpl_free(&begin);
    if (st != CPL_OK) {
        cpl_shard_free(s);
    }
    return st;
}

void cpl_shard_free(cpl_shard *s) {
    cpl_free(&s->param);
    cpl_free(&s->m);
    cpl_free(&s->v);
    cpl_free(&s->mask);
}

enum { HEAD_ATTRS = 17 };
/* The attributes of a model file; values from and to head. */
static void head_attrs(cpl_ckpt_attr a[HEAD_ATTRS], const cpl_store_head *h) {
    const cpl_ckpt_attr list[HEAD_ATTRS] = {
        {.name = "key", .type = CPL_T_TEXT, .text = h->key},
        {.name = "layers", .type = CPL_T_I64, .i = h->shape.layers},
        {.name = "heads", .type = CPL_T_I64, .i = h->shape.heads},
        {.name = "width", .type = CPL_T_I64, .i = h->shape.width},
        {.name = "context", .type = CPL_T_I64, .i = h->shape.context},
        {.name = "vocab", .type = CPL_T_I64, .i = h->shape.vocab},
        {.name = "step", .type = CPL_T_I64, .i = h->step},
        {.name = "has_moments", .type = CPL_T_I64, .i = h->moments},
        {.name = "has_mask", .type = CPL_T_I64, .i = h->masked},
        {.name = "has_series", .type = CPL_T_I64, .i = h->series},
        {.name = "loss_scale", .type = CPL_T_F64, .f = h->state.loss_scale},
        {.name = "good_steps", .type = CPL_T_I64, .i = h->state.good_steps},
        {.name = "hysteresis_left", .type = CPL_T_I64, .i = h->state.hysteresis_left},
        {.name = "stuck_steps", .type = CPL_T_I64, .i = h->state.stuck_steps},
        {.name = "adam_step", .type = CPL_T_I64, .i = h->state.adam_step},
        {.name = "grad_norm", .type = CPL_T_F64, .f = h->state.grad_norm},
        {.name = "grad_factor", .type = CPL_T_F64, .f = h->state.grad_factor},
    };
    memcpy(a, list, sizeof list);
}

static cpl_status head_values(const char *path, const cpl_ckpt_attr a[HEAD_ATTRS], cpl_store_head *h) {
    cpl_status st = CPL_OK;
    if (strlen(a[0].text) >= sizeof h->key) {
        CPL_FAIL(CPL_DAMAGED, "%s: attribute key is longer than a SHA-256", path);
    }
    memcpy(h->key, a[0].text, strlen(a[0].text) + 1);
    h->shape = (cpl_model_shape){a[1].i, a[2].i, a[3].i, a[4].i, a[5].i};
    h->step = a[6].i;
    h->moments = a[7].i != 0;
    h->masked = a[8].i != 0;
    h->series = a[9].i != 0;
    h->state = (cpl_step_state){.loss_scale = (float)a[10].f,
                                .good_steps = (int32_t)a[11].i,
                                .hysteresis_left = (int32_t)a[12].i,
                                .stuck_steps = (int32_t)a[13].i,
                                .adam_step = a[14].i,
                                .grad_norm = (float)a[15].f,
                                .grad_factor = (float)a[16].f};
    if (cpl_model_shape_check(&h->shape) != CPL_OK) {
        CPL_FAIL(CPL_DAMAGED, "%s: no model has the shape of its attributes", path);
    }
done:
    return st;
}

enum { SHARD_ARRAYS = 7 };
/* Arrays of a shard; returns how many. The projection of distillation stands in arrays of its own, so that whoever reads the model
 * does not see it; it is never masked. */
static size_t shard_arrays(const cpl_shard *s, const cpl_layout *layout, cpl_ckpt_array a[SHARD_ARRAYS]) {
    const cpl_param *projection = cpl_layout_projection(layout);
    int64_t end = projection == NULL ? layout->total : projection->offset;
    int64_t begin = s->begin < end ? s->begin : end, n = s->begin + s->n < end ? s->n : end - begin;
    const cpl_ckpt_array model = {.type = CPL_T_F32, .total = end, .begin = begin, .n = n};
    const cpl_ckpt_array beside = {
        .type = CPL_T_F32, .total = layout->total - end, .begin = s->begin - begin, .n = s->n - n, .help = "distill.projection"};
    const struct {
        bool there;
        float *data;
        const char *name, *help, *beside;
    } list[] = {{true, s->param, "param", "weights, flat in the order of the layout", "projection"},
                {s->moments, s->m, "m", "AdamW first moments", "projection_m"},
                {s->moments, s->v, "v", "AdamW second moments", "projection_v"}};
    size_t count = 0;
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        if (list[i].there) {
            a[count] = model;
            a[count].name = list[i].name;
            a[count].help = list[i].help;
            a[count++].data = list[i].data;
        }
        if (list[i].there && projection != NULL) {
            a[count] = beside;
            a[count].name = list[i].beside;
            a[count++].data = list[i].data + n;
        }
    }
    if (s->masked) {
        a[count] = model;
        a[count].type = CPL_T_U8;
        a[count].name = "mask";
        a[count].help = "0: pruned";
        a[count++].data = s->mask;
    }
    return count;
}

cpl_status cpl_store_save(const char *path, cpl_comm *comm, const cpl_layout *layout, const char *key, int64_t step,
                          const cpl_shard *shard, const cpl_step_state *state, const cpl_metrics *metrics) {
    cpl_status st = CPL_OK;
    cpl_ckpt_array arrays[SHARD_ARRAYS + CPL_METRICS_ARRAYS];
    cpl_ckpt_attr attrs[HEAD_ATTRS];
    double *flat[CPL_METRICS_ARRAYS] = {0};
    cpl_store_head head = {
        .shape = layout->shape, .step = step, .moments = shard->moments, .masked = shard->masked, .series = metrics != NULL};
    size_t n = shard_arrays(shard, layout, arrays);
    if (state != NULL) {
        head.state = *state;
    }
    snprintf(head.key, sizeof head.key, "%s", key);
    head_attrs(attrs, &head);
    if (metrics != NULL) {
        CPL_TRY(cpl_agree(comm, cpl_metrics_pack(metrics, flat, arrays + n, cpl_comm_rank(comm) == 0)));
        n += CPL_METRICS_ARRAYS;
    }
    cpl_io_ranks ranks = cpl_store_ranks(comm);
    CPL_TRY(cpl_checkpoint_write(path, &ranks, arrays, n, attrs, HEAD_ATTRS));
done:
    for (int i = 0; i < CPL_METRICS_ARRAYS; i++) {
        cpl_free(&flat[i]);
    }
    return st;
}

cpl_status cpl_store_head_read(const char *path, cpl_comm *comm, cpl_store_head *head) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    cpl_status local = CPL_OK;
    if (cpl_comm_rank(comm) == 0) {
        cpl_ckpt_attr attrs[HEAD_ATTRS];
        cpl_store_head empty = {0};
        head_attrs(attrs, &empty);
        local = cpl_arena_create(&arena);
        if (local == CPL_OK) {
            local = cpl_checkpoint_read(path, NULL, NULL, 0, attrs, HEAD_ATTRS, arena);
        }
        if (local == CPL_OK) {
            local = head_values(path, attrs, head);
        }
    }
    CPL_TRY(cpl_agree(comm, local));
    CPL_TRY(cpl_comm_bcast(comm, head, sizeof *head, 0));
done:
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_store_load(const char *path, cpl_comm *comm, const cpl_layout *layout, cpl_shard *shard) {
    cpl_ckpt_array arrays[SHARD_ARRAYS];
    size_t n = shard_arrays(shard, layout, arrays);
    cpl_io_ranks ranks = cpl_store_ranks(comm);
    return cpl_checkpoint_read(path, &ranks, arrays, n, NULL, 0, NULL);
}

cpl_status cpl_model_load(cpl_model *model, const char *path, cpl_comm *comm) {
    cpl_status st = CPL_OK;
    cpl_store_head head;
    memset(model, 0, sizeof *model);
    CPL_TRY(cpl_store_head_read(path, comm, &head));
    cpl_status local = cpl_layout_create(&model->layout, &head.shape);
    size_t total = local == CPL_OK ? (size_t)model->layout->total : 0;
    if (local == CPL_OK) {
        local = cpl_alloc(&model->weights, total, sizeof(float), "weights");
    }
    if (local == CPL_OK && head.masked) {
        local = cpl_alloc(&model->mask, total, 1, "mask");
    }
    CPL_TRY(cpl_agree(comm, local));
    memcpy(model->key, head.key, sizeof head.key);
    cpl_shard whole = {.n = (int64_t)total, .masked = head.masked, .param = model->weights, .mask = model->mask};
    CPL_TRY(cpl_store_load(path, comm, model->layout, &whole));
done:
    if (st != CPL_OK) {
        cpl_model_free(model);
    }
    return st;
}

void cpl_model_free(cpl_model *model) {
    cpl_layout_destroy(&model->layout);
    cpl_free(&model->weights);
    cpl_free(&model->mask);
}

cpl_status cpl_model_upload(cpl_device *dev, const cpl_layout *layout, cpl_dtype dt, const float *weights, void *out) {
    cpl_status st = CPL_OK;
    float *staging = NULL;
    void *work = NULL;
    size_t total = (size_t)layout->total;
    CPL_TRY(cpl_device_alloc(dev, &work, total, cpl_dtype_size(dt), "working weights"));
    if (cpl_dtype_storage(dt) == CPL_F32) {
        CPL_TRY(CPL_OPS(dev, upload, work, weights, total * sizeof(float)));
    } else {
        CPL_TRY(cpl_device_alloc(dev, &staging, total, sizeof(float), "weights on their way to the device"));
        CPL_TRY(CPL_OPS(dev, upload, staging, weights, total * sizeof(float)));
        CPL_TRY(CPL_OPS(dev, cast_from_f32, dt, work, staging, layout->total));
        CPL_TRY(dev->ops->synchronize(dev));
    }
    *(void **)out = work;
    work = NULL;
done:
    cpl_device_free(dev, &staging);
    cpl_device_free(dev, &work);
    return st;
}

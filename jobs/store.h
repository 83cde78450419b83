/* Models on disk: weights, moments, mask, scaler and series of one model as a checkpoint file, whole or a shard at a time.
 * Refuses to mix shapes: what is read must fit the layout. */
#ifndef CPL_JOBS_STORE_H
#define CPL_JOBS_STORE_H

#include "comm/comm.h"
#include "io/ranks.h"
#include "jobs/metrics.h"
#include "jobs/model/model.h"

/* What io needs to know of a group of ranks. */
cpl_io_ranks cpl_store_ranks(cpl_comm *comm);

/* One rank's part of a model: host, elements [begin, begin+n) of the flat layout. */
typedef struct {
    int64_t begin, n;
    bool moments, masked; /* has m and v; has mask. Then they are not NULL, even where n is 0. */
    float *param, *m, *v; /* owned */
    uint8_t *mask;        /* owned */
} cpl_shard;
/* The shard of `comm`'s rank (cpl_layout_shards); moments and masked: with those arrays. */
cpl_status cpl_shard_create(cpl_shard *s, const cpl_layout *layout, cpl_comm *comm, bool moments, bool masked);
void cpl_shard_free(cpl_shard *s);

typedef struct {
    cpl_model_shape shape;
    int64_t step;
    bool moments, masked, series;
    cpl_step_state state;
    char key[CPL_SHA256_HEX];
} cpl_store_head;

/* Collective. Writes the file; arrays the shard lacks are left out. state, metrics: NULL if there are none. */
cpl_status cpl_store_save(const char *path, cpl_comm *comm, const cpl_layout *layout, const char *key, int64_t step,
                          const cpl_shard *shard, const cpl_step_state *state, const cpl_metrics *metrics);
/* Collective: rank 0 reads, all know. Errors: CPL_NOT_FOUND, CPL_DAMAGED. */
cpl_status cpl_store_head_read(const char *path, cpl_comm *comm, cpl_store_head *head);
/* Collective: each rank reads its part (and what arrays the shard has). Errors: CPL_DAMAGED where the file does not fit the layout.
 */
cpl_status cpl_store_load(const char *path, cpl_comm *comm, const cpl_layout *layout, cpl_shard *shard);

/* A whole model in host memory on every rank of comm. */
typedef struct {
    cpl_layout *layout; /* owned */
    float *weights;     /* owned [total] */
    uint8_t *mask;      /* owned [total] or NULL */
    char key[CPL_SHA256_HEX];
} cpl_model;
/* Collective. path: a checkpoint. */
cpl_status cpl_model_load(cpl_model *model, const char *path, cpl_comm *comm);
void cpl_model_free(cpl_model *model);
/* Host weights [total] as a working copy on the device. Free with cpl_device_free. */
cpl_status cpl_model_upload(cpl_device *dev, const cpl_layout *layout, cpl_dtype dt, const float *weights, void *out);

#endif

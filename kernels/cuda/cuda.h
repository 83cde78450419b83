/* What the files of the CUDA back end share: prototypes of all operations, the device, scratch memory, errors.
 * Refuses to be included from outside kernels/. Device code: kernels/cuda/device.cuh. */
#ifndef CPL_KERNELS_CUDA_CUDA_H
#define CPL_KERNELS_CUDA_CUDA_H

#include <cuda_runtime_api.h>
#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/backend.h"
#include "kernels/cuda/nvml.h"

/* CPL_CUDA(gelu_fwd) is cpl_cuda_gelu_fwd. */
#define CPL_CUDA(name)           cpl_cuda_##name
#define CPL_OP(name, parameters) cpl_status CPL_CUDA(name) parameters;
#include "kernels/ops.def"
#undef CPL_OP

/* A slot's content lives until the next call for that slot. Memory that a slot has outgrown is kept as long as there are recorded
 * graphs, for they may hold its address. */
enum {
    CPL_CUDA_SCRATCH_ROWS, /* partial sums over rows: LayerNorm's gain and bias, bias gradients, position embedding */
    CPL_CUDA_SCRATCH_ATTENTION,
    CPL_CUDA_SCRATCH_LINEAR,
    CPL_CUDA_SCRATCH_FLAT,
    CPL_CUDA_SCRATCH_COUNT
};

enum { CPL_CUDA_PRODUCT_WORKSPACE = 64 << 20 };      /* bytes, of cuBLASLt: kernels/cuda/product.c */
enum { CPL_CUDA_TABLES = 64, CPL_CUDA_OLDEST = 80 }; /* oldest: sm_80 */

typedef struct {
    void *device, *host; /* owned: the same bytes */
    size_t bytes;
} cpl_cuda_table;

typedef struct cpl_cuda_linear cpl_cuda_linear;       /* cuBLASLt and what it has timed: kernels/cuda/linear.c */
typedef struct cpl_cuda_attention cpl_cuda_attention; /* choices and plans: kernels/cuda/attention.c */

typedef struct {
    cpl_backend_device shared; /* first: kernels/device.c casts impl to it */
    cpl_gpu gpu;
    int ordinal, sm_count, capability; /* capability: 90 for sm_90 */
    int threads;                       /* of the host, for the parts that run there */
    bool blocking;                     /* CUDA_LAUNCH_BLOCKING: every operation is waited for, so that an error names it */
    bool recording;
    cudaStream_t stream;                   /* owned: all operations, in order */
    cudaStream_t beside;                   /* owned: copies of cpl_cuda_copy_beside, or NULL: none yet */
    cudaEvent_t fork, joined;              /* owned, with it */
    bool copies;                           /* not joined */
    int graphs;                            /* recorded and not forgotten */
    void *scratch[CPL_CUDA_SCRATCH_COUNT]; /* as all device memory here: of cpl_device_alloc */
    size_t scratch_bytes[CPL_CUDA_SCRATCH_COUNT];
    void **outgrown; /* owned [outgrown_count]: scratch that a graph may still use */
    size_t outgrown_count;
    cpl_cuda_table table[CPL_CUDA_TABLES];
    int tables;
    cudaEvent_t *mark; /* owned [marks], each made at its first use: NULL before */
    int marks;
    cpl_cuda_linear *linear;       /* owned */
    cpl_cuda_attention *attention; /* owned, or NULL: not asked yet */
    cpl_nvml *nvml;                /* owned, or NULL: nvml_missing says why */
    char nvml_missing[CPL_NVML_TEXT];
} cpl_cuda;

static inline cpl_cuda *cpl_cuda_of(const cpl_device *dev) {
    return (cpl_cuda *)dev->impl;
}
static inline cudaStream_t cpl_cuda_stream(const cpl_device *dev) {
    return cpl_cuda_of(dev)->stream;
}

/* CPL_DEVICE with "<doing>: <CUDA's text>", CPL_OK for cudaSuccess. */
cpl_status cpl_cuda_status(cudaError_t error, const char *file, int line, const char *doing);
#define CPL_CUDA_TRY(doing, call) CPL_TRY(cpl_cuda_status((call), __FILE__, __LINE__, (doing)))
/* After the launches of operation `op`: the launch error, or with CUDA_LAUNCH_BLOCKING the error of running it. */
cpl_status cpl_cuda_launched(cpl_device *dev, const char *op);

/* *out (a T **) = at least `bytes` of the slot, 256-byte aligned, content undefined; borrowed. Errors: CPL_NO_MEMORY; CPL_INTERNAL
 * when it would have to grow while a graph is recorded (run the same operations once before). */
cpl_status cpl_cuda_scratch(cpl_device *dev, int slot, size_t bytes, void *out);
/* *out = a device copy of a small host table, made once for the same bytes; borrowed. Errors: as cpl_cuda_scratch. */
cpl_status cpl_cuda_constant(cpl_device *dev, const void *host, size_t bytes, const void **out);

/* kernels/cuda/describe.c, scratch.c: see kernels/backend.h. */
int64_t cpl_cuda_pass_bytes(const cpl_pass *pass);
int cpl_cuda_gpus(cpl_gpu *list, int most);
cpl_gpu_link cpl_cuda_link(const cpl_gpu *from, const cpl_gpu *to);
void cpl_cuda_energy(cpl_device *dev, cpl_energy *out);
void cpl_cuda_about(void (*line)(const char *key, const char *value, void *to), void *to);
void cpl_cuda_describe(const cpl_device *dev, void (*line)(const char *key, const char *value, void *to), void *to);

/* kernels/cuda/graph.c: see kernels/backend.h. */
cpl_status cpl_cuda_mark(cpl_device *dev, int slot);
cpl_status cpl_cuda_wait_mark(cpl_device *dev, int slot);
cpl_status cpl_cuda_mark_ms(cpl_device *dev, int from, int to, double *ms);
cpl_status cpl_cuda_over_mark(cpl_device *dev, int slot, bool *over);
cpl_status cpl_cuda_record(cpl_device *dev, cpl_status (*body)(void *context), void *context, cpl_graph **out);
cpl_status cpl_cuda_replay(cpl_device *dev, cpl_graph *graph);
void cpl_cuda_forget(cpl_device *dev, cpl_graph *graph);
void cpl_cuda_marks_free(cpl_cuda *cuda);
/* Scratch memory that was outgrown: no graph is left that may use it. */
void cpl_cuda_free_outgrown(cpl_device *dev);

/* kernels/cuda/reach.cu: see kernels/kernels.h. */
bool cpl_cuda_reaches(const cpl_device *dev, const char *identity);
cpl_status cpl_cuda_share(cpl_device *dev, const void *memory, cpl_shared_name *out);
cpl_status cpl_cuda_map(cpl_device *dev, const cpl_shared_name *name, void **out);
void cpl_cuda_unmap(cpl_device *dev, void *memory);
cpl_status cpl_cuda_meet(cpl_device *dev, const cpl_reach *board, uint32_t *word);
cpl_status cpl_cuda_copy_beside(cpl_device *dev, void *to, const void *from, size_t bytes);
cpl_status cpl_cuda_join(cpl_device *dev);
void cpl_cuda_beside_free(cpl_cuda *cuda);

cpl_status cpl_cuda_linear_open(cpl_device *dev);
void cpl_cuda_linear_close(cpl_device *dev);
void cpl_cuda_attention_close(cpl_device *dev);

#ifdef __cplusplus
}
#endif
#endif

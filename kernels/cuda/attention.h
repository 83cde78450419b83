/* What the files of CUDA attention share: a problem's shape, the implementations, what is remembered per shape.
 * Refuses to be included from outside kernels/cuda. */
#ifndef CPL_KERNELS_CUDA_ATTENTION_H
#define CPL_KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda/cuda.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    cpl_dtype dt;
    int64_t B, T, H, D;
} cpl_attention_shape;

/* Buffers of one call, as ops.def describes them; borrowed. Forward: out and lse are written, dqkv and dout are NULL. dbias: for
 * cpl_attention_sm90_bwd; after the others attention.c sums what they made. */
typedef struct {
    const void *qkv;
    void *out;
    float *lse;
    const void *dout;
    void *dqkv;
    float *dbias; /* or NULL */
} cpl_attention_buffers;

/* Scratch of a backward, before whatever a library takes: delta [B,H,T] f32, in bytes. */
static inline size_t cpl_attention_delta(const cpl_attention_shape *s) {
    return ((size_t)(s->B * s->H * s->T) * sizeof(float) + 255) / 256 * 256;
}
/* Bytes of CPL_CUDA_SCRATCH_ATTENTION that this shape comes to, timing included; foretold without a GPU. capability: 90 for sm_90.
 */
size_t cpl_attention_scratch(const cpl_attention_shape *s, bool training, int capability);

/* Our own kernels: every shape with D <= 256. Errors: CPL_UNSUPPORTED for a wider head. They are the next ones where those are
 * usable. */
cpl_status cpl_attention_own_fwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x);
cpl_status cpl_attention_own_bwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x);

/* For GPUs of sm_90: 16-bit types, heads of 64, sequences of whole blocks, buffers at multiples of 16 bytes. scratch: bytes, 0
 * where the shape is another. Sources: arXiv:2307.08691, arXiv:2407.08608. Errors: CPL_DEVICE; CPL_NO_MEMORY for the scratch. */
enum { CPL_ATTENTION_SM90_BLOCK = 128, CPL_ATTENTION_SM90_FLOATS = 288 }; /* rows of a block; kept of them */
size_t cpl_attention_sm90_scratch(const cpl_attention_shape *s);
bool cpl_attention_sm90_usable(const cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x);
cpl_status cpl_attention_sm90_fwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x);
cpl_status cpl_attention_sm90_bwd(cpl_device *dev, const cpl_attention_shape *s, const cpl_attention_buffers *x);

typedef enum { CPL_ATTENTION_FWD, CPL_ATTENTION_BWD, CPL_ATTENTION_DIRECTIONS } cpl_attention_direction;

/* cuDNN. `plan` makes, once per direction and shape, the plan that `run` needs: CPL_OK and *usable says whether cuDNN can; it takes
 * memory and may not be called while a graph is recorded. Without cuDNN in the build nothing is usable. */
typedef struct cpl_cudnn cpl_cudnn;
/* Bytes of scores that cuDNN's backward may keep at a time: larger batches go in slices of whole sequences. */
#define CPL_ATTENTION_SCORES_MAX ((int64_t)1 << 30)
cpl_status cpl_attention_cudnn_plan(cpl_device *dev, cpl_cudnn **cudnn, cpl_attention_direction direction,
                                    const cpl_attention_shape *s, bool *usable);
cpl_status cpl_attention_cudnn_run(cpl_device *dev, cpl_cudnn *cudnn, cpl_attention_direction direction,
                                   const cpl_attention_shape *s, const cpl_attention_buffers *x);
void cpl_attention_cudnn_close(cpl_cudnn **cudnn);
size_t cpl_attention_cudnn_version(void); /* 91400 for 9.14.0; 0: not in this build */
/* Bytes of the backward's workspace as far as they can be foretold; 0 where it cannot be used. */
int64_t cpl_attention_cudnn_workspace(const cpl_attention_shape *s);

#ifdef __cplusplus
}
#endif
#endif

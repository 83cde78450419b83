/* Devices, buffers, element types and the table of operations; the contract of each operation stands in ops.def.
 * Refuses to know what a model is: operations see pointers, shapes and element types. */
#ifndef CPL_KERNELS_H
#define CPL_KERNELS_H

#include "io/base/arena.h"
#include "io/base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Dimension letters, used everywhere:
 *   B sequences of a micro-batch   T tokens of a sequence   C width (channels)   H heads   D head size, C = H*D
 *   V vocabulary   L blocks   R rows = B*T   N, K output and input features of a linear layer */

/* Storage format of weights and activations. CPL_TF32 is stored as CPL_F32: it says that linear_* may multiply what they read with
 * 10 bits of mantissa (sums stay f32), and only they and cpl_workspace_create are given it. */
typedef enum { CPL_F32, CPL_BF16, CPL_F16, CPL_TF32, CPL_DTYPES } cpl_dtype;
static inline size_t cpl_dtype_size(cpl_dtype t) {
    return t == CPL_BF16 || t == CPL_F16 ? 2 : 4;
}
static inline cpl_dtype cpl_dtype_storage(cpl_dtype t) {
    return t == CPL_TF32 ? CPL_F32 : t;
}
const char *cpl_dtype_name(cpl_dtype t);

/* Sums over flat buffers are made of one partial sum per chunk of this many elements, added in order of their global index, so that
 * no result depends on ranks or threads. Shards of flat buffers start at multiples of it. */
enum { CPL_SUM_CHUNK = 4096 };

/* Elements in a row that are in or out of a sample (select_histogram). */
enum { CPL_SELECT_PIECE = 16384 };

/* The loss scaler and all that decides about a step, in device memory (numerics: scaler state machine; Micikevicius et al. 2017,
 * arXiv:1710.03740). Written by step_control alone, except lr, which the host feeds. */
typedef struct {
    float loss_scale;
    int32_t good_steps;
    int32_t hysteresis_left;
    int32_t stuck_steps; /* overflows in a row with the scale already at min */
    int64_t adam_step;   /* updates made; not advanced on a skipped step */
    float lr;            /* of this step, input */
    float grad_norm;     /* of the unscaled, averaged gradient before clipping; inf or nan on overflow */
    float grad_factor;   /* what AdamW multiplies the raw gradient sum by: unscale, average and clip in one */
    uint32_t skip;       /* 1: this step changes no parameter */
} cpl_step_state;

/* Constants of a run that decide about a step. */
typedef struct {
    bool dynamic;               /* false: the scale never changes; overflows skip all the same */
    float growth, backoff;      /* powers of two */
    int32_t growth_interval;    /* good steps */
    int32_t hysteresis;         /* consecutive overflows before a backoff */
    float min_scale, max_scale; /* powers of two */
    float clip;                 /* global norm; 0: no clipping */
    float beta1, beta2, eps;    /* AdamW */
    float inv_micro_batches;    /* 1 / micro-batches of the global batch */
} cpl_step_rules;

typedef enum { CPL_KD_FORWARD_KL, CPL_KD_REVERSE_KL, CPL_KD_JSD } cpl_kd_kind;

/* Uniform quantization (numerics: quantization). */
typedef enum { CPL_QUANT_SYMMETRIC, CPL_QUANT_ASYMMETRIC } cpl_quant_scheme;
typedef struct {
    cpl_quant_scheme scheme;
    int bits;      /* 2 to 8 */
    int64_t group; /* weights that share a scale: rows*cols (tensor), cols (channel), or g <= cols along the input dimension; */
                   /* the last group of a row is shorter where g does not divide cols */
    cpl_dtype scale_dtype; /* CPL_F32 or CPL_F16; the division uses the scale as stored */
} cpl_quant_spec;
typedef struct {
    double sum_sq_error, sum_sq, max_error; /* over the weights given; added to (max: raised) */
    double sum_noise;                       /* sum over weights of scale^2/12, the uniform-noise model */
    int64_t code_count[256];                /* how often each code occurs, for the entropy */
} cpl_quant_error;

/* The same buffer of every rank of a group, whose devices read and write all of them (cpl_comm_share). */
enum { CPL_REACH_MOST = 8 };
typedef struct {
    void *at[CPL_REACH_MOST]; /* by rank; borrowed, those of others mapped */
    int count, own;           /* ranks (0: none); at[own] is this device's */
} cpl_reach;

/* Elements [first, last) of the flat gradients, rank r's from grad.at[r] (f32) on; first is a multiple of CPL_SUM_CHUNK. */
typedef struct {
    cpl_reach grad;
    int64_t first, last;
} cpl_sum_part;

typedef struct cpl_device cpl_device;
typedef struct {
#define CPL_OP(name, parameters) cpl_status(*name) parameters;
#include "kernels/ops.def"
#undef CPL_OP
} cpl_ops;

typedef struct cpl_trace cpl_trace;
struct cpl_device {
    const cpl_ops *ops; /* borrowed, static */
    const char *kind;   /* "cpu" or "cuda" */
    char name[128];     /* what it is, for people */
    char where[64];     /* of a GPU: the beginning of its UUID, and its PCI address; "" on the CPU */
    void *impl;         /* owned by the back end */
    cpl_trace *trace;   /* borrowed; NULL: operations are not timed one by one */
};
/* dev->ops->gelu_fwd(dev, ...) written CPL_OPS(dev, gelu_fwd, ...) */
#define CPL_OPS(dev, op, ...)                                                                                                      \
    ((dev)->trace == NULL ? (dev)->ops->op((dev), __VA_ARGS__)                                                                     \
                          : (cpl_trace_begin((dev), #op), cpl_trace_end((dev), (dev)->ops->op((dev), __VA_ARGS__))))

/* backend "auto" takes what CUPEL_DEVICE says (cpu, cuda), else a GPU where there is one, else the CPU; "cpu"; "cuda" fails where
 * there is none. gpu: which of cpl_gpus. threads: CPU threads of this process, 0: OMP_NUM_THREADS, else as many as the process may
 * run on. CUPEL_DEVICE_BYTES in the environment ("512Mi") is the most device memory this process takes.
 * Errors: CPL_UNSUPPORTED with what is missing; CPL_USAGE. */
const char *cpl_device_backend(const char *backend); /* what CUPEL_DEVICE makes of it: "auto" stays "auto" without */
cpl_status cpl_device_create(cpl_device **out, const char *backend, int gpu, int threads);
void cpl_device_destroy(cpl_device **dev);

/* Device memory: zeroed, 64-byte aligned. Errors: CPL_NO_MEMORY naming `what` and the bytes wanted. Counted for cpl_device_memory.
 */
cpl_status cpl_device_alloc(cpl_device *dev, void *out, size_t count, size_t size, const char *what);
void cpl_device_free(cpl_device *dev, void *pointer); /* pointer: a T **, set to NULL */
/* Bytes of device memory held now, and at the most since creation or the last restart. */
void cpl_device_memory(const cpl_device *dev, size_t *held, size_t *peak);
void cpl_device_peak_restart(cpl_device *dev); /* the peak is what is held now */
/* The most that was in use on the whole device by whomever, over the same time, as the driver counted it when this process took
 * memory or recorded a graph: with context, libraries and other processes. 0: not known (the CPU). */
size_t cpl_device_memory_used(const cpl_device *dev);
/* What this process could hold in all: what it holds and what is free. SIZE_MAX: not known. */
size_t cpl_device_memory_room(const cpl_device *dev);
int cpl_device_threads(const cpl_device *dev);
/* Whether linear layers can be computed in dt here: CPL_TF32 needs a GPU. */
bool cpl_device_has(const cpl_device *dev, cpl_dtype dt);

/* Frees what operations keep for the next call of the same, where no graph is recorded. */
void cpl_device_trim(cpl_device *dev);

/* Passes over a micro-batch, as far as the operations' own memory depends on them. */
typedef struct {
    cpl_dtype dt;
    int64_t B, T, C, H; /* B 0: none, flat buffers alone */
    int64_t flat;       /* elements of the largest flat buffer that is summed or searched */
    bool training;      /* backward too */
} cpl_pass;
/* Device memory that operations take for themselves in such passes, counted as held: partial sums, workspaces of libraries. kind:
 * of a back end. *bytes -1: this build lacks it. Needs no device. */
void cpl_device_pass_bytes(const char *kind, const cpl_pass *pass, int64_t *bytes);

/* Energy drawn until now by the whole GPU, or by the processor packages of the host: only differences of one meter mean something.
 * Devices with the same meter draw the same joules. */
typedef struct {
    const char *source; /* "NVML", "RAPL"; NULL: not measured here, and nothing else is set */
    char meter[64];     /* unique in the world */
    double joules;
} cpl_energy;
void cpl_device_energy(cpl_device *dev, cpl_energy *out);

/* Host memory for feed and fetch: page-locked where that lets copies run beside the host. Zeroed. Errors: CPL_NO_MEMORY. */
cpl_status cpl_device_host_alloc(cpl_device *dev, void *out, size_t count, size_t size, const char *what);
void cpl_device_host_free(cpl_device *dev, void *pointer); /* pointer: a T **, set to NULL */

/* Marks: points in the device's order of operations. wait returns when all before the mark of that slot is over (at once where the
 * slot was never marked); ms is the time between two marks that are over. */
enum { CPL_MARKS = 64 };
cpl_status cpl_device_mark(cpl_device *dev, int slot);
cpl_status cpl_device_wait(cpl_device *dev, int slot);
cpl_status cpl_device_mark_ms(cpl_device *dev, int from, int to, double *ms);
/* The same without waiting: *over says whether wait would return at once. */
cpl_status cpl_device_over(cpl_device *dev, int slot, bool *over);

/* For those who move device memory beside the operations. identity: the GPU's place on this host, the same for all processes that
 * use it (PCI bus, device, function); "" where the device is the host. stream: the order of all operations (cudaStream_t), NULL
 * there. */
void cpl_device_identity(const cpl_device *dev, char *out, size_t size);
void *cpl_device_stream(const cpl_device *dev);

/* Processes whose GPUs read, write and atomically change each other's memory (NVLink). reaches: this device that of the GPU with
 * such an identity, which this process must see. share: a name by which another process maps memory of cpl_device_alloc, at least
 * CPL_SHARED_LEAST bytes of it, for CUDA puts several smaller buffers into one block and shares blocks; unmap before its owner
 * frees it. Errors: CPL_DEVICE; CPL_INTERNAL where no process reaches memory of this kind of device. Source: CUDA's programming
 * guide, interprocess communication. */
enum { CPL_SHARED_LEAST = 2 << 20 };
typedef struct {
    unsigned char bytes[64];
} cpl_shared_name;
bool cpl_device_reaches(const cpl_device *dev, const char *identity);
cpl_status cpl_device_share(cpl_device *dev, const void *memory, cpl_shared_name *out);
cpl_status cpl_device_map(cpl_device *dev, const cpl_shared_name *name, void **out);
void cpl_device_unmap(cpl_device *dev, void *memory);
/* board: CPL_BOARD_WORDS u32 of each rank, zeroed before the first meeting. Enqueues: what follows on each device waits until all
 * ranks' devices have come here, and sees what they wrote before. word: in device memory, NULL or |= that of all, 0 or 1. The same
 * calls in the same order on all ranks; a device whose ranks do not all come waits for ever. Errors: as above. Source: release and
 * acquire at system scope, PTX ISA, memory consistency model. */
enum { CPL_BOARD_WORDS = 2 * CPL_REACH_MOST + 1 };
cpl_status cpl_device_meet(cpl_device *dev, const cpl_reach *board, uint32_t *word);
/* Enqueues a copy between memory that this device reaches, by a copy engine: after what came before, beside what follows, until
 * join, behind which all such copies are over. Errors: as above. Source: CUDA's programming guide, streams and events. */
cpl_status cpl_device_copy_beside(cpl_device *dev, void *to, const void *from, size_t bytes);
cpl_status cpl_device_join(cpl_device *dev);

/* Graphs: what `body` enqueues, to be enqueued again as one. body must have run once before (it takes its memory then) and may
 * neither wait nor use upload or download. *out NULL: this device records none, and the caller runs body itself. */
typedef struct cpl_graph cpl_graph;
cpl_status cpl_device_record(cpl_device *dev, cpl_status (*body)(void *context), void *context, cpl_graph **out);
cpl_status cpl_device_replay(cpl_device *dev, cpl_graph *graph);
void cpl_graph_destroy(cpl_device *dev, cpl_graph **graph);

/* A profile: what each CPL_OPS call took by the device's clock, while dev->trace points to one. Not noted: what a graph replays or
 * is recorded from, and an operation inside another. The device may not be one of a test (it needs a back end). */
typedef struct {
    const char *op; /* borrowed, static: its name in ops.def */
    double at, ms;  /* begin, from that of the first on, and duration; of cpl_trace_read */
} cpl_traced_op;
struct cpl_trace {
    cpl_traced_op *op; /* owned [room] */
    int64_t count, room;
    int depth;         /* operations that are running */
    cpl_status status; /* of the first mark that failed; told by cpl_trace_read */
};
void cpl_trace_begin(cpl_device *dev, const char *op);
cpl_status cpl_trace_end(cpl_device *dev, cpl_status st); /* st, that of the operation */
/* Waits, and fills the times. */
cpl_status cpl_trace_read(cpl_device *dev, cpl_trace *trace);
void cpl_trace_free(cpl_trace *trace);

/* Lines "key: value" of what the back ends found here (instruction sets, matrix library and version, threads), for `cupel info`. */
void cpl_device_describe(const cpl_device *dev, void (*line)(const char *key, const char *value, void *to), void *to);

#endif

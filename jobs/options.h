/* Every option of every stage, declared once: the struct, the parser, --help, the job-file check, the stage's key and its HDF5
 * attributes. Refuses options that change no result: those stand in CPL_RUN_FIELDS, outside every key. */
#ifndef CPL_JOBS_OPTIONS_H
#define CPL_JOBS_OPTIONS_H

#include "io/base/fields.h"
#include "jobs/model/model.h"

/* X(TYPE, name, default, min, max, unit or choices, help); default NULL: must be given. */
#define CPL_CORPUS_FIELDS(X)                                                                                                       \
    X(TEXTS, train, NULL, 0, 0, "FILES", "text files, token shards (llm.c .bin, nanoGPT .bin, .h5), one after another")            \
    X(TEXTS, val, "", 0, 0, "FILES", "held-out text of its own; without it the end of the training text is held out")              \
    X(REAL, held_out, "0.1", 0, 0.9, "", "fraction of the training tokens that is held out when val is not given")                 \
    X(INT, vocab, "0", 0, 1 << 24, "tokens", "vocabulary; 0: 256 for text, what the shard says otherwise")

#define CPL_SHAPE_FIELDS(X)                                                                                                        \
    X(INT, layers, "6", 1, 1000, "blocks", "transformer blocks")                                                                   \
    X(INT, heads, "6", 1, 1024, "heads", "attention heads; must divide width")                                                     \
    X(INT, width, "384", 1, 65536, "channels", "size of the hidden state")                                                         \
    X(INT, context, "256", 1, 1 << 20, "tokens", "length of a sequence")

/* Of everything that trains: train, distill and the fine-tuning after prune. */
#define CPL_TRAINING_FIELDS(X)                                                                                                     \
    X(INT, micro_batch, "8", 1, 1 << 20, "sequences", "sequences of one forward and backward pass of one rank")                    \
    X(INT, global_batch, "64", 1, 1 << 30, "sequences", "sequences of one step over all ranks; a multiple of micro_batch")         \
    X(CHOICE, precision, "fp32", 0, 0, "fp32|bf16|fp16|tf32",                                                                      \
      "storage of weights, activations and their gradients; sums are fp32; tf32: fp32 multiplied in TF32 by a GPU")                \
    X(REAL, lr, "6e-4", 0, 10, "", "peak learning rate")                                                                           \
    X(REAL, min_lr, "0.1", 0, 1, "of lr", "where the schedule ends")                                                               \
    X(CHOICE, schedule, "cosine", 0, 0, "constant|cosine|linear|wsd",                                                              \
      "learning rate after warm-up; wsd: constant, then down linearly")                                                            \
    X(INT, warmup, "100", 0, 1 << 30, "steps", "linear warm-up from 0")                                                            \
    X(REAL, decay, "0.2", 0, 1, "of steps", "wsd: the last part, in which the rate falls")                                         \
    X(REAL, weight_decay, "0.1", 0, 10, "", "decoupled; 2-D weights only")                                                         \
    X(REAL, beta1, "0.9", 0, 0.999999, "", "AdamW first moment")                                                                   \
    X(REAL, beta2, "0.95", 0, 0.999999, "", "AdamW second moment")                                                                 \
    X(REAL, eps, "1e-8", 1e-12, 1, "", "AdamW")                                                                                    \
    X(REAL, clip, "1", 0, 1e9, "", "largest global gradient norm; 0: no clipping")                                                 \
    X(INT, eval_every, "200", 0, 1 << 30, "steps", "validation loss every so many steps; 0: at the end only")                      \
    X(CHOICE, recompute, "none", 0, 0, "none|gelu|block", "activations computed again in the backward pass to save memory")        \
    X(CHOICE, optimizer, "sharded", 0, 0, "sharded|replicated",                                                                    \
      "AdamW state split over the ranks (ZeRO-1) or whole on each; same bits")                                                     \
    X(CHOICE, reduction, "linear", 0, 0, "linear|tree", "gradient sum; tree: the same bits on 1, 2, 4 ... ranks, more memory")     \
    X(CHOICE, loss_scaling, "auto", 0, 0, "auto|dynamic|fixed",                                                                    \
      "auto: dynamic for fp16, scale 1 otherwise; fixed: scale stays at loss_scale")                                               \
    X(REAL, loss_scale, "65536", 1.0 / 1024, 1.0 * (1ull << 40), "", "first loss scale; a power of two")                           \
    X(REAL, scale_growth, "2", 1, 65536, "", "factor after scale_interval good steps; a power of two")                             \
    X(REAL, scale_backoff, "0.5", 1.0 / 65536, 1, "", "factor on overflow; a power of two")                                        \
    X(INT, scale_interval, "2000", 1, 1 << 30, "steps", "good steps in a row before the scale grows")                              \
    X(INT, hysteresis, "1", 1, 1000, "steps", "consecutive overflows before the scale falls")                                      \
    X(REAL, min_scale, "1", 1.0 / 1024, 1.0 * (1ull << 40), "", "the scale never falls below; a power of two")                     \
    X(REAL, max_scale, "16777216", 1, 1.0 * (1ull << 40), "", "the scale never grows above; a power of two")                       \
    X(INT, overflow_limit, "20", 1, 1 << 30, "steps", "overflows in a row at min_scale that stop the job")                         \
    X(BOOL, grad_exponents, "false", 0, 0, "", "histogram of log2|gradient| per tensor group at every evaluation")                 \
    X(INT, inject_step, "-1", -1, 1 << 30, "step", "fault injection: at this step ...")                                            \
    X(INT, inject_count, "1", 1, 1 << 30, "steps", "... and the following, so many in all ...")                                    \
    X(INT, inject_rank, "0", 0, 1 << 20, "rank", "... on this rank ...")                                                           \
    X(TEXT, inject_tensor, "wte", 0, 0, "TENSOR", "... the gradient of this tensor gets ...")                                      \
    X(CHOICE, inject_kind, "inf", 0, 0, "inf|nan", "... this value")

#define CPL_TRAIN_FIELDS(X) X(INT, steps, "1000", 1, 1 << 30, "steps", "optimizer steps; skipped steps count")

#define CPL_DISTILL_FIELDS(X)                                                                                                      \
    X(TEXT, teacher, NULL, 0, 0, "STAGE", "name of an earlier stage, or a checkpoint file")                                        \
    X(INT, steps, "1000", 1, 1 << 30, "steps", "optimizer steps; skipped steps count")                                             \
    X(CHOICE, start, "teacher", 0, 0, "teacher|scratch", "student made of copied teacher layers, or initialised anew")             \
    X(INTS, teacher_layers, "", 0, 1000, "blocks", "teacher blocks copied, from 0; empty: evenly spaced, first and last kept")     \
    X(INT, layers, "0", 0, 1000, "blocks", "blocks of the student; 0: half of the teacher's")                                      \
    X(INT, heads, "0", 0, 1024, "heads", "start scratch only; 0: as the teacher")                                                  \
    X(INT, width, "0", 0, 65536, "channels", "start scratch only; 0: as the teacher")                                              \
    X(REAL, temperature, "2", 0.01, 1000, "", "softens both distributions")                                                        \
    X(REAL, alpha, "0.5", 0, 1, "", "share of the soft loss; the rest is cross-entropy on the text")                               \
    X(CHOICE, divergence, "forward_kl", 0, 0, "forward_kl|reverse_kl|jsd",                                                         \
      "KL(teacher|student), KL(student|teacher), Jensen-Shannon")                                                                  \
    X(REAL, beta, "0.5", 0, 1, "", "weight of the teacher in jsd (strictly between 0 and 1 there)")                                \
    X(REAL, hidden_weight, "0", 0, 1e6, "", "weight of the hidden states' mean squared distance from the teacher's; 0: none")

#define CPL_PRUNE_FIELDS(X)                                                                                                        \
    X(TEXT, model, NULL, 0, 0, "STAGE", "name of an earlier stage, or a checkpoint file")                                          \
    X(DECIMAL, sparsity, "0.5", 0, 1, "", "fraction of the prunable weights that is removed, exactly")                             \
    X(CHOICE, scope, "global", 0, 0, "global|tensor", "one threshold for all tensors, or the same fraction of each")               \
    X(CHOICE, include, "blocks", 0, 0, "blocks|all", "2-D weights of the blocks, or of the embeddings too")                        \
    X(INT, finetune_steps, "0", 0, 1 << 30, "steps", "training afterwards with the removed weights held at zero")

#define CPL_QUANTIZE_FIELDS(X)                                                                                                     \
    X(TEXT, model, NULL, 0, 0, "STAGE", "name of an earlier stage, or a checkpoint file")                                          \
    X(CHOICE, scheme, "symmetric", 0, 0, "symmetric|asymmetric",                                                                   \
      "uniform codes around zero, or between the least and the greatest weight")                                                   \
    X(INT, bits, "8", 2, 16, "bits", "of a code, 2 to 8; 16: not quantized")                                                       \
    X(TEXT, granularity, "channel", 0, 0, "tensor|channel|groupN",                                                                 \
      "weights that share a scale; groupN: N along the input, such as group64")                                                    \
    X(CHOICE, scale_type, "fp16", 0, 0, "fp16|fp32", "storage of the scales")                                                      \
    X(CHOICE, weights, "blocks", 0, 0, "blocks|all",                                                                               \
      "2-D weights of the blocks, or of the embeddings too; the rest stays in 16 bits")

#define CPL_EVAL_FIELDS(X)                                                                                                         \
    X(TEXT, model, NULL, 0, 0, "STAGE", "name of an earlier stage, or a checkpoint file")                                          \
    X(CHOICE, precision, "fp32", 0, 0, "fp32|bf16|fp16|tf32", "storage of weights and activations; tf32: as of train")             \
    X(INT, micro_batch, "8", 1, 1 << 20, "sequences", "sequences of one forward pass")                                             \
    X(INT, latency_runs, "20", 0, 1 << 20, "runs", "timed forward passes of one sequence; 0: not measured")

#define CPL_SWEEP_FIELDS(X)                                                                                                        \
    X(INT, group_ranks, "1", 1, 1 << 20, "ranks", "ranks that work on one trial together")                                         \
    X(TEXTS, pareto, "val_loss,bytes", 0, 0, "AXES", "what no other trial may beat together: val_loss, bytes, latency, energy")    \
    X(CHOICE, precision, "fp32", 0, 0, "fp32|bf16|fp16|tf32",                                                                      \
      "storage of weights and activations in the evaluation; tf32: as of train")                                                   \
    X(INT, micro_batch, "8", 1, 1 << 20, "sequences", "sequences of one forward pass of the evaluation")                           \
    X(INT, latency_runs, "20", 0, 1 << 20, "runs", "timed forward passes of one sequence; 0: not measured")

/* How much latency, memory and energy weigh in a sweep's score, each relative to the first model unchanged. */
#define CPL_OBJECTIVE_FIELDS(X)                                                                                                    \
    X(REAL, latency, "0", 0, 1e9, "", "weight of the median latency")                                                              \
    X(REAL, memory, "0", 0, 1e9, "", "weight of the stored bytes")                                                                 \
    X(REAL, energy, "0", 0, 1e9, "", "weight of the joules of the evaluation; where they are measured")

/* Change no result: where, how often and with what, outside every key. */
#define CPL_RUN_FIELDS(X)                                                                                                          \
    X(CHOICE, device, "auto", 0, 0, "auto|cpu|cuda", "what the ranks compute on")                                                  \
    X(INT, threads, "0", 0, 4096, "threads", "CPU threads of a rank; 0: OMP_NUM_THREADS, else its share of the cores")             \
    X(INT, ranks_per_gpu, "0", 0, 1024, "ranks",                                                                                   \
      "that may share a GPU, by turns; more are refused; 0: CUPEL_RANKS_PER_GPU, else 1")                                          \
    X(INT, checkpoint_every, "200", 0, 1 << 30, "steps", "0: at the end only")                                                     \
    X(REAL, checkpoint_seconds, "0", 0, 1e9, "s", "also when so much time has passed; 0: not")                                     \
    X(INT, keep_checkpoints, "2", 1, 1000, "files", "of a training stage")                                                         \
    X(INT, watchdog, "600", 0, 1 << 30, "s", "without progress the job ends with the name of the rank that hangs; 0: never")

typedef struct {
    CPL_CORPUS_FIELDS(CPL_FIELD_MEMBER)
} cpl_corpus_options;
typedef struct {
    CPL_SHAPE_FIELDS(CPL_FIELD_MEMBER)
} cpl_shape_options;
typedef struct {
    CPL_TRAINING_FIELDS(CPL_FIELD_MEMBER)
} cpl_training;
typedef struct {
    CPL_TRAIN_FIELDS(CPL_FIELD_MEMBER) cpl_shape_options shape;
    cpl_training training;
} cpl_train_options;
typedef struct {
    CPL_DISTILL_FIELDS(CPL_FIELD_MEMBER) cpl_training training;
} cpl_distill_options;
typedef struct {
    CPL_PRUNE_FIELDS(CPL_FIELD_MEMBER) cpl_training training;
} cpl_prune_options;
typedef struct {
    CPL_QUANTIZE_FIELDS(CPL_FIELD_MEMBER)
} cpl_quantize_options;
typedef struct {
    CPL_EVAL_FIELDS(CPL_FIELD_MEMBER)
} cpl_eval_options;
typedef struct {
    CPL_OBJECTIVE_FIELDS(CPL_FIELD_MEMBER)
} cpl_objective_options;
typedef struct {
    CPL_SWEEP_FIELDS(CPL_FIELD_MEMBER) cpl_objective_options objective;
} cpl_sweep_options;
typedef struct {
    CPL_RUN_FIELDS(CPL_FIELD_MEMBER)
} cpl_run_options;

enum { CPL_PRECISION_FP32, CPL_PRECISION_BF16, CPL_PRECISION_FP16, CPL_PRECISION_TF32 };
enum { CPL_DEVICE_AUTO, CPL_DEVICE_CPU, CPL_DEVICE_CUDA };
enum { CPL_SCHEDULE_CONSTANT, CPL_SCHEDULE_COSINE, CPL_SCHEDULE_LINEAR, CPL_SCHEDULE_WSD };
enum { CPL_OPTIMIZER_SHARDED, CPL_OPTIMIZER_REPLICATED };
enum { CPL_REDUCTION_LINEAR, CPL_REDUCTION_TREE };
enum { CPL_SCALING_AUTO, CPL_SCALING_DYNAMIC, CPL_SCALING_FIXED };
enum { CPL_START_TEACHER, CPL_START_SCRATCH };
enum { CPL_SCOPE_GLOBAL, CPL_SCOPE_TENSOR };
enum { CPL_INCLUDE_BLOCKS, CPL_INCLUDE_ALL };

/* A precision option as an element type. */
static inline cpl_dtype cpl_precision_dtype(int precision) {
    static const cpl_dtype dtypes[] = {[CPL_PRECISION_FP32] = CPL_F32,
                                       [CPL_PRECISION_BF16] = CPL_BF16,
                                       [CPL_PRECISION_FP16] = CPL_F16,
                                       [CPL_PRECISION_TF32] = CPL_TF32};
    return dtypes[precision];
}

/* A table of fields with its length. */
typedef struct {
    const cpl_field *fields; /* borrowed, static */
    size_t count;
} cpl_options_table;
extern const cpl_options_table cpl_corpus_table, cpl_run_table, cpl_training_table, cpl_train_table, cpl_distill_table,
    cpl_prune_table, cpl_quantize_table, cpl_eval_table, cpl_sweep_table, cpl_objective_table;

/* Combinations that no single field can see (CPL_USAGE, naming the option): batch multiples, powers of two, scale bounds. */
cpl_status cpl_training_check(const cpl_training *t);
/* Whether so many ranks can share its micro-batches; label: the stage, in front of the message. Errors: CPL_USAGE. */
cpl_status cpl_training_ranks_check(const cpl_training *t, int64_t ranks, const char *label);
cpl_status cpl_quantize_check(const cpl_quantize_options *q);
/* Shared scale of one 2-D tensor [rows, cols] under these options. Errors: CPL_USAGE for a granularity that is none. */
cpl_status cpl_quantize_spec(const cpl_quantize_options *q, int64_t rows, int64_t cols, cpl_quant_spec *spec);

#endif

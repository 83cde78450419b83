/* One trial of a sweep: prune, fine-tune, quantize, evaluate, measure; and the file that keeps what came out.
 * Refuses to leave half a result: the file appears whole or not at all. */
#ifndef CPL_JOBS_STUDY_TRIAL_H
#define CPL_JOBS_STUDY_TRIAL_H

#include "jobs/study/grid.h"

/* Figures of a trial, NAN where there are none. */
#define CPL_TRIAL_FIGURES(X)                                                                                                       \
    X(val_loss, "nat/token", "token-weighted mean over the whole validation split")                                                \
    X(perplexity, "", "exp(val_loss)")                                                                                             \
    X(bytes, "byte", "stored payload: codes, scales, zero points, masks, everything else in 16 bits")                              \
    X(sparsity, "", "share of the prunable weights that is removed")                                                               \
    X(sqnr_db, "dB", "signal to quantization noise over all quantized weights")                                                    \
    X(latency_p50_ms, "ms", "median time of a forward pass of one sequence, weights dequantized")                                  \
    X(latency_p99_ms, "ms", "99th percentile of it")                                                                               \
    X(tokens_per_s, "token/s", "tokens of that sequence over the median")                                                          \
    X(energy_j, "J", "drawn by the trial's GPUs or processor packages while it was evaluated")                                     \
    X(wall_s, "s", "of the whole trial")
typedef struct {
#define CPL_TRIAL_MEMBER(name, units, help) double name;
    CPL_TRIAL_FIGURES(CPL_TRIAL_MEMBER)
#undef CPL_TRIAL_MEMBER
} cpl_trial_figures;
enum { CPL_TRIAL_FIGURE_COUNT = sizeof(cpl_trial_figures) / sizeof(double) };

/* Collective over group. metered: what the group draws is its own (cpl_energy_meters). model_path: checkpoint. Writes the file
 * `path` from the group's rank 0: status "done" with figures and per-tensor arrays, or "failed" with the error, when the trial
 * itself failed; then *outcome is that failure, its message set, and the status returned is CPL_OK all the same. Other statuses:
 * CPL_STOPPED, CPL_COMM, CPL_IO. */
cpl_status cpl_trial_run(cpl_context *ctx, cpl_comm *group, bool metered, const cpl_sweep_options *options, const cpl_trial *trial,
                         const char *model_path, const char *key, const char *path, cpl_trial_figures *figures,
                         cpl_status *outcome);
/* Reads a trial's file. *failed and *error ("" if none); names and per-tensor values may be NULL pointers where not wanted. Memory
 * from the arena. CPL_NOT_FOUND where there is none of this key. */
cpl_status cpl_trial_read(const char *path, const char *key, cpl_trial_figures *figures, bool *failed, char **error,
                          cpl_arena *arena);

#endif

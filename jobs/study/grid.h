/* The grid of a sweep: models times every option of prune and quantize that is given as a list, and the trials it has.
 * Refuses values that the options' own tables refuse, with their place in the job file, before any trial runs. */
#ifndef CPL_JOBS_STUDY_GRID_H
#define CPL_JOBS_STUDY_GRID_H

#include "jobs/study/job.h"

enum { CPL_GRID_AXES_MAX = 7 }; /* with the axis of tensors an array has at most 8 dimensions */
typedef enum { CPL_AXIS_MODEL, CPL_AXIS_PRUNE, CPL_AXIS_QUANTIZE } cpl_axis_section;

/* All text is owned by the job's arena. */
typedef struct {
    const char *name; /* of the dimension: model, or the option's name (quantize_NAME where prune has an axis of that name too) */
    cpl_axis_section section;
    const cpl_field *field; /* NULL for the models */
    int64_t count;
    char **value;
} cpl_axis;

typedef struct {
    int n_axes; /* the first is the models */
    cpl_axis axis[CPL_GRID_AXES_MAX];
    int64_t trials;                   /* product of the counts */
    const cpl_node *prune, *quantize; /* mappings, NULL if not given */
    cpl_objective_options objective;
} cpl_grid;

/* What one trial does. index -1: the first model unchanged, which all others are measured against. */
typedef struct {
    int64_t index;
    int64_t model; /* index into the models */
    cpl_prune_options prune;
    cpl_quantize_options quantize; /* bits 16: not quantized */
    bool prunes, quantizes;        /* false: leaves the weights alone, and its options are not in the key */
} cpl_trial;

/* Reads `model`, `prune`, `quantize`, `objective` of the stage's mapping and checks every trial. */
cpl_status cpl_grid_bind(cpl_job *job, cpl_stage *stage, cpl_grid **out);
/* Position of a trial along an axis. */
int64_t cpl_grid_position(const cpl_grid *g, int64_t trial, int axis);
cpl_status cpl_grid_trial(const cpl_grid *g, int64_t index, cpl_trial *trial, cpl_arena *arena);
/* Key of a trial: what it does to which weights, and how they are measured. common: hash of what all trials share. */
cpl_status cpl_grid_key(const cpl_trial *trial, const char *model_key, const char *common, char key[CPL_SHA256_HEX]);
/* "teacher sparsity=0.5 bits=4" */
void cpl_grid_describe(const cpl_grid *g, int64_t index, char *text, size_t size);

#endif

/* A job: what a job file, or one stage's command line, asks for. And what a kind of stage is.
 * Refuses to start any work: everything wrong with a job is found here, with file, line and column. */
#ifndef CPL_JOBS_STUDY_JOB_H
#define CPL_JOBS_STUDY_JOB_H

#include "comm/comm.h"
#include "io/corpus.h"
#include "io/jobfile.h"
#include "io/record.h"
#include "jobs/options.h"
#include <signal.h>

typedef struct cpl_job cpl_job;
typedef struct cpl_stage cpl_stage;

/* What a running study has at hand. */
typedef struct {
    cpl_comm *world;      /* owned by main */
    cpl_device *dev;      /* owned by main */
    cpl_job *job;         /* borrowed */
    const char *out;      /* borrowed: the study's folder */
    cpl_corpus *corpus;   /* owned: training text */
    cpl_corpus *held_out; /* owned: text of its own for validation, or NULL */
    char corpus_sha256[CPL_SHA256_HEX];
    const volatile sig_atomic_t *stop; /* borrowed: set by a signal */
    const char *command_line;          /* borrowed */
    char *hostnames;                   /* owned by the job's arena */
    char started[32];                  /* UTC, ISO 8601 */
    int lock;                          /* rank 0: descriptor that holds DIR/.lock, else -1 */
} cpl_context;
/* Training and validation windows of T tokens. */
void cpl_context_splits(const cpl_context *ctx, int64_t T, cpl_split *train, cpl_split *val);
/* The same for a model, checked: CPL_INPUT where the corpus has tokens the model does not know, or no window is held out.
 * Collective over comm. */
cpl_status cpl_context_text(const cpl_context *ctx, cpl_comm *comm, const cpl_model_shape *model, cpl_split *train, cpl_split *val);

/* A model that a stage reads. */
typedef struct {
    const char *name; /* borrowed: as in the job file: a stage, or a checkpoint file */
    char *path;       /* owned by the job's arena: checkpoint file; set before the stage runs */
    char key[CPL_SHA256_HEX];
} cpl_input;

/* A kind of stage: train, distill, prune, quantize, sweep, eval. One table of these is all the study engine knows of them. */
typedef struct {
    const char *name, *help;
    const cpl_options_table *table;
    size_t size;                                        /* of the options struct */
    const char *const *others;                          /* keys of the stage's mapping that bind reads, NULL-terminated, or NULL */
    cpl_status (*bind)(cpl_job *job, cpl_stage *stage); /* reads `others`; NULL: none */
    cpl_status (*check)(const cpl_stage *stage);        /* combinations of options; NULL: none */
    cpl_status (*inputs)(cpl_job *job, cpl_stage *stage);                      /* cpl_stage_add_input for each; NULL: none */
    cpl_status (*hash)(const cpl_stage *stage, cpl_sha256 *hash);              /* adds what bind read; NULL: none */
    int64_t (*final_step)(const cpl_stage *stage);                             /* of the model file it leaves; -1: leaves none */
    cpl_status (*run)(cpl_context *ctx, cpl_stage *stage, cpl_record *record); /* collective over ctx->world */
} cpl_stage_kind;
extern const cpl_stage_kind cpl_stage_train, cpl_stage_distill, cpl_stage_prune, cpl_stage_quantize, cpl_stage_sweep,
    cpl_stage_eval;
/* NULL-terminated. */
extern const cpl_stage_kind *const cpl_stage_kinds[];
const cpl_stage_kind *cpl_stage_kind_find(const char *name);

struct cpl_stage {
    const cpl_stage_kind *kind;
    char *name;           /* owned by the job's arena, as all below */
    const cpl_node *node; /* its mapping: where messages point */
    void *options;        /* kind->size bytes */
    void *extra;          /* what bind made of the other keys */
    size_t n_inputs;
    cpl_input *input;
    char key[CPL_SHA256_HEX];
    char *folder; /* DIR/checkpoints/<16 digits of the key>; set by the study */
    char *model;  /* checkpoint it leaves, NULL if none */
};
/* Fails with the position of option `name` of the stage, or of the stage: "study.yaml:12:9: stage teacher: text". */
cpl_status cpl_stage_fail(const cpl_stage *stage, const char *name, const char *format, ...)
    __attribute__((format(printf, 3, 4), cold));
cpl_status cpl_stage_add_input(cpl_job *job, cpl_stage *stage, const char *name);

struct cpl_job {
    cpl_arena *arena;  /* owned */
    char *name, *text; /* text: the YAML as given */
    bool single;       /* one stage of the command line */
    int64_t seed;
    cpl_corpus_options corpus;
    cpl_run_options run;
    size_t n_stages;
    cpl_stage *stage;
};

/* One --set or command-line option: stage.option=value, corpus.train=..., run.device=..., seed=3. */
typedef struct {
    const char *path, *value; /* borrowed */
} cpl_setting;

/* Reads and checks a job file, the settings put over it. Errors: CPL_USAGE, CPL_NOT_FOUND. */
cpl_status cpl_job_read(cpl_job **out, const char *path, const cpl_setting *settings, size_t n_settings);
/* A job of one stage of this kind from the command line: `settings` without a dot are the stage's own options ("steps"), "name" its
 * name. */
cpl_status cpl_job_single(cpl_job **out, const cpl_stage_kind *kind, const cpl_setting *settings, size_t n_settings);
void cpl_job_destroy(cpl_job **job);
/* The job with every option written out, as YAML that gives the same job again. Owned by the job's arena. */
cpl_status cpl_job_resolved(cpl_job *job, char **yaml);

#endif

/* A study: its stages keyed by content, run where they are not done, and results.h5 put together from their records.
 * Refuses to run anything twice, to lose what is finished, and to let two jobs write one folder. */
#ifndef CPL_JOBS_STUDY_H
#define CPL_JOBS_STUDY_H

#include "jobs/study/job.h"

/* Opens the corpora (all ranks; the same on all), refuses what cpl_study_check refuses, and only then makes and locks the folder
 * and hashes the corpora (rank 0; remembered by path, size and time in DIR/corpus.h5). Collective. */
cpl_status cpl_context_open(cpl_context *ctx);
/* The same for looking only: makes no folder, takes no lock, writes nothing. Where DIR is not there the hash stays empty, and no
 * key fits anything. Collective. */
cpl_status cpl_context_look(cpl_context *ctx);
void cpl_context_close(cpl_context *ctx);
/* cpl_agree for ranks that may have to wait long while others work: this rank's watchdog is off meanwhile, the others' own see to
 * them. */
cpl_status cpl_context_wait(cpl_context *ctx, cpl_comm *group, cpl_status own);

/* Whether every stage could begin: its inputs are there or made by an earlier stage, the ranks can share its micro-batches, the
 * text is long enough, and so on. Makes and changes no file. Collective; needs open corpora. Errors: CPL_USAGE, CPL_INPUT,
 * CPL_DAMAGED. */
cpl_status cpl_study_check(cpl_context *ctx);

/* Keys, folders, model paths and inputs of every stage. Collective; needs an open context. A stage's key is the hash of its
 * resolved options, its inputs' keys, the corpus hash, held_out and seed. */
cpl_status cpl_study_keys(cpl_context *ctx);
/* Whether the stage's record of this key and its model are there. Rank 0's view, known to all. Collective. */
cpl_status cpl_study_done(cpl_context *ctx, const cpl_stage *stage, bool *done);
/* Path of a stage's record, DIR/stages/NAME.h5. */
void cpl_study_record_path(const cpl_context *ctx, const char *name, char *path, size_t size);
/* Puts results.h5 together from the records that are there and current; of a single stage's command with those of the folder's
 * other stages. Rank 0 only. */
cpl_status cpl_study_results(cpl_context *ctx);
/* Whether results.h5 is whole and of this job. Rank 0 only. */
bool cpl_study_results_current(const cpl_context *ctx);
/* Runs what is not done, in order; each finished stage's record is written and results.h5 renewed before the next begins.
 * Collective. *ran: how many stages ran. */
cpl_status cpl_study_run(cpl_context *ctx, int *ran);

/* For stages: attributes every model-making stage has: parameters, val_loss, perplexity, context, stride, bytes. */
cpl_status cpl_record_model(cpl_record *rec, const cpl_layout *layout, double val_loss, int64_t bytes);

#endif

/* The commands that run stages: run FILE, and train, distill, prune, quantize, sweep, eval for one stage.
 * Refuses to start any work before the whole job has been checked on all ranks. */
#include "io/base/log.h"
#include "jobs/commands.h"
#include "jobs/device.h"
#include "jobs/report.h"
#include "jobs/study/study.h"
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* DIR/job.yaml: the job with every option written out. */
static cpl_status write_job(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    char path[4096], part[4096 + 8], *yaml = NULL;
    FILE *f = NULL;
    CPL_TRY(cpl_job_resolved(ctx->job, &yaml));
    ctx->job->text = yaml;
    snprintf(path, sizeof path, "%s/job.yaml", ctx->out);
    snprintf(part, sizeof part, "%s.part", path);
    f = fopen(part, "w");
    if (f == NULL || fputs(yaml, f) < 0 || fflush(f) != 0 || fsync(fileno(f)) != 0) {
        CPL_FAIL(CPL_IO, "%s: %m", part);
    }
    if (rename(part, path) != 0) {
        CPL_FAIL(CPL_IO, "%s: %m", path);
    }
done:
    if (f != NULL) {
        fclose(f);
    }
    if (st != CPL_OK && f != NULL) {
        unlink(part);
    }
    return st;
}

static cpl_status run_job(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    int ran = 0;
    double start = cpl_now();
    time_t now = time(NULL);
    struct tm tm;
    strftime(ctx->started, sizeof ctx->started, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
    cpl_run_options *run = &ctx->job->run;
    CPL_TRY(cpl_job_device(ctx->world, run->device, run->threads, run->ranks_per_gpu, &ctx->dev));
    CPL_TRY(cpl_context_open(ctx));
    CPL_TRY(cpl_agree(ctx->world, cpl_comm_rank(ctx->world) == 0 ? write_job(ctx) : CPL_OK));
    CPL_TRY(cpl_study_keys(ctx));
    cpl_signals_catch();
    CPL_TRY(cpl_agree(ctx->world, cpl_watchdog_start(ctx->world, (int)run->watchdog)));
    CPL_TRY(cpl_study_run(ctx, &ran));
    if (cpl_comm_rank(ctx->world) == 0) {
        char path[4096];
        snprintf(path, sizeof path, "%s/results.h5", ctx->out);
        if (!cpl_study_results_current(ctx)) {
            CPL_TRY(cpl_study_results(ctx));
        }
        CPL_TRY(cpl_report_terminal(path, ctx->out, stdout));
    }
    cpl_log_info(ran > 0 ? "%d of %d stages ran, in %.1f s" : "nothing to do: all stages are done already", ran,
                 (int)ctx->job->n_stages, cpl_now() - start);
    cpl_log_info("results: %s/results.h5", ctx->out);
done:
    return cpl_agree(ctx->world, st);
}

static cpl_status run_arguments(cpl_comm *world, cpl_arguments *a, cpl_job *job) {
    cpl_context ctx = {.world = world,
                       .job = job,
                       .out = a->out != NULL ? a->out : job->name,
                       .stop = &cpl_stop_requested,
                       .command_line = cpl_command_line,
                       .lock = -1};
    cpl_log_init(cpl_comm_rank(world), a->quiet);
    cpl_status st = run_job(&ctx);
    cpl_watchdog_stop();
    cpl_context_close(&ctx);
    cpl_job_device_close(world, &ctx.dev);
    return st;
}

static void print_help(const cpl_command *self, const cpl_stage_kind *kind) {
    printf("cupel %s %s\n  %s\n", self->name, self->usage, self->help);
    if (kind != NULL) {
        printf("\nOptions of the stage (also of a '- %s:' in a job file):\n", kind->name);
        cpl_fields_help(kind->table->fields, kind->table->count);
        printf("\nThe corpus, as --corpus.NAME VALUE (--text FILE is --corpus.train FILE):\n");
        cpl_fields_help(cpl_corpus_table.fields, cpl_corpus_table.count);
        printf("\nHow it runs, as --run.NAME VALUE:\n");
        cpl_fields_help(cpl_run_table.fields, cpl_run_table.count);
        return;
    }
    printf("\nA job file has name, seed, corpus, run, and a list of stages; see the README. --set PATH=VALUE changes one option:\n"
           "  --set teacher.steps=100   --set corpus.train=a.txt,b.txt   --set run.threads=1   --set seed=7\n\n");
    for (int i = 0; cpl_stage_kinds[i] != NULL; i++) {
        printf("  cupel %-9s --help    options of stage %s: %s\n", cpl_stage_kinds[i]->name, cpl_stage_kinds[i]->name,
               cpl_stage_kinds[i]->help);
    }
}

cpl_status cpl_command_run(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arguments a = {0};
    cpl_job *job = NULL;
    CPL_TRY(cpl_agree(world, cpl_arguments_parse(&a, NULL, false, argc, argv)));
    if (a.help) {
        if (cpl_comm_rank(world) == 0) {
            print_help(self, NULL);
        }
        goto done;
    }
    if (a.file == NULL) {
        CPL_TRY(cpl_agree(world, cpl_fail(CPL_USAGE, __FILE__, __LINE__, "run: expected a job file, cupel run study.yaml")));
    }
    CPL_TRY(cpl_agree(world, cpl_job_read(&job, a.file, a.settings, a.n_settings)));
    CPL_TRY(run_arguments(world, &a, job));
done:
    cpl_job_destroy(&job);
    cpl_arguments_free(&a);
    return st;
}

cpl_status cpl_command_stage(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arguments a = {0};
    cpl_job *job = NULL;
    const cpl_stage_kind *kind = cpl_stage_kind_find(self->name);
    CPL_TRY(cpl_agree(world, cpl_arguments_parse(&a, kind, false, argc, argv)));
    if (a.help) {
        if (cpl_comm_rank(world) == 0) {
            print_help(self, kind);
        }
        goto done;
    }
    CPL_TRY(cpl_agree(world, cpl_job_single(&job, kind, a.settings, a.n_settings)));
    CPL_TRY(run_arguments(world, &a, job));
done:
    cpl_job_destroy(&job);
    cpl_arguments_free(&a);
    return st;
}

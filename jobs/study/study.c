/* The study engine.
 * Refuses to run anything twice, to lose what is finished, and to let two jobs write one folder. */
#include "jobs/study/study.h"
#include "cupel_version.h"
#include "io/base/log.h"
#include "jobs/store.h"
#include "jobs/study/cost.h"
#include "jobs/study/fit.h"
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PATH_SIZE = 4096 };

static bool is_root(const cpl_context *ctx) {
    return cpl_comm_rank(ctx->world) == 0;
}

void cpl_study_record_path(const cpl_context *ctx, const char *name, char *path, size_t size) {
    snprintf(path, size, "%s/stages/%s.h5", ctx->out, name);
}

/* --- keys --- */

/* Input name to path and key: an earlier stage of the job, a stage this folder knows from before, or a checkpoint file. */
static cpl_status resolve_input(cpl_context *ctx, const cpl_stage *stage, cpl_input *in) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = ctx->job->arena;
    char record[PATH_SIZE], *folder = NULL, *key = NULL;
    for (const cpl_stage *s = ctx->job->stage; s < stage; s++) {
        if (strcmp(s->name, in->name) == 0) {
            if (s->model == NULL) {
                st = cpl_stage_fail(stage, NULL, "stage '%s' (%s) leaves no model to work on", s->name, s->kind->name);
                goto done;
            }
            in->path = s->model;
            memcpy(in->key, s->key, sizeof in->key);
            return CPL_OK;
        }
    }
    cpl_status local = CPL_OK;
    struct {
        int found;
        char path[PATH_SIZE], key[CPL_SHA256_HEX];
    } told = {0};
    if (is_root(ctx)) {
        cpl_study_record_path(ctx, in->name, record, sizeof record);
        if (strchr(in->name, '/') == NULL && cpl_record_read_text(record, "model", &folder, arena) == CPL_OK &&
            cpl_record_read_text(record, "key", &key, arena) == CPL_OK) {
            told.found = 1;
            snprintf(told.path, sizeof told.path, "%s/%s", ctx->out, folder);
            snprintf(told.key, sizeof told.key, "%s", key);
        } else if (access(in->name, R_OK) == 0) {
            cpl_ckpt_attr attr = {.name = "key", .type = CPL_T_TEXT};
            local = cpl_checkpoint_read(in->name, NULL, NULL, 0, &attr, 1, arena);
            if (local == CPL_OK) {
                told.found = 1;
                snprintf(told.path, sizeof told.path, "%s", in->name);
                snprintf(told.key, sizeof told.key, "%s", attr.text);
            }
        }
    }
    CPL_TRY(cpl_agree(ctx->world, local));
    CPL_TRY(cpl_comm_bcast(ctx->world, &told, sizeof told, 0));
    if (!told.found) {
        const char *words[1000], *near;
        size_t n = 0;
        for (const cpl_stage *s = ctx->job->stage; s < stage && n < 1000; s++) {
            words[n++] = s->name;
        }
        near = cpl_nearest_word(words, n, in->name);
        st = cpl_stage_fail(stage, NULL, "no earlier stage and no checkpoint file is called '%s'%s%s%s", in->name,
                            near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
        goto done;
    }
    CPL_TRY(cpl_arena_strdup(arena, &in->path, told.path));
    memcpy(in->key, told.key, sizeof in->key);
done:
    return st;
}

static cpl_status stage_key(cpl_context *ctx, cpl_stage *s) {
    cpl_status st = CPL_OK;
    cpl_sha256 h;
    char text[200];
    cpl_sha256_init(&h);
    cpl_sha256_add_text(&h, "cupel stage 1");
    cpl_sha256_add_text(&h, s->kind->name);
    CPL_TRY(cpl_fields_hash(s->kind->table->fields, s->kind->table->count, s->options, &h));
    if (s->kind->hash != NULL) {
        CPL_TRY(s->kind->hash(s, &h));
    }
    for (size_t i = 0; i < s->n_inputs; i++) {
        CPL_TRY(resolve_input(ctx, s, &s->input[i]));
        cpl_sha256_add_text(&h, s->input[i].key);
    }
    snprintf(text, sizeof text, "seed=%lld held_out=%.17g vocab=%lld %s", (long long)ctx->job->seed, ctx->job->corpus.held_out,
             (long long)cpl_corpus_vocab(ctx->corpus), cpl_corpus_tokenizer(ctx->corpus));
    cpl_sha256_add_text(&h, text);
    cpl_sha256_add_text(&h, ctx->corpus_sha256);
    cpl_sha256_end(&h, s->key);
    CPL_TRY(cpl_arena_printf(ctx->job->arena, &s->folder, "%s/checkpoints/%.16s", ctx->out, s->key));
    int64_t step = s->kind->final_step == NULL ? -1 : s->kind->final_step(s);
    if (step >= 0) {
        CPL_TRY(cpl_arena_printf(ctx->job->arena, &s->model, "%s/step-%lld.h5", s->folder, (long long)step));
    }
done:
    return st;
}

cpl_status cpl_study_keys(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < ctx->job->n_stages; i++) {
        CPL_TRY(stage_key(ctx, &ctx->job->stage[i]));
    }
done:
    return st;
}

/* --- what is done --- */

static bool record_is_current(const cpl_context *ctx, const cpl_stage *s) {
    char path[PATH_SIZE], *key = NULL, *status = NULL;
    cpl_arena *arena = NULL;
    cpl_study_record_path(ctx, s->name, path, sizeof path);
    bool current = cpl_arena_create(&arena) == CPL_OK && cpl_record_read_text(path, "key", &key, arena) == CPL_OK &&
                   strcmp(key, s->key) == 0 && cpl_record_read_text(path, "status", &status, arena) == CPL_OK &&
                   strcmp(status, "done") == 0 && (s->model == NULL || access(s->model, R_OK) == 0);
    cpl_arena_destroy(&arena);
    return current;
}

cpl_status cpl_study_done(cpl_context *ctx, const cpl_stage *stage, bool *done_out) {
    int64_t yes = is_root(ctx) && record_is_current(ctx, stage);
    cpl_status st = cpl_comm_bcast(ctx->world, &yes, sizeof yes, 0);
    *done_out = yes != 0;
    return st;
}

/* --- records and results --- */

static void now_text(char *out, size_t size) {
    time_t t = time(NULL);
    struct tm tm;
    gmtime_r(&t, &tm);
    strftime(out, size, "%Y-%m-%dT%H:%M:%SZ", &tm);
}

static cpl_status record_options(cpl_record *rec, const cpl_stage *s, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < s->kind->table->count; i++) {
        const cpl_field *f = &s->kind->table->fields[i];
        const char *at = (const char *)s->options + f->offset;
        char name[80], *text = NULL;
        snprintf(name, sizeof name, "option_%s", f->name);
        switch (f->type) {
        case CPL_FIELD_INT:
            CPL_TRY(cpl_record_i64(rec, name, *(const int64_t *)at));
            break;
        case CPL_FIELD_REAL:
            CPL_TRY(cpl_record_f64(rec, name, *(const double *)at));
            break;
        case CPL_FIELD_BOOL:
            CPL_TRY(cpl_record_i64(rec, name, *(const bool *)at));
            break;
        default:
            CPL_TRY(cpl_field_text(f, s->options, &text, arena));
            CPL_TRY(cpl_record_text(rec, name, text));
        }
    }
done:
    return st;
}

static cpl_status write_record(cpl_context *ctx, const cpl_stage *s, cpl_record *rec, const char *started,
                               const cpl_stage_cost *cost) {
    cpl_status st = CPL_OK;
    char path[PATH_SIZE], finished[32];
    now_text(finished, sizeof finished);
    CPL_TRY(cpl_record_text(rec, "kind", s->kind->name));
    CPL_TRY(cpl_record_text(rec, "key", s->key));
    CPL_TRY(cpl_record_text(rec, "status", "done"));
    CPL_TRY(cpl_record_text(rec, "started", started));
    CPL_TRY(cpl_record_text(rec, "finished", finished));
    CPL_TRY(cpl_stage_cost_record(rec, cost));
    CPL_TRY(cpl_record_i64(rec, "ranks", cpl_comm_size(ctx->world)));
    if (s->model != NULL) {
        CPL_TRY(cpl_record_text(rec, "model", s->model + strlen(ctx->out) + 1));
    }
    CPL_TRY(record_options(rec, s, ctx->job->arena));
    cpl_study_record_path(ctx, s->name, path, sizeof path);
    CPL_TRY(cpl_record_write(rec, path));
done:
    return st;
}

static cpl_status root_attributes(cpl_context *ctx, cpl_record *root, char *hosts) {
    cpl_status st = CPL_OK;
    char library[128], now[32];
    CPL_TRY(cpl_record_i64(root, "schema_version", 1));
    CPL_TRY(cpl_record_text(root, "cupel_version", CUPEL_VERSION));
    CPL_TRY(cpl_record_text(root, "git_revision", CUPEL_GIT_REVISION));
    CPL_TRY(cpl_record_text(root, "name", ctx->job->name));
    CPL_TRY(cpl_record_text(root, "command_line", ctx->command_line));
    CPL_TRY(cpl_record_text(root, "job", ctx->job->text));
    CPL_TRY(cpl_record_i64(root, "seed", ctx->job->seed));
    CPL_TRY(cpl_record_i64(root, "ranks", cpl_comm_size(ctx->world)));
    CPL_TRY(cpl_record_text(root, "hostnames", hosts));
    CPL_TRY(cpl_record_text(root, "device", ctx->dev->name));
    cpl_comm_library(library, sizeof library);
    CPL_TRY(cpl_record_text(root, "mpi", library));
    cpl_h5_library(library, sizeof library);
    CPL_TRY(cpl_record_text(root, "hdf5", library));
    CPL_TRY(cpl_record_text(root, "started", ctx->started));
    now_text(now, sizeof now);
    CPL_TRY(cpl_record_text(root, "finished", now));
done:
    return st;
}

static bool is_of_job(const cpl_context *ctx, const char *name) {
    for (size_t i = 0; i < ctx->job->n_stages; i++) {
        if (strcmp(ctx->job->stage[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

static cpl_status add_part(const cpl_context *ctx, const char *name, cpl_results_part *part, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    char path[PATH_SIZE], *group = NULL, *file = NULL;
    cpl_study_record_path(ctx, name, path, sizeof path);
    CPL_TRY(cpl_arena_printf(arena, &group, "stages/%s", name));
    CPL_TRY(cpl_arena_strdup(arena, &file, path));
    *part = (cpl_results_part){group, file};
done:
    return st;
}

static int is_record(const struct dirent *entry) {
    const char *dot = strrchr(entry->d_name, '.');
    return dot != NULL && strcmp(dot, ".h5") == 0;
}

/* Records of other stages in DIR/stages that are whole. */
static cpl_status add_others(const cpl_context *ctx, cpl_results_part **parts, size_t *n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    struct dirent **found = NULL;
    char path[PATH_SIZE], *status = NULL;
    cpl_results_part *more = NULL;
    snprintf(path, sizeof path, "%s/stages", ctx->out);
    int count = scandir(path, &found, is_record, alphasort);
    if (count < 0) {
        CPL_FAIL(CPL_IO, "%s: %s", path, strerror(errno));
    }
    CPL_TRY(cpl_arena_alloc(arena, &more, *n + (size_t)count, sizeof *more));
    memcpy(more, *parts, *n * sizeof *more);
    *parts = more;
    for (int i = 0; i < count; i++) {
        *strrchr(found[i]->d_name, '.') = '\0';
        cpl_study_record_path(ctx, found[i]->d_name, path, sizeof path);
        if (!is_of_job(ctx, found[i]->d_name) && cpl_record_read_text(path, "status", &status, arena) == CPL_OK &&
            strcmp(status, "done") == 0) {
            CPL_TRY(add_part(ctx, found[i]->d_name, &more[(*n)++], arena));
        }
    }
done:
    for (int i = 0; i < count; i++) {
        free(found[i]);
    }
    free(found);
    return st;
}

cpl_status cpl_study_results(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    cpl_record *root = NULL;
    cpl_results_part *parts = NULL;
    char path[PATH_SIZE], *corpus = NULL;
    cpl_arena *arena = NULL;
    size_t n = 0;
    CPL_TRY(cpl_arena_create(&arena));
    CPL_TRY(cpl_arena_alloc(arena, &parts, ctx->job->n_stages + 1, sizeof *parts));
    CPL_TRY(cpl_arena_printf(arena, &corpus, "%s/corpus.h5", ctx->out));
    parts[n++] = (cpl_results_part){"corpus", corpus};
    for (size_t i = 0; i < ctx->job->n_stages; i++) {
        const cpl_stage *s = &ctx->job->stage[i];
        if (record_is_current(ctx, s)) {
            CPL_TRY(add_part(ctx, s->name, &parts[n++], arena));
        }
    }
    if (ctx->job->single) {
        CPL_TRY(add_others(ctx, &parts, &n, arena));
    }
    CPL_TRY(cpl_record_create(&root));
    CPL_TRY(root_attributes(ctx, root, ctx->hostnames));
    snprintf(path, sizeof path, "%s/results.h5", ctx->out);
    CPL_TRY(cpl_results_assemble(path, root, parts, n));
done:
    cpl_record_destroy(&root);
    cpl_arena_destroy(&arena);
    return st;
}

bool cpl_study_results_current(const cpl_context *ctx) {
    char path[PATH_SIZE], *job = NULL;
    cpl_arena *arena = NULL;
    snprintf(path, sizeof path, "%s/results.h5", ctx->out);
    bool current = cpl_arena_create(&arena) == CPL_OK && cpl_record_read_text(path, "job", &job, arena) == CPL_OK &&
                   strcmp(job, ctx->job->text) == 0;
    cpl_arena_destroy(&arena);
    return current;
}

/* --- the run --- */

static cpl_status make_folder(const char *path) {
    if (mkdir(path, 0777) != 0 && errno != EEXIST) {
        return cpl_fail(CPL_IO, __FILE__, __LINE__, "%s: cannot make folder: %s", path, strerror(errno));
    }
    return CPL_OK;
}

static cpl_status run_stage(cpl_context *ctx, cpl_stage *s) {
    cpl_status st = CPL_OK;
    cpl_record *rec = NULL;
    cpl_stage_cost cost;
    char started[32];
    now_text(started, sizeof started);
    cpl_log_event("stage_started", "\"stage\":\"%s\",\"kind\":\"%s\",\"key\":\"%s\"", s->name, s->kind->name, s->key);
    cpl_status local = cpl_record_create(&rec);
    if (local == CPL_OK && is_root(ctx)) {
        local = make_folder(s->folder);
    }
    CPL_TRY(cpl_agree(ctx->world, local));
    cpl_stage_cost_begin(&cost, ctx->dev);
    st = s->kind->run(ctx, s, rec);
    CPL_TRY(st == CPL_NO_MEMORY ? cpl_stage_fit(ctx, s, st) : st);
    CPL_TRY(cpl_stage_cost_end(&cost, ctx->world, ctx->dev));
    if (is_root(ctx)) {
        local = write_record(ctx, s, rec, started, &cost);
        if (local == CPL_OK) {
            local = cpl_study_results(ctx);
        }
    }
    CPL_TRY(cpl_agree(ctx->world, local));
    cpl_log_event("stage_done", "\"stage\":\"%s\",\"wall_s\":%.3f", s->name, cost.wall_s);
done:
    cpl_record_destroy(&rec);
    return st;
}

cpl_status cpl_study_run(cpl_context *ctx, int *ran) {
    cpl_status st = CPL_OK;
    *ran = 0;
    for (size_t i = 0; i < ctx->job->n_stages; i++) {
        cpl_stage *s = &ctx->job->stage[i];
        bool is_done = false;
        CPL_TRY(cpl_study_done(ctx, s, &is_done));
        if (is_done) {
            cpl_log_info("%s: already done", s->name);
            continue;
        }
        CPL_TRY(run_stage(ctx, s));
        (*ran)++;
    }
done:
    return st;
}

cpl_status cpl_record_model(cpl_record *rec, const cpl_layout *layout, double val_loss, int64_t bytes) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_record_i64(rec, "parameters", layout->parameters));
    CPL_TRY(cpl_record_i64(rec, "layers", layout->shape.layers));
    CPL_TRY(cpl_record_i64(rec, "heads", layout->shape.heads));
    CPL_TRY(cpl_record_i64(rec, "width", layout->shape.width));
    CPL_TRY(cpl_record_i64(rec, "vocab", layout->shape.vocab));
    CPL_TRY(cpl_record_i64(rec, "context", layout->shape.context));
    CPL_TRY(cpl_record_i64(rec, "stride", layout->shape.context));
    CPL_TRY(cpl_record_f64(rec, "val_loss", val_loss));
    CPL_TRY(cpl_record_f64(rec, "perplexity", exp(val_loss)));
    CPL_TRY(cpl_record_i64(rec, "bytes", bytes));
done:
    return st;
}

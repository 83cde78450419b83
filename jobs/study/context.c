/* What a study has open: its folder and lock, its corpora and their hash.
 * Refuses a folder that another job is writing. */
#include "io/base/log.h"
#include "jobs/study/study.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_SIZE = 4096 };

/* mkdir -p */
static cpl_status make_path(const char *path) {
    char part[PATH_SIZE];
    snprintf(part, sizeof part, "%s", path);
    for (char *slash = strchr(part + 1, '/');; slash = strchr(slash + 1, '/')) {
        if (slash != NULL) {
            *slash = 0;
        }
        if (mkdir(part, 0777) != 0 && errno != EEXIST) {
            return cpl_fail(CPL_IO, __FILE__, __LINE__, "%s: cannot make folder: %s", part, strerror(errno));
        }
        if (slash == NULL) {
            return CPL_OK;
        }
        *slash = '/';
    }
}

static cpl_status lock_folder(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    char path[PATH_SIZE];
    static const char *const inside[] = {"", "/stages", "/checkpoints", "/trials"};
    for (size_t i = 0; i < sizeof inside / sizeof inside[0]; i++) {
        snprintf(path, sizeof path, "%s%s", ctx->out, inside[i]);
        CPL_TRY(make_path(path));
    }
    snprintf(path, sizeof path, "%s/.lock", ctx->out);
    ctx->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (ctx->lock < 0) {
        CPL_FAIL(CPL_IO, "%s: cannot open: %s", path, strerror(errno));
    }
    if (flock(ctx->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        CPL_FAIL(CPL_USAGE, "%s: another cupel job is writing this folder", ctx->out);
    }
    snprintf(path, sizeof path, "%s/log.jsonl", ctx->out);
    CPL_TRY(cpl_log_open(path));
done:
    return st;
}

static cpl_status open_corpora(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    const cpl_corpus_options *o = &ctx->job->corpus;
    CPL_TRY(cpl_corpus_open(&ctx->corpus, (const char *const *)o->train.value, o->train.count, o->vocab));
    if (o->val.count > 0) {
        CPL_TRY(cpl_corpus_open(&ctx->held_out, (const char *const *)o->val.value, o->val.count, cpl_corpus_vocab(ctx->corpus)));
    }
done:
    return st;
}

/* Collective. A file of the same name on another machine may be another file. */
static cpl_status compare_corpora(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    const int64_t own[3] = {cpl_corpus_tokens(ctx->corpus), ctx->held_out == NULL ? 0 : cpl_corpus_tokens(ctx->held_out),
                            cpl_corpus_vocab(ctx->corpus)};
    int64_t root[3] = {own[0], own[1], own[2]};
    CPL_TRY(cpl_comm_bcast(ctx->world, root, sizeof root, 0));
    cpl_status local = CPL_OK;
    if (memcmp(own, root, sizeof own) != 0) {
        local = cpl_fail(CPL_INPUT, __FILE__, __LINE__,
                         "%s: the corpus has %lld + %lld tokens of %lld here, %lld + %lld of %lld on rank 0: expected the same "
                         "files on all machines",
                         ctx->job->corpus.train.value[0], (long long)own[0], (long long)own[1], (long long)own[2],
                         (long long)root[0], (long long)root[1], (long long)root[2]);
    }
    CPL_TRY(cpl_agree(ctx->world, local));
done:
    return st;
}

/* Paths, sizes and times of all files: what the remembered hash is good for. */
static cpl_status fingerprint(const cpl_context *ctx, char hex[CPL_SHA256_HEX]) {
    cpl_status st = CPL_OK;
    const cpl_text_list *lists[2] = {&ctx->job->corpus.train, &ctx->job->corpus.val};
    cpl_sha256 h;
    cpl_sha256_init(&h);
    for (int l = 0; l < 2; l++) {
        cpl_sha256_add_text(&h, l == 0 ? "train" : "val");
        for (size_t i = 0; i < lists[l]->count; i++) {
            struct stat s;
            char text[PATH_SIZE + 100];
            if (stat(lists[l]->value[i], &s) != 0) {
                CPL_FAIL(CPL_NOT_FOUND, "%s: %s", lists[l]->value[i], strerror(errno));
            }
            snprintf(text, sizeof text, "%s %lld %lld.%09ld", lists[l]->value[i], (long long)s.st_size, (long long)s.st_mtim.tv_sec,
                     s.st_mtim.tv_nsec);
            cpl_sha256_add_text(&h, text);
        }
    }
    cpl_sha256_end(&h, hex);
done:
    return st;
}

static cpl_status content_hash(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    char hex[CPL_SHA256_HEX];
    CPL_TRY(cpl_corpus_sha256(ctx->corpus, ctx->corpus_sha256));
    if (ctx->held_out != NULL) {
        cpl_sha256 h;
        CPL_TRY(cpl_corpus_sha256(ctx->held_out, hex));
        cpl_sha256_init(&h);
        cpl_sha256_add_text(&h, ctx->corpus_sha256);
        cpl_sha256_add_text(&h, hex);
        cpl_sha256_end(&h, ctx->corpus_sha256);
    }
done:
    return st;
}

/* Rank 0: hash of the content, from DIR/corpus.h5 where the files have not changed since, else computed. *known: it was there. */
static cpl_status find_hash(cpl_context *ctx, char print[CPL_SHA256_HEX], bool *known) {
    cpl_status st = CPL_OK;
    char path[PATH_SIZE], *known_print = NULL, *hash = NULL;
    cpl_arena *arena = ctx->job->arena;
    CPL_TRY(fingerprint(ctx, print));
    snprintf(path, sizeof path, "%s/corpus.h5", ctx->out);
    *known = cpl_record_read_text(path, "fingerprint", &known_print, arena) == CPL_OK && strcmp(known_print, print) == 0 &&
             cpl_record_read_text(path, "sha256", &hash, arena) == CPL_OK && strlen(hash) == CPL_SHA256_HEX - 1;
    if (*known) {
        memcpy(ctx->corpus_sha256, hash, CPL_SHA256_HEX);
    } else {
        CPL_TRY(content_hash(ctx));
    }
done:
    return st;
}

/* Rank 0. */
static cpl_status remember_hash(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    char path[PATH_SIZE], print[CPL_SHA256_HEX];
    cpl_record *rec = NULL;
    bool known = false;
    CPL_TRY(find_hash(ctx, print, &known));
    if (known) {
        return CPL_OK;
    }
    snprintf(path, sizeof path, "%s/corpus.h5", ctx->out);
    CPL_TRY(cpl_record_create(&rec));
    CPL_TRY(cpl_record_text(rec, "sha256", ctx->corpus_sha256));
    CPL_TRY(cpl_record_text(rec, "fingerprint", print));
    CPL_TRY(cpl_record_i64(rec, "tokens", cpl_corpus_tokens(ctx->corpus) + (ctx->held_out ? cpl_corpus_tokens(ctx->held_out) : 0)));
    CPL_TRY(cpl_record_i64(rec, "vocab", cpl_corpus_vocab(ctx->corpus)));
    CPL_TRY(cpl_record_text(rec, "tokenizer", cpl_corpus_tokenizer(ctx->corpus)));
    CPL_TRY(cpl_record_write(rec, path));
done:
    cpl_record_destroy(&rec);
    return st;
}

cpl_status cpl_context_open(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    bool root = cpl_comm_rank(ctx->world) == 0;
    ctx->lock = -1;
    CPL_TRY(cpl_agree(ctx->world, open_corpora(ctx)));
    CPL_TRY(compare_corpora(ctx));
    CPL_TRY(cpl_study_check(ctx));
    CPL_TRY(cpl_agree(ctx->world, root ? lock_folder(ctx) : CPL_OK));
    CPL_TRY(cpl_agree(ctx->world, root ? remember_hash(ctx) : CPL_OK));
    CPL_TRY(cpl_comm_bcast(ctx->world, ctx->corpus_sha256, sizeof ctx->corpus_sha256, 0));
    CPL_TRY(cpl_comm_hostnames(ctx->world, &ctx->hostnames, ctx->job->arena));
done:
    return st;
}

cpl_status cpl_context_look(cpl_context *ctx) {
    cpl_status st = CPL_OK;
    char print[CPL_SHA256_HEX];
    bool known = false, look = cpl_comm_rank(ctx->world) == 0 && access(ctx->out, F_OK) == 0;
    ctx->lock = -1;
    CPL_TRY(cpl_agree(ctx->world, open_corpora(ctx)));
    CPL_TRY(cpl_agree(ctx->world, look ? find_hash(ctx, print, &known) : CPL_OK));
    CPL_TRY(cpl_comm_bcast(ctx->world, ctx->corpus_sha256, sizeof ctx->corpus_sha256, 0));
done:
    return st;
}

void cpl_context_close(cpl_context *ctx) {
    cpl_corpus_close(&ctx->corpus);
    cpl_corpus_close(&ctx->held_out);
    cpl_log_close();
    if (ctx->lock >= 0) {
        close(ctx->lock);
        ctx->lock = -1;
    }
}

cpl_status cpl_context_wait(cpl_context *ctx, cpl_comm *group, cpl_status own) {
    cpl_watchdog_stop();
    cpl_status st = cpl_agree(group, own);
    cpl_status started = cpl_watchdog_start(ctx->world, (int)ctx->job->run.watchdog);
    return st != CPL_OK ? st : started;
}

void cpl_context_splits(const cpl_context *ctx, int64_t T, cpl_split *train, cpl_split *val) {
    cpl_split unused;
    if (ctx->held_out == NULL) {
        cpl_corpus_split(ctx->corpus, ctx->job->corpus.held_out, T, train, val);
    } else {
        cpl_corpus_split(ctx->corpus, 0, T, train, &unused);
        cpl_corpus_split(ctx->held_out, 0, T, val, &unused);
    }
}

cpl_status cpl_context_text(const cpl_context *ctx, cpl_comm *comm, const cpl_model_shape *model, cpl_split *train,
                            cpl_split *val) {
    cpl_context_splits(ctx, model->context, train, val);
    cpl_status st = cpl_split_check(val, 1, "held-out text");
    if (st == CPL_OK && cpl_corpus_vocab(ctx->corpus) > model->vocab) {
        st = cpl_fail(CPL_INPUT, __FILE__, __LINE__, "the corpus has a vocabulary of %lld tokens, the model knows %lld",
                      (long long)cpl_corpus_vocab(ctx->corpus), (long long)model->vocab);
    }
    return cpl_agree(comm, st);
}

/* The command prepare: text or token shards to token shards.
 * Refuses to share the work: rank 0 writes, the others wait. */
#include "io/base/log.h"
#include "io/corpus.h"
#include "jobs/command_options.h"
#include "jobs/table.h"

static const char *const formats[] = {"h5", "llmc", "nanogpt"};
#define PREPARE_FIELDS(X)                                                                                                          \
    X(TEXT, to, "", 0, 0, "PREFIX", "shards are PREFIX_000000.h5 (or .bin), PREFIX_000001.h5 ...; required")                       \
    X(CHOICE, format, "h5", 0, 0, "h5|llmc|nanogpt", "HDF5; llm.c's header and uint16; raw uint16")                                \
    X(INT, shard_tokens, "100M", 1, 9007199254740992.0, "tokens", "of a shard, at most")                                           \
    X(INT, vocab, "0", 0, 1 << 24, "tokens", "tokens must be below it; 0: 256 for text, what the shards allow otherwise")
typedef struct {
    PREPARE_FIELDS(CPL_FIELD_MEMBER)
} prepare_options;
#define CPL_FIELD_OWNER prepare_options
static const cpl_field fields[] = {PREPARE_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER
static const cpl_options_table table = {fields, sizeof fields / sizeof fields[0]};

static cpl_status prepare(const prepare_options *o, const cpl_command_arguments *a) {
    cpl_status st = CPL_OK;
    cpl_corpus *corpus = NULL;
    int64_t shards = 0;
    char rate[CPL_AMOUNT_TEXT];
    double start = cpl_now();
    if (a->count == 0) {
        CPL_FAIL(CPL_USAGE, "prepare: expected text files or token shards, cupel prepare FILE... --to PREFIX");
    }
    if (o->to[0] == '\0') {
        CPL_FAIL(CPL_USAGE, "prepare: expected --to PREFIX, where the shards go");
    }
    CPL_TRY(cpl_corpus_open(&corpus, (const char *const *)a->argument, a->count, o->vocab));
    CPL_TRY(cpl_corpus_write(corpus, o->to, formats[o->format], o->shard_tokens, &shards));
    double seconds = cpl_now() - start;
    cpl_amount_text((double)cpl_corpus_tokens(corpus) / (seconds > 0 ? seconds : 1), "tokens/s", rate);
    cpl_log_info("%lld tokens of a vocabulary of %lld in %lld shard%s %s_000000.%s%s, %.1f s, %s",
                 (long long)cpl_corpus_tokens(corpus), (long long)cpl_corpus_vocab(corpus), (long long)shards,
                 shards == 1 ? "" : "s", o->to, o->format == 0 ? "h5" : "bin", shards == 1 ? "" : " ...", seconds, rate);
done:
    cpl_corpus_close(&corpus);
    return st;
}

cpl_status cpl_command_prepare(const cpl_command *self, cpl_comm *world, int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    prepare_options options;
    cpl_command_arguments a;
    cpl_status local = cpl_arena_create(&arena);
    local = local == CPL_OK ? cpl_command_options(self, &table, &options, &a, arena, argc, argv) : local;
    CPL_TRY(cpl_agree(world, local));
    if (a.help) {
        cpl_command_help(self, world, &table, NULL);
        goto done;
    }
    CPL_TRY(cpl_agree(world, cpl_comm_rank(world) == 0 ? prepare(&options, &a) : CPL_OK));
done:
    cpl_arena_destroy(&arena);
    return st;
}

/* From the tree of a job file to a checked job.
 * Refuses to start any work: everything wrong with a job is found here, with file, line and column. */
#include "jobs/study/job.h"
#include "jobs/study/settings.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

const cpl_stage_kind *const cpl_stage_kinds[] = {
    &cpl_stage_train, &cpl_stage_distill, &cpl_stage_prune, &cpl_stage_quantize, &cpl_stage_sweep, &cpl_stage_eval, NULL};
enum { KINDS = sizeof cpl_stage_kinds / sizeof cpl_stage_kinds[0] - 1, STAGES_MAX = 1000 };

const cpl_stage_kind *cpl_stage_kind_find(const char *name) {
    for (int i = 0; i < KINDS; i++) {
        if (strcmp(cpl_stage_kinds[i]->name, name) == 0) {
            return cpl_stage_kinds[i];
        }
    }
    return NULL;
}

cpl_status cpl_stage_fail(const cpl_stage *stage, const char *name, const char *format, ...) {
    char text[CPL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    const cpl_node *node = stage->node, *option = name == NULL ? NULL : cpl_node_get(node, name);
    return cpl_node_fail(option != NULL ? option : node, "%s '%s': %s%s%s", stage->kind->name, stage->name,
                         name == NULL ? "" : name, name == NULL ? "" : ": ", text);
}

cpl_status cpl_stage_add_input(cpl_job *job, cpl_stage *stage, const char *name) {
    cpl_status st = CPL_OK;
    cpl_input *more = NULL;
    CPL_TRY(cpl_arena_alloc(job->arena, &more, stage->n_inputs + 1, sizeof *more));
    for (size_t i = 0; i < stage->n_inputs; i++) {
        more[i] = stage->input[i];
    }
    more[stage->n_inputs].name = name;
    stage->input = more;
    stage->n_inputs++;
done:
    return st;
}

static cpl_status expect_mapping(const cpl_node *node, const char *what) {
    if (node->kind != CPL_NODE_MAPPING) {
        return cpl_node_fail(node, "%s: expected a mapping of options", what);
    }
    return CPL_OK;
}

/* A name that can be a folder, a group of an HDF5 file and a prefix of --set. */
static bool name_is_good(const char *s) {
    static const char good[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    return s[0] != 0 && strlen(s) <= 60 && strspn(s, good) == strlen(s);
}

static cpl_status bind_name(cpl_job *job, cpl_stage *s, const cpl_node *options) {
    cpl_status st = CPL_OK;
    const cpl_node *name = cpl_node_get(options, "name");
    const char *text = s->kind->name;
    if (name != NULL) {
        if (name->kind != CPL_NODE_SCALAR || !name_is_good(name->text)) {
            st = cpl_node_fail(name, "stage name: expected up to 60 letters, digits, '_' and '-'");
            goto done;
        }
        text = name->text;
    }
    CPL_TRY(cpl_arena_strdup(job->arena, &s->name, text));
    for (const cpl_stage *other = job->stage; other < s; other++) {
        if (strcmp(other->name, s->name) == 0) {
            st = cpl_stage_fail(s, name == NULL ? NULL : "name", "another stage has that name already");
            goto done;
        }
    }
done:
    return st;
}

static cpl_status bind_stage(cpl_job *job, cpl_stage *s, const cpl_node *item) {
    cpl_status st = CPL_OK;
    const char *others[16] = {"name"}, *words[KINDS], *near;
    size_t n_others = 1;
    char what[160];
    for (int i = 0; i < KINDS; i++) {
        words[i] = cpl_stage_kinds[i]->name;
    }
    if (item->kind != CPL_NODE_MAPPING || item->count != 1) {
        st = cpl_node_fail(item, "stage: expected one of train, distill, prune, quantize, sweep, eval with its options");
        goto done;
    }
    s->kind = cpl_stage_kind_find(item->key[0]->text);
    if (s->kind == NULL) {
        near = cpl_nearest_word(words, KINDS, item->key[0]->text);
        st = cpl_node_fail(item->key[0], "unknown stage '%s'%s%s%s", item->key[0]->text, near ? "; did you mean '" : "",
                           near ? near : "", near ? "'?" : "; expected train, distill, prune, quantize, sweep or eval");
        goto done;
    }
    s->node = item->item[0];
    CPL_TRY(expect_mapping(s->node, s->kind->name));
    CPL_TRY(bind_name(job, s, s->node));
    for (size_t i = 0; s->kind->others != NULL && s->kind->others[i] != NULL; i++) {
        others[n_others++] = s->kind->others[i];
    }
    CPL_TRY(cpl_arena_alloc(job->arena, &s->options, 1, s->kind->size));
    CPL_TRY(cpl_fields_default(s->kind->table->fields, s->kind->table->count, s->options, job->arena));
    snprintf(what, sizeof what, "%s '%s'", s->kind->name, s->name);
    CPL_TRY(cpl_node_bind(s->node, s->kind->table->fields, s->kind->table->count, s->options, others, n_others, what, job->arena));
    if (s->kind->bind != NULL) {
        CPL_TRY(s->kind->bind(job, s));
    }
    if (s->kind->check != NULL) {
        CPL_TRY(s->kind->check(s));
    }
    if (s->kind->inputs != NULL) {
        CPL_TRY(s->kind->inputs(job, s));
    }
done:
    return st;
}

static cpl_status bind_section(cpl_job *job, const cpl_node *root, const char *name, const cpl_options_table *table, void *options,
                               bool required) {
    cpl_status st = CPL_OK;
    const cpl_node *node = cpl_node_get(root, name);
    CPL_TRY(cpl_fields_default(table->fields, table->count, options, job->arena));
    if (node == NULL) {
        if (required) {
            st = cpl_node_fail(root, "expected a section '%s:'", name);
        }
        goto done;
    }
    CPL_TRY(expect_mapping(node, name));
    CPL_TRY(cpl_node_bind(node, table->fields, table->count, options, NULL, 0, name, job->arena));
done:
    return st;
}

#define CPL_JOB_FIELDS(X)                                                                                                          \
    X(TEXT, name, "study", 0, 0, "NAME", "of the study")                                                                           \
    X(INT, seed, "42", 0, 9007199254740992.0, "", "of initialisation and data order")
typedef struct {
    CPL_JOB_FIELDS(CPL_FIELD_MEMBER)
} job_options;
#define CPL_FIELD_OWNER job_options
static const cpl_field job_fields[] = {CPL_JOB_FIELDS(CPL_FIELD_ROW)};
#undef CPL_FIELD_OWNER

static cpl_status bind_job(cpl_job *job, const cpl_node *root) {
    cpl_status st = CPL_OK;
    static const char *const others[] = {"corpus", "run", "stages"};
    job_options o;
    size_t n_fields = sizeof job_fields / sizeof job_fields[0];
    CPL_TRY(expect_mapping(root, "job"));
    CPL_TRY(cpl_fields_default(job_fields, n_fields, &o, job->arena));
    CPL_TRY(cpl_node_bind(root, job_fields, n_fields, &o, others, 3, "job", job->arena));
    job->name = o.name;
    job->seed = o.seed;
    CPL_TRY(bind_section(job, root, "corpus", &cpl_corpus_table, &job->corpus, true));
    CPL_TRY(bind_section(job, root, "run", &cpl_run_table, &job->run, false));
    const cpl_node *stages = cpl_node_get(root, "stages");
    if (stages == NULL || stages->kind != CPL_NODE_SEQUENCE || stages->count == 0 || stages->count > STAGES_MAX) {
        st = cpl_node_fail(stages == NULL ? root : stages, "expected 'stages:' with 1 to %d stages, '- train: {...}' and so on",
                           STAGES_MAX);
        goto done;
    }
    CPL_TRY(cpl_arena_alloc(job->arena, &job->stage, stages->count, sizeof *job->stage));
    for (size_t i = 0; i < stages->count; i++) {
        CPL_TRY(bind_stage(job, &job->stage[i], stages->item[i]));
        job->n_stages++;
    }
done:
    return st;
}

static cpl_status job_create(cpl_job **out) {
    cpl_status st = CPL_OK;
    cpl_job *job = NULL;
    CPL_TRY(cpl_alloc(&job, 1, sizeof *job, "job"));
    CPL_TRY(cpl_arena_create(&job->arena));
    *out = job;
    job = NULL;
done:
    cpl_job_destroy(&job);
    return st;
}

void cpl_job_destroy(cpl_job **job) {
    if (*job != NULL) {
        cpl_arena_destroy(&(*job)->arena);
        cpl_free(job);
    }
}

cpl_status cpl_job_read(cpl_job **out, const char *path, const cpl_setting *settings, size_t n_settings) {
    cpl_status st = CPL_OK;
    cpl_job *job = NULL;
    cpl_node *root = NULL;
    CPL_TRY(job_create(&job));
    CPL_TRY(cpl_jobfile_read(path, &root, job->arena));
    CPL_TRY(expect_mapping(root, "job"));
    CPL_TRY(cpl_settings_apply(root, settings, n_settings, job->arena));
    CPL_TRY(bind_job(job, root));
    *out = job;
    job = NULL;
done:
    cpl_job_destroy(&job);
    return st;
}

cpl_status cpl_job_single(cpl_job **out, const cpl_stage_kind *kind, const cpl_setting *settings, size_t n_settings) {
    cpl_status st = CPL_OK;
    cpl_job *job = NULL;
    cpl_node *root = NULL;
    char text[128];
    CPL_TRY(job_create(&job));
    snprintf(text, sizeof text, "{corpus: {}, run: {}, stages: [{%s: {}}]}", kind->name);
    CPL_TRY(cpl_jobfile_parse(text, strlen(text), "command line", &root, job->arena));
    CPL_TRY(cpl_settings_apply_single(root, settings, n_settings, job->arena));
    CPL_TRY(bind_job(job, root));
    job->single = true;
    *out = job;
    job = NULL;
done:
    cpl_job_destroy(&job);
    return st;
}

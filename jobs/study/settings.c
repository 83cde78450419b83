/* Settings from the command line over the tree of a job file; the resolved job as YAML.
 * Refuses paths that lead nowhere. */
#include "jobs/study/settings.h"
#include "io/base/log.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Sets key to value in a mapping, replacing or adding. */
static cpl_status mapping_put(cpl_node *mapping, const char *key, const char *origin, cpl_node *value, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_node **keys = NULL, **items = NULL, *name = NULL;
    for (size_t i = 0; i < mapping->count; i++) {
        if (strcmp(mapping->key[i]->text, key) == 0) {
            mapping->item[i] = value;
            return CPL_OK;
        }
    }
    CPL_TRY(cpl_arena_alloc(arena, &keys, mapping->count + 1, sizeof *keys));
    CPL_TRY(cpl_arena_alloc(arena, &items, mapping->count + 1, sizeof *items));
    CPL_TRY(cpl_arena_alloc(arena, &name, 1, sizeof *name));
    for (size_t i = 0; i < mapping->count; i++) {
        keys[i] = mapping->key[i];
        items[i] = mapping->item[i];
    }
    *name = (cpl_node){.kind = CPL_NODE_SCALAR, .file = origin, .line = value->line, .column = value->column};
    CPL_TRY(cpl_arena_strdup(arena, &name->text, key));
    keys[mapping->count] = name;
    items[mapping->count] = value;
    mapping->key = keys;
    mapping->item = items;
    mapping->count++;
done:
    return st;
}

/* The mapping of the stage called `name`, NULL if there is none. Stages without a name are called after their kind. */
static cpl_node *find_stage(const cpl_node *root, const char *name) {
    const cpl_node *stages = cpl_node_get(root, "stages");
    for (size_t i = 0; stages != NULL && stages->kind == CPL_NODE_SEQUENCE && i < stages->count; i++) {
        const cpl_node *item = stages->item[i];
        if (item->kind != CPL_NODE_MAPPING || item->count != 1 || item->item[0]->kind != CPL_NODE_MAPPING) {
            continue;
        }
        const cpl_node *given = cpl_node_get(item->item[0], "name");
        const char *called = given != NULL && given->kind == CPL_NODE_SCALAR ? given->text : item->key[0]->text;
        if (strcmp(called, name) == 0) {
            return item->item[0];
        }
    }
    return NULL;
}

/* The value as a node that says where it came from. */
static cpl_status value_node(const cpl_setting *s, const char *flag, cpl_node **out, char **origin, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    CPL_TRY(cpl_arena_printf(arena, origin, "%s%s", flag, s->path));
    const char *text = s->value;
    bool structured = text[0] == '[' || text[0] == '{';
    if (structured) {
        CPL_TRY(cpl_jobfile_parse(text, strlen(text), *origin, out, arena));
    } else {
        CPL_TRY(cpl_arena_alloc(arena, out, 1, sizeof **out));
        **out = (cpl_node){.kind = CPL_NODE_SCALAR, .file = *origin, .line = 1, .column = 1};
        CPL_TRY(cpl_arena_strdup(arena, &(*out)->text, text));
    }
done:
    return st;
}

static cpl_status no_such_place(const cpl_node *root, const char *origin, const char *head) {
    const char *words[64] = {"corpus", "run"};
    size_t n = 2;
    const cpl_node *stages = cpl_node_get(root, "stages");
    for (size_t i = 0; stages != NULL && stages->kind == CPL_NODE_SEQUENCE && i < stages->count && n < 64; i++) {
        const cpl_node *item = stages->item[i];
        if (item->kind == CPL_NODE_MAPPING && item->count == 1 && item->item[0]->kind == CPL_NODE_MAPPING) {
            const cpl_node *given = cpl_node_get(item->item[0], "name");
            words[n++] = given != NULL && given->kind == CPL_NODE_SCALAR ? given->text : item->key[0]->text;
        }
    }
    const char *near = cpl_nearest_word(words, n, head);
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "%s: the job has no stage or section '%s'%s%s%s", origin, head,
                    near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
}

/* Puts the value at head.rest..., creating mappings on the way. */
static cpl_status put_path(cpl_node *root, const cpl_setting *s, const char *flag, cpl_node *own, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_node *value = NULL, *at = root;
    char *origin = NULL, *path = NULL;
    CPL_TRY(value_node(s, flag, &value, &origin, arena));
    CPL_TRY(cpl_arena_strdup(arena, &path, s->path));
    for (char *dash = strchr(path, '-'); dash != NULL && own != NULL; dash = strchr(dash, '-')) {
        *dash = '_';
    }
    char *dot = strchr(path, '.');
    if (dot == NULL) {
        cpl_node *place = own != NULL && strcmp(path, "seed") != 0 ? own : root;
        CPL_TRY(mapping_put(place, path, origin, value, arena));
        goto done;
    }
    *dot = 0;
    at = find_stage(root, path);
    if (at == NULL && own != NULL && strcmp(path, "corpus") != 0 && strcmp(path, "run") != 0) {
        at = own;
        *dot = '.';
        dot = path - 1; /* the whole path is inside the stage: prune.sparsity */
    }
    if (at == NULL && (strcmp(path, "corpus") == 0 || strcmp(path, "run") == 0)) {
        at = root;
        *dot = '.';
        dot = path - 1;
    }
    if (at == NULL) {
        st = no_such_place(root, origin, path);
        goto done;
    }
    for (char *rest = dot + 1;; rest = dot + 1) {
        dot = strchr(rest, '.');
        if (dot == NULL) {
            CPL_TRY(mapping_put(at, rest, origin, value, arena));
            break;
        }
        *dot = 0;
        cpl_node *next = cpl_node_get(at, rest);
        if (next == NULL) {
            CPL_TRY(cpl_arena_alloc(arena, &next, 1, sizeof *next));
            *next = (cpl_node){.kind = CPL_NODE_MAPPING, .file = origin, .line = 1, .column = 1};
            CPL_TRY(mapping_put(at, rest, origin, next, arena));
        }
        if (next->kind != CPL_NODE_MAPPING) {
            CPL_FAIL(CPL_USAGE, "%s: '%s' is no mapping of options", origin, rest);
        }
        at = next;
    }
done:
    return st;
}

cpl_status cpl_settings_apply(cpl_node *root, const cpl_setting *settings, size_t n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < n; i++) {
        CPL_TRY(put_path(root, &settings[i], "--set ", NULL, arena));
    }
done:
    return st;
}

cpl_status cpl_settings_apply_single(cpl_node *root, const cpl_setting *settings, size_t n, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    cpl_node *own = cpl_node_get(root, "stages")->item[0]->item[0];
    for (size_t i = 0; i < n; i++) {
        CPL_TRY(put_path(root, &settings[i], "--", own, arena));
    }
done:
    return st;
}

/* --- the resolved job --- */

static cpl_status print_quoted(FILE *to, const char *text) {
    cpl_status st = CPL_OK;
    char *quoted = NULL;
    size_t size = 6 * strlen(text) + 3; /* a control character takes six */
    CPL_TRY(cpl_alloc(&quoted, size, 1, "the job as text"));
    cpl_json_quote(quoted, size, text);
    fputs(quoted, to);
done:
    cpl_free(&quoted);
    return st;
}

static cpl_status print_fields(cpl_job *job, FILE *to, const char *indent, const cpl_options_table *table, const void *options) {
    cpl_status st = CPL_OK;
    for (size_t i = 0; i < table->count; i++) {
        char *value = NULL;
        const cpl_field *f = &table->fields[i];
        CPL_TRY(cpl_field_text(f, options, &value, job->arena));
        fprintf(to, "%s%s: ", indent, f->name);
        if (f->type == CPL_FIELD_TEXT || f->type == CPL_FIELD_TEXTS) {
            CPL_TRY(print_quoted(to, value));
        } else {
            fputs(f->type == CPL_FIELD_INTS && value[0] == 0 ? "[]" : value, to);
        }
        fputc('\n', to);
    }
done:
    return st;
}

/* Keys that bind read, from the tree. */
static cpl_status print_node(FILE *to, const cpl_node *node) {
    cpl_status st = CPL_OK;
    if (node->kind == CPL_NODE_SCALAR) {
        return print_quoted(to, node->text);
    }
    bool mapping = node->kind == CPL_NODE_MAPPING;
    fputc(mapping ? '{' : '[', to);
    for (size_t i = 0; i < node->count; i++) {
        fprintf(to, "%s%s%s", i > 0 ? ", " : "", mapping ? node->key[i]->text : "", mapping ? ": " : "");
        CPL_TRY(print_node(to, node->item[i]));
    }
    fputc(mapping ? '}' : ']', to);
done:
    return st;
}

static cpl_status print_stage(cpl_job *job, FILE *to, const cpl_stage *s) {
    cpl_status st = CPL_OK;
    fprintf(to, "  - %s:\n      name: %s\n", s->kind->name, s->name);
    CPL_TRY(print_fields(job, to, "      ", s->kind->table, s->options));
    for (size_t k = 0; s->kind->others != NULL && s->kind->others[k] != NULL; k++) {
        const cpl_node *node = cpl_node_get(s->node, s->kind->others[k]);
        if (node != NULL) {
            fprintf(to, "      %s: ", s->kind->others[k]);
            CPL_TRY(print_node(to, node));
            fputc('\n', to);
        }
    }
done:
    return st;
}

static cpl_status print_job(cpl_job *job, FILE *to) {
    cpl_status st = CPL_OK;
    fputs("name: ", to);
    CPL_TRY(print_quoted(to, job->name));
    fprintf(to, "\nseed: %lld\ncorpus:\n", (long long)job->seed);
    CPL_TRY(print_fields(job, to, "  ", &cpl_corpus_table, &job->corpus));
    fputs("run:\n", to);
    CPL_TRY(print_fields(job, to, "  ", &cpl_run_table, &job->run));
    fputs("stages:\n", to);
    for (size_t i = 0; i < job->n_stages; i++) {
        CPL_TRY(print_stage(job, to, &job->stage[i]));
    }
done:
    return st;
}

cpl_status cpl_job_resolved(cpl_job *job, char **yaml) {
    cpl_status st = CPL_OK;
    char *text = NULL;
    size_t size = 0;
    FILE *to = open_memstream(&text, &size);
    if (to == NULL) {
        CPL_FAIL(CPL_NO_MEMORY, "the job as text: out of memory");
    }
    st = print_job(job, to);
    bool whole = ferror(to) == 0;
    whole = fclose(to) == 0 && whole;
    if (st == CPL_OK && !whole) {
        CPL_FAIL(CPL_NO_MEMORY, "the job as text: out of memory");
    }
    if (st == CPL_OK) {
        CPL_TRY(cpl_arena_strdup(job->arena, yaml, text));
    }
done:
    free(text);
    return st;
}

/* Mappings of a job file and option tables: which key sets which option.
 * Refuses keys that no option bears, and names the nearest that one does. */
#include "io/jobfile.h"
#include <stdio.h>
#include <string.h>

cpl_node *cpl_node_get(const cpl_node *mapping, const char *key) {
    for (size_t i = 0; mapping->kind == CPL_NODE_MAPPING && i < mapping->count; i++) {
        if (strcmp(mapping->key[i]->text, key) == 0) {
            return mapping->item[i];
        }
    }
    return NULL;
}

typedef struct {
    const cpl_field *fields; /* borrowed [count] */
    size_t count;
    const char *const *others; /* borrowed [n_others] */
    size_t n_others;
    const char *prefix; /* borrowed: "stage train: ", or "" */
    cpl_arena *arena;   /* borrowed */
} binding;

static bool is_other(const binding *b, const char *name) {
    for (size_t i = 0; i < b->n_others; i++) {
        if (strcmp(b->others[i], name) == 0) {
            return true;
        }
    }
    return false;
}

static cpl_status fail_unknown(const binding *b, const cpl_node *key) {
    cpl_status st = CPL_OK;
    const char **names;
    size_t n = 0;
    CPL_TRY(cpl_arena_alloc(b->arena, &names, b->count + b->n_others, sizeof *names));
    for (size_t i = 0; i < b->count; i++) {
        names[n++] = b->fields[i].name;
    }
    for (size_t i = 0; i < b->n_others; i++) {
        names[n++] = b->others[i];
    }
    const char *near = cpl_nearest_word(names, n, key->text);
    if (near != NULL) {
        st = cpl_node_fail(key, "%sunknown option '%.60s'; did you mean '%s'?", b->prefix, key->text, near);
        goto done;
    }
    char list[400];
    size_t used = 0;
    for (size_t i = 0; i < n && used < sizeof list; i++) {
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i > 0 ? ", " : "", names[i]);
    }
    if (used >= sizeof list) {
        memcpy(list + sizeof list - 4, "...", 4);
    }
    st = cpl_node_fail(key, "%sunknown option '%.60s'; expected %s%s", b->prefix, key->text, n > 1 ? "one of " : "",
                       n > 0 ? list : "none");
done:
    return st;
}

/* Puts "file:line:column: stage train: heads: " before what a value failed with. */
static cpl_status place(const binding *b, const cpl_node *node, const char *name, cpl_status st) {
    return cpl_fail_context(st, "%s:%d:%d: %s%s", node->file, node->line, node->column, b->prefix, name);
}

/* Members are tried one by one into a list of their own first, so that the error stands at the member. */
static cpl_status bind_sequence(const binding *b, const cpl_field *field, const cpl_node *node, void *options) {
    cpl_status st = CPL_OK;
    union {
        cpl_int_list ints;
        cpl_text_list texts;
    } probe;
    cpl_field probe_field = *field;
    probe_field.offset = 0;
    const char **texts;
    bool is_list = field->type == CPL_FIELD_INTS || field->type == CPL_FIELD_TEXTS;
    CPL_TRY(cpl_arena_alloc(b->arena, &texts, node->count, sizeof *texts));
    for (size_t i = 0; is_list && i < node->count; i++) {
        const cpl_node *item = node->item[i];
        if (item->kind != CPL_NODE_SCALAR) {
            st = cpl_node_fail(item, "%s%s: expected a single value in the list, got a %s", b->prefix, field->name,
                               item->kind == CPL_NODE_MAPPING ? "mapping" : "list");
            goto done;
        }
        texts[i] = item->text;
        CPL_TRY(place(b, item, field->name, cpl_field_set_list(&probe_field, &probe, &texts[i], 1, b->arena)));
    }
    CPL_TRY(place(b, node, field->name, cpl_field_set_list(field, options, texts, is_list ? node->count : 0, b->arena)));
done:
    return st;
}

static cpl_status bind_value(const binding *b, const cpl_field *field, const cpl_node *node, void *options) {
    switch (node->kind) {
    case CPL_NODE_SCALAR:
        return place(b, node, field->name, cpl_field_set(field, options, node->text, b->arena));
    case CPL_NODE_SEQUENCE:
        return bind_sequence(b, field, node, options);
    case CPL_NODE_MAPPING:
        break;
    }
    return cpl_node_fail(node, "%s%s: expected a value, got a mapping", b->prefix, field->name);
}

/* set [count]: line in which a field was given, 0 for not at all. */
static cpl_status check_required(const binding *b, const cpl_node *mapping, const int *set) {
    char list[400];
    size_t used = 0, missing = 0;
    for (size_t i = 0; i < b->count; i++) {
        if (b->fields[i].initial != NULL || set[i] != 0) {
            continue;
        }
        if (used < sizeof list) {
            used += (size_t)snprintf(list + used, sizeof list - used, "%s'%s'", missing > 0 ? ", " : "", b->fields[i].name);
        }
        missing++;
    }
    if (missing == 0) {
        return CPL_OK;
    }
    return cpl_node_fail(mapping, "%soption%s %s %s required", b->prefix, missing > 1 ? "s" : "", list, missing > 1 ? "are" : "is");
}

cpl_status cpl_node_bind(const cpl_node *mapping, const cpl_field *fields, size_t count, void *options, const char *const *others,
                         size_t n_others, const char *what, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    bool named = what != NULL && what[0] != '\0';
    char *prefix;
    int *set;
    CPL_TRY(cpl_arena_printf(arena, &prefix, "%s%s", named ? what : "", named ? ": " : ""));
    binding b = {fields, count, others, n_others, prefix, arena};
    if (mapping->kind != CPL_NODE_MAPPING) {
        st = cpl_node_fail(mapping, "%sexpected a mapping (option: value), got a %s", prefix,
                           mapping->kind == CPL_NODE_SEQUENCE ? "list" : "single value");
        goto done;
    }
    CPL_TRY(cpl_arena_alloc(arena, &set, count, sizeof *set));
    for (size_t i = 0; i < mapping->count; i++) {
        const cpl_node *key = mapping->key[i];
        if (is_other(&b, key->text)) {
            continue;
        }
        const cpl_field *field = cpl_field_find(fields, count, key->text);
        if (field == NULL) {
            st = fail_unknown(&b, key);
            goto done;
        }
        if (set[field - fields] != 0) { /* micro-batch and micro_batch are two keys but one option */
            st =
                cpl_node_fail(key, "%soption '%s' stands twice; the first is in line %d", prefix, field->name, set[field - fields]);
            goto done;
        }
        set[field - fields] = key->line;
        CPL_TRY(bind_value(&b, field, mapping->item[i], options));
    }
    CPL_TRY(check_required(&b, mapping, set));
done:
    return st;
}

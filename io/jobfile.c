/* Job files: YAML events (libyaml) into a tree of nodes with positions.
 * Refuses anchors, aliases, tags, merge keys, several documents, duplicate keys, and sizes and depths that no job needs. */
#include "io/jobfile.h"
#include "io/base/utf8.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <yaml.h>

/* KEYS_MAX bounds the search for duplicates, which is quadratic. */
enum { BYTES_MAX = 1 << 20, DEPTH_MAX = 32, KEYS_MAX = 1024 };

typedef struct {
    yaml_parser_t parser; /* owned; valid while `open` */
    bool open;
    const char *file; /* borrowed from the arena */
    const char *text; /* borrowed from the arena; 0-terminated */
    size_t bytes;
    cpl_arena *arena; /* borrowed */
} reader;

static cpl_status fail_at(const reader *r, yaml_mark_t mark, const char *format, ...) __attribute__((format(printf, 3, 4), cold));

static cpl_status fail_at(const reader *r, yaml_mark_t mark, const char *format, ...) {
    char text[CPL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "%s:%zu:%zu: %s", r->file, mark.line + 1, mark.column + 1, text);
}

cpl_status cpl_node_fail(const cpl_node *node, const char *format, ...) {
    char text[CPL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "%s:%d:%d: %s", node->file, node->line, node->column, text);
}

/* Every character is one that YAML allows to be printed (YAML 1.1, 5.1); libyaml would refuse the others too, but without a line.
 */
static cpl_status check_characters(const reader *r) {
    cpl_status st = CPL_OK;
    yaml_mark_t mark = {0};
    const unsigned char *p = (const unsigned char *)r->text, *end = p + r->bytes;
    while (p < end) {
        size_t n = cpl_utf8_length(p);
        if (n == 0) {
            st = *p == 0 ? fail_at(r, mark, "a 0 byte: this is no text file") : fail_at(r, mark, "byte 0x%02X is not UTF-8", *p);
            goto done;
        }
        bool next_line = p[0] == 0xC2 && p[1] == 0x85, separator = n == 3 && p[0] == 0xE2 && p[1] == 0x80 && (p[2] & 0xFE) == 0xA8;
        bool control =
            (*p < 0x20 && *p != '\t' && *p != '\n' && *p != '\r') || *p == 0x7F || (*p == 0xC2 && p[1] < 0xA0 && !next_line);
        bool no_character = n == 3 && p[0] == 0xEF && ((p[1] == 0xBB && p[2] == 0xBF) || (p[1] == 0xBF && p[2] >= 0xBE));
        if (control || no_character) {
            unsigned code = n == 1 ? *p : n == 2 ? p[1] : 0xF000u | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
            st = fail_at(r, mark, "character U+%04X is not allowed here", code);
            goto done;
        }
        if (*p == '\n' || (*p == '\r' && p[1] != '\n') || next_line || separator) {
            mark.line++;
            mark.column = 0;
        } else {
            mark.column++;
        }
        p += n;
    }
done:
    return st;
}

/* libyaml's own refusals: scanner and parser. */
static cpl_status fail_yaml(const reader *r) {
    const yaml_parser_t *y = &r->parser;
    if (y->error == YAML_MEMORY_ERROR) {
        return cpl_fail(CPL_NO_MEMORY, __FILE__, __LINE__, "%s: no memory to read it", r->file);
    }
    if (y->error == YAML_READER_ERROR) {
        return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "%s: byte %zu: %s", r->file, y->problem_offset, y->problem);
    }
    const char *problem = y->problem == NULL ? "not YAML" : y->problem;
    const char *at = r->text;
    for (size_t i = 0; i < y->problem_mark.index && *at != '\0'; i++) { /* libyaml counts characters */
        at += cpl_utf8_length((const unsigned char *)at);
    }
    if (*at == '\t' && (strstr(problem, "cannot start any token") != NULL || strstr(problem, "tab character") != NULL)) {
        return fail_at(r, y->problem_mark, "a tab: YAML is indented with spaces");
    }
    if (y->context != NULL && y->context_mark.line != y->problem_mark.line) {
        return fail_at(r, y->problem_mark, "%s (%s that began in line %zu)", problem, y->context, y->context_mark.line + 1);
    }
    return fail_at(r, y->problem_mark, "%s%s%s%s", problem, y->context != NULL ? " (" : "", y->context != NULL ? y->context : "",
                   y->context != NULL ? ")" : "");
}

/* The caller deletes the event, also after a failure. */
static cpl_status next_event(reader *r, yaml_event_t *event) {
    memset(event, 0, sizeof *event);
    return yaml_parser_parse(&r->parser, event) ? CPL_OK : fail_yaml(r);
}

static cpl_status new_node(reader *r, cpl_node_kind kind, yaml_mark_t mark, cpl_node **out) {
    cpl_status st = cpl_arena_alloc(r->arena, out, 1, sizeof **out);
    if (st == CPL_OK) {
        **out = (cpl_node){.kind = kind, .line = (int)mark.line + 1, .column = (int)mark.column + 1, .file = r->file};
    }
    return st;
}

/* Room for one more member; lists double, so that n members cost O(n). */
static cpl_status grow(reader *r, cpl_node *node, size_t *room) {
    cpl_status st = CPL_OK;
    if (node->count < *room) {
        goto done;
    }
    size_t more = *room == 0 ? 8 : 2 * *room;
    cpl_node **key = NULL, **item;
    CPL_TRY(cpl_arena_alloc(r->arena, &item, more, sizeof *item));
    if (node->kind == CPL_NODE_MAPPING) {
        CPL_TRY(cpl_arena_alloc(r->arena, &key, more, sizeof *key));
    }
    if (node->count > 0) {
        memcpy(item, node->item, node->count * sizeof *item);
        if (key != NULL) {
            memcpy(key, node->key, node->count * sizeof *key);
        }
    }
    node->key = key;
    node->item = item;
    *room = more;
done:
    return st;
}

/* Anchors and tags would give a value a second meaning, away from its place. */
static cpl_status check_plain(const reader *r, const yaml_event_t *e) {
    const yaml_char_t *anchor = NULL, *tag = NULL;
    if (e->type == YAML_ALIAS_EVENT) {
        return fail_at(r, e->start_mark, "alias *%s: job files have no anchors and aliases, write the value out",
                       (const char *)e->data.alias.anchor);
    }
    if (e->type == YAML_SCALAR_EVENT) {
        anchor = e->data.scalar.anchor;
        tag = e->data.scalar.tag;
    } else if (e->type == YAML_SEQUENCE_START_EVENT) {
        anchor = e->data.sequence_start.anchor;
        tag = e->data.sequence_start.tag;
    } else if (e->type == YAML_MAPPING_START_EVENT) {
        anchor = e->data.mapping_start.anchor;
        tag = e->data.mapping_start.tag;
    }
    if (anchor != NULL) {
        return fail_at(r, e->start_mark, "anchor &%s: job files have no anchors and aliases, write the value out",
                       (const char *)anchor);
    }
    if (tag != NULL) {
        return fail_at(r, e->start_mark, "tag %s: job files have no tags, the option says which type it wants", (const char *)tag);
    }
    return CPL_OK;
}

static cpl_status read_scalar(reader *r, const yaml_event_t *e, cpl_node **out) {
    cpl_status st = CPL_OK;
    const char *value = (const char *)e->data.scalar.value;
    CPL_TRY(new_node(r, CPL_NODE_SCALAR, e->start_mark, out));
    if (strlen(value) != e->data.scalar.length) {
        st = cpl_node_fail(*out, "a text with a \\0 in it");
        goto done;
    }
    CPL_TRY(cpl_arena_strdup(r->arena, &(*out)->text, value));
done:
    return st;
}

static cpl_status read_node(reader *r, const yaml_event_t *first, int depth, cpl_node **out);

static cpl_status read_sequence(reader *r, cpl_node *node, int depth) {
    cpl_status st = CPL_OK;
    yaml_event_t event = {0};
    size_t room = 0;
    for (;;) {
        CPL_TRY(next_event(r, &event));
        if (event.type == YAML_SEQUENCE_END_EVENT) {
            goto done;
        }
        CPL_TRY(grow(r, node, &room));
        CPL_TRY(read_node(r, &event, depth, &node->item[node->count]));
        node->count++;
        yaml_event_delete(&event);
    }
done:
    yaml_event_delete(&event);
    return st;
}

static cpl_status check_key(const cpl_node *mapping, const cpl_node *key) {
    if (strcmp(key->text, "<<") == 0) {
        return cpl_node_fail(key, "merge key <<: job files have no merges, write the options out");
    }
    if (mapping->count >= KEYS_MAX) {
        return cpl_node_fail(key, "over %d keys in one mapping", KEYS_MAX);
    }
    for (size_t i = 0; i < mapping->count; i++) {
        if (strcmp(mapping->key[i]->text, key->text) == 0) {
            return cpl_node_fail(key, "key '%.60s' stands twice; the first is in line %d", key->text, mapping->key[i]->line);
        }
    }
    return CPL_OK;
}

static cpl_status read_mapping(reader *r, cpl_node *node, int depth) {
    cpl_status st = CPL_OK;
    yaml_event_t event = {0};
    size_t room = 0;
    for (;;) {
        cpl_node *key;
        CPL_TRY(next_event(r, &event));
        if (event.type == YAML_MAPPING_END_EVENT) {
            goto done;
        }
        CPL_TRY(check_plain(r, &event));
        if (event.type != YAML_SCALAR_EVENT) {
            st = fail_at(r, event.start_mark, "expected a key (one word), got a %s",
                         event.type == YAML_MAPPING_START_EVENT ? "mapping" : "list");
            goto done;
        }
        CPL_TRY(read_scalar(r, &event, &key));
        CPL_TRY(check_key(node, key));
        CPL_TRY(grow(r, node, &room));
        yaml_event_delete(&event);
        CPL_TRY(next_event(r, &event));
        CPL_TRY(read_node(r, &event, depth, &node->item[node->count]));
        node->key[node->count++] = key;
        yaml_event_delete(&event);
    }
done:
    yaml_event_delete(&event);
    return st;
}

/* The node that `first` begins; depth: of the nodes around it. */
static cpl_status read_node(reader *r, const yaml_event_t *first, int depth, cpl_node **out) {
    cpl_status st = CPL_OK;
    CPL_TRY(check_plain(r, first));
    if (first->type == YAML_SCALAR_EVENT) {
        CPL_TRY(read_scalar(r, first, out));
        goto done;
    }
    if (depth >= DEPTH_MAX) {
        st = fail_at(r, first->start_mark, "nested deeper than %d", DEPTH_MAX);
        goto done;
    }
    if (first->type == YAML_SEQUENCE_START_EVENT) {
        CPL_TRY(new_node(r, CPL_NODE_SEQUENCE, first->start_mark, out));
        CPL_TRY(read_sequence(r, *out, depth + 1));
    } else if (first->type == YAML_MAPPING_START_EVENT) {
        CPL_TRY(new_node(r, CPL_NODE_MAPPING, first->start_mark, out));
        CPL_TRY(read_mapping(r, *out, depth + 1));
    } else {
        CPL_FAIL(CPL_INTERNAL, "%s: libyaml gave event %d where a value begins", r->file, (int)first->type);
    }
done:
    return st;
}

/* Stream start, at most one document, stream end. */
static cpl_status read_stream(reader *r, cpl_node **root) {
    cpl_status st = CPL_OK;
    yaml_event_t event = {0};
    do {
        yaml_event_delete(&event);
        CPL_TRY(next_event(r, &event));
        if (event.type == YAML_DOCUMENT_START_EVENT && *root != NULL) {
            st = fail_at(r, event.start_mark, "a second document begins here; a job file is one");
            goto done;
        }
        if (event.type == YAML_DOCUMENT_START_EVENT) {
            yaml_event_delete(&event);
            CPL_TRY(next_event(r, &event));
            CPL_TRY(read_node(r, &event, 0, root));
        }
    } while (event.type != YAML_STREAM_END_EVENT);
    if (*root == NULL) {
        CPL_TRY(new_node(r, CPL_NODE_SCALAR, (yaml_mark_t){0}, root));
        CPL_TRY(cpl_arena_strdup(r->arena, &(*root)->text, ""));
    }
done:
    yaml_event_delete(&event);
    return st;
}

cpl_status cpl_jobfile_parse(const char *text, size_t bytes, const char *name, cpl_node **root, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    reader r = {.bytes = bytes, .arena = arena};
    char *file, *copy;
    *root = NULL;
    if (bytes > BYTES_MAX) {
        CPL_FAIL(CPL_USAGE, "%s: over %d bytes: this is no job file", name, BYTES_MAX);
    }
    if (bytes >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0) { /* a byte order mark, as some editors leave it */
        text += 3;
        r.bytes -= 3;
    }
    CPL_TRY(cpl_arena_strdup(arena, &file, name));
    CPL_TRY(cpl_arena_alloc(arena, &copy, r.bytes + 1, 1));
    if (r.bytes > 0) {
        memcpy(copy, text, r.bytes);
    }
    r.file = file;
    r.text = copy;
    CPL_TRY(check_characters(&r));
    if (!yaml_parser_initialize(&r.parser)) {
        CPL_FAIL(CPL_NO_MEMORY, "%s: no memory to read it", name);
    }
    r.open = true;
    yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)r.text, r.bytes);
    st = read_stream(&r, root);
done:
    if (r.open) {
        yaml_parser_delete(&r.parser);
    }
    if (st != CPL_OK) {
        *root = NULL;
    }
    return st;
}

cpl_status cpl_jobfile_read(const char *path, cpl_node **root, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    FILE *file = NULL;
    char *text = NULL;
    *root = NULL;
    errno = 0;
    file = fopen(path, "rbe");
    if (file == NULL) {
        CPL_FAIL(errno == ENOENT ? CPL_NOT_FOUND : CPL_IO, "%s: cannot be opened: %s", path, strerror(errno));
    }
    CPL_TRY(cpl_alloc(&text, BYTES_MAX + 1, 1, "a job file"));
    size_t bytes = fread(text, 1, BYTES_MAX + 1, file);
    if (ferror(file)) {
        CPL_FAIL(CPL_IO, "%s: cannot be read: %s", path, strerror(errno));
    }
    CPL_TRY(cpl_jobfile_parse(text, bytes, path, root, arena));
    if ((*root)->kind != CPL_NODE_MAPPING) {
        st = cpl_node_fail(*root, "expected a mapping (name: value), got %s",
                           (*root)->kind == CPL_NODE_SEQUENCE ? "a list"
                           : (*root)->text[0] == '\0'         ? "nothing: the file is empty"
                                                              : "a text");
        *root = NULL;
    }
done:
    cpl_free(&text);
    if (file != NULL) {
        fclose(file);
    }
    return st;
}

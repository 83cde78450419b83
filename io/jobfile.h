/* Job files: YAML as a tree that remembers where everything stood, and the binding of a mapping to an option table.
 * Refuses anchors, merges, several documents and duplicate keys; every error is "file:line:column: what was expected". */
#ifndef CPL_IO_JOBFILE_H
#define CPL_IO_JOBFILE_H

#include "io/base/fields.h"

typedef enum { CPL_NODE_SCALAR, CPL_NODE_SEQUENCE, CPL_NODE_MAPPING } cpl_node_kind;
typedef struct cpl_node cpl_node;
struct cpl_node {
    cpl_node_kind kind;
    int line, column;       /* from 1 */
    const char *file;       /* borrowed: as the user wrote it */
    char *text;             /* scalar */
    size_t count;           /* members */
    cpl_node **key, **item; /* key: mappings only (scalars) */
};

/* The whole tree is owned by the arena. Errors: CPL_USAGE with file:line:column; CPL_NOT_FOUND. Files over 1 MiB and nesting deeper
 * than 32 are refused. */
cpl_status cpl_jobfile_read(const char *path, cpl_node **root, cpl_arena *arena);
/* The same from memory; `name` stands for the file in messages ("--set", "command line"). */
cpl_status cpl_jobfile_parse(const char *text, size_t bytes, const char *name, cpl_node **root, cpl_arena *arena);
/* NULL if the mapping has no such key. */
cpl_node *cpl_node_get(const cpl_node *mapping, const char *key);
/* Fails with "file:line:column: text". */
cpl_status cpl_node_fail(const cpl_node *node, const char *format, ...) __attribute__((format(printf, 2, 3), cold));
/* Sets the fields named in the mapping. Keys listed in `others` (n) are passed over: the caller reads them. `what` names the
 * mapping in messages
 * ("stage train"). Errors: unknown key (with the nearest right name), wrong type or range; required fields (no default) that are
 * missing are reported at the mapping's position. */
cpl_status cpl_node_bind(const cpl_node *mapping, const cpl_field *fields, size_t count, void *options, const char *const *others,
                         size_t n_others, const char *what, cpl_arena *arena);

#endif

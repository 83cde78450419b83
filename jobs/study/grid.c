/* The grid of a sweep.
 * Refuses values that the options' own tables refuse, before any trial runs. */
#include "jobs/study/grid.h"
#include <stdio.h>
#include <string.h>

enum { TRIALS_MAX = 1000000 };

static const cpl_options_table *table_of(cpl_axis_section section) {
    return section == CPL_AXIS_PRUNE ? &cpl_prune_table : &cpl_quantize_table;
}

static cpl_status add_axis(cpl_grid *g, const cpl_node *node, const char *name, cpl_axis_section section, const cpl_field *field,
                           cpl_axis **axis) {
    if (g->n_axes == CPL_GRID_AXES_MAX) {
        return cpl_node_fail(node, "a sweep can vary at most %d options beside the model", CPL_GRID_AXES_MAX - 1);
    }
    *axis = &g->axis[g->n_axes++];
    **axis = (cpl_axis){.name = name, .section = section, .field = field};
    return CPL_OK;
}

/* Members of a sequence, or a text split at commas. */
static cpl_status axis_values(cpl_axis *a, const cpl_node *node, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    if (node->kind == CPL_NODE_SCALAR) {
        char *copy = NULL, *rest = NULL;
        CPL_TRY(cpl_arena_strdup(arena, &copy, node->text));
        CPL_TRY(cpl_arena_alloc(arena, &a->value, strlen(copy) + 1, sizeof *a->value));
        for (char *part = strtok_r(copy, ", ", &rest); part != NULL; part = strtok_r(NULL, ", ", &rest)) {
            a->value[a->count++] = part;
        }
    } else if (node->kind == CPL_NODE_SEQUENCE) {
        CPL_TRY(cpl_arena_alloc(arena, &a->value, node->count + 1, sizeof *a->value));
        for (size_t i = 0; i < node->count; i++) {
            if (node->item[i]->kind != CPL_NODE_SCALAR) {
                st = cpl_node_fail(node->item[i], "%s: expected a single value", a->name);
                goto done;
            }
            a->value[a->count++] = node->item[i]->text;
        }
    }
    if (a->count == 0) {
        st = cpl_node_fail(node, "%s: expected at least one value", a->name);
    }
done:
    return st;
}

static bool name_is_taken(const cpl_grid *g, const char *name) {
    for (int i = 0; i < g->n_axes; i++) {
        if (strcmp(g->axis[i].name, name) == 0) {
            return true;
        }
    }
    return false;
}

/* A list is an axis; so is a comma list from the command line. Single values hold for all trials. */
static bool is_list(const cpl_node *node, const cpl_field *field) {
    bool text_list = field->type == CPL_FIELD_INTS || field->type == CPL_FIELD_TEXTS;
    return !text_list && (node->kind == CPL_NODE_SEQUENCE || (node->kind == CPL_NODE_SCALAR && strchr(node->text, ',') != NULL));
}

static cpl_status bind_section(cpl_job *job, cpl_stage *stage, cpl_grid *g, const cpl_node *section, cpl_axis_section which,
                               const char *what) {
    cpl_status st = CPL_OK;
    const cpl_options_table *table = table_of(which);
    if (section == NULL) {
        return CPL_OK;
    }
    if (section->kind != CPL_NODE_MAPPING) {
        return cpl_node_fail(section, "%s: expected a mapping of options", what);
    }
    for (size_t i = 0; i < section->count; i++) {
        const char *name = section->key[i]->text;
        const cpl_field *f = cpl_field_find(table->fields, table->count, name);
        if (strcmp(name, "model") == 0) {
            st = cpl_node_fail(section->key[i], "%s '%s': the models stand beside '%s', not in it", stage->kind->name, stage->name,
                               what);
            goto done;
        }
        if (f == NULL) {
            const char *near = cpl_field_nearest(table->fields, table->count, name);
            st = cpl_node_fail(section->key[i], "%s '%s': %s has no option '%s'%s%s%s", stage->kind->name, stage->name, what, name,
                               near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
            goto done;
        }
        if (is_list(section->item[i], f)) {
            cpl_axis *axis = NULL;
            char *dim = NULL;
            CPL_TRY(cpl_arena_printf(job->arena, &dim, "%s%s", name_is_taken(g, f->name) ? "quantize_" : "", f->name));
            CPL_TRY(add_axis(g, section->item[i], dim, which, f, &axis));
            CPL_TRY(axis_values(axis, section->item[i], job->arena));
        }
    }
done:
    return st;
}

/* The options of a section that hold for all trials, and the trial's position on the axes. */
static cpl_status set_options(const cpl_grid *g, int64_t trial, cpl_axis_section which, const cpl_node *section, void *options,
                              cpl_arena *arena) {
    cpl_status st = CPL_OK;
    const cpl_options_table *table = table_of(which);
    CPL_TRY(cpl_fields_default(table->fields, table->count, options, arena));
    for (size_t i = 0; section != NULL && i < section->count; i++) {
        const cpl_node *node = section->item[i];
        const cpl_field *f = cpl_field_find(table->fields, table->count, section->key[i]->text);
        if (is_list(node, f)) {
            continue;
        }
        if (node->kind != CPL_NODE_SCALAR) {
            st = cpl_node_fail(node, "%s: expected a value or a list of values", f->name);
            goto done;
        }
        if (cpl_field_set(f, options, node->text, arena) != CPL_OK) {
            st = cpl_node_fail(node, "%s: %s", f->name, cpl_status_message());
            goto done;
        }
    }
    for (int a = 1; a < g->n_axes; a++) {
        const cpl_axis *axis = &g->axis[a];
        if (axis->section == which &&
            cpl_field_set(axis->field, options, axis->value[cpl_grid_position(g, trial, a)], arena) != CPL_OK) {
            st = cpl_node_fail(cpl_node_get(section, axis->field->name), "%s: %s", axis->name, cpl_status_message());
            goto done;
        }
    }
done:
    return st;
}

int64_t cpl_grid_position(const cpl_grid *g, int64_t trial, int axis) {
    for (int a = g->n_axes - 1; a > axis; a--) {
        trial /= g->axis[a].count;
    }
    return trial % g->axis[axis].count;
}

cpl_status cpl_grid_trial(const cpl_grid *g, int64_t index, cpl_trial *t, cpl_arena *arena) {
    cpl_status st = CPL_OK;
    int64_t at = index < 0 ? 0 : index;
    memset(t, 0, sizeof *t);
    t->index = index;
    t->model = cpl_grid_position(g, at, 0);
    CPL_TRY(set_options(g, at, CPL_AXIS_PRUNE, g->prune, &t->prune, arena));
    CPL_TRY(set_options(g, at, CPL_AXIS_QUANTIZE, g->quantize, &t->quantize, arena));
    t->prunes = index >= 0 && g->prune != NULL && (t->prune.sparsity.num != 0 || t->prune.finetune_steps > 0);
    t->quantizes = index >= 0 && g->quantize != NULL && t->quantize.bits <= 8;
done:
    return st;
}

cpl_status cpl_grid_key(const cpl_trial *t, const char *model_key, const char *common, char key[CPL_SHA256_HEX]) {
    cpl_status st = CPL_OK;
    cpl_sha256 h;
    cpl_sha256_init(&h);
    cpl_sha256_add_text(&h, "cupel trial 1");
    cpl_sha256_add_text(&h, common);
    cpl_sha256_add_text(&h, model_key);
    if (t->prunes) {
        cpl_sha256_add_text(&h, "prune");
        CPL_TRY(cpl_fields_hash(cpl_prune_table.fields, cpl_prune_table.count, &t->prune, &h));
    }
    if (t->quantizes) {
        cpl_sha256_add_text(&h, "quantize");
        CPL_TRY(cpl_fields_hash(cpl_quantize_table.fields, cpl_quantize_table.count, &t->quantize, &h));
    }
    cpl_sha256_end(&h, key);
done:
    return st;
}

void cpl_grid_describe(const cpl_grid *g, int64_t index, char *text, size_t size) {
    size_t at = 0;
    if (index < 0) {
        snprintf(text, size, "%s unchanged", g->axis[0].value[0]);
        return;
    }
    for (int a = 0; a < g->n_axes && at < size; a++) {
        const char *value = g->axis[a].value[cpl_grid_position(g, index, a)];
        at += (size_t)snprintf(text + at, size - at, a == 0 ? "%s" : " %s=%s", a == 0 ? value : g->axis[a].name, value);
    }
}

/* Every trial's combination of options, before any runs. */
static cpl_status check_trials(const cpl_grid *g, const cpl_stage *stage) {
    cpl_status st = CPL_OK;
    cpl_arena *arena = NULL;
    char text[256];
    for (int64_t i = 0; i < g->trials; i++) {
        cpl_trial t;
        CPL_TRY(cpl_arena_create(&arena));
        CPL_TRY(cpl_grid_trial(g, i, &t, arena));
        if ((t.prunes && cpl_training_check(&t.prune.training) != CPL_OK) || cpl_quantize_check(&t.quantize) != CPL_OK) {
            cpl_grid_describe(g, i, text, sizeof text);
            st = cpl_stage_fail(stage, NULL, "trial '%s': %s", text, cpl_status_message());
            goto done;
        }
        cpl_arena_destroy(&arena);
    }
done:
    cpl_arena_destroy(&arena);
    return st;
}

cpl_status cpl_grid_bind(cpl_job *job, cpl_stage *stage, cpl_grid **out) {
    cpl_status st = CPL_OK;
    cpl_grid *g = NULL;
    cpl_axis *models = NULL;
    const cpl_node *model = cpl_node_get(stage->node, "model"), *objective = cpl_node_get(stage->node, "objective");
    CPL_TRY(cpl_arena_alloc(job->arena, &g, 1, sizeof *g));
    g->prune = cpl_node_get(stage->node, "prune");
    g->quantize = cpl_node_get(stage->node, "quantize");
    if (model == NULL) {
        st = cpl_stage_fail(stage, NULL, "expected 'model:' with one or more stages");
        goto done;
    }
    CPL_TRY(add_axis(g, model, "model", CPL_AXIS_MODEL, NULL, &models));
    CPL_TRY(axis_values(models, model, job->arena));
    CPL_TRY(bind_section(job, stage, g, g->prune, CPL_AXIS_PRUNE, "prune"));
    CPL_TRY(bind_section(job, stage, g, g->quantize, CPL_AXIS_QUANTIZE, "quantize"));
    CPL_TRY(cpl_fields_default(cpl_objective_table.fields, cpl_objective_table.count, &g->objective, job->arena));
    if (objective != NULL && objective->kind != CPL_NODE_MAPPING) {
        st = cpl_node_fail(objective, "objective: expected a mapping of weights");
        goto done;
    }
    if (objective != NULL) {
        CPL_TRY(cpl_node_bind(objective, cpl_objective_table.fields, cpl_objective_table.count, &g->objective, NULL, 0, "objective",
                              job->arena));
    }
    g->trials = 1;
    for (int a = 0; a < g->n_axes; a++) {
        if (!cpl_mul_i64(g->trials, g->axis[a].count, &g->trials) || g->trials > TRIALS_MAX) {
            st = cpl_stage_fail(stage, NULL, "the grid has more than %d trials", TRIALS_MAX);
            goto done;
        }
    }
    CPL_TRY(check_trials(g, stage));
    *out = g;
done:
    return st;
}

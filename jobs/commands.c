/* The table of commands, and what their command lines have in common.
 * Refuses unknown options, with the nearest right one. */
#include "jobs/commands.h"
#include "io/base/arena.h"
#include "io/base/log.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const cpl_command cpl_commands[] = {
    {"run", "FILE [--set PATH=VALUE]... [--out DIR] [--quiet]", "run a study; what is done is kept, what was interrupted goes on",
     cpl_command_run},
    {"plan", "FILE [--ranks N] [--list] [--set PATH=VALUE]... [--out DIR]",
     "what a study would do: parameters, bytes per rank, tokens, what is done", cpl_command_plan},
    {"train", "--text FILE [--OPTION VALUE]... [--out DIR]", "train a model", cpl_command_stage},
    {"distill", "--text FILE --teacher STAGE [--OPTION VALUE]... [--out DIR]",
     "train a smaller model on a larger one's predictions", cpl_command_stage},
    {"prune", "--text FILE --model STAGE [--OPTION VALUE]... [--out DIR]", "remove the smallest weights, exactly as many as asked",
     cpl_command_stage},
    {"quantize", "--text FILE --model STAGE [--OPTION VALUE]... [--out DIR]", "store weights in 2 to 8 bits", cpl_command_stage},
    {"sweep", "--text FILE --model STAGES [--prune.OPTION V,V]... [--quantize.OPTION V,V]... [--out DIR]",
     "a grid over options of prune and quantize", cpl_command_stage},
    {"eval", "--text FILE --model STAGE [--OPTION VALUE]... [--out DIR]", "validation loss and latency of a model",
     cpl_command_stage},
    {"prepare", "FILE... --to PREFIX [--format h5|llmc|nanogpt]", "text or token shards to token shards", cpl_command_prepare},
    {"report", "DIR", "the table of a study's results", cpl_command_report},
    {"bench", "[WHAT] [--OPTION VALUE]...", "speed of this machine's operations beside its limits", cpl_command_bench},
    {"info", "", "what was found on this machine", cpl_command_info},
    {NULL, NULL, NULL, NULL},
};

const cpl_command *cpl_command_find(const char *name) {
    for (const cpl_command *c = cpl_commands; c->name != NULL; c++) {
        if (strcmp(c->name, name) == 0) {
            return c;
        }
    }
    return NULL;
}

volatile sig_atomic_t cpl_stop_requested;
char cpl_command_line[4096];

static void on_signal(int number) {
    (void)number;
    cpl_stop_requested = 1;
}

void cpl_signals_catch(void) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    const int numbers[] = {SIGUSR1, SIGUSR2, SIGHUP, SIGTERM};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        sigaction(numbers[i], &action, NULL);
    }
}

void cpl_arguments_free(cpl_arguments *a) {
    cpl_free(&a->settings);
}

/* An option of a stage's command line that is none of the stage's own. */
static cpl_status check_stage_option(const cpl_stage_kind *kind, const char *path) {
    char name[100];
    snprintf(name, sizeof name, "%.99s", path);
    if (strchr(name, '.') != NULL || strcmp(name, "seed") == 0 || strcmp(name, "name") == 0) {
        return CPL_OK;
    }
    for (size_t i = 0; kind->others != NULL && kind->others[i] != NULL; i++) {
        if (strcmp(kind->others[i], name) == 0) {
            return CPL_OK;
        }
    }
    if (cpl_field_find(kind->table->fields, kind->table->count, name) != NULL) {
        return CPL_OK;
    }
    const char *near = cpl_field_nearest(kind->table->fields, kind->table->count, name);
    return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "%s: unknown option --%s%s%s%s", kind->name, name,
                    near ? "; did you mean --" : "", near ? near : "", near ? "?" : "; see --help");
}

static cpl_status parse_set(cpl_arguments *a, char *text) {
    char *equals = strchr(text, '=');
    if (equals == NULL || equals == text) {
        return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "--set: expected PATH=VALUE such as teacher.steps=100, got '%s'", text);
    }
    *equals = 0;
    a->settings[a->n_settings++] = (cpl_setting){text, equals + 1};
    return CPL_OK;
}

cpl_status cpl_arguments_parse(cpl_arguments *a, const cpl_stage_kind *kind, bool plan, int argc, char **argv) {
    cpl_status st = CPL_OK;
    *a = (cpl_arguments){0};
    CPL_TRY(cpl_alloc(&a->settings, (size_t)argc + 1, sizeof *a->settings, "arguments"));
    for (int i = 1; i < argc; i++) {
        char *arg = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            a->help = true;
            continue;
        }
        if (strcmp(arg, "--quiet") == 0) {
            a->quiet = true;
            continue;
        }
        if (plan && strcmp(arg, "--list") == 0) {
            a->list = true;
            continue;
        }
        if (strncmp(arg, "--", 2) != 0) {
            if (kind != NULL || a->file != NULL) {
                CPL_FAIL(CPL_USAGE, "%s: unexpected argument '%s'", argv[0], arg);
            }
            a->file = arg;
            continue;
        }
        char *equals = strchr(arg, '=');
        if (equals != NULL) {
            *equals = 0;
            value = equals + 1;
        } else if (value == NULL) {
            CPL_FAIL(CPL_USAGE, "%s: %s needs a value", argv[0], arg);
        } else {
            i++;
        }
        if (strcmp(arg, "--out") == 0) {
            a->out = value;
        } else if (strcmp(arg, "--set") == 0 && kind == NULL) {
            CPL_TRY(parse_set(a, value));
        } else if (strcmp(arg, "--ranks") == 0 && plan) {
            a->ranks = strtoll(value, &equals, 10);
            if (*equals != 0 || a->ranks < 1 || a->ranks > 1000000) {
                CPL_FAIL(CPL_USAGE, "--ranks: expected a number of ranks, got '%s'", value);
            }
        } else if (strcmp(arg, "--text") == 0 && kind != NULL) {
            a->settings[a->n_settings++] = (cpl_setting){"corpus.train", value};
        } else if (kind != NULL) {
            CPL_TRY(check_stage_option(kind, arg + 2));
            a->settings[a->n_settings++] = (cpl_setting){arg + 2, value};
        } else {
            static const char *const words[] = {"out", "set", "quiet", "help", "ranks", "list"};
            const char *near = cpl_nearest_word(words, plan ? 6 : 4, arg + 2);
            CPL_FAIL(CPL_USAGE, "%s: unknown option %s%s%s%s", argv[0], arg, near ? "; did you mean --" : "; see --help",
                     near ? near : "", near ? "?" : "");
        }
    }
done:
    if (st != CPL_OK) {
        cpl_arguments_free(a);
    }
    return st;
}

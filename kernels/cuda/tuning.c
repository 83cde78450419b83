/* See tuning.h: one line a choice, "name key-in-hex ms value-in-hex".
 * Refuses lines of another form, and files of another GPU or library version. */
#include "kernels/cuda/tuning.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KEY_MAX = 256, ROUNDS_MAX = 32 };

typedef struct {
    char name[32];
    char key[2 * KEY_MAX + 1], value[2 * KEY_MAX + 1]; /* hex; value "-": none */
    double ms;
} entry;

struct cpl_tuning {
    char path[1024]; /* "": none can be kept */
    char title[256]; /* the file's first line */
    int file;        /* owned descriptor, -1: none */
    off_t seen;      /* bytes of it that are in the table */
    entry *entries;  /* owned [capacity] */
    size_t count, capacity;
};

static void to_hex(const void *bytes, size_t n, char *hex) {
    const unsigned char *p = bytes;
    if (n == 0) {
        strcpy(hex, "-");
        return;
    }
    for (size_t i = 0; i < n; i++) {
        snprintf(hex + 2 * i, 3, "%02x", p[i]);
    }
}

static bool from_hex(const char *hex, void *bytes, size_t n) {
    unsigned char *p = bytes;
    if (strlen(hex) != 2 * n) {
        return n == 0 && strcmp(hex, "-") == 0;
    }
    for (size_t i = 0; i < n; i++) {
        unsigned value = 0;
        if (sscanf(hex + 2 * i, "%2x", &value) != 1) {
            return false;
        }
        p[i] = (unsigned char)value;
    }
    return true;
}

static cpl_status add(cpl_tuning *t, const entry *e) {
    cpl_status st = CPL_OK;
    entry *grown = NULL;
    if (t->count == t->capacity) {
        size_t capacity = t->capacity == 0 ? 64 : 2 * t->capacity;
        CPL_TRY(cpl_alloc(&grown, capacity, sizeof *grown, "tuning table"));
        if (t->count > 0) {
            memcpy(grown, t->entries, t->count * sizeof *grown);
        }
        cpl_free(&t->entries);
        t->entries = grown;
        t->capacity = capacity;
    }
    t->entries[t->count++] = *e;
done:
    return st;
}

/* The folder is made where it is missing; "" where that cannot be done. */
static void find_path(cpl_tuning *t, const char *gpu, int64_t version) {
    char folder[800] = "", name[128];
    const char *own = getenv("CUPEL_CACHE"), *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (own != NULL && own[0] != 0) {
        snprintf(folder, sizeof folder, "%.780s", own);
    } else if (cache != NULL && cache[0] != 0) {
        snprintf(folder, sizeof folder, "%.700s/cupel", cache);
    } else if (home != NULL && home[0] != 0) {
        snprintf(folder, sizeof folder, "%.700s/.cache", home);
        (void)mkdir(folder, 0777);
        snprintf(folder, sizeof folder, "%.700s/.cache/cupel", home);
    } else {
        return;
    }
    (void)mkdir(folder, 0777);
    if (access(folder, W_OK) != 0) {
        return;
    }
    snprintf(name, sizeof name, "%.100s", gpu);
    for (char *c = name; *c != 0; c++) {
        bool plain = (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9');
        *c = plain ? *c : '-';
    }
    snprintf(t->path, sizeof t->path, "%s/%s-%lld.tuning", folder, name, (long long)version);
}

/* A line without its end. */
static bool parse(const char *line, entry *e) {
    char ms[40], *end = NULL;
    if (sscanf(line, "%31s %512s %39s %512s", e->name, e->key, ms, e->value) != 4) {
        return false;
    }
    e->ms = strtod(ms, &end);
    return end != ms && *end == 0 && e->ms > 0;
}

/* The file's lines behind `seen`; *good: all are of the form. The title is the first. */
static cpl_status read_more(cpl_tuning *t, bool *good) {
    cpl_status st = CPL_OK;
    char line[4 * KEY_MAX + 256];
    int copy = dup(t->file);
    FILE *f = copy < 0 ? NULL : fdopen(copy, "r");
    *good = f != NULL && fseeko(f, t->seen, SEEK_SET) == 0;
    while (*good && fgets(line, sizeof line, f) != NULL) {
        entry e;
        *good = t->seen == 0 ? strcmp(line, t->title) == 0 : parse(line, &e);
        if (*good && t->seen > 0) {
            CPL_TRY(add(t, &e));
        }
        t->seen += *good ? (off_t)strlen(line) : 0;
    }
done:
    if (f != NULL) {
        fclose(f);
    } else if (copy >= 0) {
        close(copy);
    }
    return st;
}

static void append(cpl_tuning *t, const char *text) {
    size_t n = strlen(text);
    if (t->file >= 0 && write(t->file, text, n) == (ssize_t)n) {
        t->seen += (off_t)n;
    }
}

cpl_status cpl_tuning_claim(cpl_tuning *t) {
    cpl_status st = CPL_OK;
    bool good = true;
    if (t->file < 0) {
        return CPL_OK;
    }
    while (flock(t->file, LOCK_EX) != 0 && errno == EINTR) {
    }
    CPL_TRY(read_more(t, &good));
    if (!good || t->seen == 0) { /* damaged, or new */
        t->count = 0;
        t->seen = 0;
        if (ftruncate(t->file, 0) == 0) {
            append(t, t->title);
        }
    }
done:
    return st;
}

void cpl_tuning_release(cpl_tuning *t) {
    if (t->file >= 0) {
        (void)flock(t->file, LOCK_UN);
    }
}

cpl_status cpl_tuning_open(cpl_tuning **out, const char *gpu, int64_t version) {
    cpl_status st = CPL_OK;
    cpl_tuning *t = NULL;
    CPL_TRY(cpl_alloc(&t, 1, sizeof *t, "tuning table"));
    snprintf(t->title, sizeof t->title, "cupel tuning 2, %.120s, cuBLASLt %lld\n", gpu, (long long)version);
    find_path(t, gpu, version);
    t->file = t->path[0] == 0 ? -1 : open(t->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    CPL_TRY(cpl_tuning_claim(t));
    cpl_tuning_release(t);
    *out = t;
    t = NULL;
done:
    cpl_tuning_close(&t);
    return st;
}

void cpl_tuning_close(cpl_tuning **tuning) {
    cpl_tuning *t = *tuning;
    if (t == NULL) {
        return;
    }
    if (t->file >= 0) {
        close(t->file);
    }
    cpl_free(&t->entries);
    cpl_free(tuning);
}

bool cpl_tuning_find(const cpl_tuning *t, const char *name, const void *key, size_t key_bytes, double *ms, void *value,
                     size_t value_bytes) {
    char hex[2 * KEY_MAX + 1];
    to_hex(key, key_bytes, hex);
    for (size_t i = t->count; i-- > 0;) {
        const entry *e = &t->entries[i];
        if (strcmp(e->key, hex) == 0 && strcmp(e->name, name) == 0 && from_hex(e->value, value, value_bytes)) {
            *ms = e->ms;
            return true;
        }
    }
    return false;
}

cpl_status cpl_tuning_keep(cpl_tuning *t, const char *name, const void *key, size_t key_bytes, double ms, const void *value,
                           size_t value_bytes) {
    cpl_status st = CPL_OK;
    char line[4 * KEY_MAX + 256];
    entry e = {.ms = ms};
    if (key_bytes > KEY_MAX || value_bytes > KEY_MAX || strlen(name) >= sizeof e.name) {
        CPL_FAIL(CPL_INTERNAL, "tuning: '%s' with %zu and %zu bytes: expected at most %d", name, key_bytes, value_bytes, KEY_MAX);
    }
    strcpy(e.name, name);
    to_hex(key, key_bytes, e.key);
    to_hex(value, value_bytes, e.value);
    CPL_TRY(add(t, &e));
    snprintf(line, sizeof line, "%s %s %.6g %s\n", e.name, e.key, e.ms, e.value);
    append(t, line);
done:
    return st;
}

cpl_status cpl_tuning_time(cpl_device *dev, cpl_status (*body)(void *context), void *context, int rounds, double *ms) {
    cpl_status st = CPL_OK;
    cudaStream_t stream = cpl_cuda_stream(dev);
    cudaEvent_t event[2] = {NULL, NULL};
    double taken[ROUNDS_MAX];
    for (int i = 0; i < 2; i++) {
        CPL_CUDA_TRY("make an event", cudaEventCreate(&event[i]));
    }
    for (int round = 0; round < rounds && round < ROUNDS_MAX; round++) {
        float one = 0;
        CPL_CUDA_TRY("time an operation", cudaEventRecord(event[0], stream));
        CPL_TRY(body(context));
        CPL_CUDA_TRY("time an operation", cudaEventRecord(event[1], stream));
        CPL_CUDA_TRY("time an operation", cudaEventSynchronize(event[1]));
        CPL_CUDA_TRY("time an operation", cudaEventElapsedTime(&one, event[0], event[1]));
        int at = round;
        for (; at > 0 && taken[at - 1] > (double)one; at--) {
            taken[at] = taken[at - 1];
        }
        taken[at] = (double)one;
    }
    *ms = taken[rounds / 2];
done:
    for (int i = 0; i < 2; i++) {
        if (event[i] != NULL) {
            cudaEventDestroy(event[i]);
        }
    }
    return st;
}

/* Runs for about as long as asked, at least one. */
static cpl_status repeat(cpl_status (*body)(void *context), void *context, double about_ms, double long_ms, int64_t *times) {
    cpl_status st = CPL_OK;
    *times = 1 + (int64_t)(long_ms / about_ms);
    for (int64_t i = 0; i < *times; i++) {
        CPL_TRY(body(context));
    }
done:
    return st;
}

cpl_status cpl_tuning_sustained(cpl_device *dev, cpl_status (*body)(void *context), void *context, double about_ms, double lead_ms,
                                double timed_ms, double *ms) {
    cpl_status st = CPL_OK;
    cudaStream_t stream = cpl_cuda_stream(dev);
    cudaEvent_t event[2] = {NULL, NULL};
    int64_t times = 0;
    float all = 0;
    for (int i = 0; i < 2; i++) {
        CPL_CUDA_TRY("make an event", cudaEventCreate(&event[i]));
    }
    CPL_TRY(repeat(body, context, about_ms, lead_ms, &times));
    CPL_CUDA_TRY("time an operation", cudaEventRecord(event[0], stream));
    CPL_TRY(repeat(body, context, about_ms, timed_ms, &times));
    CPL_CUDA_TRY("time an operation", cudaEventRecord(event[1], stream));
    CPL_CUDA_TRY("time an operation", cudaEventSynchronize(event[1]));
    CPL_CUDA_TRY("time an operation", cudaEventElapsedTime(&all, event[0], event[1]));
    *ms = (double)all / (double)times;
done:
    for (int i = 0; i < 2; i++) {
        if (event[i] != NULL) {
            cudaEventDestroy(event[i]);
        }
    }
    return st;
}

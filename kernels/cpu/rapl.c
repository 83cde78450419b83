/* See rapl.h. Folders intel-rapl:N of /sys/class/powercap, or of $CUPEL_POWERCAP: "name" (package-N), "energy_uj", and
 * "max_energy_range_uj", where the counter begins anew (documentation of Linux: power/powercap/powercap.rst).
 * Refuses to count psys, core and dram: packages hold or overlap them. */
#include "kernels/cpu/rapl.h"
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* The smallest range is 2^32 units of 15.3 uJ, 65 kJ: at 1 kW a package it lasts for a minute. */
enum { PACKAGES_MAX = 64, FOLDERS_MAX = 256, SECONDS_BETWEEN = 20, PATH_SIZE = 512 };

typedef struct {
    char path[PATH_SIZE];
    double range, last; /* microjoules */
} package;

struct cpl_rapl {
    package package[PACKAGES_MAX];
    int count; /* 0: not measured */
    char meter[64];
    double joules; /* since the counters were opened */
    bool failed;   /* a counter could not be read any more */
    bool started, ending;
    pthread_t thread; /* owned */
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static bool read_text(const char *folder, const char *name, char *text, int size) {
    char path[PATH_SIZE + 40];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    bool good = f != NULL && fgets(text, size, f) != NULL;
    if (f != NULL) {
        fclose(f);
    }
    if (good) {
        text[strcspn(text, "\n")] = '\0';
    }
    return good;
}

static bool read_number(const char *folder, const char *name, double *value) {
    char text[64], *end = NULL;
    if (!read_text(folder, name, text, sizeof text)) {
        return false;
    }
    *value = strtod(text, &end);
    return end != text && *end == '\0' && *value >= 0;
}

/* The packages, with their counters; -1: there are some and one of them may not be read. */
static int find_packages(package list[PACKAGES_MAX]) {
    const char *root = getenv("CUPEL_POWERCAP");
    int count = 0;
    for (int i = 0; i < FOLDERS_MAX && count < PACKAGES_MAX; i++) {
        char name[64];
        package *p = &list[count];
        snprintf(p->path, sizeof p->path, "%.480s/intel-rapl:%d", root == NULL ? "/sys/class/powercap" : root, i);
        if (access(p->path, F_OK) != 0) {
            break;
        }
        if (!read_text(p->path, "name", name, sizeof name) || strncmp(name, "package", 7) != 0) {
            continue;
        }
        if (!read_number(p->path, "max_energy_range_uj", &p->range) || !read_number(p->path, "energy_uj", &p->last)) {
            return -1;
        }
        count++;
    }
    return count;
}

/* Under the lock. */
static void advance(cpl_rapl *r) {
    for (int i = 0; i < r->count && !r->failed; i++) {
        package *p = &r->package[i];
        double now = 0;
        r->failed = !read_number(p->path, "energy_uj", &now);
        if (!r->failed) {
            r->joules += (now >= p->last ? now - p->last : p->range - p->last + now) * 1e-6;
            p->last = now;
        }
    }
}

static void *watch(void *context) {
    cpl_rapl *r = context;
    struct timespec until;
    pthread_mutex_lock(&r->lock);
    while (!r->ending) {
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += SECONDS_BETWEEN;
        if (pthread_cond_timedwait(&r->wake, &r->lock, &until) == ETIMEDOUT) {
            advance(r);
        }
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* The same for all processes of a running kernel, containers too. */
static bool host_identity(char meter[64]) {
    return read_text("/proc/sys/kernel/random", "boot_id", meter, 64);
}

static cpl_rapl *open_counters(void) {
    cpl_rapl *r = NULL;
    if (cpl_alloc(&r, 1, sizeof *r, "energy counters") != CPL_OK) {
        cpl_status_clear();
        return NULL;
    }
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->wake, NULL);
    int count = find_packages(r->package);
    if (count > 0 && host_identity(r->meter)) {
        r->count = count;
        r->started = pthread_create(&r->thread, NULL, watch, r) == 0;
        r->count = r->started ? count : 0;
    }
    return r;
}

void cpl_rapl_read(cpl_rapl **rapl, cpl_energy *out) {
    if (*rapl == NULL) {
        *rapl = open_counters();
    }
    cpl_rapl *r = *rapl;
    if (r == NULL || r->count == 0) {
        return;
    }
    pthread_mutex_lock(&r->lock);
    advance(r);
    if (!r->failed) {
        out->source = "RAPL";
        memcpy(out->meter, r->meter, sizeof out->meter);
        out->joules = r->joules;
    }
    pthread_mutex_unlock(&r->lock);
}

void cpl_rapl_close(cpl_rapl **rapl) {
    cpl_rapl *r = *rapl;
    if (r == NULL) {
        return;
    }
    if (r->started) {
        pthread_mutex_lock(&r->lock);
        r->ending = true;
        pthread_cond_signal(&r->wake);
        pthread_mutex_unlock(&r->lock);
        pthread_join(r->thread, NULL);
    }
    pthread_cond_destroy(&r->wake);
    pthread_mutex_destroy(&r->lock);
    cpl_free(rapl);
}

void cpl_rapl_describe(char *text, size_t size) {
    package list[PACKAGES_MAX];
    int count = find_packages(list);
    if (count > 0) {
        snprintf(text, size, "RAPL, %d package%s", count, count == 1 ? "" : "s");
    } else {
        snprintf(text, size, "not measured: %s",
                 count < 0 ? "the counters of /sys/class/powercap may not be read by this user"
                           : "/sys/class/powercap has no RAPL package");
    }
}

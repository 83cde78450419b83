/* The watchdog: a thread that ends this process when its work stops, so that a hanging or stopped rank does not keep the others for
 * ever. Refuses to call MPI, whose locks the hanging thread may hold: it says why, leaves, and the launcher ends the rest. */
#include "comm/internal.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static struct {
    pthread_t thread;
    pthread_mutex_t mutex; /* guards stop, slots, count, mine, pids */
    pthread_cond_t wake;
    bool running, stop;
    int seconds, rank;
    char host[65];
    cpl_watch_slot *slots; /* borrowed, NULL: none [count] */
    int count, mine;
    bool pids; /* this process sees those of all slots: no other process table */
    _Atomic(const char *) phase;
    _Atomic uint64_t beats;
} dog = {.mutex = PTHREAD_MUTEX_INITIALIZER, .phase = "the start"};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool has_ended(const cpl_watch_slot *slot) {
    return kill(atomic_load(&slot->pid), 0) != 0 && errno == ESRCH;
}

void cpl_watchdog_board(cpl_watch_slot *slots, int count, int mine) {
    pthread_mutex_lock(&dog.mutex);
    dog.slots = slots;
    dog.count = count;
    dog.mine = mine;
    dog.pids = true;
    for (int i = 0; i < count; i++) {
        dog.pids = dog.pids && !has_ended(&slots[i]);
    }
    pthread_mutex_unlock(&dog.mutex);
}

int cpl_watchdog_gone(void) {
    int rank = -1;
    pthread_mutex_lock(&dog.mutex);
    for (int i = 0; i < dog.count && dog.pids && rank < 0; i++) {
        rank = has_ended(&dog.slots[i]) ? atomic_load(&dog.slots[i].rank) : -1;
    }
    pthread_mutex_unlock(&dog.mutex);
    return rank;
}

/* mutex held. Leaves a sign of life on the board. */
static void see(void) {
    if (dog.slots != NULL) {
        atomic_store(&dog.slots[dog.mine].seen_ms, (int64_t)(1e3 * now()));
    }
}

/* A rank of this host whose own watchdog has not run for half the limit: it is stopped, or its machine is. -1: none. */
static int stopped_rank(double *since) {
    for (int i = 0; i < dog.count; i++) {
        int64_t seen = atomic_load(&dog.slots[i].seen_ms);
        *since = now() - 1e-3 * (double)seen;
        if (i != dog.mine && seen > 0 && *since > 0.5 * dog.seconds) {
            return atomic_load(&dog.slots[i].rank);
        }
    }
    return -1;
}

/* mutex held. One rank of a host speaks for all, the others leave a little later, so that its line comes first. */
_Noreturn static void bite(double idle) {
    if (dog.count > 0 && atomic_exchange(&dog.slots[0].claimed, 1) != 0) {
        usleep(300000);
        _exit(cpl_status_exit(CPL_COMM));
    }
    char line[512], stopped[128] = "";
    double since = 0.0;
    int rank = stopped_rank(&since);
    if (rank >= 0) {
        snprintf(stopped, sizeof stopped, "; rank %d of this host is stopped (last seen running %.1f s ago)", rank, since);
    }
    int n = snprintf(line, sizeof line, "cupel: rank %d on %s: no progress for %.0f s in phase '%s'%s\n", dog.rank, dog.host, idle,
                     atomic_load(&dog.phase), stopped);
    size_t size = n < (int)sizeof line ? (size_t)n : sizeof line - 1;
    if (write(STDERR_FILENO, line, size) < 0) {
        _exit(cpl_status_exit(CPL_COMM));
    }
    _exit(cpl_status_exit(CPL_COMM));
}

/* Time counts only while this thread itself runs: a job that Slurm suspends (SIGSTOP to all) and resumes later is not at fault. */
static void *watch(void *unused) {
    double tick = 0.1 * dog.seconds < 1.0 ? 0.1 * dog.seconds : 1.0;
    double last = now(), idle = 0.0;
    uint64_t beats = atomic_load(&dog.beats);
    pthread_mutex_lock(&dog.mutex);
    while (!dog.stop) {
        double at = now();
        see();
        uint64_t seen = atomic_load(&dog.beats);
        idle = seen != beats ? 0.0 : idle + (at - last < 2.0 * tick ? at - last : 2.0 * tick);
        beats = seen;
        last = at;
        if (idle >= dog.seconds) {
            bite(idle);
        }
        double until = at + tick;
        struct timespec t = {(time_t)until, (long)(1e9 * (until - (double)(time_t)until))};
        pthread_cond_timedwait(&dog.wake, &dog.mutex, &t);
    }
    if (dog.slots != NULL) {
        atomic_store(&dog.slots[dog.mine].seen_ms, 0);
    }
    pthread_mutex_unlock(&dog.mutex);
    return unused;
}

cpl_status cpl_watchdog_start(cpl_comm *world, int seconds) {
    cpl_status st = CPL_OK;
    if (seconds == 0) {
        return CPL_OK;
    }
    if (seconds < 0 || dog.running) {
        CPL_FAIL(CPL_INTERNAL, "a watchdog of %d s cannot start%s", seconds, dog.running ? ": one runs already" : "");
    }
    dog.seconds = seconds;
    dog.rank = world->rank;
    dog.stop = false;
    if (gethostname(dog.host, sizeof dog.host - 1) != 0) {
        snprintf(dog.host, sizeof dog.host, "unknown");
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&dog.wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_lock(&dog.mutex);
    see();
    pthread_mutex_unlock(&dog.mutex);
    /* Signals that ask for an early end are the main thread's. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&dog.thread, NULL, watch, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed != 0) {
        pthread_cond_destroy(&dog.wake);
        CPL_FAIL(CPL_INTERNAL, "cannot start the watchdog thread: error %d", failed);
    }
    dog.running = true;
done:
    return st;
}

void cpl_watchdog_beat(const char *phase) {
    atomic_store(&dog.phase, phase);
    atomic_fetch_add(&dog.beats, 1);
}

void cpl_watchdog_stop(void) {
    if (!dog.running) {
        return;
    }
    pthread_mutex_lock(&dog.mutex);
    dog.stop = true;
    pthread_cond_signal(&dog.wake);
    pthread_mutex_unlock(&dog.mutex);
    pthread_join(dog.thread, NULL);
    pthread_cond_destroy(&dog.wake);
    dog.running = false;
}

/* A job that goes wrong in the way and on the rank that its arguments say, with the shape that main has everywhere: run, agree, one
 * message, end, exit. Refuses nothing itself: test_comm_failures.sh judges what comes out. */
#include "comm/internal.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

_Noreturn static void look_for_the_dead(cpl_comm *world) {
    signal(SIGTERM, SIG_IGN); /* as cupel does: it is mpirun's next word */
    int rank = -1;
    while (rank < 0) {
        usleep(1000);
        rank = cpl_watchdog_gone();
    }
    (void)cpl_fail(CPL_COMM, __FILE__, __LINE__, "rank %d of this host has ended", rank);
    cpl_comm_end(world, "the phase");
}

/* usage: ranks_failure WAY RANK [RANK2]; WAY:
 *   none input usage stopped   the status of a phase, on RANK (and RANK2)
 *   mpi                        an MPI call fails on RANK, the others wait in a barrier
 *   abort                      RANK gives up at once with exit status 9
 *   gone                       RANK is killed, the others look for ranks that have ended, as they do while they wait for a GPU
 *   freeze loop kill           RANK is stopped by SIGSTOP, hangs, is killed, while the others wait in a barrier; watchdog of 3 s
 * Every process leaves its id in the file pid-<rank>. */
static cpl_status phase(cpl_comm *world, const char *way, int mine) {
    cpl_status st = CPL_OK;
    int rank = cpl_comm_rank(world);
    if (mine && strcmp(way, "input") == 0) {
        CPL_FAIL(CPL_INPUT, "corpus-%d.txt: no such file", rank);
    } else if (mine && strcmp(way, "usage") == 0) {
        CPL_FAIL(CPL_USAGE, "expected an integer on rank %d", rank);
    } else if (mine && strcmp(way, "stopped") == 0) {
        CPL_FAIL(CPL_STOPPED, "a signal asked rank %d to stop", rank);
    } else if (mine && strcmp(way, "mpi") == 0) {
        CPL_TRY(cpl_comm_bcast(world, &rank, sizeof rank, 99));
    } else if (mine && strcmp(way, "abort") == 0) {
        cpl_world_abort(world, 9);
    } else if (mine && strcmp(way, "freeze") == 0) {
        raise(SIGSTOP);
    } else if (mine && (strcmp(way, "kill") == 0 || strcmp(way, "gone") == 0)) {
        raise(SIGKILL);
    } else if (strcmp(way, "gone") == 0) {
        look_for_the_dead(world);
    }
    while (mine && strcmp(way, "loop") == 0) {
        usleep(1000);
    }
    if (strstr("mpi abort freeze loop kill", way) != NULL) {
        cpl_watchdog_beat("the barrier");
        CPL_TRY(cpl_comm_barrier(world));
    }
done:
    return st;
}

static cpl_status leave_pid(int rank) {
    cpl_status st = CPL_OK;
    char name[32];
    snprintf(name, sizeof name, "pid-%d", rank);
    FILE *f = fopen(name, "w");
    if (f == NULL) {
        CPL_FAIL(CPL_IO, "%s: cannot be written", name);
    }
    fprintf(f, "%ld\n", (long)getpid());
    fclose(f);
done:
    return st;
}

int main(int argc, char **argv) {
    cpl_comm *world = NULL;
    cpl_status st = cpl_world_init(&world, &argc, &argv);
    if (st != CPL_OK) {
        fprintf(stderr, "cupel: %s\n", cpl_status_message());
        return cpl_status_exit(st);
    }
    int rank = cpl_comm_rank(world);
    int mine = 0;
    for (int i = 2; i < argc; i++) {
        mine = mine || atoi(argv[i]) == rank;
    }
    st = cpl_agree(world, leave_pid(rank));
    if (st == CPL_OK) {
        st = cpl_agree(world, cpl_watchdog_start(world, 3));
    }
    if (st == CPL_OK) {
        cpl_watchdog_beat("the phase");
        st = cpl_agree(world, phase(world, argc > 1 ? argv[1] : "none", mine));
    }
    if (st != CPL_OK && rank == 0) {
        fprintf(stderr, "cupel: %s\n", cpl_status_message());
    }
    cpl_world_finish(&world);
    return cpl_status_exit(st);
}

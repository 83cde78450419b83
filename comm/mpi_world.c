/* Starts and ends MPI, and finds out what it offers here: threads, neighbours of this host, one-sided calls.
 * Refuses a world in which the launcher started more processes than MPI sees. */
#include "comm/internal.h"
#include <mpi.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

static MPI_Win board = MPI_WIN_NULL; /* the watchdogs' page of this host */
static bool one_sided = true;

bool cpl_comm_mpi_one_sided(void) {
    return one_sided;
}

/* The page of memory where the watchdogs of this host see one another. Where MPI cannot share memory there is none, and a watchdog
 * then cannot name a stopped neighbour. */
static cpl_status map_board(cpl_comm *world, MPI_Comm host) {
    cpl_status st = CPL_OK;
    cpl_watch_slot *own = NULL, *slots = NULL;
    MPI_Aint bytes = 0;
    int unit = 0;
    int mapped = MPI_Win_allocate_shared(sizeof *own, sizeof *own, MPI_INFO_NULL, host, &own, &board) == MPI_SUCCESS;
    int here = mapped;
    CPL_MPI("map memory shared by this host", MPI_Allreduce(MPI_IN_PLACE, &mapped, 1, MPI_INT, MPI_MIN, host));
    if (!mapped) {
        if (here) {
            CPL_MPI("unmap memory shared by this host", MPI_Win_free(&board));
        }
        board = MPI_WIN_NULL;
        goto done;
    }
    CPL_MPI("map memory shared by this host", MPI_Win_set_errhandler(board, MPI_ERRORS_RETURN));
    CPL_MPI("map memory shared by this host", MPI_Win_shared_query(board, 0, &bytes, &unit, &slots));
    atomic_store(&own->seen_ms, 0);
    atomic_store(&own->rank, world->rank);
    atomic_store(&own->pid, (int)getpid());
    atomic_store(&own->claimed, 0);
    CPL_MPI("wait for the ranks of this host", MPI_Barrier(host));
    cpl_watchdog_board(slots, world->local_size, world->local_rank);
done:
    return st;
}

static cpl_status find_neighbours(cpl_comm *world) {
    cpl_status st = CPL_OK;
    MPI_Comm host = MPI_COMM_NULL;
    CPL_MPI("find the ranks of this host",
            MPI_Comm_split_type(*(const MPI_Comm *)cpl_comm_mpi(world), MPI_COMM_TYPE_SHARED, world->rank, MPI_INFO_NULL, &host));
    CPL_MPI("count the ranks of this host", MPI_Comm_size(host, &world->local_size));
    CPL_MPI("find this rank on its host", MPI_Comm_rank(host, &world->local_rank));
    CPL_TRY(map_board(world, host));
    CPL_MPI("find the ranks of this host", MPI_Comm_free(&host));
done:
    return st;
}

/* Tries whether MPI has one-sided calls over the hosts of the world; the same answer on all ranks. */
static cpl_status find_one_sided(cpl_comm *world) {
    cpl_status st = CPL_OK;
    MPI_Comm comm = *(const MPI_Comm *)cpl_comm_mpi(world);
    MPI_Win window = MPI_WIN_NULL;
    int64_t *value = NULL;
    int here = MPI_Win_allocate(sizeof *value, sizeof *value, MPI_INFO_NULL, comm, &value, &window) == MPI_SUCCESS;
    int all = here;
    CPL_MPI("try one-sided calls", MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, comm));
    if (all) {
        CPL_MPI("try one-sided calls", MPI_Win_free(&window));
    }
    one_sided = all != 0;
done:
    return st;
}

/* Fails on all ranks or on none. */
static cpl_status check_world(const cpl_comm *world, int thread_level, int64_t launched, const char *launcher) {
    cpl_status st = CPL_OK;
    if (thread_level < MPI_THREAD_FUNNELED) {
        CPL_FAIL(CPL_COMM, "this MPI offers thread level %d, but MPI_THREAD_FUNNELED (%d) is needed", thread_level,
                 MPI_THREAD_FUNNELED);
    }
    if (launched > 1 && world->size == 1) {
        CPL_FAIL(
            CPL_USAGE,
            "%s started %lld processes but MPI sees one: use the mpirun of the MPI that cupel was built with, or srun --mpi=pmix",
            launcher, (long long)launched);
    }
done:
    return st;
}

cpl_status cpl_comm_mpi_create(cpl_comm **out, int *argc, char ***argv, int64_t launched, const char *launcher) {
    cpl_status st = CPL_OK;
    int thread_level = 0;
    bool started = false;
    CPL_TRY(cpl_comm_mpi_alloc(out));
    CPL_MPI("start MPI", MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &thread_level));
    started = true;
    CPL_MPI("start MPI", MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    CPL_MPI("start MPI", MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN));
    CPL_TRY(cpl_comm_mpi_open(*out));
    CPL_TRY(check_world(*out, thread_level, launched, launcher));
    CPL_TRY(find_neighbours(*out));
    CPL_TRY(find_one_sided(*out));
done:
    if (st != CPL_OK && started) {
        cpl_comm_mpi_finish(out);
    } else if (st != CPL_OK) {
        cpl_comm_destroy(out);
    }
    return st;
}

void cpl_comm_mpi_finish(cpl_comm **world) {
    cpl_watchdog_beat("the end of MPI");
    cpl_watchdog_board(NULL, 0, 0);
    if (board != MPI_WIN_NULL && !cpl_comm_mpi_broken()) {
        MPI_Win_free(&board);
    }
    cpl_comm_destroy(world);
    if (!cpl_comm_mpi_broken()) {
        MPI_Finalize();
    }
}

void cpl_comm_mpi_abort(int exit_status) {
    MPI_Abort(MPI_COMM_WORLD, exit_status);
    _exit(exit_status);
}

void cpl_comm_library(char *out, size_t size) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING + 1] = "";
    int length = 0;
    if (size == 0) {
        return;
    }
    if (MPI_Get_library_version(text, &length) != MPI_SUCCESS) {
        strcpy(text, "MPI of unknown make");
    }
    /* "Open MPI v4.1.4, package: ..." and "MPICH Version:      4.0.2\nMPICH Release ...": name and number of the first line. */
    text[strcspn(text, ",\n")] = '\0';
    size_t n = 0;
    for (char *word = strtok(text, " \t"); word != NULL && n + 1 < size; word = strtok(NULL, " \t")) {
        if (strcasecmp(word, "version:") == 0) {
            continue;
        }
        word += word[0] == 'v' && word[1] >= '0' && word[1] <= '9' ? 1 : 0;
        n += (size_t)snprintf(out + n, size - n, "%s%s", n > 0 ? " " : "", word);
    }
    out[n < size ? n : size - 1] = '\0';
}

/* A counter that all ranks share, for handing out trials: one-sided (MPI_Fetch_and_op) where MPI can, so that no rank must listen;
 * else rank 0 answers whenever it waits in this folder's code or calls cpl_comm_progress. Refuses to hand out a number twice. */
#include "comm/internal.h"
#include <mpi.h>
#include <sched.h>

enum { ASK_TAG = 1, GIVE_TAG = 2 };

struct cpl_counter {
    cpl_comm *comm; /* borrowed */
    int64_t own;    /* the next value, where it lives in this process outside a window */
    MPI_Win window; /* owned; MPI_WIN_NULL where it is not used */
    bool locked;
    MPI_Comm talk;     /* owned: questions and answers, where MPI has no one-sided calls over these hosts; else MPI_COMM_NULL */
    MPI_Request asked; /* owned, on rank 0: the next question */
    cpl_counter *next; /* borrowed, list of served counters */
};

static cpl_counter *served; /* those whose value lives in this process */

static cpl_status answer(cpl_counter *counter) {
    cpl_status st = CPL_OK;
    for (int asked = 1; asked;) {
        MPI_Status from;
        CPL_MPI("serve a shared counter", MPI_Test(&counter->asked, &asked, &from));
        if (asked) {
            int64_t value = counter->own++;
            CPL_MPI("serve a shared counter", MPI_Send(&value, 1, MPI_INT64_T, from.MPI_SOURCE, GIVE_TAG, counter->talk));
            CPL_MPI("serve a shared counter",
                    MPI_Irecv(NULL, 0, MPI_BYTE, MPI_ANY_SOURCE, ASK_TAG, counter->talk, &counter->asked));
        }
    }
done:
    return st;
}

cpl_status cpl_counter_serve(void) {
    cpl_status st = CPL_OK;
    for (cpl_counter *counter = served; counter != NULL; counter = counter->next) {
        CPL_TRY(answer(counter));
    }
done:
    return st;
}

cpl_status cpl_mpi_wait(int count, void *requests, const char *doing) {
    cpl_status st = CPL_OK;
    if (cpl_comm_mpi_one_sided()) {
        return cpl_mpi_status(MPI_Waitall(count, requests, MPI_STATUSES_IGNORE), __FILE__, __LINE__, doing);
    }
    for (int finished = 0; !finished;) {
        CPL_MPI(doing, MPI_Testall(count, requests, &finished, MPI_STATUSES_IGNORE));
        CPL_TRY(cpl_counter_serve());
        if (!finished) {
            sched_yield();
        }
    }
done:
    return st;
}

/* The value lives on rank 0 of the group; all others have an empty part of the window. */
static cpl_status open_window(cpl_counter *counter, MPI_Comm comm, int64_t start) {
    cpl_status st = CPL_OK;
    bool home = counter->comm->rank == 0;
    int64_t *value = NULL;
    CPL_MPI("make a shared counter",
            MPI_Win_allocate(home ? sizeof *value : 0, sizeof *value, MPI_INFO_NULL, comm, &value, &counter->window));
    CPL_MPI("make a shared counter", MPI_Win_set_errhandler(counter->window, MPI_ERRORS_RETURN));
    if (home) {
        CPL_MPI("set a shared counter", MPI_Win_lock(MPI_LOCK_EXCLUSIVE, 0, 0, counter->window));
        *value = start;
        CPL_MPI("set a shared counter", MPI_Win_unlock(0, counter->window));
    }
    CPL_MPI("set a shared counter", MPI_Barrier(comm));
    CPL_MPI("open a shared counter", MPI_Win_lock_all(0, counter->window));
    counter->locked = true;
done:
    return st;
}

static cpl_status open_service(cpl_counter *counter, MPI_Comm comm) {
    cpl_status st = CPL_OK;
    CPL_MPI("make a shared counter", MPI_Comm_dup(comm, &counter->talk));
    if (counter->comm->rank == 0) {
        CPL_MPI("make a shared counter", MPI_Irecv(NULL, 0, MPI_BYTE, MPI_ANY_SOURCE, ASK_TAG, counter->talk, &counter->asked));
        counter->next = served;
        served = counter;
    }
done:
    return st;
}

/* All questions have been answered when all ranks are here: who asks waits for the answer. */
static void close_service(cpl_counter *counter) {
    cpl_status met = cpl_comm_barrier(counter->comm);
    for (cpl_counter **p = &served; *p != NULL; p = &(*p)->next) {
        if (*p == counter) {
            *p = counter->next;
            break;
        }
    }
    if (met != CPL_OK) {
        return;
    }
    if (counter->asked != MPI_REQUEST_NULL) {
        MPI_Cancel(&counter->asked);
        MPI_Wait(&counter->asked, MPI_STATUS_IGNORE);
    }
    MPI_Comm_free(&counter->talk);
}

cpl_status cpl_counter_create(cpl_counter **out, cpl_comm *c, int64_t start) {
    cpl_status st = CPL_OK;
    *out = NULL;
    CPL_TRY(cpl_agree(c, cpl_alloc(out, 1, sizeof **out, "a shared counter")));
    **out = (cpl_counter){.comm = c, .own = start, .window = MPI_WIN_NULL, .talk = MPI_COMM_NULL, .asked = MPI_REQUEST_NULL};
    const MPI_Comm *comm = cpl_comm_mpi(c);
    if (comm != NULL && cpl_comm_mpi_one_sided()) {
        CPL_TRY(open_window(*out, *comm, start));
    } else if (comm != NULL) {
        CPL_TRY(open_service(*out, *comm));
    }
done:
    if (st != CPL_OK) {
        cpl_counter_destroy(out);
    }
    return st;
}

void cpl_counter_destroy(cpl_counter **counter) {
    if (*counter == NULL) {
        return;
    }
    if ((*counter)->window != MPI_WIN_NULL && !cpl_comm_mpi_broken()) {
        if ((*counter)->locked) {
            MPI_Win_unlock_all((*counter)->window);
        }
        MPI_Win_free(&(*counter)->window);
    }
    if ((*counter)->talk != MPI_COMM_NULL) {
        close_service(*counter);
    }
    cpl_free(counter);
}

static cpl_status ask(cpl_counter *counter, int64_t *value) {
    cpl_status st = CPL_OK;
    MPI_Request request = MPI_REQUEST_NULL;
    CPL_MPI("take the next number of a shared counter", MPI_Irecv(value, 1, MPI_INT64_T, 0, GIVE_TAG, counter->talk, &request));
    CPL_MPI("take the next number of a shared counter", MPI_Send(NULL, 0, MPI_BYTE, 0, ASK_TAG, counter->talk));
    CPL_TRY(cpl_mpi_wait(1, &request, "take the next number of a shared counter"));
done:
    return st;
}

cpl_status cpl_counter_next(cpl_counter *counter, int64_t *value) {
    cpl_status st = CPL_OK;
    static const int64_t one = 1;
    if (counter->window == MPI_WIN_NULL) {
        if (counter->talk != MPI_COMM_NULL && counter->comm->rank != 0) {
            return ask(counter, value);
        }
        *value = counter->own++;
        return CPL_OK;
    }
    CPL_MPI("take the next number of a shared counter", MPI_Fetch_and_op(&one, value, MPI_INT64_T, 0, 0, MPI_SUM, counter->window));
    CPL_MPI("take the next number of a shared counter", MPI_Win_flush(0, counter->window));
done:
    return st;
}

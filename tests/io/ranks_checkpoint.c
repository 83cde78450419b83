/* Checkpoints of any number of ranks, read by any other: ranks_checkpoint all FOLDER. Also: full FOLDER, on a disk that is too
 * small for one. Refuses comm: MPI is spoken to directly, as io may not look there. Element i of every array is a function of i
 * alone. */
#include "io/base/log.h"
#include "io/checkpoint.h"
#include "io/record.h"
#include <fcntl.h>
#include <mpi.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static int rank, size; /* in the group at work */

static cpl_status barrier(void *comm) {
    return MPI_Barrier(*(MPI_Comm *)comm) == MPI_SUCCESS ? CPL_OK : CPL_COMM;
}
static cpl_status agree(void *comm, cpl_status st) {
    int mine = (int)st;
    int worst = 0;
    MPI_Allreduce(&mine, &worst, 1, MPI_INT, MPI_MAX, *(MPI_Comm *)comm);
    return (cpl_status)worst;
}

enum { ARRAYS = 6, MASK = 2, BIG = 40 << 20 };
/* Chunks shared by ranks, one element, none. The mask may be BIG: more than the 256 chunks of one round of collective writing. */
static const cpl_ckpt_array shapes[ARRAYS] = {
    {.name = "weights", .type = CPL_T_F32, .total = 1000003, .help = "master weights"},
    {.name = "moments", .type = CPL_T_F64, .total = 200000, .help = NULL},
    {.name = "mask", .type = CPL_T_U8, .total = 70001, .help = NULL},
    {.name = "step", .type = CPL_T_I64, .total = 1, .help = NULL},
    {.name = "index", .type = CPL_T_I32, .total = 65536, .help = NULL},
    {.name = "none", .type = CPL_T_F32, .total = 0, .help = NULL},
};

/* Where rank r's part begins. */
static int64_t begin_of(int64_t total, int r, const char *cut) {
    if (r <= 0) {
        return 0;
    }
    if (r >= size) {
        return total;
    }
    if (strcmp(cut, "last") == 0) { /* the others have nothing */
        return 0;
    }
    if (strcmp(cut, "first") == 0) {
        return total;
    }
    int64_t even = total / size * r;
    return strcmp(cut, "shards") == 0 ? even / 4096 * 4096 : even + (even > 0 ? 1 : 0); /* shards, or anywhere */
}

static void value(cpl_type type, int64_t i, void *out) {
    uint64_t x = (uint64_t)i * 0x9E3779B97F4A7C15u;
    x ^= x >> 29;
    memcpy(out, &x, cpl_type_size(type));
}

static void drop(cpl_ckpt_array a[ARRAYS]) {
    for (int k = 0; k < ARRAYS; k++) {
        free(a[k].data);
        a[k].data = NULL;
    }
}

static bool fill(cpl_ckpt_array a[ARRAYS], const char *cut, bool big, bool values) {
    for (int k = 0; k < ARRAYS; k++) {
        a[k] = shapes[k];
        a[k].total = big && k == MASK ? BIG : a[k].total;
        a[k].begin = begin_of(a[k].total, rank, cut);
        a[k].n = begin_of(a[k].total, rank + 1, cut) - a[k].begin;
        size_t element = cpl_type_size(a[k].type);
        a[k].data = malloc((size_t)a[k].n * element + 1);
        if (a[k].data == NULL) {
            return false;
        }
        memset(a[k].data, 0xEE, (size_t)a[k].n * element);
        for (int64_t i = 0; values && i < a[k].n; i++) {
            value(a[k].type, a[k].begin + i, (char *)a[k].data + (size_t)i * element);
        }
    }
    return true;
}

static bool right(const cpl_ckpt_array a[ARRAYS]) {
    for (int k = 0; k < ARRAYS; k++) {
        size_t element = cpl_type_size(a[k].type);
        for (int64_t i = 0; i < a[k].n; i++) {
            char want[8];
            value(a[k].type, a[k].begin + i, want);
            if (memcmp(want, (char *)a[k].data + (size_t)i * element, element) != 0) {
                fprintf(stderr, "rank %d: %s[%lld] is not what was written\n", rank, a[k].name, (long long)a[k].begin + i);
                return false;
            }
        }
    }
    return true;
}

static bool expect(const char *what, cpl_status want, cpl_status got) {
    if (want != got) {
        fprintf(stderr, "rank %d: %s: status %d, expected %d: %s\n", rank, what, (int)got, (int)want, cpl_status_message());
    }
    return want == got;
}

/* A failure on one rank is the failure of all, and nobody waits for ever. */
static bool failures(const char *path, const cpl_io_ranks *ranks, cpl_ckpt_array a[ARRAYS]) {
    const int last = size - 1;
    bool good = true;
    cpl_ckpt_array broken[ARRAYS];
    memcpy(broken, a, sizeof broken);
    if (rank == last) {
        broken[0].n = broken[0].total + 1;
    }
    good &= expect("a bad part on the last rank", CPL_INTERNAL, cpl_checkpoint_write(path, ranks, broken, ARRAYS, NULL, 0));

    struct rlimit old;
    getrlimit(RLIMIT_FSIZE, &old);
    struct rlimit tight = {100000, old.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    /* Written in turn any rank may run into it, written together rank 0 does before the others start. */
    if (rank == (ranks->mpi_comm == NULL ? last : 0)) {
        setrlimit(RLIMIT_FSIZE, &tight);
    }
    good &= expect("a limit on one rank", CPL_IO, cpl_checkpoint_write(path, ranks, a, ARRAYS, NULL, 0));
    setrlimit(RLIMIT_FSIZE, &old);

    good &= expect("no folder", CPL_IO, cpl_checkpoint_write("no/such/folder.h5", ranks, a, ARRAYS, NULL, 0));
    good &= expect("another file on the last rank", CPL_NOT_FOUND,
                   cpl_checkpoint_read(rank == last ? "nowhere.h5" : path, ranks, a, ARRAYS, NULL, 0, NULL));
    good &= expect("the older file", CPL_OK, cpl_checkpoint_read(path, ranks, a, ARRAYS, NULL, 0, NULL));
    return good && right(a);
}

static MPI_Comm group; /* the first ranks of the world */

/* False on the ranks that are not among the first n. */
static bool enter(int n) {
    int me;
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    MPI_Comm_split(MPI_COMM_WORLD, me < n ? 0 : MPI_UNDEFINED, me, &group);
    if (group == MPI_COMM_NULL) {
        return false;
    }
    MPI_Comm_rank(group, &rank);
    MPI_Comm_size(group, &size);
    return true;
}
static void leave(void) {
    if (group != MPI_COMM_NULL) {
        MPI_Comm_free(&group);
    }
    MPI_Barrier(MPI_COMM_WORLD);
}

static const cpl_ckpt_attr scale = {.name = "scale", .type = CPL_T_F64, .f = 65536};

static bool write_one(const char *path, bool together, const char *cut, bool big) {
    const cpl_io_ranks ranks = {rank, size, together ? &group : NULL, &group, barrier, agree};
    cpl_ckpt_array a[ARRAYS] = {{.name = NULL}};
    bool good = fill(a, cut, big, true) && expect("write", CPL_OK, cpl_checkpoint_write(path, &ranks, a, ARRAYS, &scale, 1));
    drop(a);
    return good;
}

static bool read_one(const char *path, bool big) {
    const cpl_io_ranks ranks = {rank, size, NULL, &group, barrier, agree};
    cpl_ckpt_array a[ARRAYS] = {{.name = NULL}};
    cpl_ckpt_attr got = {.name = "scale", .type = CPL_T_F64};
    bool good = fill(a, "anywhere", big, false) &&
                expect("read", CPL_OK, cpl_checkpoint_read(path, &ranks, a, ARRAYS, &got, 1, NULL)) && got.f == 65536 && right(a);
    drop(a);
    return good;
}

/* n ranks write, every number of ranks reads. */
static bool round_trip(const char *path, int n, int world, bool together, const char *cut, bool big) {
    bool good = !enter(n) || write_one(path, together, cut, big);
    leave();
    for (int readers = 1; readers <= world; readers++) {
        good &= !enter(readers) || read_one(path, big);
        leave();
    }
    return good;
}

static bool fail_once(const char *path, int n, bool together) {
    bool good = true;
    if (enter(n)) {
        const cpl_io_ranks ranks = {rank, size, together ? &group : NULL, &group, barrier, agree};
        cpl_ckpt_array a[ARRAYS] = {{.name = NULL}};
        good = fill(a, "shards", false, true) && failures(path, &ranks, a);
        drop(a);
    }
    leave();
    return good;
}

/* What a rank of Open MPI leaves that was killed while it opened a file; whoever waits for it waits for ever. */
static bool after_a_kill(const char *folder, int world) {
    int me, pid = (int)getpid(); /* in the name, for the semaphore is the whole host's */
    char path[1024], name[64];
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    MPI_Bcast(&pid, 1, MPI_INT, 0, MPI_COMM_WORLD);
    snprintf(path, sizeof path, "%s/killed-%d.h5", folder, pid);
    snprintf(name, sizeof name, "/OMPIO_killed-%d.h5.part", pid);
    sem_t *taken = me == 0 ? sem_open(name, O_CREAT | O_EXCL, 0600, 0) : SEM_FAILED;
    bool good = me != 0 || expect("a semaphore", CPL_OK, taken != SEM_FAILED ? CPL_OK : CPL_IO);
    MPI_Barrier(MPI_COMM_WORLD);
    good &= round_trip(path, world, world, true, "shards", false);
    if (taken != SEM_FAILED) {
        sem_close(taken);
        remove(path);
    }
    return good;
}

static bool everything(const char *path, int world, bool together) {
    static const char *const cuts[] = {"shards", "anywhere", "first", "last"};
    bool good = true;
    for (int n = 1; n <= world; n++) {
        for (int c = 0; c < (n == world ? 4 : n == 1 ? 1 : 2); c++) {
            good &= round_trip(path, n, world, together, cuts[c], false);
        }
        good &= fail_once(path, n, together);
    }
    return good & round_trip(path, world, world, together, "shards", true);
}

static bool full(const char *path, bool together) {
    const cpl_io_ranks ranks = {rank, size, together ? &group : NULL, &group, barrier, agree};
    cpl_ckpt_array a[ARRAYS] = {{.name = NULL}};
    bool good = fill(a, "shards", true, true) &&
                expect("write to a full disk", CPL_IO, cpl_checkpoint_write(path, &ranks, a, ARRAYS, &scale, 1));
    if (good && rank == 0) {
        printf("%s\n", cpl_status_message());
    }
    drop(a);
    return good;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int world = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (argc != 3) {
        fprintf(stderr, "usage: ranks_checkpoint all|full FOLDER\n");
        MPI_Finalize();
        return 2;
    }
    cpl_log_init(0, false); /* every rank may warn: the script wants none */
    char path[1024];
    snprintf(path, sizeof path, "%s/a.h5", argv[2]);
    bool good = true;
    for (int together = 0; together <= (int)cpl_h5_is_parallel(); together++) {
        if (strcmp(argv[1], "all") == 0) {
            good &= everything(path, world, together);
            good &= !together || after_a_kill(argv[2], world);
        } else {
            good &= enter(world) && full(path, together);
            leave();
        }
    }
    MPI_Finalize();
    return good ? 0 : 1;
}

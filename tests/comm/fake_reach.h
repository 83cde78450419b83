/* A CPU device whose memory other processes map, by way of /proc: what cpl_device_share and its kin are on GPUs.
 * Refuses nothing that a GPU would: copies beside other work are made at once or as late as may be. */
#ifndef CPL_TESTS_COMM_FAKE_REACH_H
#define CPL_TESTS_COMM_FAKE_REACH_H

#include "kernels/backend.h"
#include "tests/comm/fake_plane.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FAKE_BLOCKS = 64, FAKE_COPIES = 256 };

static struct {
    cpl_backend backend;
    const cpl_backend *real;
    cpl_comm *comm;
    bool late;
    struct {
        void *memory;
        size_t bytes;
        int file; /* -1: another process' */
    } block[FAKE_BLOCKS];
    struct {
        void *to;
        const void *from;
        size_t bytes;
    } copy[FAKE_COPIES];
    int copies, sent; /* waiting; asked for */
} fake_reach;

static cpl_status fake_enter(void *memory, size_t bytes, int file) {
    for (int i = 0; i < FAKE_BLOCKS; i++) {
        if (fake_reach.block[i].memory == NULL) {
            fake_reach.block[i].memory = memory;
            fake_reach.block[i].bytes = bytes;
            fake_reach.block[i].file = file;
            return CPL_OK;
        }
    }
    return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "more than %d shared blocks", FAKE_BLOCKS);
}

/* A file without a name: a process that is killed leaves none. */
static cpl_status fake_alloc(cpl_device *dev, void **out, size_t bytes, const char *what) {
    if (bytes < CPL_SHARED_LEAST) {
        return fake_reach.real->alloc(dev, out, bytes, what);
    }
    int file = memfd_create("cupel-test", 0);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0) {
        return cpl_fail(CPL_NO_MEMORY, __FILE__, __LINE__, "shared memory of %zu bytes", bytes);
    }
    *out = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (*out == MAP_FAILED) {
        return cpl_fail(CPL_NO_MEMORY, __FILE__, __LINE__, "mapping %zu bytes", bytes);
    }
    return fake_enter(*out, bytes, file);
}

static bool fake_leave(void *memory) {
    for (int i = 0; i < FAKE_BLOCKS; i++) {
        if (fake_reach.block[i].memory == memory) {
            munmap(memory, fake_reach.block[i].bytes);
            if (fake_reach.block[i].file >= 0) {
                close(fake_reach.block[i].file);
            }
            fake_reach.block[i].memory = NULL;
            return true;
        }
    }
    return false;
}

static void fake_free(cpl_device *dev, void *memory, size_t bytes) {
    if (!fake_leave(memory)) {
        fake_reach.real->free(dev, memory, bytes);
    }
}

static bool fake_reaches(const cpl_device *dev, const char *identity) {
    return true;
}

static cpl_status fake_share(cpl_device *dev, const void *memory, cpl_shared_name *out) {
    for (int i = 0; i < FAKE_BLOCKS; i++) {
        if (fake_reach.block[i].memory == memory) {
            snprintf((char *)out->bytes, sizeof out->bytes, "/proc/%d/fd/%d", (int)getpid(), fake_reach.block[i].file);
            return CPL_OK;
        }
    }
    return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "memory that is no shared block");
}

static cpl_status fake_map(cpl_device *dev, const cpl_shared_name *name, void **out) {
    const char *path = (const char *)name->bytes;
    struct stat about;
    int file = open(path, O_RDWR);
    if (file < 0 || fstat(file, &about) != 0) {
        return cpl_fail(CPL_DEVICE, __FILE__, __LINE__, "shared memory %s: %s", path, strerror(errno));
    }
    *out = mmap(NULL, (size_t)about.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (*out == MAP_FAILED) {
        return cpl_fail(CPL_DEVICE, __FILE__, __LINE__, "mapping %s: %s", path, strerror(errno));
    }
    return fake_enter(*out, (size_t)about.st_size, -1);
}

static void fake_unmap(cpl_device *dev, void *memory) {
    fake_leave(memory);
}

static cpl_status fake_meet(cpl_device *dev, const cpl_reach *board, uint32_t *word) {
    uint32_t all = word == NULL ? 0 : *word;
    cpl_status st = fake_reach.comm->ops->or_u32(fake_reach.comm, &all);
    if (word != NULL) {
        *word = all;
    }
    return st;
}

static cpl_status fake_copy_beside(cpl_device *dev, void *to, const void *from, size_t bytes) {
    fake_reach.sent++;
    if (!fake_reach.late) {
        memcpy(to, from, bytes);
        return CPL_OK;
    }
    if (fake_reach.copies == FAKE_COPIES) {
        return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "more than %d copies before a join", FAKE_COPIES);
    }
    fake_reach.copy[fake_reach.copies].to = to;
    fake_reach.copy[fake_reach.copies].from = from;
    fake_reach.copy[fake_reach.copies++].bytes = bytes;
    return CPL_OK;
}

static cpl_status fake_join_copies(cpl_device *dev) {
    for (int i = 0; i < fake_reach.copies; i++) {
        memcpy(fake_reach.copy[i].to, fake_reach.copy[i].from, fake_reach.copy[i].bytes);
    }
    fake_reach.copies = 0;
    return CPL_OK;
}

/* fake_attach, and the memory of all ranks' CPU devices is within reach. Until fake_reach_detach, in place of cpl_comm_detach; no
 * memory of the device may live across either. */
static fake_plane *fake_reach_attach(cpl_comm *c, cpl_device *dev, bool late) {
    static const char *const gpu[FAKE_RANKS] = {"0", "1", "2", "3", "4", "5", "6", "7"};
    char why[256] = "";
    cpl_backend_device *shared = dev->impl;
    fake_plane *f = fake_attach(c, dev, false);
    f->base.early = false;
    fake_reach.real = shared->backend;
    fake_reach.comm = c;
    fake_reach.late = late;
    fake_reach.sent = 0;
    fake_reach.backend = *shared->backend;
    fake_reach.backend.alloc = fake_alloc;
    fake_reach.backend.free = fake_free;
    fake_reach.backend.reaches = fake_reaches;
    fake_reach.backend.share = fake_share;
    fake_reach.backend.map = fake_map;
    fake_reach.backend.unmap = fake_unmap;
    fake_reach.backend.meet = fake_meet;
    fake_reach.backend.copy_beside = fake_copy_beside;
    fake_reach.backend.join = fake_join_copies;
    shared->backend = &fake_reach.backend;
    if (cpl_reach_open(c, gpu, why, sizeof why) != CPL_OK || !cpl_comm_reaches(c)) {
        fprintf(stderr, "fake reach: %s %s\n", why, cpl_status_message());
        abort();
    }
    return f;
}

static void fake_reach_detach(cpl_comm *c, cpl_device *dev) {
    cpl_comm_detach(c);
    ((cpl_backend_device *)dev->impl)->backend = fake_reach.real;
}

#endif

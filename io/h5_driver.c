/* An HDF5 file driver over POSIX for files being written: it remembers the first failed write and tells HDF5 that all went well.
 * Refuses to let HDF5 see a failed write: of a file with one, HDF5 1.10 cannot close the handle, and follows it into freed memory
 * when the process ends. The failure is asked for by cpl_h5_written and reported by cpl_h5_close. */
#include "io/h5_driver.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif

typedef struct {
    H5FD_t shared; /* HDF5's own part; must be first */
    cpl_h5_written_file state;
    dev_t device;
    ino_t inode;
    haddr_t eoa, eof; /* end of what HDF5 allocated, of what it wrote */
    int *report;      /* borrowed; where the errno goes on closing; NULL: nowhere */
} driven;

/* For calls that HDF5 is told to have failed; cpl_h5_fail finds the number and says its text. */
static void push(hid_t minor, int why) {
    (void)H5Epush2(H5E_DEFAULT, __FILE__, "driver", __LINE__, H5E_ERR_CLS, H5E_VFL, minor, "errno = %d", why);
}

static void remember(driven *f, int why) {
    if (f->state.error == 0) {
        f->state.error = why;
    }
}

static H5FD_t *driver_open(const char *name, unsigned flags, hid_t fapl, haddr_t maxaddr) {
    (void)fapl;
    (void)maxaddr;
    int mode = (flags & H5F_ACC_RDWR) != 0 ? O_RDWR : O_RDONLY;
    mode |= ((flags & H5F_ACC_TRUNC) != 0 ? O_TRUNC : 0) | ((flags & H5F_ACC_CREAT) != 0 ? O_CREAT : 0);
    mode |= (flags & H5F_ACC_EXCL) != 0 ? O_EXCL : 0;
    struct stat about;
    driven *f = calloc(1, sizeof *f);
    if (f == NULL) {
        return NULL;
    }
    f->state.descriptor = open(name, mode | O_CLOEXEC, 0666);
    if (f->state.descriptor < 0 || fstat(f->state.descriptor, &about) != 0) {
        push(H5E_CANTOPENFILE, errno);
        if (f->state.descriptor >= 0) {
            (void)close(f->state.descriptor);
        }
        free(f);
        return NULL;
    }
    f->device = about.st_dev;
    f->inode = about.st_ino;
    f->eof = (haddr_t)about.st_size;
    return &f->shared;
}

static herr_t driver_close(H5FD_t *file) {
    driven *f = (driven *)file;
    if (close(f->state.descriptor) != 0) { /* NFS may say only now that a quota is full */
        remember(f, errno);
    }
    if (f->report != NULL) {
        *f->report = f->state.error;
    }
    free(f);
    return 0;
}

static int driver_cmp(const H5FD_t *a, const H5FD_t *b) {
    const driven *x = (const driven *)a;
    const driven *y = (const driven *)b;
    if (x->device != y->device) {
        return x->device < y->device ? -1 : 1;
    }
    return x->inode < y->inode ? -1 : x->inode > y->inode;
}

static herr_t driver_query(const H5FD_t *file, unsigned long *flags) {
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE | H5FD_FEAT_AGGREGATE_SMALLDATA |
             H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
    return 0;
}

static haddr_t driver_get_eoa(const H5FD_t *file, H5FD_mem_t type) {
    (void)type;
    return ((const driven *)file)->eoa;
}

static herr_t driver_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t at) {
    (void)type;
    ((driven *)file)->eoa = at;
    return 0;
}

static haddr_t driver_get_eof(const H5FD_t *file, H5FD_mem_t type) {
    (void)type;
    return ((const driven *)file)->eof;
}

static herr_t driver_get_handle(H5FD_t *file, hid_t fapl, void **handle) {
    (void)fapl;
    *handle = &((driven *)file)->state;
    return 0;
}

/* Beyond the end are zeros, as HDF5 expects of its drivers. A failed read is told: nothing is held back by it. */
static herr_t driver_read(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t at, size_t size, void *buffer) {
    (void)type;
    (void)dxpl;
    driven *f = (driven *)file;
    char *to = buffer;
    while (size > 0) {
        ssize_t n = pread(f->state.descriptor, to, size, (off_t)at);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            push(H5E_READERROR, errno);
            return -1;
        }
        if (n == 0) {
            memset(to, 0, size);
            break;
        }
        to += n;
        at += (haddr_t)n;
        size -= (size_t)n;
    }
    return 0;
}

static herr_t driver_write(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t at, size_t size, const void *buffer) {
    (void)type;
    (void)dxpl;
    driven *f = (driven *)file;
    const char *from = buffer;
    f->eof = at + size > f->eof ? at + size : f->eof;
    while (size > 0 && f->state.error == 0) {
        ssize_t n = pwrite(f->state.descriptor, from, size, (off_t)at);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            remember(f, n < 0 ? errno : EIO);
            break;
        }
        from += n;
        at += (haddr_t)n;
        size -= (size_t)n;
    }
    return 0;
}

static herr_t driver_truncate(H5FD_t *file, hid_t dxpl, hbool_t closing) {
    (void)dxpl;
    (void)closing;
    driven *f = (driven *)file;
    if (f->eoa != f->eof && f->state.error == 0 && ftruncate(f->state.descriptor, (off_t)f->eoa) != 0) {
        remember(f, errno);
    }
    f->eof = f->eoa;
    return 0;
}

static const H5FD_class_t driver = {
#ifdef H5FD_CLASS_VERSION
    .version = H5FD_CLASS_VERSION,
    .value = 432, /* 256 to 511 are for drivers that are not registered with the HDF Group */
#endif
    .name = "cupel_written",
    .maxaddr = ((haddr_t)1 << (8 * sizeof(off_t) - 1)) - 1,
    .fc_degree = H5F_CLOSE_WEAK,
    .open = driver_open,
    .close = driver_close,
    .cmp = driver_cmp,
    .query = driver_query,
    .get_eoa = driver_get_eoa,
    .set_eoa = driver_set_eoa,
    .get_eof = driver_get_eof,
    .get_handle = driver_get_handle,
    .read = driver_read,
    .write = driver_write,
    .truncate = driver_truncate,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

hid_t cpl_h5_driver(void) {
    static hid_t id = H5I_INVALID_HID;
    if (H5Iget_type(id) != H5I_VFL) { /* not yet, or the library was closed and opened again */
        id = H5FDregister(&driver);
    }
    return id;
}

cpl_h5_written_file *cpl_h5_driven(hid_t file) {
    void *handle = NULL;
    hid_t fapl = H5Fget_access_plist(file);
    bool ours = fapl > 0 && H5Pget_driver(fapl) == cpl_h5_driver();
    if (fapl > 0) {
        (void)H5Pclose(fapl);
    }
    return ours && H5Fget_vfd_handle(file, H5P_DEFAULT, &handle) >= 0 ? handle : NULL;
}

void cpl_h5_report_to(cpl_h5_written_file *state, int *report) {
    driven *f = (driven *)((char *)state - offsetof(driven, state));
    f->report = report;
}

/* HDF5 handles, properties, types and the error stack as a line of text.
 * Refuses to print, and to name a cause that the library did not give. */
#include "io/h5_driver.h"
#include <errno.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static herr_t close_id(hid_t id) {
    switch (H5Iget_type(id)) {
    case H5I_FILE:
        return H5Fclose(id);
    case H5I_GROUP:
        return H5Gclose(id);
    case H5I_DATATYPE:
        return H5Tclose(id);
    case H5I_DATASPACE:
        return H5Sclose(id);
    case H5I_DATASET:
        return H5Dclose(id);
    case H5I_ATTR:
        return H5Aclose(id);
    case H5I_GENPROP_LST:
        return H5Pclose(id);
    default:
        return -1;
    }
}

void cpl_h5_release(hid_t *id) {
    if (*id > 0) {
        (void)close_id(*id); /* what must not fail unseen was closed by cpl_h5_close */
    }
    *id = H5I_INVALID_HID;
}

cpl_status cpl_h5_begin(void) {
    cpl_status st = CPL_OK;
    if (H5open() < 0 || H5Eset_auto2(H5E_DEFAULT, NULL, NULL) < 0) {
        CPL_FAIL(CPL_HDF5, "the HDF5 library does not start");
    }
done:
    return st;
}

typedef struct {
    char text[512];
    bool memory;
} deepest;

/* With H5E_WALK_UPWARD the first entry is where the failure was noticed; those after it only pass it on. */
static herr_t first_entry(unsigned n, const H5E_error2_t *entry, void *context) {
    deepest *d = context;
    if (n == 0) {
        snprintf(d->text, sizeof d->text, "%s", entry->desc != NULL ? entry->desc : "");
        d->memory = entry->maj_num == H5E_RESOURCE && entry->min_num == H5E_NOSPACE;
    }
    return 0;
}

cpl_status cpl_h5_fail(cpl_status code, const char *file, int line, const char *format, ...) {
    deepest d = {.text = ""};
    (void)H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first_entry, &d);
    char what[CPL_MESSAGE_MAX];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(what, sizeof what, format, args);
    va_end(args);
    /* The POSIX driver writes "..., errno = 28, error message = '...', buf = ..., ...". */
    const char *number = strstr(d.text, "errno = ");
    int os = number != NULL ? (int)strtol(number + strlen("errno = "), NULL, 10) : 0;
    if (os != 0) {
        return cpl_fail(CPL_IO, file, line, "%s: %s", what, strerror(os));
    }
    return cpl_fail(d.memory ? CPL_NO_MEMORY : code, file, line, "%s: %s", what,
                    d.text[0] != '\0' ? d.text : "HDF5 gives no reason");
}

static cpl_status write_failed(const char *path, int why) {
    return cpl_fail(CPL_IO, __FILE__, __LINE__, "%s: cannot be written: %s", path, strerror(why));
}

cpl_status cpl_h5_written(hid_t file, const char *path) {
    const cpl_h5_written_file *state = cpl_h5_driven(file);
    return state != NULL && state->error != 0 ? write_failed(path, state->error) : CPL_OK;
}

cpl_status cpl_h5_close(hid_t *file, const char *path) {
    cpl_status st = CPL_OK;
    int why = 0;
    hid_t id = *file;
    cpl_h5_written_file *state = cpl_h5_driven(id);
    if (state != NULL) {
        cpl_h5_report_to(state, &why);
    }
    *file = H5I_INVALID_HID;
    CPL_H5(CPL_HDF5, close_id(id), "%s: cannot be closed", path);
    st = why != 0 ? write_failed(path, why) : CPL_OK;
done:
    return st;
}

cpl_status cpl_h5_access(hid_t *fapl, const void *mpi_comm) {
    cpl_status st = CPL_OK;
    CPL_H5(CPL_HDF5, *fapl = H5Pcreate(H5P_FILE_ACCESS), "file access list");
    CPL_H5(CPL_HDF5, H5Pset_libver_bounds(*fapl, H5F_LIBVER_V110, H5F_LIBVER_V110), "format bounds 1.10");
    CPL_H5(CPL_HDF5, H5Pset_fclose_degree(*fapl, H5F_CLOSE_STRONG), "file close degree");
    if (mpi_comm == NULL) {
        CPL_H5(CPL_HDF5, H5Pset_driver(*fapl, cpl_h5_driver(), NULL), "file driver");
        goto done;
    }
#ifdef H5_HAVE_PARALLEL
    CPL_H5(CPL_HDF5, H5Pset_fapl_mpio(*fapl, *(const MPI_Comm *)mpi_comm, MPI_INFO_NULL), "MPI file access");
#else
    CPL_FAIL(CPL_INTERNAL, "MPI file access asked of a serial HDF5");
#endif
done:
    return st;
}

void cpl_h5_forget_opening(const char *path) {
    const char *slash = strrchr(path, '/');
    char name[1 + 252]; /* Open MPI cuts it behind 251 bytes, without the '/' */
    (void)snprintf(name, sizeof name, "/OMPIO_%s", slash != NULL ? slash + 1 : path);
    (void)sem_unlink(name); /* mostly there is none */
}

/* File locks are off: finished files are only ever replaced by rename, and network file systems without locks are common on
 * clusters. */
static cpl_status reading_access(hid_t *fapl) {
    cpl_status st = CPL_OK;
    CPL_H5(CPL_HDF5, *fapl = H5Pcreate(H5P_FILE_ACCESS), "file access list");
#if H5_VERSION_GE(1, 12, 1) || (H5_VERSION_GE(1, 10, 7) && !H5_VERSION_GE(1, 12, 0))
    CPL_H5(CPL_HDF5, H5Pset_file_locking(*fapl, 0, 1), "file locks");
#endif
done:
    return st;
}

cpl_status cpl_h5_open(const char *path, hid_t *file) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE fapl = H5I_INVALID_HID;
    struct stat about;
    if (stat(path, &about) != 0) {
        CPL_FAIL(errno == ENOENT || errno == ENOTDIR ? CPL_NOT_FOUND : CPL_IO, "%s: %s", path, strerror(errno));
    }
    if (!S_ISREG(about.st_mode)) {
        CPL_FAIL(CPL_IO, "%s: expected an HDF5 file, it is not a regular file", path);
    }
    if (access(path, R_OK) != 0) {
        CPL_FAIL(CPL_IO, "%s: %s", path, strerror(errno));
    }
    CPL_TRY(reading_access(&fapl));
    CPL_H5(CPL_DAMAGED, *file = H5Fopen(path, H5F_ACC_RDONLY, fapl), "%s: expected a whole HDF5 file", path);
done:
    return st;
}

cpl_status cpl_h5_create(const char *path, hid_t fapl, hid_t *file) {
    cpl_status st = CPL_OK;
    CPL_H5_HANDLE fcpl = H5I_INVALID_HID;
    const unsigned order = H5P_CRT_ORDER_TRACKED | H5P_CRT_ORDER_INDEXED;
    CPL_H5(CPL_HDF5, fcpl = H5Pcreate(H5P_FILE_CREATE), "%s: creation list", path);
    CPL_H5(CPL_HDF5, H5Pset_link_creation_order(fcpl, order), "%s: creation order", path);
    CPL_H5(CPL_HDF5, H5Pset_attr_creation_order(fcpl, order), "%s: creation order", path);
    CPL_H5(CPL_HDF5, H5Pset_obj_track_times(fcpl, 0), "%s: creation list", path);
    CPL_H5(CPL_HDF5, *file = H5Fcreate(path, H5F_ACC_TRUNC, fcpl, fapl), "%s: cannot be created", path);
done:
    return st;
}

size_t cpl_type_size(cpl_type t) {
    switch (t) {
    case CPL_T_F32:
        return sizeof(float);
    case CPL_T_F64:
        return sizeof(double);
    case CPL_T_I64:
        return sizeof(int64_t);
    case CPL_T_I32:
        return sizeof(int32_t);
    case CPL_T_U8:
        return sizeof(uint8_t);
    case CPL_T_U32:
        return sizeof(uint32_t);
    case CPL_T_TEXT:
        return sizeof(char *);
    }
    return 0;
}

hid_t cpl_h5_memory_type(cpl_type t) {
    switch (t) {
    case CPL_T_F32:
        return H5T_NATIVE_FLOAT;
    case CPL_T_F64:
        return H5T_NATIVE_DOUBLE;
    case CPL_T_I64:
        return H5T_NATIVE_INT64;
    case CPL_T_I32:
        return H5T_NATIVE_INT32;
    case CPL_T_U8:
        return H5T_NATIVE_UINT8;
    case CPL_T_U32:
        return H5T_NATIVE_UINT32;
    case CPL_T_TEXT:
        break;
    }
    return H5I_INVALID_HID;
}

hid_t cpl_h5_file_type(cpl_type t) {
    switch (t) {
    case CPL_T_F32:
        return H5T_IEEE_F32LE;
    case CPL_T_F64:
        return H5T_IEEE_F64LE;
    case CPL_T_I64:
        return H5T_STD_I64LE;
    case CPL_T_I32:
        return H5T_STD_I32LE;
    case CPL_T_U8:
        return H5T_STD_U8LE;
    case CPL_T_U32:
        return H5T_STD_U32LE;
    case CPL_T_TEXT:
        break;
    }
    return H5I_INVALID_HID;
}

bool cpl_h5_type_of(hid_t type, cpl_type *out) {
    static const cpl_type numbers[] = {CPL_T_F32, CPL_T_F64, CPL_T_I64, CPL_T_I32, CPL_T_U8, CPL_T_U32};
    if (H5Tget_class(type) == H5T_STRING) {
        *out = CPL_T_TEXT;
        return true;
    }
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        if (H5Tequal(type, cpl_h5_file_type(numbers[i])) > 0) {
            *out = numbers[i];
            return true;
        }
    }
    return false;
}

cpl_status cpl_h5_text_type(size_t bytes, hid_t *out) {
    cpl_status st = CPL_OK;
    CPL_H5(CPL_HDF5, *out = H5Tcopy(H5T_C_S1), "text type");
    CPL_H5(CPL_HDF5, H5Tset_size(*out, bytes == 0 ? 1 : bytes), "text type of %zu bytes", bytes);
    CPL_H5(CPL_HDF5, H5Tset_cset(*out, H5T_CSET_UTF8), "text type");
    if (bytes != H5T_VARIABLE) {
        CPL_H5(CPL_HDF5, H5Tset_strpad(*out, H5T_STR_NULLPAD), "text type");
    }
done:
    return st;
}

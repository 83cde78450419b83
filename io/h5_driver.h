/* The file driver under files being written (h5_driver.c), as h5.c sees it.
 * Refuses to be included elsewhere. */
#ifndef CPL_IO_H5_DRIVER_H
#define CPL_IO_H5_DRIVER_H

#include "io/h5.h"

typedef struct {
    int descriptor; /* first, as behind the handle of HDF5's own POSIX driver */
    int error;      /* errno of the first failed write; 0: none */
} cpl_h5_written_file;

hid_t cpl_h5_driver(void); /* borrowed; negative where HDF5 does not take it */
/* NULL if the file is not under this driver; else valid until it is closed. */
cpl_h5_written_file *cpl_h5_driven(hid_t file);
/* Closing the file leaves its error in *report. */
void cpl_h5_report_to(cpl_h5_written_file *state, int *report);

#endif

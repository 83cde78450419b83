/* What io needs to know of the ranks that write one file together; jobs fill it in from a cpl_comm.
 * Refuses to include comm: io looks into io/base alone. */
#ifndef CPL_IO_RANKS_H
#define CPL_IO_RANKS_H

#include "io/base/status.h"

typedef struct {
    int rank, size;
    const void *mpi_comm; /* borrowed MPI_Comm *, NULL without MPI */
    void *comm;           /* borrowed, handed to the two functions */
    cpl_status (*barrier)(void *comm);
    cpl_status (*agree)(void *comm, cpl_status st); /* worst status wins on all ranks */
} cpl_io_ranks;

#endif

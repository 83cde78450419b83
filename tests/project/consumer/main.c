/* Uses one thing of every installed library, so that each must link with all that it needs.
 * Refuses to be more than that. */
#include "comm/comm.h"
#include "cupel_version.h"
#include "io/base/status.h"
#include "io/jobfile.h"
#include "jobs/options.h"
#include "kernels/kernels.h"
#include <stdio.h>

int main(int argc, char **argv) {
    cpl_status st = CPL_OK;
    cpl_comm *world = NULL;
    cpl_device *dev = NULL;
    CPL_TRY(cpl_world_init(&world, &argc, &argv));
    CPL_TRY(cpl_device_create(&dev, "cpu", 0, 1));
    printf("cupel %s, %d rank, status 0 is \"%s\"\n", CUPEL_VERSION, cpl_comm_size(world), cpl_status_text(CPL_OK));
done:
    if (st != CPL_OK) {
        fprintf(stderr, "%s\n", cpl_status_message());
    }
    cpl_device_destroy(&dev);
    cpl_world_finish(&world);
    return cpl_status_exit(st);
}

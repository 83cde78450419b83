/* The device of a rank.
 * Refuses to let the ranks of a host start more threads together than it has cores for them. */
#include "jobs/device.h"
#include "io/base/hash.h"
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Host and cores in one number, equal for ranks that share them. */
static int64_t cores_identity(const cpu_set_t *cores) {
    char host[256] = "", hex[CPL_SHA256_HEX];
    cpl_sha256 h;
    gethostname(host, sizeof host - 1);
    cpl_sha256_init(&h);
    cpl_sha256_add_text(&h, host);
    cpl_sha256_add(&h, cores, sizeof *cores);
    cpl_sha256_end(&h, hex);
    hex[15] = 0;
    return (int64_t)strtoull(hex, NULL, 16);
}

static cpl_status share_of_cores(cpl_comm *world, int64_t *threads) {
    cpl_status st = CPL_OK;
    int64_t *identity = NULL, sharing = 0;
    int size = cpl_comm_size(world), rank = cpl_comm_rank(world);
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPL_TRY(cpl_agree(world, cpl_alloc(&identity, (size_t)size, sizeof *identity, "ranks of the host")));
    int64_t count = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    identity[rank] = cores_identity(&cores);
    CPL_TRY(cpl_comm_allreduce_i64(world, identity, (size_t)size, CPL_SUM));
    for (int r = 0; r < size; r++) {
        sharing += identity[r] == identity[rank];
    }
    *threads = count > sharing ? count / sharing : 1;
done:
    cpl_free(&identity);
    return st;
}

cpl_status cpl_job_device(cpl_comm *world, int choice, int64_t threads, cpl_device **dev) {
    cpl_status st = CPL_OK;
    static const char *const names[] = {"auto", "cpu", "cuda"};
    const char *omp = getenv("OMP_NUM_THREADS");
    int64_t unset = omp == NULL || omp[0] == '\0';
    CPL_TRY(cpl_comm_allreduce_i64(world, &unset, 1, CPL_MAX));
    if (threads == 0 && unset) {
        CPL_TRY(share_of_cores(world, &threads));
    }
    CPL_TRY(cpl_agree(world, cpl_device_create(dev, cpl_device_backend(names[choice]), cpl_comm_local_rank(world), (int)threads)));
done:
    return st;
}

void cpl_job_device_close(cpl_comm *world, cpl_device **dev) {
    cpl_comm_detach(world);
    cpl_device_destroy(dev);
}

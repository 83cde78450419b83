/* The CUDA back end of a build without CUDA.
 * Refuses to open. */
#include "kernels/backend.h"

static cpl_status open_nothing(cpl_device *dev, int gpu, int threads) {
    return cpl_fail(CPL_UNSUPPORTED, __FILE__, __LINE__,
                    "back end 'cuda' is not in this build (cmake --preset cuda makes one that has it): use cpu or auto");
}

static void about(void (*line)(const char *key, const char *value, void *to), void *to) {
    line("CUDA", "not in this build", to);
}

const cpl_backend cpl_cuda_backend = {.kind = "cuda", .open = open_nothing, .about = about};

/* See nvml.h. The few prototypes stand here, for machines that build need not have nvml.h (NVML API reference, r580).
 * Refuses to take an error of NVML for a figure. */
#include "kernels/cuda/nvml.h"
#include "io/base/arena.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct nvml_device *nvml_handle;
enum {
    NVML_SUCCESS = 0,
    NVML_NOT_SUPPORTED = 3,
    NVML_P2P_OK = 0,
    NVML_P2P_NVLINK = 2
}; /* nvmlReturn_t, nvmlGpuP2PStatus_t, nvmlGpuP2PCapsIndex_t */

/* X(member, symbol, parameters): all return nvmlReturn_t. */
#define NVML_FUNCTIONS(X)                                                                                                          \
    X(init, "nvmlInit_v2", (void))                                                                                                 \
    X(shutdown, "nvmlShutdown", (void))                                                                                            \
    X(by_bus, "nvmlDeviceGetHandleByPciBusId_v2", (const char *bus, nvml_handle *handle))                                          \
    X(uuid, "nvmlDeviceGetUUID", (nvml_handle handle, char *text, unsigned size))                                                  \
    X(energy, "nvmlDeviceGetTotalEnergyConsumption", (nvml_handle handle, unsigned long long *millijoules))                        \
    X(p2p, "nvmlDeviceGetP2PStatus", (nvml_handle a, nvml_handle b, int capability, int *status))                                  \
    X(driver, "nvmlSystemGetDriverVersion", (char *text, unsigned size))

struct cpl_nvml {
    void *library; /* owned */
    bool initialised;
#define NVML_MEMBER(member, symbol, parameters) int(*member) parameters; /* NULL: the library has none */
    NVML_FUNCTIONS(NVML_MEMBER)
#undef NVML_MEMBER
};

static void find_functions(cpl_nvml *nvml) {
    void *found;
#define NVML_FIND(member, symbol, parameters)                                                                                      \
    found = dlsym(nvml->library, symbol);                                                                                          \
    memcpy(&nvml->member, &found, sizeof found);
    NVML_FUNCTIONS(NVML_FIND)
#undef NVML_FIND
}

cpl_status cpl_nvml_open(cpl_nvml **out, char why[CPL_NVML_TEXT]) {
    cpl_status st = CPL_OK;
    cpl_nvml *nvml = NULL;
    const char *path = getenv("CUPEL_NVML");
    *out = NULL;
    path = path == NULL || path[0] == '\0' ? "libnvidia-ml.so.1" : path;
    CPL_TRY(cpl_alloc(&nvml, 1, sizeof *nvml, "NVML"));
    nvml->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (nvml->library == NULL) {
        snprintf(why, CPL_NVML_TEXT, "%.60s cannot be opened", path);
        goto done;
    }
    find_functions(nvml);
    int code = nvml->init == NULL || nvml->by_bus == NULL ? -1 : nvml->init();
    if (code != NVML_SUCCESS) {
        snprintf(why, CPL_NVML_TEXT, "%.60s: %s (%d)", path, code == -1 ? "is no NVML" : "does not start", code);
        goto done;
    }
    nvml->initialised = true;
    *out = nvml;
    nvml = NULL;
done:
    cpl_nvml_close(&nvml);
    return st;
}

void cpl_nvml_close(cpl_nvml **out) {
    cpl_nvml *nvml = *out;
    if (nvml == NULL) {
        return;
    }
    if (nvml->initialised && nvml->shutdown != NULL) {
        (void)nvml->shutdown();
    }
    if (nvml->library != NULL) {
        dlclose(nvml->library);
    }
    cpl_free(out);
}

bool cpl_nvml_energy(const cpl_nvml *nvml, const char *bus, double *joules, char *uuid, size_t uuid_size, char why[CPL_NVML_TEXT]) {
    nvml_handle handle = NULL;
    unsigned long long millijoules = 0;
    const char *missing = nvml->energy == NULL ? "nvmlDeviceGetTotalEnergyConsumption"
                          : nvml->uuid == NULL ? "nvmlDeviceGetUUID"
                                               : NULL;
    if (missing != NULL) {
        snprintf(why, CPL_NVML_TEXT, "NVML has no %s", missing);
        return false;
    }
    int code = nvml->by_bus(bus, &handle);
    code = code == NVML_SUCCESS ? nvml->uuid(handle, uuid, (unsigned)uuid_size) : code;
    if (code != NVML_SUCCESS) {
        snprintf(why, CPL_NVML_TEXT, "NVML does not find the GPU at %s (%d)", bus, code);
        return false;
    }
    code = nvml->energy(handle, &millijoules);
    if (code != NVML_SUCCESS) {
        snprintf(why, CPL_NVML_TEXT, "%s (%d)",
                 code == NVML_NOT_SUPPORTED ? "this GPU has no energy counter" : "NVML reads no energy", code);
        return false;
    }
    *joules = (double)millijoules * 1e-3;
    return true;
}

bool cpl_nvml_nvlink(const cpl_nvml *nvml, const char *bus_a, const char *bus_b) {
    nvml_handle a = NULL, b = NULL;
    int status = -1;
    return nvml->p2p != NULL && nvml->by_bus(bus_a, &a) == NVML_SUCCESS && nvml->by_bus(bus_b, &b) == NVML_SUCCESS &&
           nvml->p2p(a, b, NVML_P2P_NVLINK, &status) == NVML_SUCCESS && status == NVML_P2P_OK;
}

void cpl_nvml_driver(const cpl_nvml *nvml, char *text, size_t size) {
    if (nvml->driver == NULL || nvml->driver(text, (unsigned)size) != NVML_SUCCESS) {
        text[0] = '\0';
    }
}

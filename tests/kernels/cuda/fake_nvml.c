/* A stand-in for NVIDIA's management library, for tests on machines without: two GPUs, at 0000:01:00.0 and 0000:02:00.0, joined by
 * NVLink; each reading of the first one's counter is 250 J after the one before. FAKE_NVML in the environment: "broken" does not
 * start, "uncounted" has no energy counter. With FAKE_OLD it has no such function at all.
 * Refuses GPUs elsewhere, and handles of its own library that it did not give. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, DRIVER = 9 };
static const char *const buses[2] = {"0000:01:00.0", "0000:02:00.0"};
static int started;

static int mode(const char *wanted) {
    const char *said = getenv("FAKE_NVML");
    return said != NULL && strcmp(said, wanted) == 0;
}
static int is_ours(const void *handle) {
    return started == 1 && (handle == &buses[0] || handle == &buses[1]);
}

int nvmlInit_v2(void);
int nvmlShutdown(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, const void **handle);
int nvmlDeviceGetUUID(const void *handle, char *text, unsigned size);
int nvmlDeviceGetTotalEnergyConsumption(const void *handle, unsigned long long *energy);
int nvmlDeviceGetP2PStatus(const void *a, const void *b, int capability, int *status);
int nvmlSystemGetDriverVersion(char *text, unsigned size);

int nvmlInit_v2(void) {
    started += !mode("broken");
    return mode("broken") ? DRIVER : OK;
}
int nvmlShutdown(void) {
    started--;
    return OK;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, const void **handle) {
    for (int i = 0; i < 2; i++) {
        if (started == 1 && strcmp(bus, buses[i]) == 0) {
            *handle = &buses[i];
            return OK;
        }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetUUID(const void *handle, char *text, unsigned size) {
    if (!is_ours(handle)) {
        return INVALID;
    }
    snprintf(text, size, "GPU-00000000-0000-0000-0000-00000000000%d", handle == &buses[0] ? 1 : 2);
    return OK;
}
#ifndef FAKE_OLD
static unsigned long long millijoules = 1000000;

int nvmlDeviceGetTotalEnergyConsumption(const void *handle, unsigned long long *energy) {
    if (!is_ours(handle) || mode("uncounted")) {
        return is_ours(handle) ? UNSUPPORTED : INVALID;
    }
    *energy = handle == &buses[0] ? (millijoules += 250000) : 7;
    return OK;
}
#endif
int nvmlDeviceGetP2PStatus(const void *a, const void *b, int capability, int *status) {
    *status = is_ours(a) && is_ours(b) && capability == 2 ? 0 : 1;
    return OK;
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    snprintf(text, size, "999.01");
    return OK;
}

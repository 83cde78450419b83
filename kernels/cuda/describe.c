/* What is known of the GPUs without computing on them: names, links, energy, versions.
 * Refuses to hide a figure that is missing: it says why. */
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/nvml.h"
#include <cublasLt.h>
#include <stdio.h>
#include <string.h>
#ifdef CPL_CUDNN
#include <cudnn.h>
#endif

static void uuid_text(const cudaUUID_t *uuid, char out[CPL_GPU_UUID]) {
    static const int dash_before[] = {4, 6, 8, 10};
    size_t used = (size_t)snprintf(out, CPL_GPU_UUID, "GPU-");
    for (int i = 0, dash = 0; i < 16; i++) {
        bool dashed = dash < 4 && dash_before[dash] == i;
        dash += dashed;
        used += (size_t)snprintf(out + used, CPL_GPU_UUID - used, "%s%02x", dashed ? "-" : "", (unsigned char)uuid->bytes[i]);
    }
}

int cpl_cuda_gpus(cpl_gpu *list, int most) {
    int count = 0, n = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        count = 0;
    }
    for (int i = 0; i < count && n < most; i++) {
        struct cudaDeviceProp p;
        cpl_gpu *gpu = &list[n];
        if (cudaGetDeviceProperties(&p, i) != cudaSuccess || 10 * p.major + p.minor < CPL_CUDA_OLDEST ||
            cudaDeviceGetPCIBusId(gpu->bus, sizeof gpu->bus, i) != cudaSuccess) {
            continue;
        }
        snprintf(gpu->name, sizeof gpu->name, "%.100s", p.name);
        uuid_text(&p.uuid, gpu->uuid);
        gpu->ordinal = i;
        gpu->memory = p.totalGlobalMem;
        gpu->sm_count = p.multiProcessorCount;
        gpu->capability = 10 * p.major + p.minor;
        n++;
    }
    (void)cudaGetLastError();
    return n;
}

cpl_gpu_link cpl_cuda_link(const cpl_gpu *from, const cpl_gpu *to) {
    int direct = 0, atomics = 0;
    char why[CPL_NVML_TEXT];
    cpl_nvml *nvml = NULL;
    bool nvlink = false;
    if (cudaDeviceCanAccessPeer(&direct, from->ordinal, to->ordinal) != cudaSuccess || !direct) {
        (void)cudaGetLastError();
        return CPL_LINK_NONE;
    }
    if (cpl_nvml_open(&nvml, why) == CPL_OK && nvml != NULL) {
        nvlink = cpl_nvml_nvlink(nvml, from->bus, to->bus);
        cpl_nvml_close(&nvml);
    } else if (cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, from->ordinal, to->ordinal) ==
               cudaSuccess) {
        nvlink = atomics != 0; /* on x86 hosts PCI has none */
    }
    (void)cudaGetLastError();
    return nvlink ? CPL_LINK_NVLINK : CPL_LINK_PCI;
}

void cpl_cuda_energy(cpl_device *dev, cpl_energy *out) {
    char why[CPL_NVML_TEXT];
    const cpl_cuda *cuda = cpl_cuda_of(dev);
    if (cuda->nvml != NULL && cpl_nvml_energy(cuda->nvml, cuda->gpu.bus, &out->joules, out->meter, sizeof out->meter, why)) {
        out->source = "NVML";
    }
}

void cpl_cuda_about(void (*line)(const char *key, const char *value, void *to), void *to) {
    char text[200], why[CPL_NVML_TEXT] = "", version[64] = "";
    int runtime = 0, driver = 0, count = 0;
    cpl_nvml *nvml = NULL;
    (void)cudaRuntimeGetVersion(&runtime);
    (void)cudaDriverGetVersion(&driver);
    cudaError_t error = cudaGetDeviceCount(&count);
    (void)cudaGetLastError();
    if (cpl_nvml_open(&nvml, why) == CPL_OK && nvml != NULL) {
        cpl_nvml_driver(nvml, version, sizeof version);
        cpl_nvml_close(&nvml);
    }
    if (error != cudaSuccess || count == 0) {
        snprintf(text, sizeof text, "%d.%d, no GPU can be used here (%s)", runtime / 1000, runtime % 1000 / 10,
                 error == cudaSuccess ? "none is visible" : cudaGetErrorString(error));
    } else {
        snprintf(text, sizeof text, "%d.%d, driver %s%sfor up to %d.%d, %d GPU%s", runtime / 1000, runtime % 1000 / 10, version,
                 version[0] == '\0' ? "" : " ", driver / 1000, driver % 1000 / 10, count, count == 1 ? "" : "s");
    }
    line("CUDA", text, to);
    size_t lt = cublasLtGetVersion();
    snprintf(text, sizeof text, "%zu.%zu.%zu", lt / 10000, lt / 100 % 100, lt % 100);
    line("cuBLASLt", text, to);
#ifdef CPL_CUDNN
    size_t dnn = cudnnGetVersion();
    snprintf(text, sizeof text, "%zu.%zu.%zu", dnn / 10000, dnn / 100 % 100, dnn % 100);
    line("cuDNN", text, to);
#else
    line("cuDNN", "not in this build: attention is by our own kernels", to);
#endif
}

void cpl_cuda_describe(const cpl_device *dev, void (*line)(const char *key, const char *value, void *to), void *to) {
    const cpl_cuda *cuda = cpl_cuda_of(dev);
    char text[200], why[CPL_NVML_TEXT] = "", uuid[CPL_GPU_UUID];
    size_t left = 0, all = 0;
    double joules = 0;
    if (cudaMemGetInfo(&left, &all) == cudaSuccess) {
        snprintf(text, sizeof text, "%.1f of %.1f GiB free", (double)left / 0x1p30, (double)all / 0x1p30);
        line("GPU memory", text, to);
    }
    if (cuda->nvml == NULL) {
        snprintf(text, sizeof text, "not measured: %s", cuda->nvml_missing);
    } else if (cpl_nvml_energy(cuda->nvml, cuda->gpu.bus, &joules, uuid, sizeof uuid, why)) {
        snprintf(text, sizeof text, "NVML, %.0f J since the driver was loaded", joules);
    } else {
        snprintf(text, sizeof text, "not measured: %s", why);
    }
    line("energy", text, to);
}

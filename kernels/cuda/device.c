/* The CUDA back end as a device: memory, copies, what it opens and closes.
 * Refuses a GPU older than sm_80. */
#include "kernels/cuda/cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const cpl_ops cpl_cuda_ops;

cpl_status cpl_cuda_status(cudaError_t error, const char *file, int line, const char *doing) {
    if (error == cudaSuccess) {
        return CPL_OK;
    }
    cpl_status code = error == cudaErrorMemoryAllocation ? CPL_NO_MEMORY : CPL_DEVICE;
    return cpl_fail(code, file, line, "%s: CUDA: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}

cpl_status cpl_cuda_launched(cpl_device *dev, const char *op) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    CPL_CUDA_TRY(op, cudaGetLastError());
    if (cuda->blocking && !cuda->recording) {
        CPL_CUDA_TRY(op, cudaStreamSynchronize(cuda->stream));
    }
done:
    return st;
}

/* --- memory --- */

static cpl_status allocate(cpl_device *dev, void **out, size_t bytes, const char *what) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    void *memory = NULL;
    if (cuda->recording) {
        CPL_FAIL(CPL_INTERNAL, "%s: memory cannot be taken while a graph is recorded", what);
    }
    cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaErrorMemoryAllocation) {
        size_t left = 0, all = 0;
        (void)cudaGetLastError();
        (void)cudaMemGetInfo(&left, &all);
        CPL_FAIL(CPL_NO_MEMORY, "%s: %.2f GiB wanted on %s, %.2f of %.2f GiB are free; this process holds %.2f", what,
                 (double)bytes / 0x1p30, dev->name, (double)left / 0x1p30, (double)all / 0x1p30,
                 (double)cuda->shared.held / 0x1p30);
    }
    CPL_CUDA_TRY(what, error);
    CPL_CUDA_TRY(what, cudaMemsetAsync(memory, 0, bytes, cuda->stream));
    *out = memory;
    memory = NULL;
done:
    if (memory != NULL) {
        cudaFree(memory);
    }
    return st;
}

static void release(cpl_device *dev, void *memory, size_t bytes) {
    cudaStreamSynchronize(cpl_cuda_stream(dev));
    cudaFree(memory);
}

static void look_at_memory(cpl_device *dev, size_t *left, size_t *all) {
    if (cudaMemGetInfo(left, all) != cudaSuccess) {
        (void)cudaGetLastError();
        *left = *all = 0;
    }
}

static cpl_status allocate_host(cpl_device *dev, void **out, size_t bytes, const char *what) {
    cpl_status st = CPL_OK;
    CPL_CUDA_TRY(what, cudaMallocHost(out, bytes));
    memset(*out, 0, bytes);
done:
    return st;
}

static void release_host(cpl_device *dev, void *memory) {
    cudaFreeHost(memory);
}

/* Recorded graphs may hold the address: kept until none is left. */
static cpl_status outgrow(cpl_cuda *cuda, void *memory) {
    cpl_status st = CPL_OK;
    void **grown = NULL;
    CPL_TRY(cpl_alloc(&grown, cuda->outgrown_count + 1, sizeof *grown, "list of device memory"));
    if (cuda->outgrown_count > 0) {
        memcpy(grown, cuda->outgrown, cuda->outgrown_count * sizeof *grown);
    }
    grown[cuda->outgrown_count++] = memory;
    cpl_free(&cuda->outgrown);
    cuda->outgrown = grown;
done:
    return st;
}

void cpl_cuda_free_outgrown(cpl_device *dev) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    for (size_t i = 0; i < cuda->outgrown_count; i++) {
        cpl_device_free(dev, &cuda->outgrown[i]);
    }
    cpl_free(&cuda->outgrown);
    cuda->outgrown_count = 0;
}

cpl_status cpl_cuda_scratch(cpl_device *dev, int slot, size_t bytes, void *out) {
    static const char *const names[] = {[CPL_CUDA_SCRATCH_ROWS] = "partial sums over rows",
                                        [CPL_CUDA_SCRATCH_ATTENTION] = "workspace of attention",
                                        [CPL_CUDA_SCRATCH_LINEAR] = "bias gradients",
                                        [CPL_CUDA_SCRATCH_FLAT] = "partial sums of a flat buffer"};
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (bytes > cuda->scratch_bytes[slot]) {
        if (cuda->recording) {
            CPL_FAIL(CPL_INTERNAL, "scratch memory of %zu bytes: expected to be taken before a graph is recorded", bytes);
        }
        if (cuda->scratch[slot] != NULL && cuda->graphs > 0) {
            CPL_TRY(outgrow(cuda, cuda->scratch[slot]));
            cuda->scratch[slot] = NULL;
        }
        cpl_device_free(dev, &cuda->scratch[slot]);
        cuda->scratch_bytes[slot] = 0;
        CPL_TRY(cpl_device_alloc(dev, &cuda->scratch[slot], bytes, 1, names[slot]));
        cuda->scratch_bytes[slot] = bytes;
    }
    memcpy(out, &cuda->scratch[slot], sizeof(void *));
done:
    return st;
}

static void trim(cpl_device *dev) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    for (int i = 0; i < CPL_CUDA_SCRATCH_COUNT && cuda->graphs == 0; i++) {
        cpl_device_free(dev, &cuda->scratch[i]);
        cuda->scratch_bytes[i] = 0;
    }
}

cpl_status cpl_cuda_constant(cpl_device *dev, const void *host, size_t bytes, const void **out) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    for (int i = 0; i < cuda->tables; i++) {
        if (cuda->table[i].bytes == bytes && memcmp(cuda->table[i].host, host, bytes) == 0) {
            *out = cuda->table[i].device;
            return CPL_OK;
        }
    }
    if (cuda->tables == CPL_CUDA_TABLES || cuda->recording) {
        CPL_FAIL(CPL_INTERNAL, "table of %zu bytes: expected at most %d different ones, each used once before a graph is recorded",
                 bytes, CPL_CUDA_TABLES);
    }
    cpl_cuda_table *t = &cuda->table[cuda->tables++];
    t->bytes = bytes;
    CPL_TRY(cpl_alloc(&t->host, bytes, 1, "table"));
    memcpy(t->host, host, bytes);
    CPL_TRY(cpl_device_alloc(dev, &t->device, bytes, 1, "table"));
    CPL_CUDA_TRY("table", cudaMemcpyAsync(t->device, host, bytes, cudaMemcpyHostToDevice, cuda->stream));
    CPL_CUDA_TRY("table", cudaStreamSynchronize(cuda->stream));
    *out = t->device;
done:
    return st;
}

cpl_status CPL_CUDA(zero)(cpl_device *dev, void *x, size_t bytes) {
    cpl_status st = CPL_OK;
    CPL_CUDA_TRY("zero", cudaMemsetAsync(x, 0, bytes, cpl_cuda_stream(dev)));
    st = cpl_cuda_launched(dev, "zero");
done:
    return st;
}

static cpl_status copied(cpl_device *dev, void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, bool wait,
                         const char *doing) {
    cpl_status st = CPL_OK;
    if (bytes == 0) {
        return CPL_OK;
    }
    CPL_CUDA_TRY(doing, cudaMemcpyAsync(to, from, bytes, kind, cpl_cuda_stream(dev)));
    if (wait || cpl_cuda_of(dev)->blocking) {
        CPL_CUDA_TRY(doing, cudaStreamSynchronize(cpl_cuda_stream(dev)));
    }
done:
    return st;
}

cpl_status CPL_CUDA(upload)(cpl_device *dev, void *device_to, const void *host_from, size_t bytes) {
    return copied(dev, device_to, host_from, bytes, cudaMemcpyHostToDevice, true, "upload");
}
cpl_status CPL_CUDA(download)(cpl_device *dev, void *host_to, const void *device_from, size_t bytes) {
    return copied(dev, host_to, device_from, bytes, cudaMemcpyDeviceToHost, true, "download");
}
cpl_status CPL_CUDA(feed)(cpl_device *dev, void *device_to, const void *host_from, size_t bytes) {
    return copied(dev, device_to, host_from, bytes, cudaMemcpyHostToDevice, false, "feed");
}
cpl_status CPL_CUDA(fetch)(cpl_device *dev, void *host_to, const void *device_from, size_t bytes) {
    return copied(dev, host_to, device_from, bytes, cudaMemcpyDeviceToHost, false, "fetch");
}
cpl_status CPL_CUDA(copy)(cpl_device *dev, void *to, const void *from, size_t bytes) {
    return copied(dev, to, from, bytes, cudaMemcpyDeviceToDevice, false, "copy");
}
cpl_status CPL_CUDA(synchronize)(cpl_device *dev) {
    return cpl_cuda_status(cudaStreamSynchronize(cpl_cuda_stream(dev)), __FILE__, __LINE__, "wait for the GPU");
}

/* --- the device --- */

static void identity(const cpl_device *dev, char *out, size_t size) {
    snprintf(out, size, "%s", cpl_cuda_of(dev)->gpu.bus);
}

static void *stream(const cpl_device *dev) {
    return cpl_cuda_stream(dev);
}

static void close_device(cpl_device *dev) {
    cpl_cuda *cuda = cpl_cuda_of(dev);
    if (cuda->stream != NULL) {
        cudaStreamSynchronize(cuda->stream);
    }
    cpl_cuda_attention_close(dev);
    cpl_cuda_linear_close(dev);
    cpl_device_free_all(dev);
    cpl_nvml_close(&cuda->nvml);
    for (int i = 0; i < cuda->tables; i++) {
        cpl_free(&cuda->table[i].host);
    }
    cpl_cuda_marks_free(cuda);
    cpl_cuda_beside_free(cuda);
    if (cuda->stream != NULL) {
        cudaStreamDestroy(cuda->stream);
    }
    cpl_free(&cuda->outgrown);
    cpl_free(&cuda);
    dev->impl = NULL;
}

static cpl_status choose(cpl_device *dev, int gpu) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = cpl_cuda_of(dev);
    cpl_gpu *list = NULL;
    int visible = 0;
    cudaError_t error = cudaGetDeviceCount(&visible);
    if (error != cudaSuccess || visible == 0) {
        (void)cudaGetLastError();
        CPL_FAIL(CPL_UNSUPPORTED, "device cuda: no GPU can be used here (%s)",
                 error == cudaSuccess ? "none is visible" : cudaGetErrorString(error));
    }
    CPL_TRY(cpl_alloc(&list, CPL_GPUS_MAX, sizeof *list, "list of GPUs"));
    int count = cpl_cuda_gpus(list, CPL_GPUS_MAX);
    if (count == 0) {
        CPL_FAIL(CPL_UNSUPPORTED, "device cuda: %d GPU%s visible, none of sm_%d or newer", visible, visible == 1 ? " is" : "s are",
                 CPL_CUDA_OLDEST);
    }
    if (gpu >= count) {
        CPL_FAIL(CPL_UNSUPPORTED, "device cuda: GPU %d of %d is not there", gpu, count);
    }
    cuda->gpu = list[gpu];
    CPL_CUDA_TRY("choose a GPU", cudaSetDevice(cuda->gpu.ordinal));
    snprintf(dev->name, sizeof dev->name, "%.100s", cuda->gpu.name);
    snprintf(dev->where, sizeof dev->where, "%.12s at %s", cuda->gpu.uuid, cuda->gpu.bus);
    cuda->ordinal = cuda->gpu.ordinal;
    cuda->capability = cuda->gpu.capability;
    cuda->sm_count = cuda->gpu.sm_count;
done:
    cpl_free(&list);
    return st;
}

static cpl_status open_device(cpl_device *dev, int gpu, int threads) {
    cpl_status st = CPL_OK;
    cpl_cuda *cuda = NULL;
    const char *blocking = getenv("CUDA_LAUNCH_BLOCKING");
    CPL_TRY(cpl_alloc(&cuda, 1, sizeof *cuda, "device"));
    cuda->shared.backend = &cpl_cuda_backend; /* cpl_device_alloc is called before this function returns */
    cuda->shared.most = SIZE_MAX;
    dev->impl = cuda;
    dev->ops = &cpl_cuda_ops;
    CPL_TRY(choose(dev, gpu));
    cuda->threads = threads;
    cuda->blocking = blocking != NULL && strcmp(blocking, "1") == 0;
    CPL_CUDA_TRY("make a stream", cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking));
    CPL_TRY(cpl_nvml_open(&cuda->nvml, cuda->nvml_missing));
    CPL_TRY(cpl_cuda_linear_open(dev));
done:
    if (st != CPL_OK && cuda != NULL) {
        close_device(dev);
    }
    return st;
}

static int host_threads(const cpl_device *dev) {
    return cpl_cuda_of(dev)->threads;
}

const cpl_backend cpl_cuda_backend = {.kind = "cuda",
                                      .has_tf32 = true,
                                      .open = open_device,
                                      .close = close_device,
                                      .alloc = allocate,
                                      .free = release,
                                      .memory = look_at_memory,
                                      .energy = cpl_cuda_energy,
                                      .trim = trim,
                                      .pass_bytes = cpl_cuda_pass_bytes,
                                      .gpus = cpl_cuda_gpus,
                                      .link = cpl_cuda_link,
                                      .host_alloc = allocate_host,
                                      .host_free = release_host,
                                      .mark = cpl_cuda_mark,
                                      .wait = cpl_cuda_wait_mark,
                                      .mark_ms = cpl_cuda_mark_ms,
                                      .over = cpl_cuda_over_mark,
                                      .identity = identity,
                                      .stream = stream,
                                      .reaches = cpl_cuda_reaches,
                                      .share = cpl_cuda_share,
                                      .map = cpl_cuda_map,
                                      .unmap = cpl_cuda_unmap,
                                      .meet = cpl_cuda_meet,
                                      .copy_beside = cpl_cuda_copy_beside,
                                      .join = cpl_cuda_join,
                                      .record = cpl_cuda_record,
                                      .replay = cpl_cuda_replay,
                                      .forget = cpl_cuda_forget,
                                      .threads = host_threads,
                                      .about = cpl_cuda_about,
                                      .describe = cpl_cuda_describe};

/* Devices: choice of a back end and accounting of its memory.
 * Refuses to fall back in silence: a back end asked for by name is there or the call fails. */
#include "io/base/number.h"
#include "kernels/backend.h"
#include <omp.h>
#include <stdlib.h>
#include <string.h>

static const cpl_backend *const backends[] = {&cpl_cuda_backend, &cpl_cpu_backend}; /* "auto" takes the first that opens */
enum { BACKENDS = sizeof backends / sizeof backends[0] };

const char *cpl_dtype_name(cpl_dtype t) {
    static const char *const names[] = {[CPL_F32] = "fp32", [CPL_BF16] = "bf16", [CPL_F16] = "fp16", [CPL_TF32] = "tf32"};
    return names[t];
}

static cpl_backend_device *shared_of(const cpl_device *dev) {
    return dev->impl;
}

const char *cpl_device_backend(const char *backend) {
    const char *chosen = getenv("CUPEL_DEVICE");
    return strcmp(backend, "auto") == 0 && chosen != NULL && chosen[0] != '\0' ? chosen : backend;
}

/* CUPEL_DEVICE_BYTES. */
static cpl_status memory_limit(size_t *most) {
    const char *text = getenv("CUPEL_DEVICE_BYTES");
    int64_t bytes = 0;
    *most = SIZE_MAX;
    if (text == NULL || text[0] == '\0') {
        return CPL_OK;
    }
    if (!cpl_number_integer(text, &bytes) || bytes < 0) {
        return cpl_fail(CPL_USAGE, __FILE__, __LINE__, "CUPEL_DEVICE_BYTES=%s in the environment: expected bytes such as 512Mi",
                        text);
    }
    *most = (size_t)bytes;
    return CPL_OK;
}

cpl_status cpl_device_create(cpl_device **out, const char *backend, int gpu, int threads) {
    cpl_status st = CPL_OK;
    cpl_device *dev = NULL;
    size_t most = SIZE_MAX;
    *out = NULL;
    CPL_TRY(memory_limit(&most));
    const char *chosen = getenv("CUPEL_DEVICE");
    backend = cpl_device_backend(backend);
    bool automatic = strcmp(backend, "auto") == 0;
    if (!automatic && strcmp(backend, "cpu") != 0 && strcmp(backend, "cuda") != 0) {
        CPL_FAIL(CPL_USAGE, "back end '%s'%s: expected auto, cpu or cuda", backend,
                 chosen != NULL && strcmp(backend, chosen) == 0 ? " (CUPEL_DEVICE)" : "");
    }
    if (threads < 0 || gpu < 0) {
        CPL_FAIL(CPL_USAGE, "device: %d threads and GPU %d: expected 0 or more", threads, gpu);
    }
    CPL_TRY(cpl_alloc(&dev, 1, sizeof *dev, "device"));
    for (int i = 0; i < BACKENDS; i++) {
        if (automatic || strcmp(backend, backends[i]->kind) == 0) {
            st = backends[i]->open(dev, gpu, threads > 0 ? threads : omp_get_max_threads());
            if (st == CPL_OK) {
                dev->kind = backends[i]->kind;
                shared_of(dev)->backend = backends[i];
                shared_of(dev)->most = most;
                *out = dev;
                return CPL_OK;
            }
            if (!automatic || st != CPL_UNSUPPORTED) {
                goto done;
            }
        }
    }
done:
    cpl_free(&dev);
    return st;
}

void cpl_device_destroy(cpl_device **dev) {
    if (dev == NULL || *dev == NULL) {
        return;
    }
    const cpl_backend *backend = shared_of(*dev)->backend;
    cpl_device_free_all(*dev);
    backend->close(*dev);
    cpl_free(dev);
}

void cpl_device_free_all(cpl_device *dev) {
    cpl_backend_device *shared = shared_of(dev);
    for (size_t i = 0; i < shared->count; i++) {
        shared->backend->free(dev, shared->blocks[i].memory, shared->blocks[i].bytes);
    }
    cpl_free(&shared->blocks);
    shared->count = shared->capacity = shared->held = 0;
}

static cpl_status reserve_block(cpl_backend_device *shared) {
    cpl_status st = CPL_OK;
    cpl_block *grown = NULL;
    if (shared->count < shared->capacity) {
        return CPL_OK;
    }
    size_t capacity = shared->capacity == 0 ? 64 : 2 * shared->capacity;
    CPL_TRY(cpl_alloc(&grown, capacity, sizeof *grown, "list of device memory"));
    if (shared->count != 0) {
        memcpy(grown, shared->blocks, shared->count * sizeof *grown);
    }
    cpl_free(&shared->blocks);
    shared->blocks = grown;
    shared->capacity = capacity;
done:
    return st;
}

cpl_status cpl_device_alloc(cpl_device *dev, void *out, size_t count, size_t size, const char *what) {
    cpl_status st = CPL_OK;
    cpl_backend_device *shared = shared_of(dev);
    void *memory = NULL;
    size_t bytes;
    memcpy(out, &memory, sizeof memory);
    if (!cpl_mul_size(count, size, &bytes)) {
        CPL_FAIL(CPL_NO_MEMORY, "%s: %zu elements of %zu bytes do not fit the address space", what, count, size);
    }
    if (bytes == 0) {
        return CPL_OK;
    }
    if (shared->most != SIZE_MAX && (shared->held > shared->most || bytes > shared->most - shared->held)) {
        CPL_FAIL(CPL_NO_MEMORY, "%s: %zu bytes wanted on %s; CUPEL_DEVICE_BYTES allows %zu, and this process holds %zu", what,
                 bytes, dev->name, shared->most, shared->held);
    }
    CPL_TRY(reserve_block(shared));
    CPL_TRY(shared->backend->alloc(dev, &memory, bytes, what));
    shared->blocks[shared->count++] = (cpl_block){.memory = memory, .bytes = bytes};
    shared->held += bytes;
    if (shared->held > shared->peak) {
        shared->peak = shared->held;
        cpl_device_look(dev);
    }
    memcpy(out, &memory, sizeof memory);
done:
    return st;
}

void cpl_device_free(cpl_device *dev, void *pointer) {
    void *memory = NULL;
    void *none = NULL;
    if (pointer == NULL) {
        return;
    }
    memcpy(&memory, pointer, sizeof memory);
    if (memory == NULL) {
        return;
    }
    cpl_backend_device *shared = shared_of(dev);
    for (size_t i = shared->count; i-- > 0;) {
        if (shared->blocks[i].memory == memory) {
            size_t bytes = shared->blocks[i].bytes;
            shared->blocks[i] = shared->blocks[--shared->count];
            shared->held -= bytes;
            shared->backend->free(dev, memory, bytes);
            memcpy(pointer, &none, sizeof none);
            return;
        }
    }
}

void cpl_device_memory(const cpl_device *dev, size_t *held, size_t *peak) {
    *held = shared_of(dev)->held;
    *peak = shared_of(dev)->peak;
}

void cpl_device_peak_restart(cpl_device *dev) {
    shared_of(dev)->peak = shared_of(dev)->held;
    shared_of(dev)->used_peak = 0;
    cpl_device_look(dev);
}

void cpl_device_look(cpl_device *dev) {
    cpl_backend_device *shared = shared_of(dev);
    size_t left = 0, all = 0;
    if (shared->backend->memory != NULL) {
        shared->backend->memory(dev, &left, &all);
        shared->used_peak = all - left > shared->used_peak ? all - left : shared->used_peak;
    }
}

size_t cpl_device_memory_used(const cpl_device *dev) {
    return shared_of(dev)->used_peak;
}

size_t cpl_device_memory_room(const cpl_device *dev) {
    const cpl_backend_device *shared = shared_of(dev);
    size_t left = 0, all = 0, room = shared->most;
    if (shared->backend->memory != NULL) {
        shared->backend->memory((cpl_device *)dev, &left, &all);
        room = shared->held + left < room ? shared->held + left : room;
    }
    return room;
}

void cpl_device_trim(cpl_device *dev) {
    if (shared_of(dev)->backend->trim != NULL) {
        shared_of(dev)->backend->trim(dev);
    }
}

void cpl_device_pass_bytes(const char *kind, const cpl_pass *pass, int64_t *bytes) {
    *bytes = -1;
    for (int i = 0; i < BACKENDS; i++) {
        if (strcmp(backends[i]->kind, kind) == 0 && backends[i]->pass_bytes != NULL) {
            *bytes = backends[i]->pass_bytes(pass);
        }
    }
}

void cpl_device_energy(cpl_device *dev, cpl_energy *out) {
    const cpl_backend *backend = shared_of(dev)->backend;
    memset(out, 0, sizeof *out);
    if (backend->energy != NULL) {
        backend->energy(dev, out);
    }
}

cpl_status cpl_device_host_alloc(cpl_device *dev, void *out, size_t count, size_t size, const char *what) {
    const cpl_backend *backend = shared_of(dev)->backend;
    void *memory = NULL;
    size_t bytes;
    memcpy(out, &memory, sizeof memory);
    if (backend->host_alloc == NULL || count == 0 || size == 0) {
        return cpl_alloc(out, count, size, what);
    }
    if (!cpl_mul_size(count, size, &bytes)) {
        return cpl_fail(CPL_NO_MEMORY, __FILE__, __LINE__, "%s: %zu elements of %zu bytes do not fit the address space", what,
                        count, size);
    }
    cpl_status st = backend->host_alloc(dev, &memory, bytes, what);
    memcpy(out, &memory, sizeof memory);
    return st;
}

void cpl_device_host_free(cpl_device *dev, void *pointer) {
    const cpl_backend *backend = shared_of(dev)->backend;
    void *memory = NULL;
    void *none = NULL;
    memcpy(&memory, pointer, sizeof memory);
    if (memory == NULL) {
        return;
    }
    if (backend->host_free == NULL) {
        cpl_free(pointer);
    } else {
        backend->host_free(dev, memory);
        memcpy(pointer, &none, sizeof none);
    }
}

cpl_status cpl_device_mark(cpl_device *dev, int slot) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->mark == NULL ? CPL_OK : backend->mark(dev, slot);
}

cpl_status cpl_device_wait(cpl_device *dev, int slot) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->wait == NULL ? CPL_OK : backend->wait(dev, slot);
}

cpl_status cpl_device_mark_ms(cpl_device *dev, int from, int to, double *ms) {
    const cpl_backend *backend = shared_of(dev)->backend;
    *ms = 0;
    return backend->mark_ms == NULL ? CPL_OK : backend->mark_ms(dev, from, to, ms);
}

cpl_status cpl_device_over(cpl_device *dev, int slot, bool *over) {
    const cpl_backend *backend = shared_of(dev)->backend;
    *over = true;
    return backend->over == NULL ? CPL_OK : backend->over(dev, slot, over);
}

void cpl_device_identity(const cpl_device *dev, char *out, size_t size) {
    const cpl_backend *backend = shared_of(dev)->backend;
    out[0] = '\0';
    if (backend->identity != NULL) {
        backend->identity(dev, out, size);
    }
}

void *cpl_device_stream(const cpl_device *dev) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->stream == NULL ? NULL : backend->stream(dev);
}

bool cpl_device_reaches(const cpl_device *dev, const char *identity) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->reaches != NULL && backend->reaches(dev, identity);
}

static cpl_status unreachable(const cpl_device *dev) {
    return cpl_fail(CPL_INTERNAL, __FILE__, __LINE__, "the memory of %s is not for other processes", dev->name);
}

cpl_status cpl_device_share(cpl_device *dev, const void *memory, cpl_shared_name *out) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->share == NULL ? unreachable(dev) : backend->share(dev, memory, out);
}

cpl_status cpl_device_map(cpl_device *dev, const cpl_shared_name *name, void **out) {
    const cpl_backend *backend = shared_of(dev)->backend;
    *out = NULL;
    return backend->map == NULL ? unreachable(dev) : backend->map(dev, name, out);
}

void cpl_device_unmap(cpl_device *dev, void *memory) {
    const cpl_backend *backend = shared_of(dev)->backend;
    if (backend->unmap != NULL && memory != NULL) {
        backend->unmap(dev, memory);
    }
}

cpl_status cpl_device_meet(cpl_device *dev, const cpl_reach *board, uint32_t *word) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->meet == NULL ? unreachable(dev) : backend->meet(dev, board, word);
}

cpl_status cpl_device_copy_beside(cpl_device *dev, void *to, const void *from, size_t bytes) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->copy_beside == NULL ? unreachable(dev) : backend->copy_beside(dev, to, from, bytes);
}

cpl_status cpl_device_join(cpl_device *dev) {
    const cpl_backend *backend = shared_of(dev)->backend;
    return backend->join == NULL ? unreachable(dev) : backend->join(dev);
}

cpl_status cpl_device_record(cpl_device *dev, cpl_status (*body)(void *context), void *context, cpl_graph **out) {
    const cpl_backend *backend = shared_of(dev)->backend;
    cpl_trace *trace = dev->trace;
    *out = NULL;
    dev->trace = NULL; /* what is recorded does not run */
    cpl_status st = backend->record == NULL ? CPL_OK : backend->record(dev, body, context, out);
    dev->trace = trace;
    cpl_device_look(dev);
    return st;
}

cpl_status cpl_device_replay(cpl_device *dev, cpl_graph *graph) {
    return shared_of(dev)->backend->replay(dev, graph);
}

void cpl_graph_destroy(cpl_device *dev, cpl_graph **graph) {
    if (*graph != NULL) {
        shared_of(dev)->backend->forget(dev, *graph);
        *graph = NULL;
    }
}

int cpl_gpus(cpl_gpu list[CPL_GPUS_MAX]) {
    return cpl_cuda_backend.gpus == NULL ? 0 : cpl_cuda_backend.gpus(list, CPL_GPUS_MAX);
}

cpl_gpu_link cpl_gpus_link(const cpl_gpu *from, const cpl_gpu *to) {
    return cpl_cuda_backend.link == NULL ? CPL_LINK_NONE : cpl_cuda_backend.link(from, to);
}

int cpl_device_threads(const cpl_device *dev) {
    return shared_of(dev)->backend->threads(dev);
}

bool cpl_device_has(const cpl_device *dev, cpl_dtype dt) {
    return dt != CPL_TF32 || shared_of(dev)->backend->has_tf32;
}

void cpl_device_describe(const cpl_device *dev, void (*line)(const char *key, const char *value, void *to), void *to) {
    line("device", dev->name, to);
    shared_of(dev)->backend->describe(dev, line, to);
    for (int i = 0; i < BACKENDS; i++) {
        if (backends[i]->about != NULL) {
            backends[i]->about(line, to);
        }
    }
}

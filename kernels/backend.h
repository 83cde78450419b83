/* What a back end offers to kernels/device.c beside its table of operations.
 * Refuses to be included from outside kernels/. */
#ifndef CPL_KERNELS_BACKEND_H
#define CPL_KERNELS_BACKEND_H

#include "kernels/gpus.h"
#include "kernels/kernels.h"

typedef struct {
    const char *kind; /* "cpu", "cuda" */
    bool has_tf32;    /* linear_* take CPL_TF32 */
    /* Fills dev->ops, dev->name and dev->impl, whose first member is a cpl_backend_device. threads: of this process, at least 1.
     * Errors: CPL_UNSUPPORTED with what is missing. */
    cpl_status (*open)(cpl_device *dev, int gpu, int threads);
    void (*close)(cpl_device *dev);
    /* *out = `bytes` > 0 zeroed, 64-byte aligned, at least 64 of them. Errors: CPL_NO_MEMORY naming `what`. */
    cpl_status (*alloc)(cpl_device *dev, void **out, size_t bytes, const char *what);
    void (*free)(cpl_device *dev, void *memory, size_t bytes);
    void (*memory)(cpl_device *dev, size_t *left, size_t *all); /* of the whole device, by its driver; NULL: not known */
    void (*energy)(cpl_device *dev, cpl_energy *out);           /* *out is zeroed; NULL: not measured */
    void (*trim)(cpl_device *dev);                              /* NULL: keeps nothing that is counted */
    int64_t (*pass_bytes)(const cpl_pass *pass);                /* NULL: it is not in this build */
    int (*gpus)(cpl_gpu *list, int most);                       /* NULL, and link: it has none */
    cpl_gpu_link (*link)(const cpl_gpu *from, const cpl_gpu *to);
    /* NULL in all of these: the device is the host, memory is plain and operations are over when they return. */
    cpl_status (*host_alloc)(cpl_device *dev, void **out, size_t bytes, const char *what); /* page-locked, zeroed */
    void (*host_free)(cpl_device *dev, void *memory);
    cpl_status (*mark)(cpl_device *dev, int slot);
    cpl_status (*wait)(cpl_device *dev, int slot);
    cpl_status (*mark_ms)(cpl_device *dev, int from, int to, double *ms);
    cpl_status (*over)(cpl_device *dev, int slot, bool *over);
    void (*identity)(const cpl_device *dev, char *out, size_t size);
    void *(*stream)(const cpl_device *dev);
    /* NULL: no other process reaches its memory. */
    bool (*reaches)(const cpl_device *dev, const char *identity);
    cpl_status (*share)(cpl_device *dev, const void *memory, cpl_shared_name *out);
    cpl_status (*map)(cpl_device *dev, const cpl_shared_name *name, void **out);
    void (*unmap)(cpl_device *dev, void *memory);
    cpl_status (*meet)(cpl_device *dev, const cpl_reach *board, uint32_t *word);
    cpl_status (*copy_beside)(cpl_device *dev, void *to, const void *from, size_t bytes);
    cpl_status (*join)(cpl_device *dev);
    cpl_status (*record)(cpl_device *dev, cpl_status (*body)(void *context), void *context, cpl_graph **out);
    cpl_status (*replay)(cpl_device *dev, cpl_graph *graph);
    void (*forget)(cpl_device *dev, cpl_graph *graph);
    int (*threads)(const cpl_device *dev);
    void (*about)(void (*line)(const char *key, const char *value, void *to), void *to); /* without a device; may be NULL */
    void (*describe)(const cpl_device *dev, void (*line)(const char *key, const char *value, void *to), void *to);
} cpl_backend;

/* Size of a live allocation, kept outside device memory. */
typedef struct {
    void *memory; /* owned */
    size_t bytes;
} cpl_block;

typedef struct {
    const cpl_backend *backend; /* borrowed, static */
    cpl_block *blocks;          /* owned [capacity] */
    size_t count, capacity;
    size_t held, peak; /* bytes */
    size_t used_peak;  /* bytes of the whole device */
    size_t most;       /* CUPEL_DEVICE_BYTES; SIZE_MAX: no limit */
} cpl_backend_device;
/* Frees whatever of cpl_device_alloc is left. */
void cpl_device_free_all(cpl_device *dev);
/* Looks at the memory in use on the whole device. */
void cpl_device_look(cpl_device *dev);

extern const cpl_backend cpl_cpu_backend, cpl_cuda_backend;

#endif

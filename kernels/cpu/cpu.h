/* What the files of the CPU back end share: names per instruction set, prototypes of all operations, threads, scratch memory.
 * Refuses to be included from outside kernels/. Conversions, elementary functions and vector sums: kernels/cpu/vector.h. */
#ifndef CPL_KERNELS_CPU_CPU_H
#define CPL_KERNELS_CPU_CPU_H

#include "io/base/arena.h"
#include "io/base/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/rapl.h"
#include "kernels/kernels.h"

/* Operations are compiled once per instruction set with -DCPL_ISA=base|v3|v4; CPL_CPU(gelu_fwd) is cpl_cpu_v3_gelu_fwd. */
#ifdef CPL_ISA
#define CPL_CPU_PASTE2(isa, name) cpl_cpu_##isa##_##name
#define CPL_CPU_PASTE(isa, name)  CPL_CPU_PASTE2(isa, name)
#define CPL_CPU(name)             CPL_CPU_PASTE(CPL_ISA, name)
#define CPL_OP(name, parameters)  cpl_status CPL_CPU(name) parameters;
#include "kernels/ops.def"
#undef CPL_OP
extern const cpl_ops CPL_CPU(ops);
/* sums += column sums of x: N columns of R rows, ld elements from one to the next; bits as of any operation. Takes CPL_SCRATCH_Y.
 * sums [N] f32  x act of type dt. Errors: CPL_NO_MEMORY. */
cpl_status CPL_CPU(column_sums)(cpl_device *dev, cpl_dtype dt, float *sums, const void *x, int64_t ld, int64_t R, int64_t N);
#endif

/* Scratch buffers belong to the device; a slot's content lives until the next call for that slot. An operation asks before it
 * enters a parallel region. */
enum {
    CPL_SCRATCH_X, /* widened operands of the dense operations */
    CPL_SCRATCH_W,
    CPL_SCRATCH_Y,
    CPL_SCRATCH_TILES, /* per-thread tiles */
    CPL_SCRATCH_FLAT,  /* flat and loss operations */
    CPL_SCRATCH_FLAT2,
    CPL_SCRATCH_COUNT
};

typedef struct {
    cpl_backend_device shared; /* first: kernels/device.c casts impl to it */
    int threads;
    const char *isa;                  /* borrowed, static */
    void *scratch[CPL_SCRATCH_COUNT]; /* owned */
    size_t scratch_bytes[CPL_SCRATCH_COUNT];
    cpl_rapl *rapl; /* owned, or NULL: not asked yet */
} cpl_cpu;

static inline int cpl_cpu_threads(const cpl_device *dev) {
    return ((const cpl_cpu *)dev->impl)->threads;
}
/* Threads worth waking for `work` elements: `#pragma omp parallel for num_threads(cpl_cpu_team(dev, n)) schedule(static)`. */
static inline int cpl_cpu_team(const cpl_device *dev, int64_t work) {
    return work < 16384 ? 1 : cpl_cpu_threads(dev);
}

/* *out (a T **) = at least `bytes` of the slot, 64-byte aligned, content undefined; borrowed from the device. Errors:
 * CPL_NO_MEMORY. */
cpl_status cpl_cpu_scratch(cpl_device *dev, int slot, size_t bytes, void *out);

static inline int64_t cpl_min_i64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t cpl_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

#endif

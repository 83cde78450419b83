/* Clearing, copying, casting, adding and summing flat buffers.
 * Refuses to sum in an order that depends on threads: one partial sum per chunk, added in order of the index. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/sums.h"
#include "kernels/cpu/vector.h"
#include <string.h>

enum { COPY_PIECE = 1 << 18, CAST_PIECE = 4096, SUM_ROUND = 1024 };

cpl_status CPL_CPU(zero)(cpl_device *dev, void *x, size_t bytes) {
    int64_t n = (int64_t)bytes;
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n / COPY_PIECE * COPY_PIECE))
    for (int64_t at = 0; at < n; at += COPY_PIECE) {
        memset((char *)x + at, 0, (size_t)cpl_min_i64(n - at, COPY_PIECE));
    }
    return CPL_OK;
}

cpl_status CPL_CPU(copy)(cpl_device *dev, void *to, const void *from, size_t bytes) {
    int64_t n = (int64_t)bytes;
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n / COPY_PIECE * COPY_PIECE))
    for (int64_t at = 0; at < n; at += COPY_PIECE) {
        memcpy((char *)to + at, (const char *)from + at, (size_t)cpl_min_i64(n - at, COPY_PIECE));
    }
    return CPL_OK;
}

cpl_status CPL_CPU(upload)(cpl_device *dev, void *device_to, const void *host_from, size_t bytes) {
    return CPL_CPU(copy)(dev, device_to, host_from, bytes);
}

cpl_status CPL_CPU(download)(cpl_device *dev, void *host_to, const void *device_from, size_t bytes) {
    return CPL_CPU(copy)(dev, host_to, device_from, bytes);
}

cpl_status CPL_CPU(feed)(cpl_device *dev, void *device_to, const void *host_from, size_t bytes) {
    return CPL_CPU(copy)(dev, device_to, host_from, bytes);
}

cpl_status CPL_CPU(fetch)(cpl_device *dev, void *host_to, const void *device_from, size_t bytes) {
    return CPL_CPU(copy)(dev, host_to, device_from, bytes);
}

/* Operations of this back end have ended when they return. */
cpl_status CPL_CPU(synchronize)(cpl_device *dev) {
    return CPL_OK;
}

cpl_status CPL_CPU(cast_from_f32)(cpl_device *dev, cpl_dtype dt, void *y, const float *x, int64_t n) {
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
    for (int64_t at = 0; at < n; at += CAST_PIECE) {
        cpl_store_act(dt, y, at, x + at, cpl_min_i64(n - at, CAST_PIECE));
    }
    return CPL_OK;
}

cpl_status CPL_CPU(cast_to_f32)(cpl_device *dev, cpl_dtype dt, float *y, const void *x, int64_t n) {
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
    for (int64_t at = 0; at < n; at += CAST_PIECE) {
        cpl_load_act(dt, y + at, x, at, cpl_min_i64(n - at, CAST_PIECE));
    }
    return CPL_OK;
}

cpl_status CPL_CPU(add_f32)(cpl_device *dev, float *y, const float *x, int64_t n) {
#pragma omp parallel for simd schedule(static) num_threads(cpl_cpu_team(dev, n))
    for (int64_t i = 0; i < n; i++) {
        y[i] += x[i];
    }
    return CPL_OK;
}

cpl_status CPL_CPU(sum_f32)(cpl_device *dev, double *sum, const float *x, int64_t n) {
    double part[SUM_ROUND];
    for (int64_t start = 0; start < n; start += (int64_t)SUM_ROUND * CPL_SUM_CHUNK) {
        int64_t chunks = cpl_min_i64(cpl_ceil_div(n - start, CPL_SUM_CHUNK), SUM_ROUND);
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
        for (int64_t c = 0; c < chunks; c++) {
            int64_t first = start + c * CPL_SUM_CHUNK;
            part[c] = cpl_chunk_sum(x + first, cpl_min_i64(n - first, CPL_SUM_CHUNK));
        }
        for (int64_t c = 0; c < chunks; c++) {
            *sum += part[c];
        }
    }
    return CPL_OK;
}

/* Exact selection by magnitude: histograms of keys, and the mask once the threshold is known.
 * Refuses to break ties by anything but the index: the first ones go. */
#include "kernels/cpu/cpu.h"
#include "kernels/dtype.h"
#include <string.h>

/* The key of w: the 31 bits of |w| as an integer. Order-preserving over finite floats and inf; +0 and -0 are equal; over
 * 0x7f800000: nan. */
enum { KEY_BITS = 31, KEY_INF = 0x7f800000, HISTOGRAM_BLOCK = 512, HISTOGRAM_SHARE = 65536, WINDOW_CHUNK = 4096 };
enum { PIECE_BLOCKS = CPL_SELECT_PIECE / HISTOGRAM_BLOCK, MASK_CHUNK = 16384, MASK_ROUND = 256 };

static inline uint32_t key_of(float w) {
    return cpl_f32_bits(w) & 0x7fffffffu;
}

/* own: (1 << bits) + 1 counts, the last of keys with another prefix. Returns the nans of the block. */
static int64_t histogram_block(int64_t *own, const float *w, int64_t n, uint32_t prefix, int prefix_bits, int bits) {
    uint32_t bin[HISTOGRAM_BLOCK];
    uint32_t other = (uint32_t)1 << bits, low = other - 1, nans = 0;
    int shift = KEY_BITS - prefix_bits - bits;
    for (int64_t i = 0; i < n; i++) {
        uint32_t key = key_of(w[i]);
        uint32_t top = key >> shift;
        nans += key > KEY_INF;
        bin[i] = (top >> bits) == prefix ? top & low : other;
    }
    for (int64_t i = 0; i < n; i++) {
        own[bin[i]] += 1;
    }
    return nans;
}

cpl_status CPL_CPU(select_histogram)(cpl_device *dev, int64_t *counts, int64_t *nans, const float *w, int64_t n, int64_t stride,
                                     uint32_t prefix, int prefix_bits, int bits) {
    cpl_status st = CPL_OK;
    int64_t *table; /* borrowed from the device; one histogram a share of the weights */
    if (bits < 1 || bits > 24 || prefix_bits < 0 || prefix_bits + bits > KEY_BITS) {
        CPL_FAIL(CPL_INTERNAL, "select_histogram: bits %d after a prefix of %d, expected 1 to 24 and at most %d together", bits,
                 prefix_bits, KEY_BITS);
    }
    int64_t width = ((int64_t)1 << bits) + 1, found = 0;
    int64_t blocks = cpl_ceil_div(n, HISTOGRAM_BLOCK);
    if (stride > 1) {
        blocks = cpl_ceil_div(cpl_ceil_div(n, CPL_SELECT_PIECE), stride) * PIECE_BLOCKS;
    }
    int threads = cpl_cpu_team(dev, blocks * HISTOGRAM_BLOCK);
    int64_t shares = cpl_min_i64(cpl_ceil_div(blocks * HISTOGRAM_BLOCK, HISTOGRAM_SHARE), threads);
    if (shares == 0) {
        goto done;
    }
    CPL_TRY(cpl_cpu_scratch(dev, CPL_SCRATCH_FLAT, (size_t)(shares * width) * sizeof *table, &table));
    memset(table, 0, (size_t)(shares * width) * sizeof *table);
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : found)
    for (int64_t s = 0; s < shares; s++) {
        for (int64_t b = blocks * s / shares; b < blocks * (s + 1) / shares; b++) {
            int64_t first = (b / PIECE_BLOCKS * stride * PIECE_BLOCKS + b % PIECE_BLOCKS) * HISTOGRAM_BLOCK;
            int64_t count = first < n ? cpl_min_i64(n - first, HISTOGRAM_BLOCK) : 0;
            found += count == 0 ? 0 : histogram_block(table + s * width, w + first, count, prefix, prefix_bits, bits);
        }
    }
    for (int64_t s = 0; s < shares; s++) {
        for (int64_t i = 0; i < width - 1; i++) {
            counts[i] += table[s * width + i];
        }
    }
    *nans += found;
done:
    return st;
}

/* What keys of 31 bits, compared as signed, say of a chunk. */
typedef struct {
    int32_t found, below, nans;
} window_counts;

static window_counts window_count(const float *w, int64_t n, int32_t first, int32_t last) {
    int32_t found = 0, below = 0, nans = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = (int32_t)key_of(w[i]);
        below += key < first;
        found += (key >= first) & (key <= last);
        nans += key > KEY_INF;
    }
    return (window_counts){found, below, nans};
}

static void window_list(float *list, const float *w, int64_t n, uint32_t first, uint32_t last) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        list[found] = w[i];
        found += key_of(w[i]) - first <= last - first;
    }
}

/* A chunk's matches are put together before their place in the list is known. */
cpl_status CPL_CPU(select_window)(cpl_device *dev, float *list, int64_t capacity, int64_t *found, int64_t *below, int64_t *nans,
                                  const float *w, int64_t n, uint32_t first_key, uint32_t last_key) {
    cpl_status st = CPL_OK;
    int64_t chunks = cpl_ceil_div(n, WINDOW_CHUNK), less = 0, bad = 0, next = *found;
    if (first_key > last_key || last_key > KEY_INF) {
        CPL_FAIL(CPL_INTERNAL, "select_window: keys 0x%x to 0x%x, expected some up to that of inf", first_key, last_key);
    }
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n)) reduction(+ : less, bad)
    for (int64_t c = 0; c < chunks; c++) {
        float matches[WINDOW_CHUNK];
        int64_t count = cpl_min_i64(n - c * WINDOW_CHUNK, WINDOW_CHUNK), at;
        window_counts own = window_count(w + c * WINDOW_CHUNK, count, (int32_t)first_key, (int32_t)last_key);
        less += own.below;
        bad += own.nans;
        if (own.found == 0) {
            continue;
        }
        window_list(matches, w + c * WINDOW_CHUNK, count, first_key, last_key);
#pragma omp atomic capture
        {
            at = next;
            next += own.found;
        }
        if (at < capacity) {
            memcpy(list + at, matches, (size_t)cpl_min_i64(own.found, capacity - at) * sizeof *list);
        }
    }
    *found = next;
    *below += less;
    *nans += bad;
done:
    return st;
}

/* mask = key > threshold; returns how many are equal. Signed compares: keys have 31 bits. */
static int64_t mask_chunk(uint8_t *restrict mask, const float *restrict w, int64_t n, int32_t threshold) {
    int32_t ties = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = (int32_t)key_of(w[i]);
        mask[i] = key > threshold;
        ties += key == threshold;
    }
    return ties;
}

/* Of the chunk's ties all but the first `removed` are kept. */
static void keep_ties(uint8_t *mask, const float *w, int64_t n, uint32_t threshold, int64_t removed) {
    for (int64_t i = 0; i < n; i++) {
        if (key_of(w[i]) == threshold) {
            mask[i] = removed <= 0;
            removed -= removed > 0;
        }
    }
}

/* Chunks in rounds: their ties are counted while the mask is written, then shared out in order of the index. */
cpl_status CPL_CPU(select_mask)(cpl_device *dev, uint8_t *mask, const float *w, int64_t n, uint32_t threshold, int64_t *ties_left) {
    int64_t ties[MASK_ROUND], removed[MASK_ROUND];
    if (threshold >> KEY_BITS) { /* above every key */
        memset(mask, 0, (size_t)n);
        return CPL_OK;
    }
    for (int64_t start = 0; start < n; start += (int64_t)MASK_ROUND * MASK_CHUNK) {
        int64_t chunks = cpl_min_i64(cpl_ceil_div(n - start, MASK_CHUNK), MASK_ROUND);
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
        for (int64_t c = 0; c < chunks; c++) {
            int64_t first = start + c * MASK_CHUNK;
            ties[c] = mask_chunk(mask + first, w + first, cpl_min_i64(n - first, MASK_CHUNK), (int32_t)threshold);
        }
        for (int64_t c = 0; c < chunks; c++) {
            removed[c] = ties[c] < *ties_left ? ties[c] : *ties_left;
            *ties_left -= removed[c];
        }
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, n))
        for (int64_t c = 0; c < chunks; c++) {
            int64_t first = start + c * MASK_CHUNK;
            if (removed[c] < ties[c]) {
                keep_ties(mask + first, w + first, cpl_min_i64(n - first, MASK_CHUNK), threshold, removed[c]);
            }
        }
    }
    return CPL_OK;
}

/* By selection and not by product: nan times 0 would stay nan. */
cpl_status CPL_CPU(apply_mask)(cpl_device *dev, float *x, const uint8_t *mask, int64_t n) {
#pragma omp parallel for simd schedule(static) num_threads(cpl_cpu_team(dev, n))
    for (int64_t i = 0; i < n; i++) {
        x[i] = mask[i] ? x[i] : 0.0f;
    }
    return CPL_OK;
}

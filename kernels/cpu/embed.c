/* Token and position embedding, forward and backward.
 * Refuses tokens outside the vocabulary in the backward pass, where its size is known, and negative ones in both. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector.h"

enum { COLUMNS = 32, PIECE = 512 };

/* V < 0: its size is not known. */
static cpl_status check_tokens(const int32_t *tokens, int64_t n, int64_t V) {
    cpl_status st = CPL_OK;
    for (int64_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (V >= 0 && tokens[i] >= V)) {
            CPL_FAIL(CPL_INPUT, "token %lld of the micro-batch is %d, expected 0 to %lld", (long long)i, (int)tokens[i],
                     (long long)(V >= 0 ? V - 1 : INT32_MAX));
        }
    }
done:
    return st;
}

cpl_status CPL_CPU(embed_fwd)(cpl_device *dev, cpl_dtype dt, void *x, const int32_t *tokens, const void *wte, const void *wpe,
                              int64_t B, int64_t T, int64_t C) {
    cpl_status st = CPL_OK;
    CPL_TRY(check_tokens(tokens, B * T, -1));
#pragma omp parallel for schedule(static) num_threads(cpl_cpu_team(dev, B *T *C))
    for (int64_t row = 0; row < B * T; row++) {
        float token[PIECE], position[PIECE];
        for (int64_t c = 0; c < C; c += PIECE) {
            int64_t n = cpl_min_i64(C - c, PIECE);
            cpl_load_act(dt, token, wte, tokens[row] * C + c, n);
            cpl_load_act(dt, position, wpe, row % T * C + c, n);
            for (int64_t i = 0; i < n; i++) {
                token[i] += position[i];
            }
            cpl_store_act(dt, x, row * C + c, token, n);
        }
    }
done:
    return st;
}

/* to[0..n) += dx[at..at+n) */
static inline void add_row(float *restrict to, cpl_dtype dt, const void *dx, int64_t at, int64_t n) {
    float buffer[PIECE];
    const float *from = cpl_view_act(dt, buffer, dx, at, n);
    for (int64_t i = 0; i < n; i++) {
        to[i] += from[i];
    }
}

/* Rows of one token collide in dwte: a thread owns columns of all rows and adds them in order of b,t. */
cpl_status CPL_CPU(embed_bwd)(cpl_device *dev, cpl_dtype dt, float *dwte, float *dwpe, const void *dx, const int32_t *tokens,
                              int64_t B, int64_t T, int64_t C, int64_t V) {
    cpl_status st = CPL_OK;
    CPL_TRY(check_tokens(tokens, B * T, V));
    int64_t blocks = cpl_ceil_div(C, COLUMNS);
#pragma omp parallel num_threads(cpl_cpu_team(dev, B *T *C))
    {
#pragma omp for schedule(static) nowait
        for (int64_t block = 0; block < blocks; block++) {
            int64_t c = block * COLUMNS, n = cpl_min_i64(C - c, COLUMNS);
            for (int64_t row = 0; row < B * T; row++) {
                add_row(dwte + tokens[row] * C + c, dt, dx, row * C + c, n);
            }
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++) {
            for (int64_t b = 0; b < B; b++) {
                for (int64_t c = 0; c < C; c += PIECE) {
                    add_row(dwpe + t * C + c, dt, dx, (b * T + t) * C + c, cpl_min_i64(C - c, PIECE));
                }
            }
        }
    }
done:
    return st;
}

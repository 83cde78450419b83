/* Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405).
 * Refuses to keep state: every number is a function of (seed, purpose, step, index), so it does not depend on ranks or threads. */
#ifndef CPL_IO_BASE_RNG_H
#define CPL_IO_BASE_RNG_H

#include <stdint.h>

typedef enum { CPL_RNG_INIT = 1, CPL_RNG_DATA = 2, CPL_RNG_SAMPLE = 3, CPL_RNG_TEST = 4 } cpl_rng_purpose;

/* Four 32-bit words of block `index`: counter (index lo, index hi, step, purpose), key = seed. */
void cpl_rng_block(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t index, uint32_t out[4]);
/* One standard normal (Box-Muller on the first two words of the block); finite for every counter. */
float cpl_rng_normal(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t index);
/* Uniform in [0, 1), 24 bits. */
float cpl_rng_uniform(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t index);
/* A bijection of [0, n): where element i goes. O(1) expected time and no table (4-round Feistel network over Philox,
 * cycle-walking). n >= 1, i < n. */
uint64_t cpl_rng_permute(uint64_t seed, cpl_rng_purpose purpose, uint32_t step, uint64_t n, uint64_t i);

#endif

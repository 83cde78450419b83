/* Scalar conversions between f32 and the 16-bit storage formats: the definition that every kernel must reproduce bit for bit.
 * Refuses to lose a NaN: it stays a (quiet) NaN with its sign and leading payload bits; f16 overflows to inf. */
#ifndef CPL_KERNELS_DTYPE_H
#define CPL_KERNELS_DTYPE_H

#include "kernels/kernels.h"
#include <stdint.h>
#include <string.h>

static inline uint32_t cpl_f32_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float cpl_f32_from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float cpl_bf16_to_f32(uint16_t h) {
    return cpl_f32_from_bits((uint32_t)h << 16);
}

/* Nearest even. */
static inline uint16_t cpl_bf16_from_f32(float x) {
    uint32_t u = cpl_f32_bits(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    uint32_t nan = (u >> 16) | 0x40u;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* Branch-free, so that loops over it vectorise. Subnormals: 2^-14 is added to the exponent field and subtracted as a float. */
static inline float cpl_f16_to_f32(uint16_t h) {
    uint32_t sign = ((uint32_t)h & 0x8000u) << 16;
    uint32_t magnitude = ((uint32_t)h & 0x7fffu) << 13;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = (magnitude + (224u << 23)) | ((h & 0x3ffu) != 0 ? 0x400000u : 0u);
    uint32_t subnormal = cpl_f32_bits(cpl_f32_from_bits(magnitude + (113u << 23)) - 0x1p-14f);
    uint32_t u = magnitude < 0x00800000u ? subnormal : normal;
    u = magnitude >= 0x0f800000u ? special : u;
    return cpl_f32_from_bits(u | sign);
}

/* Nearest even; from 65520 on: inf. Subnormals are rounded by the addition of 1/2, whose last place is 2^-24. */
static inline uint16_t cpl_f16_from_f32(float x) {
    uint32_t u = cpl_f32_bits(x);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t a = u & 0x7fffffffu;
    uint32_t nan = 0x7e00u | ((a >> 13) & 0x3ffu);
    uint32_t special = a > 0x7f800000u ? nan : 0x7c00u;
    uint32_t subnormal = cpl_f32_bits(cpl_f32_from_bits(a) + 0.5f) - 0x3f000000u;
    uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
    uint32_t h = a < 0x38800000u ? subnormal : normal;
    h = a >= 0x47800000u ? special : h;
    return (uint16_t)(h | sign);
}

/* Element i of a buffer of type dt. */
static inline float cpl_act_get(cpl_dtype dt, const void *x, int64_t i) {
    switch (dt) {
    case CPL_BF16:
        return cpl_bf16_to_f32(((const uint16_t *)x)[i]);
    case CPL_F16:
        return cpl_f16_to_f32(((const uint16_t *)x)[i]);
    default:
        return ((const float *)x)[i];
    }
}

static inline void cpl_act_set(cpl_dtype dt, void *x, int64_t i, float value) {
    switch (dt) {
    case CPL_BF16:
        ((uint16_t *)x)[i] = cpl_bf16_from_f32(value);
        break;
    case CPL_F16:
        ((uint16_t *)x)[i] = cpl_f16_from_f32(value);
        break;
    default:
        ((float *)x)[i] = value;
    }
}

/* value as it reads back after storage in dt */
static inline float cpl_act_round(cpl_dtype dt, float value) {
    switch (dt) {
    case CPL_BF16:
        return cpl_bf16_to_f32(cpl_bf16_from_f32(value));
    case CPL_F16:
        return cpl_f16_to_f32(cpl_f16_from_f32(value));
    default:
        return value;
    }
}

#endif

/* fp16 and bf16 numbers as bits, to and from fp32.

All functions of this file are inlined, so they take the instructions of their callers: a call from AVX code to code
without it costs more than the work on some processors. */

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32, FLOAT16, BFLOAT16 };

ALWAYS_INLINE float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

ALWAYS_INLINE uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ALWAYS_INLINE float half_to_float(uint16_t half)
{
    const uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16;
    const float normal = float_of_bits((magnitude << 13) + (112u << 23));
    const float small = (float)(int32_t)magnitude * 0x1p-24f;
    const float special = float_of_bits((magnitude << 13) | 0x7f800000);
    const float value = magnitude < 0x0400 ? small : magnitude >= 0x7c00 ? special : normal;
    return float_of_bits(bits_of_float(value) | sign);
}

ALWAYS_INLINE uint16_t float_to_half(float value)
{
    const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    /* Below 2^-14 let fp32 addition round; above, rounding carries into the exponent. */
    const uint32_t small = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t finite = magnitude < 0x38800000 ? small : magnitude >= 0x47800000 ? 0x7c00 : normal;
    return sign | (magnitude > 0x7f800000 ? 0x7e00 : finite);
}

ALWAYS_INLINE float bfloat16_to_float(uint16_t bits)
{
    return float_of_bits((uint32_t)bits << 16);
}

ALWAYS_INLINE uint16_t float_to_bfloat16(float value)
{
    const uint32_t bits = bits_of_float(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

ALWAYS_INLINE float element(const void *array, int dtype, int64_t index)
{
    if (dtype == FLOAT32)
        return ((const float *)array)[index];
    const uint16_t bits = ((const uint16_t *)array)[index];
    return dtype == FLOAT16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

/* Read `count` numbers from `start` on. */
ALWAYS_INLINE void load_row(float *values, const void *array, int dtype, int64_t start, int64_t count)
{
    const uint16_t *halves = (const uint16_t *)array + start;
    if (dtype == FLOAT32)
        memcpy(values, (const float *)array + start, count * sizeof *values);
    for (int64_t k = 0; dtype == FLOAT16 && k < count; k++)
        values[k] = half_to_float(halves[k]);
    for (int64_t k = 0; dtype == BFLOAT16 && k < count; k++)
        values[k] = bfloat16_to_float(halves[k]);
}

/* Write `count` numbers from `start` on, rounded to the nearest of their dtype. */
ALWAYS_INLINE void store_row(void *array, const float *values, int dtype, int64_t start, int64_t count)
{
    uint16_t *halves = (uint16_t *)array + start;
    if (dtype == FLOAT32)
        memcpy((float *)array + start, values, count * sizeof *values);
    for (int64_t k = 0; dtype == FLOAT16 && k < count; k++)
        halves[k] = float_to_half(values[k]);
    for (int64_t k = 0; dtype == BFLOAT16 && k < count; k++)
        halves[k] = float_to_bfloat16(values[k]);
}

/* Round numbers in place, as if they had been stored. */
ALWAYS_INLINE void round_row(float *values, int dtype, int64_t count)
{
    for (int64_t k = 0; dtype == FLOAT16 && k < count; k++)
        values[k] = half_to_float(float_to_half(values[k]));
    for (int64_t k = 0; dtype == BFLOAT16 && k < count; k++)
        values[k] = bfloat16_to_float(float_to_bfloat16(values[k]));
}

/* fp16 and bf16 numbers as bits, to and from fp32, for kernels_cpu.c. */

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

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

static uint16_t float_to_half(float value)
{
    const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x47800000) /* 65536; below, rounding carries into the exponent */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) /* subnormal: let fp32 addition round */
        return sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f));
    return sign | ((magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13);
}

ALWAYS_INLINE uint16_t float_to_bfloat16(float value)
{
    const uint32_t bits = bits_of_float(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* Decoded rows, for one instruction set; see level.h. */

/* Write codes times a scale as fp32 or bf16, plainly. */
ALWAYS_INLINE void NAME(decode_plainly)(
    const uint8_t *codes, void *out, const int dtype, int64_t count, const int bits, float scale)
{
    float *floats = out;
    uint16_t *halves = out;
    for (int64_t k = 0; k < count * bits / 8; k++) {
        const int8_t byte = codes[k];
        const float first = (bits == 4 ? byte >> 4 : byte) * scale, second = ((int8_t)(codes[k] << 4) >> 4) * scale;
        const int64_t index = bits == 4 ? 2 * k : k;
        if (dtype == FLOAT32) {
            floats[index] = first;
            if (bits == 4)
                floats[index + 1] = second;
        } else {
            halves[index] = float_to_bfloat16(first);
            if (bits == 4)
                halves[index + 1] = float_to_bfloat16(second);
        }
    }
}

#if VECTOR == 512
/* Do the same in bf16 for as many as fill whole vectors, and return how many; INT4 by a table with an index of 5 bits. */
ALWAYS_INLINE int64_t NAME(decode_vectors)(
    const uint8_t *codes, uint16_t *out, int64_t count, const int bits, float scale)
{
    uint16_t table[32];
    for (int i = 0; i < 32; i++)
        table[i] = float_to_bfloat16(((i & 15) - (i & 8) * 2) * scale);
    const __m512i values = _mm512_loadu_si512(table), half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    int64_t k = 0;
    for (; bits == 4 && k + 32 <= count; k += 32) {
        __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + k / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), _mm512_slli_epi32(pairs, 16));
        _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(index, values));
    }
    for (; bits == 8 && k + 16 <= count; k += 16) {
        __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(codes + k))));
        __m512i floats = _mm512_castps_si512(_mm512_mul_ps(wide, _mm512_set1_ps(scale)));
        __m512i to_even = _mm512_and_si512(_mm512_srli_epi32(floats, 16), one);
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(floats, half), to_even);
        _mm256_storeu_si256((__m256i *)(out + k), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    return k;
}
#endif

/* Write codes times a scale as fp32 or bf16. */
static void NAME(decode)(const uint8_t *codes, void *out, int dtype, int64_t count, int bits, float scale)
{
    int64_t done = 0;
#if VECTOR == 512
    if (dtype == BFLOAT16)
        done = bits == 4 ? NAME(decode_vectors)(codes, out, count, 4, scale)
                         : NAME(decode_vectors)(codes, out, count, 8, scale);
#endif
    codes += done * bits / 8, count -= done, out = (char *)out + done * (dtype == FLOAT32 ? 4 : 2);
    if (bits == 4 && dtype == FLOAT32)
        NAME(decode_plainly)(codes, out, FLOAT32, count, 4, scale);
    else if (bits == 4)
        NAME(decode_plainly)(codes, out, BFLOAT16, count, 4, scale);
    else if (dtype == FLOAT32)
        NAME(decode_plainly)(codes, out, FLOAT32, count, 8, scale);
    else
        NAME(decode_plainly)(codes, out, BFLOAT16, count, 8, scale);
}

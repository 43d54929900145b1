/* Activations rounded to integers and cut into columns, and sums stored, for one instruction set; see level.h. */

#if VECTOR == 512
#define ROUND(ints, values, factor) \
    _mm512_storeu_si512(ints, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(factor))))
#elif VECTOR == 256
#define ROUND(ints, values, factor) \
    _mm256_storeu_si256( \
        (__m256i *)(ints), _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(factor))))
#else
#define ROUND(ints, values, factor) \
    for (int i = 0; i < VECTOR / 32; i++) (ints)[i] = (int32_t)lrintf((values)[i] * (factor))
#endif

/* As the functions without a suffix, which compute conversions of fp16 that this instruction set may have. */
ALWAYS_INLINE void NAME(load_row)(float *values, const void *array, int dtype, int64_t start, int64_t count)
{
    int64_t done = 0;
#if VECTOR >= 256
    for (; dtype == FLOAT16 && done + 8 <= count; done += 8) {
        const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)array + start + done));
        _mm256_storeu_ps(values + done, _mm256_cvtph_ps(halves));
    }
#endif
    load_row(values + done, array, dtype, start + done, count - done);
}

ALWAYS_INLINE void NAME(store_row)(void *array, const float *values, int dtype, int64_t start, int64_t count)
{
    int64_t done = 0;
#if VECTOR >= 256
    for (; dtype == FLOAT16 && done + 8 <= count; done += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(values + done), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)((uint16_t *)array + start + done), halves);
    }
#endif
    store_row(array, values + done, dtype, start + done, count - done);
}

/* Scale the sums of a token and some rows, add the bias, and store them as numbers of the output. */
static void NAME(finish)(const struct job *job, int64_t token, int64_t row, int64_t rows, float *sums)
{
    float others[MOST_ROWS_PER_UNIT];
    if (job->num_groups == 1) { /* else parts of the sums were scaled */
        NAME(load_row)(others, job->weight_scale, FLOAT16, row, rows);
        for (int64_t r = 0; r < rows; r++)
            sums[r] *= others[r];
    }
    if (job->bias) {
        NAME(load_row)(others, job->bias, job->bias_dtype, row, rows);
        for (int64_t r = 0; r < rows; r++)
            sums[r] += others[r];
    }
    NAME(store_row)(job->out, sums, job->out_dtype, token * job->N + row, rows);
}

/* Cut integers into the columns of a token; features of high nibbles come before those of low nibbles in a block. */
ALWAYS_INLINE void NAME(cut_into_columns)(
    const struct job *job, const int32_t *ints, struct chunk chunk, int64_t token, const int bits,
    const int by_bytes)
{
    enum { MOST_BLOCK = 128 };
    int32_t *offsets = job->x_offset + token * job->planes * job->num_pieces + chunk.start / job->piece_size;
    const int64_t num_pieces = (chunk.length + job->piece_size - 1) / job->piece_size;
    for (int plane = 0; plane < job->planes; plane++)
        memset(offsets + plane * job->num_pieces, 0, num_pieces * sizeof *offsets);
    const int block = by_bytes ? 128 : 64;
    const int first_code = job->level == PLAIN ? 0 : bits == 4 ? -8 : by_bytes ? -128 : 0;
    for (int64_t k = 0; k < chunk.length; k += block) {
        int32_t rest[MOST_BLOCK];
        for (int i = 0; i < block / 2; i++) {
            rest[i] = ints[k + (bits == 4 ? 2 * i : i)];
            rest[i + block / 2] = ints[k + (bits == 4 ? 2 * i + 1 : i + block / 2)];
        }
        for (int plane = 0; plane < job->planes; plane++) {
            const int64_t target = (token * job->planes + plane) * job->x_stride + chunk.start + k;
            int32_t sum = 0;
            for (int i = 0; i < block; i++) {
                const int32_t digit = by_bytes ? (int8_t)rest[i] : (int16_t)rest[i];
                if (by_bytes)
                    ((int8_t *)job->x)[target + i] = digit;
                else
                    ((int16_t *)job->x)[target + i] = digit;
                sum += digit;
                rest[i] = (rest[i] - digit) >> (by_bytes ? 8 : 16);
            }
            offsets[plane * job->num_pieces + k / job->piece_size] += first_code * sum;
        }
    }
}

/* Write a chunk of activations, padded with zeros, times a factor and rounded, as columns. */
static void NAME(round_chunk)(
    const struct job *job, const float *values, struct chunk chunk, int64_t token, float factor)
{
    int32_t ints[CHUNK];
    const int64_t padded = (chunk.length + 127) / 128 * 128;
    for (int64_t k = 0; k < padded; k += VECTOR / 32)
        ROUND(ints + k, values + k, factor);
    if (job->bits == 4 && job->by_bytes)
        NAME(cut_into_columns)(job, ints, chunk, token, 4, 1);
    else if (job->bits == 4)
        NAME(cut_into_columns)(job, ints, chunk, token, 4, 0);
    else if (job->by_bytes)
        NAME(cut_into_columns)(job, ints, chunk, token, 8, 1);
    else
        NAME(cut_into_columns)(job, ints, chunk, token, 8, 0);
}

/* Round the activations of a token. */
static void NAME(round_token)(const struct job *job, int64_t token)
{
    for (int64_t index = 0; index < job->num_chunks; index++) {
        const struct chunk chunk = chunk_of(job, index);
        const int64_t padded = (chunk.length + 127) / 128 * 128;
        float values[CHUNK];
        uint32_t largest_bits = 0;
        NAME(load_row)(values, job->source, job->source_dtype, token * job->K + chunk.start, chunk.length);
        for (int64_t k = chunk.length; k < padded; k++)
            values[k] = 0;
        for (int64_t k = 0; k < chunk.length; k++) {
            const uint32_t magnitude = bits_of_float(values[k]) & 0x7fffffff; /* NaN is the largest */
            largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
        }
        const float largest = float_of_bits(largest_bits);
        const int is_finite = largest_bits < 0x7f800000, is_zero = !is_finite || largest <= 1e-28f;
        float unit = is_finite ? largest / job->most : NAN;
        if (is_zero)
            memset(values, 0, padded * sizeof *values);
        NAME(round_chunk)(job, values, chunk, token, is_zero ? 0 : job->most / largest);
        for (int plane = 0; plane < job->planes; plane++, unit *= job->by_bytes ? 256 : 65536)
            job->x_scale[(token * job->planes + plane) * job->num_chunks + index] = unit;
    }
}

#undef ROUND

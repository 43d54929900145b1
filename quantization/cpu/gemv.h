/* The product of quantized rows and one token, whose columns are bytes, for one instruction set; see products.h.

Rows are read one after another, as they lie in memory: that is what the hardware fetches ahead best. */

/* Add the products of 64 bytes of codes to sums: 128 input features of INT4, 64 of INT8. */
ALWAYS_INLINE void NAME(add_bytes)(
    INTS *sums, INTS *others, const uint8_t *codes, const int8_t *x, int64_t x_stride, const int bits,
    const int columns)
{
#if VNNI
    const INTS both = XOR(LOAD(codes), bits == 4 ? (char)0x88 : (char)0x80); /* plus 8, or 128 */
    const INTS first = bits == 4 ? HIGH_NIBBLES(both) : both, second = LOW_NIBBLES(both);
    UNROLL for (int c = 0; c < columns; c++) {
        sums[c] = _mm512_dpbusd_epi32(sums[c], first, LOAD(x + c * x_stride));
        if (bits == 4)
            others[c] = _mm512_dpbusd_epi32(others[c], second, LOAD(x + c * x_stride + 64));
    }
#else
    INTS words[MOST_COLUMNS]; /* of at most four products of 15 and 128, twice; those of INT8 would overflow */
    (void)others, (void)bits;
    UNROLL for (int part = 0; part < 64; part += BYTES) {
        const INTS both = XOR(LOAD(codes + part), (char)0x88);
        const INTS first = HIGH_NIBBLES(both), second = LOW_NIBBLES(both);
        UNROLL for (int c = 0; c < columns; c++) {
            const INTS one = MULTIPLY_BYTES(first, LOAD(x + c * x_stride + part));
            const INTS other = MULTIPLY_BYTES(second, LOAD(x + c * x_stride + part + 64));
            words[c] = ADD_WORDS(part ? ADD_WORDS(words[c], one) : one, other);
        }
    }
    UNROLL for (int c = 0; c < columns; c++)
        sums[c] = ADD_INTS(sums[c], MULTIPLY_WORDS(words[c], ONES));
#endif
}

/* Return the product of a row, spread over lanes, but for the scale of a row with a single one. */
ALWAYS_INLINE __m256 NAME(multiply_row)(const struct job *job, int64_t row, const int bits, const int columns)
{
    const int64_t step = bits == 4 ? 128 : 64, stride = job->K * bits / 8;
    const uint8_t *weight = job->weight + row * stride;
    const int8_t *x = job->x;
    FLOATS total = NO_FLOATS;
    for (int64_t index = 0; index < job->num_chunks; index++) {
        const struct chunk chunk = chunk_of(job, index);
        FLOATS part[MOST_COLUMNS];
        UNROLL for (int c = 0; c < columns; c++)
            part[c] = NO_FLOATS;
        for (int64_t start = chunk.start; start < chunk.start + chunk.length; start += job->piece_size) {
            const int64_t left = chunk.start + chunk.length - start;
            const int64_t end = start + (left < job->piece_size ? left : job->piece_size);
            INTS sums[MOST_COLUMNS], others[MOST_COLUMNS];
            UNROLL for (int c = 0; c < columns; c++) {
                sums[c] = FIRST_LANE(job->x_offset[c * job->num_pieces + start / job->piece_size]);
                others[c] = FIRST_LANE(0);
            }
            int64_t k = start;
            for (; k + step <= end; k += step) {
                const uint8_t *codes = weight + k * bits / 8;
                PREFETCH_SOON(codes + ROW_AHEAD);
                NAME(add_bytes)(sums, others, codes, x + k, job->x_stride, bits, columns);
                UNROLL for (int c = 0; c < columns; c++) {
                    KEEP_IN_REGISTER(sums[c]);
                    KEEP_IN_REGISTER(others[c]);
                }
            }
            if (k < end) { /* an incomplete step, padded */
                uint8_t rest[64] = {0};
                memcpy(rest, weight + k * bits / 8, (end - k) * bits / 8);
                NAME(add_bytes)(sums, others, rest, x + k, job->x_stride, bits, columns);
            }
            const float scale = job->num_groups == 1 ? 1 : half_to_float(
                job->weight_scale[row * job->num_groups + start / job->group_size]);
            UNROLL for (int c = 0; c < columns; c++)
                part[c] = MULTIPLY_ADD(TO_FLOATS(ADD_INTS(sums[c], others[c])), BROADCAST(scale), part[c]);
        }
        UNROLL for (int c = 0; c < columns; c++)
            total = MULTIPLY_ADD(part[c], BROADCAST(job->x_scale[c * job->num_chunks + index]), total);
    }
#if VECTOR == 512
    return _mm256_add_ps(_mm512_castps512_ps256(total), _mm512_extractf32x8_ps(total, 1));
#else
    return total;
#endif
}

/* Write the sums of eight rows, but for the scale of rows with a single one; `count` are left. */
ALWAYS_INLINE void NAME(multiply_rows)(
    const struct job *job, int64_t row, int64_t count, float *sums, const int bits, const int columns)
{
    __m256 rows[8];
    for (int r = 0; r < 8; r++)
        rows[r] = r < count ? NAME(multiply_row)(job, row + r, bits, columns) : _mm256_setzero_ps();
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
    _mm256_storeu_ps(
        sums, _mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20), _mm256_permute2f128_ps(first, last, 0x31)));
}

ALWAYS_INLINE void NAME(multiply_token_by)(
    const struct job *job, int64_t row, int64_t rows, float *sums, const int bits, const int columns)
{
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8)
        NAME(multiply_rows)(job, row + r, 8, sums + r, bits, columns);
    if (r < rows) {
        float rest[8];
        NAME(multiply_rows)(job, row + r, rows - r, rest, bits, columns);
        memcpy(sums + r, rest, (rows - r) * sizeof *sums);
    }
}

/* Write the sums of `rows` rows from `row` on, times the only token. */
static void NAME(multiply_token)(const struct job *job, int64_t row, int64_t rows, float *sums)
{
    if (job->bits == 4 && job->planes == 2)
        NAME(multiply_token_by)(job, row, rows, sums, 4, 2);
    else if (job->bits == 4)
        NAME(multiply_token_by)(job, row, rows, sums, 4, 3);
#if VNNI
    else if (job->planes == 2)
        NAME(multiply_token_by)(job, row, rows, sums, 8, 2);
    else
        NAME(multiply_token_by)(job, row, rows, sums, 8, 3);
#endif
}

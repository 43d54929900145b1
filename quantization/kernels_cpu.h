/* Tiles of kernels_cpu.c for one instruction set; that file defines VECTOR (bits), VNNI, NAME and TARGET before it
includes this one. */

#if VECTOR == 512
#define INTS __m512i
#define FLOATS __m512
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, ints) _mm512_storeu_si512(p, ints)
#define LOAD_FLOATS(p) _mm512_loadu_ps(p)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define ROUND(v) _mm512_cvtps_epi32(v)
#define UNSIGNED_WORDS(p) _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define SIGNED_WORDS(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOW_WORDS(w) _mm512_ternarylogic_epi32(w, _mm512_set1_epi16(0x08), _mm512_set1_epi16(0x0f), 0x28)
#define HIGH_WORDS(w) _mm512_xor_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi16(0x08))
#define FIRST_LANE(i) _mm512_zextsi128_si512(_mm_cvtsi32_si128(i))
#define TO_FLOATS(ints) _mm512_cvtepi32_ps(ints)
#define BROADCAST(f) _mm512_set1_ps(f)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM_OF_LANES(v) _mm512_reduce_add_ps(v)
#define ADD(a, b) _mm512_add_ps(a, b)
#define NO_FLOATS _mm512_setzero_ps()
#if VNNI
#define DOT(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#else
#define DOT(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
#endif
#define TILE_ROWS 4
#else
#define INTS __m256i
#define FLOATS __m256
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, ints) _mm256_storeu_si256((__m256i *)(p), ints)
#define LOAD_FLOATS(p) _mm256_loadu_ps(p)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define ROUND(v) _mm256_cvtps_epi32(v)
#define UNSIGNED_WORDS(p) _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define SIGNED_WORDS(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOW_WORDS(w) _mm256_xor_si256(_mm256_and_si256(w, _mm256_set1_epi16(0x0f)), _mm256_set1_epi16(0x08))
#define HIGH_WORDS(w) _mm256_xor_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi16(0x08))
#define FIRST_LANE(i) _mm256_zextsi128_si256(_mm_cvtsi32_si128(i))
#define TO_FLOATS(ints) _mm256_cvtepi32_ps(ints)
#define BROADCAST(f) _mm256_set1_ps(f)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM_OF_LANES(v) NAME(sum_of_lanes)(v)
#define ADD(a, b) _mm256_add_ps(a, b)
#define NO_FLOATS _mm256_setzero_ps()
#define DOT(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#define TILE_ROWS 2

TARGET static inline float NAME(sum_of_lanes)(__m256 v)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#endif
#define LANES (VECTOR / 16) /* words in a vector */

#if !VNNI
DEFINE_ROUND(
    NAME(round), TARGET,
    for (int64_t k = 0; k < padded; k += LANES / 2)
        STORE(ints + k, ROUND(MULTIPLY(LOAD_FLOATS(values + k), BROADCAST(factor)))))
#endif

/* Add the products of 64 input features: INT4 in 32 bytes, INT8 in 64. Vectors are words. */
TARGET ALWAYS_INLINE void NAME(add_words)(
    INTS sums[MOST_ROWS][MOST_COLUMNS], const uint8_t *weight, int64_t stride, int64_t ahead, const int16_t *x,
    int64_t x_stride, const int bits, const int rows, const int columns)
{
    for (int part = 0; part < 32; part += LANES) {
        INTS first[MOST_ROWS], second[MOST_ROWS];
        UNROLL for (int r = 0; r < rows; r++) {
            const uint8_t *row = weight + r * stride + part;
            PREFETCH(row + ahead);
            const INTS both = bits == 4 ? UNSIGNED_WORDS(row) : SIGNED_WORDS(row);
            first[r] = bits == 4 ? HIGH_WORDS(both) : both;
            second[r] = bits == 4 ? LOW_WORDS(both) : SIGNED_WORDS(row + 32);
        }
        UNROLL for (int c = 0; c < columns; c++) {
            const INTS x_first = LOAD(x + c * x_stride + part), x_second = LOAD(x + c * x_stride + part + 32);
            UNROLL for (int r = 0; r < rows; r++)
                sums[r][c] = DOT(DOT(sums[r][c], first[r], x_first), second[r], x_second);
        }
    }
}

#if VNNI
#define LOW_NIBBLES(b) _mm512_ternarylogic_epi32(b, _mm512_set1_epi8(8), _mm512_set1_epi8(15), 0x28) /* (b ^ 8) & 15 */

/* Add the products of 64 bytes of codes: 128 input features of INT4, 64 of INT8. Vectors are bytes. */
TARGET ALWAYS_INLINE void NAME(add_bytes)(
    INTS sums[MOST_ROWS][MOST_COLUMNS], const uint8_t *weight, int64_t stride, int64_t ahead, const int8_t *x,
    int64_t x_stride, const int bits, const int rows, const int columns)
{
    UNROLL for (int r = 0; r < rows; r++) {
        const INTS codes = LOAD(weight + r * stride);
        PREFETCH(weight + r * stride + ahead);
        PREFETCH_SOON(weight + r * stride + 256);
        const INTS first =
            bits == 4 ? LOW_NIBBLES(_mm512_srli_epi16(codes, 4)) : _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
        UNROLL for (int c = 0; c < columns; c++)
            sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], first, LOAD(x + c * x_stride));
        if (bits == 4) {
            const INTS second = LOW_NIBBLES(codes);
            UNROLL for (int c = 0; c < columns; c++)
                sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], second, LOAD(x + c * x_stride + 64));
        }
    }
}
#undef LOW_NIBBLES
#endif

/* Add the products of `step` input features. */
TARGET ALWAYS_INLINE void NAME(add)(
    INTS sums[MOST_ROWS][MOST_COLUMNS], const uint8_t *codes, int64_t stride, int64_t ahead, const void *x,
    int64_t x_start, int64_t x_stride, const int bits, const int by_bytes, const int rows, const int columns)
{
    (void)by_bytes;
#if VNNI
    if (by_bytes) {
        NAME(add_bytes)(sums, codes, stride, ahead, (const int8_t *)x + x_start, x_stride, bits, rows, columns);
        return;
    }
#endif
    NAME(add_words)(sums, codes, stride, ahead, (const int16_t *)x + x_start, x_stride, bits, rows, columns);
}

/* Multiply some rows of the weight by some columns of activations. */
TARGET ALWAYS_INLINE void NAME(tile)(
    const struct job *job, int64_t row, int64_t column, const int bits, const int by_bytes, const int rows,
    const int columns)
{
    const int64_t stride = job->K * bits / 8, step = by_bytes && bits == 4 ? 128 : 64;
    const uint8_t *weight = job->weight + row * stride;
    const uint16_t *scales = job->weight_scale + row * job->num_groups;
    const int64_t tile_bytes = rows * stride, tiles_ahead = tile_bytes < BYTES_AHEAD ? BYTES_AHEAD / tile_bytes : 1;
    const int64_t ahead = tiles_ahead * tile_bytes;
    const int64_t x_stride = job->x_stride, num_rest = job->K % step;
    const char *x = (const char *)job->x + column * x_stride * (by_bytes ? 1 : 2);
    uint8_t rest[MOST_ROWS][64] = {{0}}; /* the last, incomplete step of every row, padded */
    for (int r = 0; num_rest && r < rows; r++)
        memcpy(rest[r], weight + r * stride + (job->K - num_rest) * bits / 8, num_rest * bits / 8);
    FLOATS totals[MOST_ROWS][MOST_COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            totals[r][c] = NO_FLOATS;
    for (int64_t index = 0; index < job->num_chunks; index++) {
        const struct chunk chunk = chunk_of(job, index);
        const int64_t num_pieces = (chunk.length + job->piece_size - 1) / job->piece_size;
        FLOATS parts[MOST_ROWS][MOST_COLUMNS];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++)
                parts[r][c] = NO_FLOATS;
        for (int64_t p = 0; p < num_pieces; p++) {
            const int64_t start = chunk.start + p * job->piece_size, left = chunk.length - p * job->piece_size;
            const int64_t end = start + (left < job->piece_size ? left : job->piece_size);
            const uint8_t *codes = weight + start * bits / 8;
            int64_t codes_stride = stride;
            INTS sums[MOST_ROWS][MOST_COLUMNS];
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int c = 0; c < columns; c++)
                    sums[r][c] = FIRST_LANE(job->x_offset[(column + c) * job->num_pieces + start / job->piece_size]);
            for (int64_t k = start; k < end; k += step, codes += step * bits / 8) {
                if (k + step > end) {
                    codes = rest[0];
                    codes_stride = 64;
                }
                NAME(add)(sums, codes, codes_stride, ahead, x, k, x_stride, bits, by_bytes, rows, columns);
                UNROLL for (int r = 0; r < rows; r++)
                    UNROLL for (int c = 0; c < columns; c++)
                        KEEP_IN_REGISTER(sums[r][c]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                const FLOATS scale = BROADCAST(_cvtsh_ss(scales[r * job->num_groups + start / job->group_size]));
                UNROLL for (int c = 0; c < columns; c++)
                    parts[r][c] = MULTIPLY_ADD(TO_FLOATS(sums[r][c]), scale, parts[r][c]);
            }
        }
        for (int c = 0; c < columns; c++) {
            const FLOATS scale = BROADCAST(job->x_scale[(column + c) * job->num_chunks + index]);
            for (int r = 0; r < rows; r++)
                totals[r][c] = MULTIPLY_ADD(parts[r][c], scale, totals[r][c]);
        }
    }
    for (int c = 0; c < columns; c += job->planes)
        for (int r = 0; r < rows; r++) {
            FLOATS total = totals[r][c];
            for (int plane = 1; plane < job->planes; plane++)
                total = ADD(total, totals[r][c + plane]);
            store(job, (column + c) / job->planes, row + r, SUM_OF_LANES(total));
        }
}

/* Multiply `rows` rows from `row` on by up to MOST_COLUMNS columns from `column` on. */
TARGET static void NAME(multiply)(const struct job *job, int64_t row, int64_t rows, int64_t column, int columns)
{
    const int64_t end = row + rows;
#define TILES(BITS, BY_BYTES, ROWS, COLUMNS) \
    case BITS * 100 + BY_BYTES * 10 + COLUMNS: \
        for (; row + ROWS <= end; row += ROWS) NAME(tile)(job, row, column, BITS, BY_BYTES, ROWS, COLUMNS); \
        for (; row < end; row++) NAME(tile)(job, row, column, BITS, BY_BYTES, 1, COLUMNS); \
        break
    switch (job->bits * 100 + job->by_bytes * 10 + columns) {
#if VNNI
        TILES(4, 1, 8, 2);
        TILES(4, 1, 8, 3);
        TILES(8, 1, 8, 2);
        TILES(8, 1, 8, 3);
#endif
        TILES(4, 0, TILE_ROWS, 1);
        TILES(4, 0, TILE_ROWS, 2);
        TILES(4, 0, TILE_ROWS, 3);
        TILES(4, 0, TILE_ROWS, 4);
        TILES(8, 0, TILE_ROWS, 1);
        TILES(8, 0, TILE_ROWS, 2);
        TILES(8, 0, TILE_ROWS, 3);
        TILES(8, 0, TILE_ROWS, 4);
    }
#undef TILES
}

#undef INTS
#undef FLOATS
#undef LOAD
#undef STORE
#undef LOAD_FLOATS
#undef MULTIPLY
#undef ROUND
#undef UNSIGNED_WORDS
#undef SIGNED_WORDS
#undef LOW_WORDS
#undef HIGH_WORDS
#undef FIRST_LANE
#undef ADD
#undef TO_FLOATS
#undef BROADCAST
#undef MULTIPLY_ADD
#undef SUM_OF_LANES
#undef NO_FLOATS
#undef DOT
#undef TILE_ROWS
#undef LANES

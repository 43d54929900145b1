/* Products of quantized rows and rounded activations, for one instruction set; see level.h. */

#if VECTOR == 128
/* Multiply `rows` rows from `row` on by up to MOST_COLUMNS columns from `column` on, of words. */
static void NAME(multiply)(const struct job *job, int64_t row, int64_t rows, int64_t column, int columns)
{
    const int64_t stride = job->K * job->bits / 8;
    float sums[MOST_COLUMNS][MOST_ROWS_PER_UNIT];
    for (int64_t r = row; r < row + rows; r++) {
        float totals[MOST_COLUMNS] = {0};
        for (int64_t piece = 0; piece < job->num_pieces; piece++) {
            const int64_t start = piece * job->piece_size, left = job->K - start;
            const int64_t length = left < job->piece_size ? left : job->piece_size;
            const uint8_t *codes = job->weight + r * stride + start * job->bits / 8;
            const float scale = job->num_groups == 1 ? 1 : half_to_float(
                job->weight_scale[r * job->num_groups + start / job->group_size]);
            for (int c = 0; c < columns; c++) {
                const int16_t *x = (const int16_t *)job->x + (column + c) * job->x_stride + start;
                int64_t sum = 0;
                for (int64_t k = 0; job->bits == 8 && k < length; k++)
                    sum += (int64_t)(int8_t)codes[k] * x[k];
                for (int64_t k = 0; job->bits == 4 && k < length / 2; k++) {
                    const int16_t *pair = x + k / 32 * 64 + k % 32;
                    sum += ((int8_t)codes[k] >> 4) * pair[0] + ((int8_t)(codes[k] << 4) >> 4) * pair[32];
                }
                const float x_scale = job->x_scale[(column + c) * job->num_chunks + start / job->chunk_size];
                totals[c] += (float)sum * (scale * x_scale);
            }
        }
        for (int c = 0; c < columns; c += job->planes)
            sums[c / job->planes][r - row] = job->planes == 1 ? totals[c] : totals[c] + totals[c + 1];
    }
    for (int c = 0; c < columns; c += job->planes)
        NAME(finish)(job, (column + c) / job->planes, row, rows, sums[c / job->planes]);
}
#else

#define UNROLL _Pragma("GCC unroll 8")
#define KEEP_IN_REGISTER(vector) __asm__("" : "+v"(vector)) /* else gcc 12 moves sums to the stack and back */
/* The same step of a later tile, into level 2: rows are too short for the hardware to see them coming. */
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define PREFETCH_SOON(address) __builtin_prefetch(address, 0, 3)

#if VECTOR == 512
#define INTS __m512i
#define FLOATS __m512
#define LOAD(p) _mm512_loadu_si512(p)
#define UNSIGNED_WORDS(p) _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define SIGNED_WORDS(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOW_WORDS(w) _mm512_ternarylogic_epi32(w, _mm512_set1_epi16(0x08), _mm512_set1_epi16(0x0f), 0x28)
#define HIGH_WORDS(w) _mm512_xor_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi16(0x08))
#define LOW_NIBBLES(b) _mm512_and_si512(b, _mm512_set1_epi8(15))
#define HIGH_NIBBLES(b) _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15))
#define XOR(b, byte) _mm512_xor_si512(b, _mm512_set1_epi8(byte))
#define FIRST_LANE(i) _mm512_zextsi128_si512(_mm_cvtsi32_si128(i))
#define TO_FLOATS(ints) _mm512_cvtepi32_ps(ints)
#define BROADCAST(f) _mm512_set1_ps(f)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUM_OF_LANES(v) _mm512_reduce_add_ps(v)
#define ADD(a, b) _mm512_add_ps(a, b)
#define ADD_INTS(a, b) _mm512_add_epi32(a, b)
#define ADD_WORDS(a, b) _mm512_add_epi16(a, b)
#define MULTIPLY_BYTES(u, s) _mm512_maddubs_epi16(u, s)
#define MULTIPLY_WORDS(a, b) _mm512_madd_epi16(a, b)
#define ONES _mm512_set1_epi16(1)
#define NO_FLOATS _mm512_setzero_ps()
#define TILE_ROWS 4
#else
#define INTS __m256i
#define FLOATS __m256
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define UNSIGNED_WORDS(p) _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define SIGNED_WORDS(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOW_WORDS(w) _mm256_xor_si256(_mm256_and_si256(w, _mm256_set1_epi16(0x0f)), _mm256_set1_epi16(0x08))
#define HIGH_WORDS(w) _mm256_xor_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi16(0x08))
#define LOW_NIBBLES(b) _mm256_and_si256(b, _mm256_set1_epi8(15))
#define HIGH_NIBBLES(b) _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(15))
#define XOR(b, byte) _mm256_xor_si256(b, _mm256_set1_epi8(byte))
#define FIRST_LANE(i) _mm256_zextsi128_si256(_mm_cvtsi32_si128(i))
#define TO_FLOATS(ints) _mm256_cvtepi32_ps(ints)
#define BROADCAST(f) _mm256_set1_ps(f)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUM_OF_LANES(v) NAME(sum_of_lanes)(v)
#define ADD(a, b) _mm256_add_ps(a, b)
#define ADD_INTS(a, b) _mm256_add_epi32(a, b)
#define ADD_WORDS(a, b) _mm256_add_epi16(a, b)
#define MULTIPLY_BYTES(u, s) _mm256_maddubs_epi16(u, s)
#define MULTIPLY_WORDS(a, b) _mm256_madd_epi16(a, b)
#define ONES _mm256_set1_epi16(1)
#define NO_FLOATS _mm256_setzero_ps()
#define TILE_ROWS 3

ALWAYS_INLINE float NAME(sum_of_lanes)(__m256 v)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#endif
#if VNNI
#define DOT_WORDS(sum, a, b) _mm512_dpwssd_epi32(sum, a, b)
#else
#define DOT_WORDS(sum, a, b) ADD_INTS(sum, MULTIPLY_WORDS(a, b))
#endif
#define WORDS (VECTOR / 16) /* in a vector */
#define BYTES (VECTOR / 8)

#include "gemv.h"

/* Add the products of 64 input features: INT4 in 32 bytes, INT8 in 64. Vectors are words. */
ALWAYS_INLINE void NAME(add_words)(
    INTS sums[MOST_ROWS][MOST_COLUMNS], const uint8_t *weight, int64_t stride, int64_t ahead, const int16_t *x,
    int64_t x_stride, const int bits, const int rows, const int columns)
{
    for (int part = 0; part < 32; part += WORDS) {
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
                sums[r][c] = DOT_WORDS(DOT_WORDS(sums[r][c], first[r], x_first), second[r], x_second);
        }
    }
}

/* Write the sums of some rows of the weight times some columns of activations, MOST_ROWS_PER_UNIT apart. */
ALWAYS_INLINE void NAME(tile)(
    const struct job *job, int64_t row, int64_t column, float *out, const int bits, const int rows,
    const int columns)
{
    const int64_t stride = job->K * bits / 8, step = 64;
    const uint8_t *weight = job->weight + row * stride;
    const uint16_t *scales = job->weight_scale + row * job->num_groups;
    const int64_t tile_bytes = rows * stride, tiles_ahead = tile_bytes < BYTES_AHEAD ? BYTES_AHEAD / tile_bytes : 1;
    const int64_t ahead = tiles_ahead * tile_bytes;
    const int64_t x_stride = job->x_stride, num_rest = job->K % step;
    const int16_t *x = (const int16_t *)job->x + column * x_stride;
    const int has_groups = job->num_groups > 1;
    uint8_t rest[MOST_ROWS][64] = {{0}}; /* the last, incomplete step of every row, padded */
    for (int r = 0; num_rest && r < rows; r++)
        memcpy(rest[r], weight + r * stride + (job->K - num_rest) * bits / 8, num_rest * bits / 8);
    FLOATS totals[MOST_ROWS][MOST_COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++)
            totals[r][c] = NO_FLOATS;
    for (int64_t index = 0; index < job->num_chunks; index++) {
        const struct chunk chunk = chunk_of(job, index);
        const int64_t num_pieces = (chunk.length + job->piece_size - 1) / job->piece_size;
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
                NAME(add_words)(sums, codes, codes_stride, ahead, x + k, x_stride, bits, rows, columns);
                UNROLL for (int r = 0; r < rows; r++)
                    UNROLL for (int c = 0; c < columns; c++)
                        KEEP_IN_REGISTER(sums[r][c]);
            }
            const float *x_scale = job->x_scale + column * job->num_chunks + index;
            UNROLL for (int r = 0; r < rows; r++) {
                const float scale =
                    has_groups ? half_to_float(scales[r * job->num_groups + start / job->group_size]) : 1;
                UNROLL for (int c = 0; c < columns; c++)
                    totals[r][c] = MULTIPLY_ADD(
                        TO_FLOATS(sums[r][c]), BROADCAST(scale * x_scale[c * job->num_chunks]), totals[r][c]);
            }
        }
    }
    for (int c = 0; c < columns; c += job->planes)
        for (int r = 0; r < rows; r++) {
            FLOATS total = totals[r][c];
            for (int plane = 1; plane < job->planes; plane++)
                total = ADD(total, totals[r][c + plane]);
            out[c / job->planes * MOST_ROWS_PER_UNIT + r] = SUM_OF_LANES(total);
        }
}

/* Multiply `rows` rows from `row` on by up to MOST_COLUMNS columns from `column` on. */
static void NAME(multiply)(const struct job *job, int64_t row, int64_t rows, int64_t column, int columns)
{
    float sums[MOST_COLUMNS][MOST_ROWS_PER_UNIT];
    int64_t r = 0;
    if (job->by_bytes) { /* of a single token */
        NAME(multiply_token)(job, row, rows, sums[0]);
        NAME(finish)(job, 0, row, rows, sums[0]);
        return;
    }
#define TILES(BITS, COLUMNS) \
    case BITS * 10 + COLUMNS: \
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS) \
            NAME(tile)(job, row + r, column, sums[0] + r, BITS, TILE_ROWS, COLUMNS); \
        for (; r < rows; r++) \
            NAME(tile)(job, row + r, column, sums[0] + r, BITS, 1, COLUMNS); \
        break
    switch (job->bits * 10 + columns) {
        TILES(4, 1);
        TILES(4, 2);
        TILES(4, 3);
        TILES(4, 4);
        TILES(8, 1);
        TILES(8, 2);
        TILES(8, 3);
        TILES(8, 4);
    }
    for (int c = 0; c < columns; c += job->planes)
        NAME(finish)(job, (column + c) / job->planes, row, rows, sums[c / job->planes]);
#undef TILES
}

#undef ADD
#undef ADD_INTS
#undef ADD_WORDS
#undef BROADCAST
#undef BYTES
#undef DOT_WORDS
#undef FIRST_LANE
#undef FLOATS
#undef HIGH_NIBBLES
#undef HIGH_WORDS
#undef INTS
#undef KEEP_IN_REGISTER
#undef LOAD
#undef LOW_NIBBLES
#undef LOW_WORDS
#undef MULTIPLY_ADD
#undef MULTIPLY_BYTES
#undef MULTIPLY_WORDS
#undef NO_FLOATS
#undef ONES
#undef PREFETCH
#undef PREFETCH_SOON
#undef SIGNED_WORDS
#undef SUM_OF_LANES
#undef TILE_ROWS
#undef TO_FLOATS
#undef UNROLL
#undef UNSIGNED_WORDS
#undef WORDS
#undef XOR
#endif

/* Linear layers on INT4 and INT8 weights for CPUs: no header of Python or torch, so one build serves all versions.

Stored layout of weights and scales: see functional.py. Shapes: M tokens, N output features, K input features.

Activations are rounded to integers with one scale per token and chunk of at most CHUNK input features. Each integer is
cut into planes, of 16 bits (`words`) or 8 bits (`bytes`), and every plane of a token is one column to multiply by:
    fp16, bf16   1 word or 2 bytes: 16 bits, finer than bf16 and, down to 1/16 of a chunk's largest, than fp16
    fp32         2 words or 3 bytes: 31 or 24 bits
Bytes need VNNI; they save the widening of the codes, which pays off for a single token. Codes of 4 bits enter the
products as code + 8 and, in bytes, codes of 8 bits as code + 128, so sums start at -8 or -128 times the sum of the
activations. Sums are exact in 32 bits within a chunk; chunks are scaled and added up in fp32. */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels_cpu_numbers.h"

#define UNROLL _Pragma("GCC unroll 8")
#define KEEP_IN_REGISTER(vector) __asm__("" : "+v"(vector)) /* else gcc 12 moves sums to the stack and back */
/* The same step of a later tile, into level 2: rows are too short for the hardware to see them coming. */
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define PREFETCH_SOON(address) __builtin_prefetch(address, 0, 3)
#define EXPORT __attribute__((visibility("default")))

enum { CHUNK = 2048, MOST_ROWS_PER_UNIT = 512, TOKENS_PER_UNIT = 16, SMALL_WORK = 1 << 18 };
enum { BYTES_AHEAD = 96 * 1024 /* between a prefetch and its use: several times the latency, a tenth of level 2 */ };
enum { MOST_ROWS = 8, MOST_COLUMNS = 4 };
enum dtype { FLOAT32, FLOAT16, BFLOAT16 };
enum level { SCALAR, AVX2, AVX512, AVX512_VNNI };

typedef void (*range_function)(int64_t begin, int64_t end, void *context);
typedef int32_t (*parallel_for_function)(int64_t begin, int64_t end, int64_t grain, range_function, void *context);

struct job {
    const uint8_t *weight;
    const uint16_t *weight_scale; /* (N, num_groups) */
    const void *source, *bias;
    void *out;
    int64_t M, N, K, num_groups, source_stride;
    int bits, source_dtype, bias_dtype, level, by_bytes, planes;
    int64_t group_size, piece_size, num_pieces, chunk_size, num_chunks, x_stride, rows_per_unit;
    void *x;           /* (M * planes, x_stride) bytes or words */
    float *x_scale;    /* (M * planes, num_chunks) */
    int32_t *x_offset; /* (M * planes, num_pieces): what sums of products start at */
    atomic_llong next;
};

struct chunk { int64_t start, length; };

ALWAYS_INLINE struct chunk chunk_of(const struct job *job, int64_t index)
{
    const int64_t start = index * job->chunk_size, left = job->K - start;
    return (struct chunk){start, left < job->chunk_size ? left : job->chunk_size};
}

ALWAYS_INLINE float element(const void *array, int dtype, int64_t index)
{
    if (dtype == FLOAT32)
        return ((const float *)array)[index];
    const uint16_t bits = ((const uint16_t *)array)[index];
    return dtype == FLOAT16 ? half_to_float(bits) : float_of_bits((uint32_t)bits << 16);
}

static void store(const struct job *job, int64_t token, int64_t row, float value)
{
    const int64_t index = token * job->N + row;
    if (job->bias)
        value += element(job->bias, job->bias_dtype, row);
    if (job->source_dtype == FLOAT32)
        ((float *)job->out)[index] = value;
    else
        ((uint16_t *)job->out)[index] =
            job->source_dtype == FLOAT16 ? float_to_half(value) : float_to_bfloat16(value);
}

/* Cut integers into the columns of a token; features of high nibbles come before those of low nibbles in a block. */
ALWAYS_INLINE void cut_into_columns(
    const struct job *job, const int32_t *ints, struct chunk chunk, int64_t token, const int bits,
    const int by_bytes)
{
    enum { MOST_BLOCK = 128 };
    int32_t *offsets = job->x_offset + token * job->planes * job->num_pieces + chunk.start / job->piece_size;
    const int64_t num_pieces = (chunk.length + job->piece_size - 1) / job->piece_size;
    for (int plane = 0; plane < job->planes; plane++)
        memset(offsets + plane * job->num_pieces, 0, num_pieces * sizeof *offsets);
    const int block = by_bytes ? 128 : 64;
    const int first_code = job->level == SCALAR ? 0 : bits == 4 ? -8 : by_bytes ? -128 : 0;
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

/* Define a function that writes a chunk of activations, padded with zeros, times a factor and rounded, as columns. */
#define DEFINE_ROUND(NAME, TARGET, ROUND_ALL) \
    TARGET static void NAME( \
        const struct job *job, const float *values, struct chunk chunk, int64_t token, float factor) \
    { \
        int32_t ints[CHUNK]; \
        const int64_t padded = (chunk.length + 127) / 128 * 128; \
        ROUND_ALL; \
        if (job->bits == 4 && job->by_bytes) \
            cut_into_columns(job, ints, chunk, token, 4, 1); \
        else if (job->bits == 4) \
            cut_into_columns(job, ints, chunk, token, 4, 0); \
        else if (job->by_bytes) \
            cut_into_columns(job, ints, chunk, token, 8, 1); \
        else \
            cut_into_columns(job, ints, chunk, token, 8, 0); \
    }
DEFINE_ROUND(round_plain, , for (int64_t k = 0; k < padded; k++) ints[k] = (int32_t)lrintf(values[k] * factor))

#if defined(__x86_64__)
#define VECTOR 256
#define VNNI 0
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "kernels_cpu.h"
#undef VECTOR
#undef NAME
#undef TARGET
#define VECTOR 512
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#include "kernels_cpu.h"
#undef VNNI
#undef NAME
#undef TARGET
#define VNNI 1
#define NAME(name) name##_vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#include "kernels_cpu.h"
#endif

/* Multiply without vector instructions of our choice. */
static void multiply_scalar(const struct job *job, int64_t row, int64_t rows, int64_t column, int columns)
{
    const int64_t stride = job->K * job->bits / 8;
    for (int64_t r = row; r < row + rows; r++) {
        float totals[MOST_COLUMNS] = {0};
        for (int64_t piece = 0; piece < job->num_pieces; piece++) {
            const int64_t start = piece * job->piece_size, left = job->K - start;
            const int64_t length = left < job->piece_size ? left : job->piece_size;
            const uint8_t *codes = job->weight + r * stride + start * job->bits / 8;
            const float scale = half_to_float(job->weight_scale[r * job->num_groups + start / job->group_size]);
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
            store(job, (column + c) / job->planes, r, job->planes == 1 ? totals[c] : totals[c] + totals[c + 1]);
    }
}

static void multiply(const struct job *job, int64_t row, int64_t rows, int64_t column, int columns)
{
#if defined(__x86_64__)
    if (job->level == AVX512_VNNI)
        multiply_vnni(job, row, rows, column, columns);
    else if (job->level == AVX512)
        multiply_avx512(job, row, rows, column, columns);
    else if (job->level == AVX2)
        multiply_avx2(job, row, rows, column, columns);
    else
#endif
        multiply_scalar(job, row, rows, column, columns);
}

static void round_chunk(
    const struct job *job, const float *values, struct chunk chunk, int64_t token, float factor)
{
#if defined(__x86_64__)
    if (job->level >= AVX512)
        round_avx512(job, values, chunk, token, factor);
    else if (job->level == AVX2)
        round_avx2(job, values, chunk, token, factor);
    else
#endif
        round_plain(job, values, chunk, token, factor);
}

static void round_token(const struct job *job, int64_t token)
{
    const float most = !job->by_bytes && job->planes == 2 ? 0x1p30f : job->planes == 3 ? 8355000 : 32639;
    for (int64_t index = 0; index < job->num_chunks; index++) {
        const struct chunk chunk = chunk_of(job, index);
        const int64_t start = token * job->source_stride + chunk.start;
        float values[CHUNK] = {0}, largest;
        uint32_t largest_bits = 0;
        for (int64_t k = 0; k < chunk.length; k++)
            values[k] = element(job->source, job->source_dtype, start + k);
        for (int64_t k = 0; k < chunk.length; k++) {
            const uint32_t magnitude = bits_of_float(values[k]) & 0x7fffffff; /* NaN is the largest */
            largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
        }
        largest = float_of_bits(largest_bits);
        const int is_finite = largest_bits < 0x7f800000;
        float unit = is_finite ? largest / most : NAN;
        if (is_finite && largest > 1e-28f)
            round_chunk(job, values, chunk, token, most / largest);
        else
            round_chunk(job, (float[CHUNK]){0}, chunk, token, 0);
        for (int plane = 0; plane < job->planes; plane++, unit *= job->by_bytes ? 256 : 65536)
            job->x_scale[(token * job->planes + plane) * job->num_chunks + index] = unit;
    }
}

static void round_tokens(int64_t begin, int64_t end, void *context)
{
    for (int64_t token = begin; token < end; token++)
        round_token(context, token);
}

/* Take units of work, which are some rows times some tokens, until none is left. */
static void work(int64_t begin, int64_t end, void *context)
{
    struct job *job = context;
    const int64_t rows_per_unit = job->rows_per_unit, units_of_rows = (job->N + rows_per_unit - 1) / rows_per_unit;
    const int64_t num_units = units_of_rows * ((job->M + TOKENS_PER_UNIT - 1) / TOKENS_PER_UNIT);
    const int64_t most = job->by_bytes ? 1 : MOST_COLUMNS / job->planes;
    (void)begin, (void)end;
    for (int64_t unit; (unit = atomic_fetch_add(&job->next, 1)) < num_units;) {
        const int64_t row = unit % units_of_rows * rows_per_unit, token = unit / units_of_rows * TOKENS_PER_UNIT;
        const int64_t rows = job->N - row < rows_per_unit ? job->N - row : rows_per_unit;
        const int64_t last = job->M - token < TOKENS_PER_UNIT ? job->M : token + TOKENS_PER_UNIT;
        for (int64_t t = token; t < last; t += most)
            multiply(job, row, rows, t * job->planes, (last - t < most ? last - t : most) * job->planes);
    }
}

struct decoding {
    const uint8_t *weight;
    const uint16_t *weight_scale;
    uint16_t *out;
    int64_t K, num_groups;
    int bits, level;
};

/* Write `count` codes times a scale as bf16, plainly. */
static void decode(const uint8_t *codes, uint16_t *out, int64_t count, int bits, float scale)
{
    for (int64_t k = 0; bits == 8 && k < count; k++)
        out[k] = float_to_bfloat16((int8_t)codes[k] * scale);
    for (int64_t k = 0; bits == 4 && k < count / 2; k++) {
        out[2 * k] = float_to_bfloat16(((int8_t)codes[k] >> 4) * scale);
        out[2 * k + 1] = float_to_bfloat16(((int8_t)(codes[k] << 4) >> 4) * scale);
    }
}

#if defined(__x86_64__)
/* Do the same for as many as fill whole vectors, and return how many; INT4 by a table with an index of 5 bits. */
__attribute__((target("avx512f,avx512bw"))) static int64_t decode_avx512(
    const uint8_t *codes, uint16_t *out, int64_t count, int bits, float scale)
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

static void decode_rows(int64_t begin, int64_t end, void *context)
{
    const struct decoding *job = context;
    const int64_t size = job->K / job->num_groups;
    for (int64_t group = begin * job->num_groups; group < end * job->num_groups; group++) {
        const uint8_t *codes = job->weight + group * size * job->bits / 8;
        const float scale = half_to_float(job->weight_scale[group]);
        uint16_t *out = job->out + group * size;
        int64_t done = 0;
#if defined(__x86_64__)
        if (job->level >= AVX512)
            done = decode_avx512(codes, out, size, job->bits, scale);
#endif
        decode(codes + done * job->bits / 8, out + done, size - done, job->bits, scale);
    }
}

/* Write the bf16 matrix (N, K) of codes times scales. */
EXPORT void glm_decode(
    const void *weight, const void *weight_scale, void *out, int64_t N, int64_t K, int64_t num_groups, int bits,
    int level, parallel_for_function parallel_for)
{
    struct decoding job = {weight, weight_scale, out, K, num_groups, bits, level};
    parallel_for(0, N, 16, decode_rows, &job);
}

/* Tell whether the vendor's library has instructions for bf16 matrix products. */
EXPORT int glm_multiplies_bfloat16(void)
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return 0;
#endif
}

/* Return the best level that this CPU has. */
EXPORT int glm_best_level(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        const int is_wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        if (!is_wide || !__builtin_cpu_supports("avx512dq"))
            return AVX2;
        return __builtin_cpu_supports("avx512vnni") ? AVX512_VNNI : AVX512;
    }
#endif
    return SCALAR;
}

/* Write x (M, K) times the weight (N, K) plus the bias to `out` (M, N); return 0 if there is too little memory. */
EXPORT int glm_quantized_linear(
    const void *x, int dtype, int64_t x_stride, const void *weight, const void *weight_scale, const void *bias,
    int bias_dtype, void *out, int64_t M, int64_t N, int64_t K, int64_t num_groups, int bits, int level,
    int num_threads, parallel_for_function parallel_for)
{
    struct job job = {
        .weight = weight, .weight_scale = weight_scale, .source = x, .bias = bias, .out = out, .M = M, .N = N, .K = K,
        .num_groups = num_groups, .source_stride = x_stride, .bits = bits, .source_dtype = dtype,
        .bias_dtype = bias_dtype, .level = level, .group_size = K / num_groups};
    job.by_bytes = level == AVX512_VNNI && M == 1 && (num_groups == 1 || job.group_size % 128 == 0);
    job.planes = (dtype == FLOAT32 ? 2 : 1) + job.by_bytes;
    if (num_groups > 1 && job.group_size < CHUNK) { /* some groups in a chunk */
        job.piece_size = job.group_size;
        job.chunk_size = CHUNK / job.group_size * job.group_size;
    } else { /* some chunks in a group */
        for (job.piece_size = CHUNK; num_groups > 1 && job.group_size % job.piece_size; job.piece_size /= 2)
            ;
        job.chunk_size = job.piece_size;
    }
    job.rows_per_unit = (N / (num_threads * 8) + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS; /* threads share fairly */
    job.rows_per_unit = job.rows_per_unit < 32 ? 32 : job.rows_per_unit;
    if (job.rows_per_unit > MOST_ROWS_PER_UNIT)
        job.rows_per_unit = MOST_ROWS_PER_UNIT;
    job.num_pieces = (K + job.piece_size - 1) / job.piece_size;
    job.num_chunks = (K + job.chunk_size - 1) / job.chunk_size;
    job.x_stride = (K + 127) / 128 * 128 + 64; /* columns at a power of two apart would share cache lines */
    const int64_t x_bytes = job.x_stride * (job.by_bytes ? 1 : 2);
    const int64_t numbers = job.num_chunks * sizeof *job.x_scale + job.num_pieces * sizeof *job.x_offset;
    const int64_t column_bytes = x_bytes + numbers;
    job.x = malloc(M * job.planes * column_bytes);
    if (!job.x)
        return 0;
    job.x_scale = (float *)((char *)job.x + M * job.planes * x_bytes);
    job.x_offset = (int32_t *)(job.x_scale + M * job.planes * job.num_chunks);
    const int is_small = M * N * K < SMALL_WORK || num_threads == 1;
    if (M == 1 || is_small)
        round_tokens(0, M, &job);
    else
        parallel_for(0, M, 1, round_tokens, &job);
    if (is_small)
        work(0, 1, &job);
    else
        parallel_for(0, num_threads, 1, work, &job);
    free(job.x);
    return 1;
}

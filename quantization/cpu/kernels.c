/* Linear layers on INT4 and INT8 weights, and whole layers for one new token, on CPUs: no header of Python or torch, so
one build serves all versions.

Activations are rounded to integers with one scale per token and chunk of at most CHUNK input features. Each integer is
cut into planes, of 16 bits (`words`) or 8 bits (`bytes`), and every plane of a token is one column to multiply by:
    fp16, bf16   1 word or 2 bytes: 16 bits, finer than bf16 and, down to 1/16 of a chunk's largest, than fp16
    fp32         2 words or 3 bytes: 31 or 24 bits
Bytes save the widening of the codes, which pays off for a single token, and for fp32 where there is no VNNI. Codes of 4
bits enter the products as code + 8 and, in bytes, codes of 8 bits as code + 128, so sums start at -8 or -128 times the
sum of the activations. Sums are exact in 32 bits within a chunk; chunks are scaled and added up in fp32. */

#include <math.h>
#include <stdlib.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "jobs.h"
#include "threads.h"

#define EXPORT __attribute__((visibility("default")))

enum { CHUNK = 2048, MOST_ROWS_PER_UNIT = 504, LEAST_ROWS_PER_UNIT = 48, TOKENS_PER_UNIT = 16, SMALL_WORK = 1 << 18 };
enum { ROWS_STEP = 24 /* what tiles of all instruction sets divide */ };
enum { BYTES_AHEAD = 96 * 1024, ROW_AHEAD = 8192 /* between a prefetch and its use */ };
enum { MOST_ROWS = 8, MOST_COLUMNS = 4 };

#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define BEGIN_TARGET(set) PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(set) PRAGMA(GCC push_options) PRAGMA(GCC target(set))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define VECTOR 128
#define VNNI 0
#define NAME(name) name##_plain
#include "level.h"
#undef VECTOR
#undef NAME
#if defined(__x86_64__)
#define VECTOR 256
#define NAME(name) name##_avx2
BEGIN_TARGET("avx2,fma,f16c")
#include "level.h"
END_TARGET
#undef VECTOR
#undef NAME
#define VECTOR 512
#define NAME(name) name##_avx512
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#include "level.h"
END_TARGET
#undef VNNI
#undef NAME
#define VNNI 1
#define NAME(name) name##_vnni
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "level.h"
END_TARGET
static const struct functions *const LEVELS[] = {&functions_plain, &functions_avx2, &functions_avx512, &functions_vnni};
#else
static const struct functions *const LEVELS[] = {&functions_plain};
#endif

/* Return the job of multiplying activations, numbers of `source_dtype`, by a weight to numbers of `out_dtype`. */
static struct job job_of(
    const struct linear *linear, const void *source, int source_dtype, void *out, int out_dtype, int64_t M, int level,
    int num_threads)
{
    struct job job = {
        .weight = linear->weight, .weight_scale = linear->weight_scale, .source = source, .bias = linear->bias,
        .out = out, .M = M, .N = linear->num_rows, .K = linear->num_columns, .num_groups = linear->num_groups,
        .bits = linear->bits, .source_dtype = source_dtype, .out_dtype = out_dtype, .bias_dtype = linear->bias_dtype,
        .level = level, .group_size = linear->num_columns / linear->num_groups};
    const int is_fp32 = out_dtype == FLOAT32;
    if (job.num_groups == 1 || job.group_size % 128 == 0)
        job.by_bytes = M == 1 && level != PLAIN && (level == AVX512_VNNI || job.bits == 4);
    job.planes = (is_fp32 ? 2 : 1) + job.by_bytes;
    job.most = job.planes == 3 ? 8355000 : is_fp32 ? 0x1p30f : 32639;
    job.tokens_per_tile = job.by_bytes ? 1 : MOST_COLUMNS / job.planes;
    if (job.num_groups > 1 && job.group_size < CHUNK) { /* some groups in a chunk */
        job.piece_size = job.group_size;
        job.chunk_size = CHUNK / job.group_size * job.group_size;
    } else { /* some chunks in a group */
        for (job.piece_size = CHUNK; job.num_groups > 1 && job.group_size % job.piece_size; job.piece_size /= 2)
            ;
        job.chunk_size = job.piece_size;
    }
    job.num_pieces = (job.K + job.piece_size - 1) / job.piece_size;
    job.num_chunks = (job.K + job.chunk_size - 1) / job.chunk_size;
    job.x_stride = (job.K + 127) / 128 * 128 + 64; /* columns at a power of two apart would share cache lines */
    job.num_unit_rows = job.N;
    const int64_t share = job.N / (num_threads * 8) / ROWS_STEP * ROWS_STEP + ROWS_STEP; /* threads share fairly */
    job.rows_per_unit = share < LEAST_ROWS_PER_UNIT ? LEAST_ROWS_PER_UNIT : share;
    if (job.rows_per_unit > MOST_ROWS_PER_UNIT)
        job.rows_per_unit = MOST_ROWS_PER_UNIT;
    return job;
}

/* Return how many bytes the rounded activations of a job take. */
static int64_t column_bytes(const struct job *job)
{
    const int64_t numbers = job->num_chunks * sizeof *job->x_scale + job->num_pieces * sizeof *job->x_offset;
    return job->M * job->planes * (job->x_stride * (job->by_bytes ? 1 : 2) + numbers);
}

/* Give a job memory for its rounded activations. */
static void place_columns(struct job *job, void *memory)
{
    job->x = memory;
    job->x_scale = (float *)((char *)memory + job->M * job->planes * job->x_stride * (job->by_bytes ? 1 : 2));
    job->x_offset = (int32_t *)(job->x_scale + job->M * job->planes * job->num_chunks);
}

/* A unit of work: some rows for some tokens, of job->num_unit_rows rows and all tokens. */
struct block { int64_t row, rows, token, tokens; };

static int64_t num_blocks(const struct job *job)
{
    const int64_t blocks_of_rows = (job->num_unit_rows + job->rows_per_unit - 1) / job->rows_per_unit;
    return blocks_of_rows * ((job->M + TOKENS_PER_UNIT - 1) / TOKENS_PER_UNIT);
}

static struct block block_of(const struct job *job, int64_t unit)
{
    const int64_t blocks_of_rows = (job->num_unit_rows + job->rows_per_unit - 1) / job->rows_per_unit;
    struct block block = {unit % blocks_of_rows * job->rows_per_unit, job->rows_per_unit,
                          unit / blocks_of_rows * TOKENS_PER_UNIT, TOKENS_PER_UNIT};
    if (block.rows > job->num_unit_rows - block.row)
        block.rows = job->num_unit_rows - block.row;
    if (block.tokens > job->M - block.token)
        block.tokens = job->M - block.token;
    return block;
}

static void multiply_block(const struct job *job, struct block block)
{
    for (int64_t done = 0; done < block.tokens; done += job->tokens_per_tile) {
        const int64_t left = block.tokens - done, tokens = left < job->tokens_per_tile ? left : job->tokens_per_tile;
        LEVELS[job->level]->multiply(
            job, block.row, block.rows, (block.token + done) * job->planes, tokens * job->planes);
    }
}

#include "layer.h"

struct product {
    struct job job;
    struct phase phases[2];
};

static void round_unit(void *context, int64_t token, int64_t thread)
{
    const struct product *product = context;
    (void)thread;
    LEVELS[product->job.level]->round_token(&product->job, token);
}

static void multiply_unit(void *context, int64_t unit, int64_t thread)
{
    const struct product *product = context;
    (void)thread;
    multiply_block(&product->job, block_of(&product->job, unit));
}

static void work_on_product(int64_t begin, int64_t end, void *context)
{
    struct product *product = context;
    (void)end;
    run_phase(&product->phases[0], product->job.M, round_unit, product, begin);
    run_phase(&product->phases[1], num_blocks(&product->job), multiply_unit, product, begin);
}

/* Write x (M, K) times the weight (N, K) plus the bias to `out` (M, N); return 0 if there is too little memory. */
EXPORT int glm_quantized_linear(
    const struct linear *linear, const void *x, int dtype, void *out, int64_t num_tokens, int level, int num_threads,
    parallel_for_function parallel_for)
{
    struct product product = {.job = job_of(linear, x, dtype, out, dtype, num_tokens, level, num_threads)};
    void *memory = malloc(column_bytes(&product.job));
    if (!memory)
        return 0;
    place_columns(&product.job, memory);
    if (num_threads == 1 || num_tokens * linear->num_rows * linear->num_columns < SMALL_WORK)
        work_on_product(0, 1, &product);
    else
        parallel_for(0, num_threads, 1, work_on_product, &product);
    free(memory);
    return 1;
}

struct decoding {
    const struct linear *linear;
    void *out;
    int dtype, level;
};

static void decode_rows(int64_t begin, int64_t end, void *context)
{
    const struct decoding *decoding = context;
    const struct linear *linear = decoding->linear;
    const int64_t size = linear->num_columns / linear->num_groups, item_size = decoding->dtype == FLOAT32 ? 4 : 2;
    for (int64_t group = begin * linear->num_groups; group < end * linear->num_groups; group++)
        LEVELS[decoding->level]->decode(
            (const uint8_t *)linear->weight + group * size * linear->bits / 8,
            (char *)decoding->out + group * size * item_size, decoding->dtype, size, linear->bits,
            half_to_float(((const uint16_t *)linear->weight_scale)[group]));
}

/* Write the matrix (N, K) of codes times scales, in fp32 or bf16. */
EXPORT void glm_decode(const struct linear *linear, void *out, int dtype, int level, parallel_for_function parallel_for)
{
    struct decoding decoding = {linear, out, dtype, level};
    parallel_for(0, linear->num_rows, 16, decode_rows, &decoding);
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

/* Tell whether the vendor's library multiplies fp32 faster than the kernels do, by 1.2 to 1.8 times from 128 tokens. */
EXPORT int glm_multiplies_fp32_faster(int level)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    return level < 2 || __builtin_cpu_is("intel"); /* on others it does not use AVX-512 */
#else
    return level < 2;
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
    return PLAIN;
}

/* What the kernels work on. Shapes: M tokens, N output features, K input features. Pointers hold stored weights in the
layout that functional.py describes. */

#include "numbers.h"

enum level { PLAIN, AVX2, AVX512, AVX512_VNNI };

/* A linear layer on a quantized weight; as in kernels_cpu.py. */
struct linear {
    const void *weight, *weight_scale /* (N, num_groups) */, *bias;
    int64_t num_rows /* N */, num_columns /* K */, num_groups;
    int32_t bits, bias_dtype;
};

/* A layer of the model and one new token for each of M rows of a batch; as in kernels_cpu.py. */
struct layer {
    struct linear query_key_value, dense, up, down;
    const void *norm_weights[2], *norm_biases[2];
    const void *x, *cos, *signed_sin; /* (M, D), (M, head_size) */
    void *out;                        /* (M, D) */
    void *keys, *values;              /* of M rows and all heads: (room, head_size) */
    const void *mask;                 /* of M rows: bytes, 0 on positions that are not seen; or none */
    const int64_t *lengths;           /* of M rows with the new token, or none if all have `length` */
    int64_t row_stride, head_stride, mask_stride; /* elements from one to the next */
    int64_t num_tokens, num_heads, head_size, length /* of the longest row with the new token */;
    float eps[2], alpha, scaling;
    int32_t dtype, norm_dtype, level, num_threads;
};

/* The product of activations and a weight, cut into units. */
struct job {
    const uint8_t *weight;
    const uint16_t *weight_scale;
    const void *source, *bias;
    void *out; /* (M, N) */
    int64_t M, N, K, num_groups;
    int bits, source_dtype, out_dtype, bias_dtype, level;
    int by_bytes, planes, tokens_per_tile;
    float most; /* the largest rounded activation */
    int64_t group_size, piece_size, num_pieces, chunk_size, num_chunks, x_stride, rows_per_unit, num_unit_rows;
    void *x;           /* (M * planes, x_stride) bytes or words */
    float *x_scale;    /* (M * planes, num_chunks) */
    int32_t *x_offset; /* (M * planes, num_pieces): what sums of products start at */
};

struct chunk { int64_t start, length; };

ALWAYS_INLINE struct chunk chunk_of(const struct job *job, int64_t index)
{
    const int64_t start = index * job->chunk_size, left = job->K - start;
    return (struct chunk){start, left < job->chunk_size ? left : job->chunk_size};
}

/* What there is of every function for each instruction set. */
struct functions {
    void (*round_token)(const struct job *, int64_t token);
    void (*multiply)(const struct job *, int64_t row, int64_t rows, int64_t column, int columns);
    void (*decode)(const uint8_t *codes, void *out, int dtype, int64_t count, int bits, float scale);
    void (*normalize)(
        float *values, int64_t size, const void *weight, const void *bias, int weight_dtype, float eps, int dtype);
    void (*attend)(
        const struct layer *, const void *qkv, void *context, int64_t token, int64_t head, float *scratch);
    void (*gate)(void *out, const void *linear, const void *gate, int dtype, int64_t count);
    void (*add_residual)(void *out, const float *residual, float alpha, int dtype, int64_t start, int64_t count);
};

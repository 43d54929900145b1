/* What a decoding step does between its products, for one instruction set; see level.h. Vectors are those that gcc and
clang know for every processor. */

#define LANES (VECTOR / 32)
typedef float NAME(floats) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(ints) __attribute__((vector_size(LANES * 4)));
typedef uint16_t NAME(halves) __attribute__((vector_size(LANES * 2)));
#define V_FLOATS NAME(floats)
#define V_INTS NAME(ints)

ALWAYS_INLINE V_FLOATS NAME(load)(const void *array, int64_t index, const int dtype)
{
    if (dtype == FLOAT32) {
        V_FLOATS values;
        memcpy(&values, (const float *)array + index, sizeof values);
        return values;
    }
    NAME(halves) halves;
    memcpy(&halves, (const uint16_t *)array + index, sizeof halves);
    const V_INTS bits = __builtin_convertvector(halves, V_INTS);
    if (dtype == BFLOAT16)
        return (V_FLOATS)(bits << 16);
    const V_INTS magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const V_FLOATS small = __builtin_convertvector(magnitude, V_FLOATS) * 0x1p-24f;
    const V_INTS normal = (magnitude << 13) + (112 << 23), special = (magnitude << 13) | 0x7f800000;
    const V_INTS is_small = magnitude < 0x0400, is_special = magnitude >= 0x7c00;
    return (V_FLOATS)(sign | (is_small & (V_INTS)small) | (is_special & special) | (~(is_small | is_special) & normal));
}

ALWAYS_INLINE float NAME(sum)(V_FLOATS values)
{
    float total = 0;
    for (int i = 0; i < LANES; i++)
        total += values[i];
    return total;
}

/* Return e to the power of values from -87 to 0, to a few units in the last place. */
ALWAYS_INLINE V_FLOATS NAME(exponential)(V_FLOATS values)
{
    const float shift = 0x1.8p23f; /* adding it leaves an integer in the last bits */
    const V_FLOATS shifted = values * 1.44269504f + shift, whole = shifted - shift;
    const V_FLOATS rest = (values - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f; /* less ln 2, in two parts */
    V_FLOATS power = rest * (1.f / 5040) + 1.f / 720;
    power = power * rest + 1.f / 120;
    power = power * rest + 1.f / 24;
    power = power * rest + 1.f / 6;
    power = power * rest + 0.5f;
    power = power * rest + 1.f;
    power = power * rest + 1.f;
    const V_INTS is_number = values == values;
    return (V_FLOATS)((is_number & ((V_INTS)power + ((V_INTS)shifted << 23))) | (~is_number & (V_INTS)values));
}

/* Replace `gate` by its GELU, erf to 1.5e-7 by formula 7.1.26 of Abramowitz and Stegun. */
ALWAYS_INLINE V_FLOATS NAME(gelu)(V_FLOATS gate)
{
    const V_INTS is_negative = gate < 0;
    const V_FLOATS size = (V_FLOATS)((V_INTS)gate & 0x7fffffff), scaled = size * 0.70710678f;
    V_FLOATS square = -scaled * scaled;
    const V_INTS is_far = square < -80.f;
    square = (V_FLOATS)((~is_far & (V_INTS)square) | (is_far & (V_INTS)(square * 0 - 80.f)));
    const V_FLOATS t = 1 / (1 + 0.3275911f * scaled);
    const V_FLOATS series =
        ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const V_FLOATS tail = series * NAME(exponential)(square) * 0.5f * size; /* |x| times half of erfc */
    return (V_FLOATS)((is_negative & (V_INTS)-tail) | (~is_negative & (V_INTS)(size - tail)));
}

/* Rotate the pairs of features i and i + size / 2 of a row of numbers, rounded as torch rounds the two steps. */
ALWAYS_INLINE void NAME(rotate)(
    float *out, const float *row, const float *cos, const float *signed_sin, int64_t size, int dtype)
{
    for (int64_t k = 0; k < size; k++)
        out[k] = row[k] * cos[k];
    round_row(out, dtype, size);
    for (int64_t k = 0; k < size; k++)
        out[k] += row[k < size / 2 ? k + size / 2 : k - size / 2] * signed_sin[k];
    round_row(out, dtype, size);
}

/* Rotate a head's query and key, store key and value behind those of the row, and attend to what the token sees. */
ALWAYS_INLINE void NAME(attend_as)(
    const struct layer *layer, const void *qkv, void *context, int64_t token, int64_t head, float *scratch,
    const int dtype)
{
    const int64_t size = layer->head_size, item_size = dtype == FLOAT32 ? 4 : 2;
    const int64_t length = layer->lengths ? layer->lengths[token] : layer->length;
    const int64_t whole = size / LANES * LANES, padded = size + LANES;
    float *row = scratch, *query = row + padded, *cos = query + padded, *sin = cos + padded, *scores = sin + padded;
    const int64_t start = (token * layer->num_heads + head) * 3 * size, last = (length - 1) * size;
    const int64_t cache = (token * layer->row_stride + head * layer->head_stride) * item_size;
    char *keys = (char *)layer->keys + cache, *values = (char *)layer->values + cache;
    NAME(load_row)(cos, layer->cos, dtype, token * size, size);
    NAME(load_row)(sin, layer->signed_sin, dtype, token * size, size);
    NAME(load_row)(row, qkv, dtype, start + size, size);
    NAME(rotate)(query, row, cos, sin, size, dtype);
    NAME(store_row)(keys, query, dtype, last, size);
    memcpy(values + last * item_size, (const char *)qkv + (start + 2 * size) * item_size, size * item_size);
    NAME(load_row)(row, qkv, dtype, start, size);
    NAME(rotate)(query, row, cos, sin, size, dtype);

    const uint8_t *mask = layer->mask ? (const uint8_t *)layer->mask + token * layer->mask_stride : 0;
    float largest = -INFINITY;
    for (int64_t s = 0; s < length; s++) {
        V_FLOATS sums[2] = {{0}};
        int64_t k = 0;
        for (; k + 2 * LANES <= whole; k += 2 * LANES)
            for (int i = 0; i < 2; i++)
                sums[i] += NAME(load)(query, k + i * LANES, FLOAT32) * NAME(load)(keys, s * size + k + i * LANES, dtype);
        if (k < whole)
            sums[0] += NAME(load)(query, k, FLOAT32) * NAME(load)(keys, s * size + k, dtype);
        float score = NAME(sum)(sums[0] + sums[1]);
        for (k = whole; k < size; k++)
            score += query[k] * element(keys, dtype, s * size + k);
        scores[s] = mask && !mask[s] ? -INFINITY : score * layer->scaling;
        largest = scores[s] > largest ? scores[s] : largest;
    }
    for (int64_t s = length; s % LANES; s++)
        scores[s] = -INFINITY;
    V_FLOATS totals = {0};
    for (int64_t s = 0; s < length; s += LANES) {
        V_FLOATS part = NAME(load)(scores, s, FLOAT32) - largest;
        const V_INTS is_far = part < -87.f;
        part = (V_FLOATS)(~is_far & (V_INTS)NAME(exponential)((V_FLOATS)(~is_far & (V_INTS)part)));
        memcpy(scores + s, &part, sizeof part);
        totals += part;
    }
    for (int64_t k = 0; k < whole;) {
        V_FLOATS sums[4] = {{0}};
        const int at_once = k + 4 * LANES <= whole ? 4 : 1;
        for (int64_t s = 0; at_once == 4 && s < length; s++)
            for (int i = 0; i < 4; i++)
                sums[i] += NAME(load)(values, s * size + k + i * LANES, dtype) * scores[s];
        for (int64_t s = 0; at_once == 1 && s < length; s++)
            sums[0] += NAME(load)(values, s * size + k, dtype) * scores[s];
        memcpy(row + k, sums, at_once * sizeof sums[0]);
        k += at_once * LANES;
    }
    for (int64_t k = whole; k < size; k++) {
        row[k] = 0;
        for (int64_t s = 0; s < length; s++)
            row[k] += element(values, dtype, s * size + k) * scores[s];
    }
    const float total = NAME(sum)(totals);
    for (int64_t k = 0; k < size; k++)
        row[k] /= total;
    NAME(store_row)(context, row, dtype, (token * layer->num_heads + head) * size, size);
}

static void NAME(attend)(
    const struct layer *layer, const void *qkv, void *context, int64_t token, int64_t head, float *scratch)
{
    if (layer->dtype == FLOAT32)
        NAME(attend_as)(layer, qkv, context, token, head, scratch, FLOAT32);
    else if (layer->dtype == FLOAT16)
        NAME(attend_as)(layer, qkv, context, token, head, scratch, FLOAT16);
    else
        NAME(attend_as)(layer, qkv, context, token, head, scratch, BFLOAT16);
}

/* Write the layer norm of `values` over them. */
static void NAME(normalize)(
    float *values, int64_t size, const void *weight, const void *bias, int weight_dtype, float eps, int dtype)
{
    enum { PARTS = 16 };
    float parts[PARTS] = {0};
    int64_t k = 0;
    for (; k + PARTS <= size; k += PARTS)
        for (int i = 0; i < PARTS; i++)
            parts[i] += values[k + i];
    float mean = 0, variance = 0;
    for (; k < size; k++)
        mean += values[k];
    for (int i = 0; i < PARTS; i++)
        mean += parts[i];
    mean /= size;
    memset(parts, 0, sizeof parts);
    for (k = 0; k + PARTS <= size; k += PARTS)
        for (int i = 0; i < PARTS; i++)
            parts[i] += (values[k + i] - mean) * (values[k + i] - mean);
    for (; k < size; k++)
        variance += (values[k] - mean) * (values[k] - mean);
    for (int i = 0; i < PARTS; i++)
        variance += parts[i];
    const float scale = 1 / sqrtf(variance / size + eps);
    for (int64_t start = 0; start < size; start += CHUNK) {
        float factor[CHUNK], shift[CHUNK];
        const int64_t count = size - start < CHUNK ? size - start : CHUNK;
        NAME(load_row)(factor, weight, weight_dtype, start, count);
        NAME(load_row)(shift, bias, weight_dtype, start, count);
        for (int64_t i = 0; i < count; i++)
            values[start + i] = (values[start + i] - mean) * scale * factor[i] + shift[i];
    }
    round_row(values, dtype, size);
}

/* Write numbers times the GELU of others. */
static void NAME(gate)(void *out, const void *linear, const void *gate, int dtype, int64_t count)
{
    for (int64_t start = 0; start < count; start += CHUNK) {
        float factors[CHUNK], gates[CHUNK];
        const int64_t size = count - start < CHUNK ? count - start : CHUNK;
        NAME(load_row)(factors, linear, dtype, start, size);
        NAME(load_row)(gates, gate, dtype, start, size);
        for (int64_t k = size; k % LANES; k++)
            gates[k] = 0;
        for (int64_t k = 0; k < size; k += LANES) {
            const V_FLOATS part = NAME(gelu)(NAME(load)(gates, k, FLOAT32));
            memcpy(gates + k, &part, sizeof part);
        }
        round_row(gates, dtype, size);
        for (int64_t k = 0; k < size; k++)
            factors[k] *= gates[k];
        NAME(store_row)(out, factors, dtype, start, size);
    }
}

/* Add `alpha` times numbers to others. */
static void NAME(add_residual)(void *out, const float *residual, float alpha, int dtype, int64_t start, int64_t count)
{
    for (int64_t done = 0; done < count; done += CHUNK) {
        float values[CHUNK];
        const int64_t size = count - done < CHUNK ? count - done : CHUNK;
        NAME(load_row)(values, out, dtype, start + done, size);
        for (int64_t k = 0; k < size; k++)
            values[k] += alpha * residual[done + k];
        NAME(store_row)(out, values, dtype, start + done, size);
    }
}

#undef LANES
#undef V_FLOATS
#undef V_INTS

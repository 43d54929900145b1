/* Documents that stay apart, or instructions, packed into rows, as packing.py describes: no header of Python, so one
build serves all versions.

From its number a document draws its objective and its place among those of its block. The documents of one objective
are packed in this order, long ones in pieces, into one row until the next piece does not fit.

Boundaries come from a file: none is used before it is known to lie in the corpus. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { NUM_OBJECTIVES = 3 /* of texts */, INSTRUCTION = 3, NO_MEMORY = -1, DAMAGED = -2 };
enum { CHANCE_BITS = 48, MOST_BUCKET_BITS = 20 };

/* As in random_numbers.py. */
static const uint64_t GOLDEN = 0x9E3779B97F4A7C15, FACTORS[2] = {0xBF58476D1CE4E5B9, 0x94D049BB133111EB};
static const uint64_t OBJECTIVE = (uint64_t)1 << 32, ORDER = (uint64_t)5 << 32;

/* As in packing.py. */
struct packing {
    const int32_t *infilled; /* tokens of a row that a text of 0 .. row_length tokens takes, by objective */
    int64_t longest[NUM_OBJECTIVES];  /* texts that are not split, at most row_length */
    double edges[NUM_OBJECTIVES - 1]; /* between the objectives in [0, 1) */
    int64_t row_length, block_tokens, num_tokens;
    int32_t is_instructions;
};

/* As in packing.py: with room for all rows and pieces. */
struct rows {
    uint8_t *objectives; /* of rows */
    int64_t *first;      /* of rows: number of the first piece */
    int64_t *start;      /* of pieces: index of the first token */
    int64_t *length;     /* of pieces; of instructions, contexts and targets in turns */
    uint8_t *is_end;     /* of pieces: whether a document ends with it */
};

struct document {
    uint64_t key;   /* objective << CHANCE_BITS | chance, by which documents are ordered */
    int64_t number; /* in its block */
};

struct state {
    const struct packing *packing;
    const struct rows *rows; /* to be written, or NULL */
    int64_t num_rows, num_pieces;
    int64_t room; /* tokens that the last row has left */
};

/* Return 64 random bits, output number `counter` of SplitMix64. */
static uint64_t mix(uint64_t key, uint64_t purpose, uint64_t counter)
{
    uint64_t state = key + (counter + purpose + 1) * GOLDEN;
    state = (state ^ state >> 30) * FACTORS[0];
    state = (state ^ state >> 27) * FACTORS[1];
    return state ^ state >> 31;
}

/* Draw the objectives and places of the documents of a block; return how many have a token. */
static int64_t draw(
    const struct packing *packing, uint64_t key, const int64_t *parts, int64_t first_number, int64_t count,
    struct document *drawn)
{
    int64_t num_drawn = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint64_t number = (uint64_t)(first_number + i);
        uint64_t objective = 0; /* instructions have one only */
        if (!packing->is_instructions) {
            if (parts[i + 1] - parts[i] <= 1)
                continue;
            const double uniform = (double)(int64_t)(mix(key, OBJECTIVE, number) >> 11) * 0x1p-53;
            objective = (uint64_t)((uniform >= packing->edges[0]) + (uniform >= packing->edges[1]));
        }
        const uint64_t chance = mix(key, ORDER, number) >> (64 - CHANCE_BITS);
        drawn[num_drawn++] = (struct document){objective << CHANCE_BITS | chance, i};
    }
    return num_drawn;
}

/* Sort documents by their keys, those of the same key in the order they have: by counting into buckets of about one
document each, as chances are spread evenly, and by insertion within these. */
static void sort(const struct document *drawn, struct document *sorted, int64_t count, int64_t *buckets)
{
    int bits = 0;
    while (bits < MOST_BUCKET_BITS && (int64_t)2 << bits <= count)
        bits++;
    const int shift = CHANCE_BITS - bits;
    int64_t end = 0;
    memset(buckets, 0, (sizeof *buckets * NUM_OBJECTIVES) << bits);
    for (int64_t i = 0; i < count; i++)
        buckets[drawn[i].key >> shift]++;
    for (int64_t bucket = 0; bucket < (int64_t)NUM_OBJECTIVES << bits; bucket++) {
        const int64_t size = buckets[bucket];
        buckets[bucket] = end;
        end += size;
    }
    for (int64_t i = 0; i < count; i++)
        sorted[buckets[drawn[i].key >> shift]++] = drawn[i];
    for (int64_t i = 1; i < count; i++) {
        const struct document moved = sorted[i];
        int64_t place = i;
        for (; place > 0 && sorted[place - 1].key > moved.key; place--)
            sorted[place] = sorted[place - 1];
        sorted[place] = moved;
    }
}

/* Put a piece that takes so many tokens into the last row, or a new one if it does not fit. */
static inline void put(struct state *state, int objective, int64_t infilled, int64_t start, int is_end)
{
    const struct rows *rows = state->rows;
    if (infilled > state->room) {
        if (rows) {
            rows->objectives[state->num_rows] = (uint8_t)objective;
            rows->first[state->num_rows] = state->num_pieces;
        }
        state->num_rows++;
        state->room = state->packing->row_length;
    }
    state->room -= infilled;
    if (rows) {
        rows->start[state->num_pieces] = start;
        rows->is_end[state->num_pieces] = (uint8_t)is_end;
    }
    state->num_pieces++;
}

/* Pack a text, which has a token, in as few pieces as its objective allows, of nearly the same length. */
static void put_text(struct state *state, int objective, int64_t start, int64_t length)
{
    const struct packing *packing = state->packing;
    const int32_t *infilled = packing->infilled + objective * (packing->row_length + 1);
    const int64_t longest = packing->longest[objective];
    const int64_t count = length <= longest ? 1 : (length - 1) / longest + 1;
    const int64_t whole = count == 1 ? length : length / count, rest = length - whole * count;
    int64_t over = 0;
    for (int64_t left = count; left > 0; left--) {
        over += rest;
        const int64_t piece = whole + (over >= count);
        over -= over >= count ? count : 0;
        if (state->rows)
            state->rows->length[state->num_pieces] = piece;
        put(state, objective, infilled[piece], start, left == 1);
        start += piece;
    }
}

/* Pack an instruction, a context with its target, with the `sop` between them. */
static void put_instruction(struct state *state, const int64_t *parts)
{
    if (state->rows) {
        int64_t *lengths = state->rows->length + 2 * state->num_pieces;
        lengths[0] = parts[1] - parts[0];
        lengths[1] = parts[2] - parts[1];
    }
    put(state, INSTRUCTION, parts[2] - parts[0] + 1, parts[0], 1);
}

/* Tell whether the parts of the documents that begin in a block can be such. */
static int are_valid(const struct packing *packing, const int64_t *parts, int64_t num_parts, int64_t block)
{
    const int64_t step = packing->is_instructions ? 2 : 1, first_token = block * packing->block_tokens;
    int rises = 1;
    if (num_parts == 0)
        return 1;
    for (int64_t i = 0; i < num_parts; i++)
        rises &= parts[i] <= parts[i + 1];
    return rises && parts[0] >= first_token && parts[num_parts - step] - first_token < packing->block_tokens &&
           parts[num_parts] <= packing->num_tokens;
}

/* Pack the documents of a block. */
static void pack_block(
    struct state *state, uint64_t key, const int64_t *parts, int64_t first_number, int64_t count,
    struct document *documents, int64_t *buckets)
{
    struct document *sorted = documents + count;
    const int is_instructions = state->packing->is_instructions;
    uint64_t last = UINT64_MAX;
    count = draw(state->packing, key, parts, first_number, count, documents);
    sort(documents, sorted, count, buckets);
    for (int64_t i = 0; i < count; i++) {
        const uint64_t objective = sorted[i].key >> CHANCE_BITS;
        if (objective != last)
            state->room = 0;
        last = objective;
        if (is_instructions) {
            put_instruction(state, parts + 2 * sorted[i].number);
        } else {
            const int64_t *part = parts + sorted[i].number;
            put_text(state, (int)objective, part[0], part[1] - part[0] - 1);
        }
    }
}

/* Pack blocks of documents, each by itself; return how many pieces there are, DAMAGED, or NO_MEMORY.

    key             of the draws
    parts           boundaries of the parts, the first that of document first_documents[0]
    num_parts       one less than boundaries
    first_documents of every block, and of the one behind
    first_block     number of the first block in the corpus
    rows_per_block  to be written
    rows            to be written; NULL to count only */
EXPORT int64_t pack_blocks(
    const struct packing *packing, uint64_t key, const int64_t *parts, int64_t num_parts,
    const int64_t *first_documents, int64_t first_block, int64_t num_blocks, int64_t *rows_per_block,
    const struct rows *rows)
{
    const int64_t step = packing->is_instructions ? 2 : 1, num_documents = num_parts / step;
    int64_t most = 1;
    for (int64_t block = 0; block < num_blocks; block++) {
        const int64_t first = first_documents[block] - first_documents[0];
        const int64_t end = first_documents[block + 1] - first_documents[0];
        if (first < 0 || end < first || end > num_documents)
            return DAMAGED;
        if (!are_valid(packing, parts + step * first, step * (end - first), first_block + block))
            return DAMAGED;
        most = end - first > most ? end - first : most;
    }
    struct document *documents = malloc(2 * (size_t)most * sizeof *documents);
    int64_t *buckets = malloc(NUM_OBJECTIVES * (size_t)most * sizeof *buckets);
    struct state state = {packing, rows, 0, 0, 0};
    for (int64_t block = 0; documents && buckets && block < num_blocks; block++) {
        const int64_t first = first_documents[block], rows_before = state.num_rows;
        pack_block(
            &state, key, parts + step * (first - first_documents[0]), first, first_documents[block + 1] - first,
            documents, buckets);
        rows_per_block[block] = state.num_rows - rows_before;
    }
    const int has_memory = documents && buckets;
    free(documents);
    free(buckets);
    return has_memory ? state.num_pieces : NO_MEMORY;
}

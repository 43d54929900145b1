/* Texts of simple letters to the ids of a unigram model, as unigram.py describes: no header of Python, so one build
serves all versions.

A text is normalized letter by letter, cut at symbols, and every part between two cuts is segmented by the path of the
largest sum of scores. All of it is what the tokenizers library computes: sums in double precision from left to right,
and of two paths with the same sum the one whose last piece begins first.

Pieces are in a trie as a double array: of node `n` the child for byte `c` is `base[n] + c` if its parent is `n`. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

enum { NEW, OTHER, SAME /* else offset << 8 | length of what a letter becomes */ };
enum { NUM_LETTERS = 0x20000, MOST_BLANKS = 127, NO_MEMORY = -1, NO_ROOM = -2, MARK_BYTES = 3 };
enum { MOST_WRITTEN = 1024 /* at a time */, MOST_TEXT = INT32_MAX - 1 /* as places in a text have 32 bits */ };

static const uint32_t FREE = UINT32_MAX, ROOT_PARENT = UINT32_MAX - 1;
static const uint8_t MARK[MARK_BYTES] = {0xE2, 0x96, 0x81}; /* how SentencePiece writes a blank */

struct node {
    uint32_t base, parent;
    double score; /* -INFINITY if no piece ends here */
};

/* As in unigram.py. */
struct unigram {
    const struct node *pieces, *symbols; /* scores of symbols: the negated place in the order they are looked for */
    const int32_t *piece_ids;            /* by node */
    const uint32_t *starts;              /* nodes by code point */
    uint32_t *letters;                   /* what becomes of them, by code point */
    const uint8_t *replacements;
    const uint32_t *blanks; /* what so many blanks become; 0 if they are none of the old strings */
    const int32_t *runs;    /* how many of so many blanks to replace at a time, at least 1 */
    const int32_t *byte_ids;
    double unknown_score;
    int32_t unknown_id, drops_blanks, has_prefix, falls_back_to_bytes, splits_byte_names;
};

struct step {
    double score;
    uint32_t start, node; /* of the last piece; root: unknown */
};

/* Read the code point at `at`, and move behind it; what is no UTF-8 gives some number, but is never read beyond. */
static uint32_t next_letter(const uint8_t **at, const uint8_t *end)
{
    const uint8_t *text = *at;
    const uint32_t first = *text;
    const int length = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (length > end - text) {
        *at = end;
        return NUM_LETTERS;
    }
    *at = text + length;
    switch (length) {
    case 1: return first;
    case 2: return (first & 31) << 6 | (text[1] & 63);
    case 3: return (first & 15) << 12 | (uint32_t)(text[1] & 63) << 6 | (text[2] & 63);
    default:
        return (first & 7) << 18 | (uint32_t)(text[1] & 63) << 12 | (uint32_t)(text[2] & 63) << 6 | (text[3] & 63);
    }
}

struct writer {
    uint8_t *at, *end;
    int drops_blanks, skips_blank;
};

static void write_blank(struct writer *writer)
{
    if (!writer->skips_blank) {
        memcpy(writer->at, MARK, MARK_BYTES);
        writer->at += MARK_BYTES;
        writer->skips_blank = writer->drops_blanks;
    }
}

static void write_replacement(struct writer *writer, const struct unigram *unigram, uint32_t replacement)
{
    const uint8_t *from = unigram->replacements + (replacement >> 8), *end = from + (replacement & 255);
    for (; from < end; from++) {
        if (*from == ' ') {
            write_blank(writer);
        } else {
            *writer->at++ = *from;
            writer->skips_blank = 0;
        }
    }
}

/* Write the first of some blanks, or as many of them as are the longest of the old strings; return how many. */
static int write_blanks(struct writer *writer, const struct unigram *unigram, int count)
{
    const int length = unigram->runs[count];
    if (length > 1)
        write_replacement(writer, unigram, unigram->blanks[length]);
    else
        write_blank(writer);
    return length;
}

/* Normalize a text as far as its letters are simple and there is room; return where that ends. */
static const uint8_t *normalize_simple(
    const struct unigram *unigram, const uint8_t *text, const uint8_t *end, struct writer *writer)
{
    while (text < end && writer->end - writer->at >= MOST_WRITTEN) {
        const uint8_t *start = text;
        if (*text == ' ') {
            while (text < end && *text == ' ' && text - start < MOST_BLANKS)
                text++;
            text = start + write_blanks(writer, unigram, (int)(text - start));
            continue;
        }
        const uint32_t letter = next_letter(&text, end);
        const uint32_t state = letter < NUM_LETTERS ? unigram->letters[letter] : OTHER;
        if (state < SAME)
            return start;
        if (state > SAME) {
            write_replacement(writer, unigram, state);
        } else {
            while (start < text)
                *writer->at++ = *start++;
            writer->skips_blank = 0;
        }
    }
    return text;
}

/* Note the letters of a text of which nothing is known. */
static void find_letters(
    const struct unigram *unigram, const uint8_t *text, const uint8_t *end, uint32_t *found, int64_t *num_found,
    int64_t most_found)
{
    while (text < end && *num_found < most_found) {
        const uint32_t letter = next_letter(&text, end);
        if (letter < NUM_LETTERS && unigram->letters[letter] == NEW) {
            unigram->letters[letter] = OTHER; /* until the caller knows better, so that it is found once */
            found[(*num_found)++] = letter;
        }
    }
}

/* Normalize texts; return how many bytes they have then, or NO_ROOM.

    texts, ends     one behind the other; text i has the bytes ends[i - 1] .. ends[i]
    out, out_ends   the normalized ones alike; texts with other letters than simple ones have no bytes
    are_others      whether a text has other letters
    found           letters of which nothing is known: if there are any, tell what they are and call again */
EXPORT int64_t normalize_texts(
    const struct unigram *unigram, const uint8_t *texts, const int64_t *ends, int64_t num_texts, uint8_t *out,
    int64_t room, int64_t *out_ends, uint8_t *are_others, uint32_t *found, int64_t *num_found, int64_t most_found)
{
    struct writer writer = {out, out + room, unigram->drops_blanks, 0};
    const uint8_t *text = texts;
    *num_found = 0;
    for (int64_t i = 0; i < num_texts; text = texts + ends[i++]) {
        const uint8_t *start = writer.at, *text_end = texts + ends[i];
        if (writer.end - writer.at < MOST_WRITTEN)
            return NO_ROOM;
        if (unigram->has_prefix) {
            memcpy(writer.at, MARK, MARK_BYTES);
            writer.at += MARK_BYTES;
        }
        const uint8_t *first = writer.at;
        writer.skips_blank = writer.drops_blanks;
        const uint8_t *left = normalize_simple(unigram, text, text_end, &writer);
        if (left < text_end && writer.end - writer.at < MOST_WRITTEN)
            return NO_ROOM;
        if (unigram->drops_blanks)
            while (writer.at - first >= MARK_BYTES && !memcmp(writer.at - MARK_BYTES, MARK, MARK_BYTES))
                writer.at -= MARK_BYTES;
        are_others[i] = left < text_end || writer.at - start > MOST_TEXT;
        if (are_others[i])
            find_letters(unigram, left, text_end, found, num_found, most_found);
        if (are_others[i] || writer.at == first)
            writer.at = out + (start - out);
        out_ends[i] = writer.at - out;
    }
    return writer.at - out;
}

/* Return the node of a whole string, 0 if it is no beginning of a piece. */
static uint32_t find_node(const struct node *nodes, const uint8_t *text, const uint8_t *end)
{
    uint32_t node = 0;
    for (; text < end; text++) {
        const uint32_t child = nodes[node].base + *text;
        if (nodes[child].parent != node)
            return 0;
        node = child;
    }
    return node;
}

/* Write the ids of neighbouring unknown letters, the last first; return how many. */
static int64_t write_unknown(const struct unigram *unigram, const uint8_t *text, const uint8_t *end, uint32_t *out)
{
    const uint32_t node = find_node(unigram->pieces, text, end);
    int has_ids = unigram->falls_back_to_bytes;
    if (isfinite(unigram->pieces[node].score)) {
        *out = (uint32_t)unigram->piece_ids[node];
        return 1;
    }
    for (const uint8_t *at = text; has_ids && at < end; at++)
        has_ids = unigram->byte_ids[*at] >= 0;
    if (!has_ids) {
        *out = (uint32_t)unigram->unknown_id;
        return 1;
    }
    for (const uint8_t *at = end; at > text;)
        *out++ = (uint32_t)unigram->byte_ids[*--at];
    return end - text;
}

/* Write the ids of the best path through `size` bytes; return how many. */
static int64_t write_path(
    const struct unigram *unigram, const uint8_t *text, uint32_t size, const struct step *steps, uint32_t *out)
{
    int64_t count = 0;
    uint32_t unknown_end = 0; /* of letters that follow one another, 0 if there are none */
    for (uint32_t end = size; end > 0; end = steps[end].start) {
        const uint32_t node = steps[end].node;
        const int32_t id = node ? unigram->piece_ids[node] : unigram->unknown_id;
        if (id == unigram->unknown_id) {
            unknown_end = unknown_end ? unknown_end : end;
            continue;
        }
        if (unknown_end)
            count += write_unknown(unigram, text + end, text + unknown_end, out + count);
        unknown_end = 0;
        out[count++] = (uint32_t)id;
    }
    if (unknown_end)
        count += write_unknown(unigram, text, text + unknown_end, out + count);
    for (int64_t left = 0, right = count - 1; left < right; left++, right--) {
        const uint32_t id = out[left];
        out[left] = out[right];
        out[right] = id;
    }
    return count;
}

/* Write the ids of a part between two cuts; return how many. */
static int64_t segment(
    const struct unigram *unigram, const uint8_t *text, uint32_t size, struct step *steps, uint32_t *out)
{
    const struct node *nodes = unigram->pieces;
    const uint8_t *at = text, *text_end = text + size;
    steps[0] = (struct step){0.0, 0, 0};
    for (uint32_t place = 1; place <= size; place++)
        steps[place].score = -INFINITY;
    while (at < text_end) {
        const uint8_t *end = at;
        const uint32_t start = (uint32_t)(at - text), letter = next_letter(&end, text_end);
        const double score_here = steps[start].score;
        uint32_t node = letter < NUM_LETTERS ? unigram->starts[letter] : find_node(nodes, at, end);
        const double letter_score = node ? nodes[node].score : -INFINITY;
        struct step *step = steps + (end - text);
        at = end;
        if (letter_score == -INFINITY && score_here + unigram->unknown_score > step->score)
            *step = (struct step){score_here + unigram->unknown_score, start, 0};
        while (node) {
            const double score = score_here + nodes[node].score;
            step = steps + (end - text);
            if (score > step->score)
                *step = (struct step){score, start, node};
            if (end == text_end)
                break;
            const uint32_t child = nodes[node].base + *end++;
            node = nodes[child].parent == node ? child : 0;
        }
    }
    return write_path(unigram, text, size, steps, out);
}

/* Return the length of the symbol at the beginning of a text, 0 if there is none; of several the first in order. */
static uint32_t symbol_length(const struct node *symbols, const uint8_t *text, uint32_t size)
{
    uint32_t node = 0, length = 0;
    double score = -INFINITY;
    for (uint32_t end = 0; end < size;) {
        const uint32_t child = symbols[node].base + text[end];
        if (symbols[child].parent != node)
            break;
        node = child;
        end++;
        if (symbols[node].score > score) {
            score = symbols[node].score;
            length = end;
        }
    }
    return length;
}

static int is_hexadecimal(uint8_t letter)
{
    return (letter >= '0' && letter <= '9') || (letter >= 'A' && letter <= 'F');
}

/* Tell whether the name of a byte piece, written out in a text, goes on at `at` behind its first letter. */
static int is_byte_name(const uint8_t *text, uint32_t at, uint32_t size)
{
    return at > 0 && size - at >= 5 && text[at - 1] == '<' && text[at] == '0' && text[at + 1] == 'x' &&
           is_hexadecimal(text[at + 2]) && is_hexadecimal(text[at + 3]) && text[at + 4] == '>';
}

/* Write the ids of a normalized text; return how many. */
static int64_t segment_text(
    const struct unigram *unigram, const uint8_t *text, uint32_t size, struct step *steps, uint32_t *out)
{
    int64_t count = 0;
    uint32_t start = 0;
    for (uint32_t at = 0; at < size;) {
        const uint32_t child = unigram->symbols[0].base + text[at];
        const uint32_t length =
            unigram->symbols[child].parent == 0 ? symbol_length(unigram->symbols, text + at, size - at) : 0;
        if (at > start && (length || (unigram->splits_byte_names && is_byte_name(text, at, size)))) {
            count += segment(unigram, text + start, at - start, steps, out + count);
            start = at;
        }
        if (length) {
            count += segment(unigram, text + at, length, steps, out + count);
            start = at + length;
        }
        at += length ? length : 1;
    }
    if (size > start)
        count += segment(unigram, text + start, size - start, steps, out + count);
    return count;
}

/* Write the ids of normalized texts; return how many, or NO_MEMORY.

    texts, ends     one behind the other; text i has the bytes ends[i - 1] .. ends[i]
    ids             with room for one per byte
    lengths         number of ids of each text */
EXPORT int64_t segment_texts(
    const struct unigram *unigram, const uint8_t *texts, const int64_t *ends, int64_t num_texts, uint32_t *ids,
    int64_t *lengths)
{
    int64_t most = 0, count = 0, start = 0;
    for (int64_t i = 0; i < num_texts; start = ends[i++])
        most = ends[i] - start > most ? ends[i] - start : most;
    struct step *steps = malloc(((size_t)most + 1) * sizeof *steps);
    if (!steps)
        return NO_MEMORY;
    start = 0;
    for (int64_t i = 0; i < num_texts; start = ends[i++]) {
        lengths[i] = segment_text(unigram, texts + start, (uint32_t)(ends[i] - start), steps, ids + count);
        count += lengths[i];
    }
    free(steps);
    return count;
}

/* Find the nodes of single letters. */
EXPORT void find_starts(const struct node *nodes, uint32_t *starts)
{
    for (uint32_t letter = 0; letter < NUM_LETTERS; letter++) {
        uint8_t text[4] = {(uint8_t)letter};
        int length = 1;
        if (letter >= 0x10000) {
            text[0] = (uint8_t)(0xF0 | letter >> 18);
            text[length++] = (uint8_t)(0x80 | (letter >> 12 & 63));
        } else if (letter >= 0x800) {
            text[0] = (uint8_t)(0xE0 | letter >> 12);
        } else if (letter >= 0x80) {
            text[0] = (uint8_t)(0xC0 | letter >> 6);
        }
        if (letter >= 0x800)
            text[length++] = (uint8_t)(0x80 | (letter >> 6 & 63));
        if (letter >= 0x80)
            text[length++] = (uint8_t)(0x80 | (letter & 63));
        starts[letter] = find_node(nodes, text, text + length);
    }
}

struct range {
    uint32_t node;
    int32_t first, last; /* of the keys that begin as the node says */
    int32_t depth;
};

/* Return a base at which the children of a node find room, 0 if there is no such one. */
static uint32_t find_base(
    const struct node *nodes, int64_t capacity, const uint8_t *labels, int num_labels, int64_t *first_free)
{
    int64_t num_taken = 0, start = *first_free > labels[0] ? *first_free : labels[0] + 1;
    for (int64_t at = start; at + 256 < capacity; at++) {
        if (nodes[at].parent != FREE) {
            num_taken++;
            continue;
        }
        const int64_t base = at - labels[0];
        int i = 1;
        while (i < num_labels && nodes[base + labels[i]].parent == FREE)
            i++;
        if (i == num_labels) {
            if (num_taken * 20 >= (at - start + 1) * 19) /* so full that it pays no more to look there */
                *first_free = at;
            return (uint32_t)base;
        }
    }
    return 0;
}

/* Build a trie; return 0, NO_ROOM if it needs more nodes, or NO_MEMORY.

    keys, ends      sorted by their bytes, none empty and none twice; key i has the bytes ends[i - 1] .. ends[i]
    scores, ids     of the keys
    nodes, node_ids with room for `capacity` of them */
EXPORT int64_t build_trie(
    const uint8_t *keys, const int64_t *ends, int32_t num_keys, const double *scores, const int32_t *ids,
    struct node *nodes, int32_t *node_ids, int64_t capacity)
{
    struct range *queue = malloc((size_t)capacity * sizeof *queue);
    int64_t num_ranges = 1, first_free = 1;
    int failed = capacity <= 512;
    if (!queue)
        return NO_MEMORY;
    for (int64_t node = 0; node < capacity; node++) {
        nodes[node] = (struct node){1, FREE, -INFINITY};
        node_ids[node] = -1;
    }
    queue[0] = (struct range){0, 0, num_keys, 0};
    nodes[0].parent = ROOT_PARENT;
    for (int64_t i = 0; i < num_ranges && !failed; i++) {
        struct range range = queue[i];
        uint8_t labels[256];
        int32_t firsts[257];
        int num_labels = 0;
        for (int32_t key = range.first; key < range.last; key++) {
            const int64_t at = (key ? ends[key - 1] : 0) + range.depth;
            if (at == ends[key]) {
                nodes[range.node].score = scores[key];
                node_ids[range.node] = ids[key];
            } else if (!num_labels || labels[num_labels - 1] != keys[at]) {
                firsts[num_labels] = key;
                labels[num_labels++] = keys[at];
            }
        }
        if (!num_labels)
            continue;
        firsts[num_labels] = range.last;
        const uint32_t base = find_base(nodes, capacity, labels, num_labels, &first_free);
        failed = !base;
        nodes[range.node].base = base;
        for (int label = 0; label < num_labels && !failed; label++) {
            const uint32_t child = base + labels[label];
            nodes[child].parent = range.node;
            queue[num_ranges++] = (struct range){child, firsts[label], firsts[label + 1], range.depth + 1};
        }
    }
    free(queue);
    return failed ? NO_ROOM : 0;
}

"""Blanks in texts, and the rows that a model trains on.

Both steps work on ragged arrays: `tokens` holds the texts of some rows one after another, `lengths` how long each is.
A text becomes a context, in which masks stand for its spans, and the contents of its blanks, each behind a `sop`:

    a b c d e f g  ->  a [MASK] d e [MASK] g </s> | sop f | sop b c      predicted: f eop | b c eop
                       0   1    2 3   4    5  6      4  4    1  1 1      position_ids

`[MASK]` blanks come in random order, each at the position of its mask; a `[gMASK]` counts on.

Shapes: `S` samples, `N` their blanks.
"""

from dataclasses import dataclass

import numpy as np

from glm_hf.training.data.random_numbers import GOAL, LENGTH, PLACE, mix, uniform
from glm_hf.training.data.recipe import InfillingRecipe

IGNORED = -100  # the label of what is not predicted


@dataclass(frozen=True)
class Spans:
    """Spans in the order of the tokens; arrays of `N`."""

    sample: np.ndarray
    """Number of the text that a span lies in."""
    start: np.ndarray
    """Index of its first token among all tokens."""
    length: np.ndarray


@dataclass(frozen=True)
class InfilledTexts:
    """Contexts and blanks, ragged arrays of token ids."""

    context: np.ndarray
    context_lengths: np.ndarray
    """`(S,)`."""
    blank: np.ndarray
    blank_lengths: np.ndarray
    """`(N,)`, without `sop`."""
    blank_sample: np.ndarray
    """`(N,)` ascending numbers of the samples that the blanks belong to."""
    blank_position: np.ndarray
    """`(N,)` position of a blank's mask in its context, -1 for a blank whose positions count on."""
    is_closed: np.ndarray
    """`(N,)` whether a blank is followed by `eop`; the window may end before it does."""


def draw_word_spans(lengths: np.ndarray, recipe: InfillingRecipe, keys: np.ndarray) -> Spans:
    """
    Draw spans of Poisson lengths until they cover the share of the recipe, and places where they do not touch.

    Every text gets at least one span and keeps at least one token outside, unless it has only one. Long texts are
    covered by `span_share` on average: spans are drawn up to that, less what the last one goes beyond it.

    Args:
        lengths: `(S,)` of the texts, at least 1.
        recipe: Share and lengths.
        keys: `(S,)` of all draws.
    """
    most = recipe.most_spans(lengths)
    column = np.arange(int(most.max()))
    drawn = np.searchsorted(recipe.span_cdf, uniform(keys[:, None], LENGTH, column), side="right") + 1
    covered = drawn.cumsum(1)
    goal = np.maximum(recipe.span_share * lengths - recipe.expected_overshoot, 1) + uniform(keys, GOAL, column[:1])
    count = np.minimum((covered < np.floor(goal)[:, None]).sum(1) + 1, most)  # (S,)
    last = (np.arange(len(lengths)), count - 1)
    longest = np.maximum(lengths - np.maximum(count - 1, 1), 1)
    drawn[last] -= np.maximum(covered[last] - longest, 0)
    return place_spans(lengths, count, drawn[column < count[:, None]], keys)


def place_spans(lengths: np.ndarray, count: np.ndarray, span_lengths: np.ndarray, keys: np.ndarray) -> Spans:
    """Place `count` `(S,)` spans of `span_lengths` `(N,)` into the texts, all places equally likely, none touching."""
    sample = np.repeat(np.arange(len(lengths)), count)
    covered = np.bincount(sample, span_lengths, minlength=len(lengths)).astype(np.int64)
    num_gaps = lengths - covered + 1  # before, between and behind the tokens that stay
    chosen = np.sort(draw_entries(num_gaps, count, keys, PLACE))  # in one text, then the next
    gap = chosen - np.repeat(exclusive_sum(num_gaps), count)
    before = exclusive_sum(span_lengths)
    before -= np.repeat(exclusive_sum(covered), count)  # tokens of earlier spans of the same text
    return Spans(sample, gap + before + np.repeat(exclusive_sum(lengths), count), span_lengths)


def draw_sentence_spans(
    lengths: np.ndarray,
    ends_sentence: np.ndarray,
    recipe: InfillingRecipe,
    keys: np.ndarray,
    is_end: np.ndarray | None = None,
) -> Spans:
    """
    Draw whole sentences, in random order, until they cover the share of the recipe.

    Every text gets at least one. A text of a single sentence is a blank as a whole. The end of a document belongs to
    no sentence, unless a text is nothing else.

    Args:
        lengths: `(S,)` of the texts.
        ends_sentence: `(sum of lengths,)` bool, whether a token ends a sentence; the last of a text always does.
        recipe: Share; more than `recipe.most_spans` are not drawn.
        keys: `(S,)` of all draws.
        is_end: `(sum of lengths,)` bool, whether a token is the `</s>` of a document; none is by default.
    """
    starts = exclusive_sum(lengths)
    is_end = np.zeros_like(ends_sentence) if is_end is None else is_end
    ends_sentence = ends_sentence | is_end
    ends_sentence[:-1] |= is_end[1:]
    ends_sentence[starts + lengths - 1] = True
    end = np.flatnonzero(ends_sentence)
    start = np.concatenate(([0], end[:-1] + 1))
    sample = np.searchsorted(starts, start, side="right") - 1
    if is_end.any():
        is_sentence = ~is_end[start]
        has_sentence = np.bincount(sample, is_sentence, len(lengths)) > 0
        is_sentence |= ~has_sentence[sample]
        start, end, sample = start[is_sentence], end[is_sentence], sample[is_sentence]
    sentences = np.bincount(sample, minlength=len(lengths))
    order = draw_entries(sentences, sentences, keys, PLACE)
    length = (end - start + 1)[order]
    covered_before = exclusive_sum(length)
    first = np.searchsorted(sample, np.arange(len(lengths)))  # `order` keeps the texts apart
    covered_before -= covered_before[first][sample]
    rank = np.arange(len(sample)) - first[sample]
    goal = (recipe.span_share * lengths)[sample]
    is_chosen = (rank == 0) | ((covered_before + length <= goal) & (rank < recipe.most_spans(lengths)[sample]))
    chosen = np.sort(order[is_chosen])
    return Spans(sample[chosen], start[chosen], (end - start + 1)[chosen])


def draw_suffixes(lengths: np.ndarray, recipe: InfillingRecipe, keys: np.ndarray) -> Spans:
    """Draw one span `(S,)` at the end of every text, of uniform length; a text keeps its first token if it can."""
    longest = np.maximum(lengths - 1, 1)
    if recipe.max_blank_length is not None:
        longest = np.minimum(longest, recipe.max_blank_length)
    shortest = np.minimum(recipe.min_blank_length, longest)
    length = shortest + (uniform(keys, LENGTH, np.zeros(1)) * (longest - shortest + 1)).astype(np.int64)
    return Spans(np.arange(len(lengths)), exclusive_sum(lengths) + lengths - length, length)


def draw_entries(counts: np.ndarray, wanted: np.ndarray, keys: np.ndarray, purpose: np.uint64) -> np.ndarray:
    """
    Draw some entries of ragged parts, all equally likely, none twice and in random order.

    Every entry gets random bits, and those with the lowest are taken. Few entries can be among these, by far, and only
    such are sorted.

    Args:
        counts: `(S,)` entries of the parts, below 2^16 each and less than 2^20 parts.
        wanted: `(S,)` entries to draw from each.
        keys: `(S,)` of the draws.
        purpose: Purpose of the draws, one of those in random_numbers.py.

    Returns:
        Indices of entries, part after part.
    """
    start = exclusive_sum(counts)
    part = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    number = np.arange(len(part), dtype=np.uint64)
    number -= np.repeat(start.astype(np.uint64), counts)
    random_bits = mix(np.repeat(keys, counts), purpose, number) >> np.uint64(36)  # 28 of them
    limit = np.minimum((wanted + 6 * np.sqrt(wanted) + 8) / counts, 1) * (1 << 28)
    low = (random_bits < np.repeat(limit.astype(np.uint64), counts)).nonzero()[0]
    low_counts = np.diff(low.searchsorted(start), append=len(low))
    if (low_counts < wanted).any():
        low, low_counts = np.arange(len(part)), counts
    packed = part[low] << np.uint64(44) | random_bits[low] << np.uint64(16) | number[low]
    packed.sort()
    drawn = packed[ragged_range(exclusive_sum(low_counts), wanted)]
    return start[drawn >> np.uint64(44)] + (drawn & np.uint64(0xFFFF)).astype(np.int64)


def mask_spans(
    tokens: np.ndarray, lengths: np.ndarray, spans: Spans, mask_token_id: int, eos_token_id: int, order: np.ndarray
) -> InfilledTexts:
    """
    Replace spans by masks and complete the contexts with `</s>`, as those of short blanks are in generation.

    Args:
        tokens: Texts of the row.
        lengths: `(S,)` of the texts.
        spans: Spans that become blanks.
        mask_token_id: Id of the mask of this kind of blank.
        eos_token_id: Added to a context that ends neither in a mask nor in `</s>`.
        order: `(N,)` indices of the spans in the order in which they are to be filled, sample after sample.
    """
    is_kept = np.ones(len(tokens), dtype=bool)
    is_kept[ragged_range(spans.start, spans.length)] = False
    is_kept[spans.start] = True
    masked = tokens.copy()
    masked[spans.start] = mask_token_id
    context = masked[is_kept]
    kept_before = exclusive_sum(is_kept)
    text_start = exclusive_sum(lengths)
    context_start = kept_before[text_start]
    context_lengths = np.diff(context_start, append=len(context))
    last = context[context_start + context_lengths - 1]
    needs_eos = (last != mask_token_id) & (last != eos_token_id)
    return InfilledTexts(
        context=np.insert(context, (context_start + context_lengths)[needs_eos], eos_token_id),
        context_lengths=context_lengths + needs_eos,
        blank=tokens[ragged_range(spans.start[order], spans.length[order])],
        blank_lengths=spans.length[order],
        blank_sample=spans.sample[order],
        blank_position=(kept_before[spans.start] - context_start[spans.sample])[order],
        is_closed=np.ones(len(order), dtype=bool),
    )


def lay_out(
    texts: InfilledTexts, numbers: np.ndarray, sop_token_id: int, eop_token_id: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """
    Lay contexts and blanks side by side.

    Args:
        texts: Contexts and blanks of the samples.
        numbers: `(S,)` of the samples in their rows, from 0 on.
        sop_token_id: Stands in front of every blank.
        eop_token_id: Is to be predicted at the end of a closed blank.

    Returns:
        `input_ids`, `position_ids`, `segment_ids` from 1 on, and `shift_labels` (what each token is to predict,
        `IGNORED` on contexts), each of as many tokens as the samples have together; and `(S,)` how many each has.
    """
    with_sop = texts.blank_lengths + 1
    blanks_length = np.bincount(texts.blank_sample, with_sop, len(texts.context_lengths)).astype(np.int64)
    sample_lengths = texts.context_lengths + blanks_length
    sample_start = exclusive_sum(sample_lengths)
    blank_start = exclusive_sum(with_sop) + texts.context_lengths.cumsum()[texts.blank_sample]
    blank_tokens = ragged_range(blank_start, texts.blank_lengths)

    total = int(sample_lengths.sum())
    input_ids = np.empty(total, dtype=np.int64)
    input_ids[ragged_range(sample_start, texts.context_lengths)] = texts.context
    input_ids[blank_start] = sop_token_id
    input_ids[blank_tokens + 1] = texts.blank

    labels = np.full(total, IGNORED, dtype=np.int64)
    labels[blank_tokens] = texts.blank
    labels[blank_start + texts.blank_lengths] = np.where(texts.is_closed, eop_token_id, IGNORED)

    position_ids = np.arange(total) - np.repeat(sample_start, sample_lengths)
    is_frozen = texts.blank_position >= 0
    frozen = ragged_range(blank_start[is_frozen], with_sop[is_frozen])
    position_ids[frozen] = np.repeat(texts.blank_position[is_frozen], with_sop[is_frozen])
    segment_ids = np.repeat(numbers + 1, sample_lengths)
    return (input_ids, position_ids, segment_ids, labels), sample_lengths


def first_in_each(is_found: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return `(S,)` the index within each of the ragged parts of the first True, -1 where there is none."""
    start = exclusive_sum(lengths)
    found = np.flatnonzero(is_found)
    part, first = np.unique(np.searchsorted(start, found, side="right") - 1, return_index=True)
    index = np.full(len(lengths), -1)
    index[part] = found[first] - start[part]
    return index


def exclusive_sum(values: np.ndarray) -> np.ndarray:
    """Return the sum of all values before each."""
    total = values.cumsum(dtype=np.int64)
    return total - values


def ragged_range(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return `start[0], start[0] + 1, ...` of `count[0]` numbers, then those of `start[1]`, and so on."""
    return np.repeat(start - exclusive_sum(count), count) + np.arange(int(count.sum()))

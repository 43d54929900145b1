"""The layout is compared with tensors written by hand, the draws with the distributions of the recipe."""

import numpy as np
import pytest

from glm_hf.training.data.blanks import (
    IGNORED,
    Spans,
    draw_entries,
    draw_sentence_spans,
    draw_suffixes,
    draw_word_spans,
    first_in_each,
    lay_out,
    mask_spans,
    place_spans,
    ragged_range,
)
from glm_hf.training.data.random_numbers import keys_of, mix, uniform
from glm_hf.training.data.recipe import InfillingRecipe

MASK, EOS, SOP, EOP = 90, 91, 92, 93


def spans_of(*spans: tuple[int, int, int]) -> Spans:
    return Spans(*(np.array(column) for column in zip(*spans, strict=True)))


def keys(number: int, seed: int = 0) -> np.ndarray:
    return keys_of(seed, np.arange(number), np.zeros(number))


def covered_by(spans: Spans) -> np.ndarray:
    return ragged_range(spans.start, spans.length)


def test_two_masks_are_laid_out_as_by_hand():
    tokens = np.arange(1, 8)  # a b c d e f g
    texts = mask_spans(tokens, np.array([7]), spans_of((0, 1, 2), (0, 5, 1)), MASK, EOS, np.array([1, 0]))
    (ids, positions, segments, labels), lengths = lay_out(texts, np.arange(len(texts.context_lengths)), SOP, EOP)
    assert ids.tolist() == [1, MASK, 4, 5, MASK, 7, EOS, SOP, 6, SOP, 2, 3]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 4, 1, 1, 1]
    assert segments.tolist() == [1] * 12
    assert labels.tolist() == [IGNORED] * 7 + [6, EOP, 2, 3, EOP]
    assert lengths.tolist() == [12]


def test_two_samples_stand_side_by_side_as_by_hand():
    tokens = np.array([1, 2, 3, 4, 5, EOS])
    spans = spans_of((0, 1, 2), (1, 3, 1))
    texts = mask_spans(tokens, np.array([3, 3]), spans, MASK, EOS, np.array([0, 1]))
    (ids, positions, segments, labels), lengths = lay_out(texts, np.arange(len(texts.context_lengths)), SOP, EOP)
    # the first ends in its mask and the second in </s> already, so neither gets one
    assert ids.tolist() == [1, MASK, SOP, 2, 3, MASK, 5, EOS, SOP, 4]
    assert positions.tolist() == [0, 1, 1, 1, 1, 0, 1, 2, 0, 0]
    assert segments.tolist() == [1] * 5 + [2] * 5
    assert labels.tolist() == [IGNORED, IGNORED, 2, 3, EOP, IGNORED, IGNORED, IGNORED, 4, EOP]
    assert lengths.tolist() == [5, 5]


def test_blanks_that_count_on_and_are_cut_off_are_laid_out_as_by_hand():
    texts = mask_spans(np.array([1, 2, 3, 4]), np.array([4]), spans_of((0, 2, 2)), MASK, EOS, np.array([0]))
    texts = texts.__class__(**{**texts.__dict__, "blank_position": np.array([-1]), "is_closed": np.array([False])})
    (ids, positions, _, labels), _ = lay_out(texts, np.zeros(1, np.int64), SOP, EOP)
    assert ids.tolist() == [1, 2, MASK, SOP, 3, 4]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert labels.tolist() == [IGNORED, IGNORED, IGNORED, 3, 4, IGNORED]


def test_sentences_side_by_side_become_two_masks():
    texts = mask_spans(np.arange(1, 6), np.array([5]), spans_of((0, 1, 2), (0, 3, 1)), MASK, EOS, np.array([0, 1]))
    assert texts.context.tolist() == [1, MASK, MASK, 5, EOS]
    assert texts.blank_position.tolist() == [1, 2]


def test_a_text_can_be_a_blank_as_a_whole():
    texts = mask_spans(np.array([7]), np.array([1]), spans_of((0, 0, 1)), MASK, EOS, np.array([0]))
    assert texts.context.tolist() == [MASK]
    assert texts.blank.tolist() == [7]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 12, 17, 40, 451])
@pytest.mark.parametrize("share", [0.15, 0.5])
def test_word_spans_stay_apart_and_inside_their_texts(length, share):
    recipe = InfillingRecipe(span_share=share)
    lengths = np.full(300, length)
    spans = draw_word_spans(lengths, recipe, keys(300))
    assert (spans.length >= 1).all()
    assert (spans.start // length == spans.sample).all()
    assert ((spans.start + spans.length - 1) // length == spans.sample).all()
    assert len(np.unique(covered_by(spans))) == spans.length.sum()
    touching = (spans.start[1:] == (spans.start + spans.length)[:-1]) & (spans.sample[1:] == spans.sample[:-1])
    assert not touching.any()
    per_text = np.bincount(spans.sample, minlength=300)
    assert (per_text >= 1).all()
    assert (per_text <= recipe.most_spans(lengths)).all()
    if length > 1:
        assert (np.bincount(spans.sample, spans.length) < length).all()


def poisson(mean: float, longest: int) -> np.ndarray:
    """Probabilities of 1 .. longest by the recurrence p(k) = p(k - 1) * mean / k."""
    values = [mean]
    for k in range(2, longest + 1):
        values.append(values[-1] * mean / k)
    return np.array(values) / sum(values)


def chi_square(observed: np.ndarray, probability: np.ndarray) -> float:
    """Normal score of the chi-square statistic (Wilson and Hilferty)."""
    expected = observed.sum() * probability
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def test_lengths_of_word_spans_are_poisson_and_cover_their_share():
    lengths = np.full(10_000, 451)
    spans = draw_word_spans(lengths, InfillingRecipe(), keys(10_000))
    counts = np.bincount(spans.length, minlength=13)[1:]
    counts = np.append(counts[:11], counts[11:].sum())
    probability = poisson(3.0, 60)
    probability = np.append(probability[:11], probability[11:].sum())
    assert abs(chi_square(counts, probability)) < 4
    assert spans.length.sum() / lengths.sum() == pytest.approx(0.15, abs=5e-4)


def test_limits_cut_the_distribution_of_lengths():
    recipe = InfillingRecipe(min_span_length=2, max_span_length=4)
    spans = draw_word_spans(np.full(5000, 300), recipe, keys(5000))
    counts = np.bincount(spans.length, minlength=5)
    assert counts[[0, 1]].sum() == counts[5:].sum() == 0
    assert abs(chi_square(counts[2:5], poisson(3.0, 4)[1:] / poisson(3.0, 4)[1:].sum())) < 4
    assert spans.length.sum() / (5000 * 300) == pytest.approx(0.15, abs=1e-3)


def test_all_places_are_equally_likely():
    number = 60_000
    spans = place_spans(np.full(number, 5), np.full(number, 2), np.ones(2 * number, np.int64), keys(number))
    first, second = (spans.start % 5).reshape(-1, 2).T
    counts = np.bincount(first * 5 + second, minlength=25)
    assert np.flatnonzero(counts).tolist() == [2, 3, 4, 8, 9, 14]  # the six pairs that do not touch
    assert abs(chi_square(counts[counts > 0], np.full(6, 1 / 6))) < 4


def test_suffixes_have_uniform_lengths():
    lengths = np.full(40_000, 21)
    spans = draw_suffixes(lengths, InfillingRecipe(), keys(40_000))
    assert (spans.start + spans.length == lengths.cumsum()).all()
    assert abs(chi_square(np.bincount(spans.length, minlength=21)[1:], np.full(20, 1 / 20))) < 4
    limited = draw_suffixes(lengths, InfillingRecipe(min_blank_length=3, max_blank_length=6), keys(40_000))
    assert set(limited.length.tolist()) == {3, 4, 5, 6}
    assert draw_suffixes(np.array([1]), InfillingRecipe(), keys(1)).length.tolist() == [1]


def test_sentence_spans_are_whole_sentences_up_to_the_share():
    recipe = InfillingRecipe(span_share=0.3)
    ends = np.zeros(40, dtype=bool)
    ends[[2, 6, 9, 19, 24, 29, 33]] = True
    lengths = np.array([20, 20])
    chosen = set()
    for seed in range(300):
        spans = draw_sentence_spans(lengths, ends, recipe, keys(2, seed))
        for text, limit in ((0, 6), (1, 6)):
            own = spans.sample == text
            assert own.any()
            assert own.sum() == 1 or spans.length[own].sum() <= limit
        chosen |= set(zip(spans.start.tolist(), spans.length.tolist(), strict=True))
    assert chosen == {(0, 3), (3, 4), (7, 3), (10, 10), (20, 5), (25, 5), (30, 4), (34, 6)}


def test_first_in_each_finds_first_marks():
    marks = np.array([False, True, True, False, False, True])
    assert first_in_each(marks, np.array([3, 2, 1])).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_length": 70_000}, "row_length must be below 65536"),
        ({"window_length": 4}, "window_length must lie between 8"),
        ({"window_length": 4096}, "window_length must lie between 8"),
        ({"mask_probability": 0.7, "smask_probability": 0.4}, "also together"),
        ({"mask_probability": -0.1}, r"must lie in \[0, 1\]"),
        ({"span_share": 0.6}, "span_share"),
        ({"mean_span_length": 0.0}, "mean_span_length"),
        ({"min_span_length": 0}, "min_span_length"),
        ({"min_span_length": 5, "max_span_length": 4}, "max_span_length"),
        ({"min_blank_length": 9, "max_blank_length": 3}, "max_blank_length"),
        ({"instruction_length": 4096}, "instruction_length must lie between 4 and row_length"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        InfillingRecipe(**change)


def test_uniform_numbers_are_uniform_and_independent():
    numbers = uniform(keys(1000)[:, None], np.uint64(7), np.arange(400))
    assert 0 <= numbers.min() < numbers.max() < 1
    assert abs(chi_square(np.bincount((numbers * 64).astype(int).ravel(), minlength=64), np.full(64, 1 / 64))) < 4
    for other in (numbers[1:, :-1], numbers[:-1, 1:], uniform(keys(999)[:, None], np.uint64(1 << 32), np.arange(399))):
        assert abs(np.corrcoef(numbers[:-1, :-1].ravel(), other.ravel())[0, 1]) < 4 / other.size**0.5
    assert len(np.unique(numbers)) == numbers.size


def test_numbers_are_those_of_splitmix64():
    """The first outputs for the seed 1234567 as published with the generator."""
    state = np.array([1234567], dtype=np.uint64)
    outputs = [int(mix(state, np.uint64(0), np.array([counter]))[0]) for counter in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_entries_are_drawn_without_repetition_and_in_random_order():
    counts, wanted = np.array([3, 400, 1, 30_000]), np.array([3, 20, 1, 5])
    seen = []
    for seed in range(200):
        drawn = draw_entries(counts, wanted, keys(4, seed), np.uint64(0))
        parts = np.split(drawn, wanted.cumsum()[:-1])
        for part, count, start in zip(parts, counts, (0, 3, 403, 404), strict=True):
            assert len(np.unique(part)) == len(part)
            assert ((start <= part) & (part < start + count)).all()
        seen.append(tuple(parts[0]))
    assert len(set(seen)) == 6


def test_entries_are_drawn_also_where_too_few_are_low(monkeypatch):
    everything = draw_entries(np.array([50, 60]), np.array([9, 2]), keys(2), np.uint64(0))
    monkeypatch.setattr("numpy.sqrt", lambda values: -np.asarray(values))
    assert draw_entries(np.array([50, 60]), np.array([9, 2]), keys(2), np.uint64(0)).tolist() == everything.tolist()


def test_seeds_of_all_sizes_have_draws_of_their_own():
    one = np.ones(1, dtype=np.uint64)
    keys = [int(keys_of(seed, one, one)[0]) for seed in (-1, 0, 1, 2**63)]
    assert len({*keys}) == 4
    assert keys[0] == int(keys_of(2**64 - 1, one, one)[0])

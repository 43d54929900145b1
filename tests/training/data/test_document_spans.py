"""Blanks where documents are joined, by counting what they hold, and by all places that a short text has."""

from collections import Counter

import numpy as np
import pytest

from glm_hf import GLMConfig
from glm_hf.training import DataCollatorForBlankInfilling, InfillingRecipe
from glm_hf.training.data.blanks import Spans, draw_word_spans, ragged_range
from glm_hf.training.data.document_spans import keep_inside_documents
from glm_hf.training.data.packing.rows import Row
from glm_hf.training.data.random_numbers import keys_of

CONFIG = GLMConfig()
EOS, SOP, EOP, TEXT = CONFIG.eos_token_id, CONFIG.sop_token_id, CONFIG.eop_token_id, 30_000


def keys(number: int) -> np.ndarray:
    return keys_of(0, np.arange(number), np.zeros(number))


def ends_of(document_length: float, shape: tuple[int, int]) -> np.ndarray:
    """Texts of documents of geometric length, as one array."""
    return np.random.default_rng(0).random(shape).ravel() < 1 / document_length


def spans_of(*spans: tuple[int, int, int]) -> Spans:
    return Spans(*(np.array(column) for column in zip(*spans, strict=True)))


def as_pairs(spans: Spans) -> list[tuple[int, int]]:
    return list(zip(spans.start.tolist(), spans.length.tolist(), strict=True))


@pytest.mark.parametrize("document_length", [3, 20, 60, 1000])
def test_spans_hold_no_end_stay_apart_and_cover_as_much(document_length):
    number, length = 400, 451
    lengths = np.full(number, length)
    is_end = ends_of(document_length, (number, length))
    drawn = draw_word_spans(lengths, InfillingRecipe(), keys(number))
    kept = keep_inside_documents(drawn, lengths, is_end, keys(number))
    assert not is_end[ragged_range(kept.start, kept.length)].any()
    is_neighbour = np.diff(kept.sample) == 0
    assert (np.diff(kept.start) > kept.length[:-1])[is_neighbour].all()
    assert (kept.start // length == kept.sample).all()
    assert ((kept.start + kept.length - 1) // length == kept.sample).all()
    if document_length >= 20:  # in shorter ones, some spans fit nowhere
        assert Counter(kept.length.tolist()) == Counter(drawn.length.tolist())
        assert kept.length.sum() / lengths.sum() == pytest.approx(0.15, abs=2e-3)


def test_spans_that_hold_no_end_stay_where_they_are():
    lengths = np.array([60, 60])
    drawn = draw_word_spans(lengths, InfillingRecipe(), keys(2))
    is_end = np.zeros(120, dtype=bool)
    is_end[60 + drawn.start[drawn.sample == 0][0]] = True
    crosses = np.array([is_end[start : start + length].any() for start, length in as_pairs(drawn)])
    kept = as_pairs(keep_inside_documents(drawn, lengths, is_end, keys(2)))
    assert set(kept) >= {pair for pair, moves in zip(as_pairs(drawn), crosses, strict=True) if not moves}
    assert as_pairs(keep_inside_documents(drawn, lengths, np.zeros(120, dtype=bool), keys(2))) == as_pairs(drawn)


def test_all_places_inside_documents_are_equally_likely():
    """Of 12 tokens, the sixth ends a document, and a span of one stands at index 8."""
    is_end = np.zeros(12, dtype=bool)
    is_end[5] = True
    found = Counter()
    for key in keys(8000):
        kept = keep_inside_documents(spans_of((0, 4, 2), (0, 8, 1)), np.array([12]), is_end, np.array([key]))
        [moved] = [pair for pair in as_pairs(kept) if pair != (8, 1)]
        found[moved] += 1
    expected = [(0, 2), (1, 2), (2, 2), (3, 2), (10, 2)]  # 6 would touch the span at 8
    assert sorted(found) == expected
    assert all(abs(count - 1600) < 4 * (8000 * 0.2 * 0.8) ** 0.5 for count in found.values())


def test_a_span_takes_the_longest_place_where_it_fits_nowhere():
    is_end = np.array([False, True, False, False, True, False])
    kept = keep_inside_documents(spans_of((0, 0, 4)), np.array([6]), is_end, keys(1))
    assert as_pairs(kept) == [(2, 2)]


def test_a_span_without_a_place_is_left_out_but_the_last_one_stays():
    is_end = np.array([False, True, True])
    kept = keep_inside_documents(spans_of((0, 0, 1), (0, 2, 1)), np.array([3]), is_end, keys(1))
    assert as_pairs(kept) == [(0, 1)]
    kept = keep_inside_documents(spans_of((0, 1, 1)), np.array([2]), np.array([True, True]), keys(1))
    assert as_pairs(kept) == [(1, 1)]


@pytest.mark.parametrize("objective", ["mask", "smask"])
@pytest.mark.parametrize("document_length", [4, 20, 200])
def test_no_blank_of_joined_documents_holds_their_end(objective, document_length):
    recipe = InfillingRecipe(smask_probability=0.3)
    collator = DataCollatorForBlankInfilling(CONFIG, recipe, sentence_end_ids=[TEXT])
    length = recipe.longest_text(objective)
    rows = []
    for number in range(20):
        tokens = TEXT + np.random.default_rng(number).integers(0, 12, 4 * length)
        tokens[ends_of(document_length, (1, 4 * length))] = EOS
        rows.append(Row(objective, tokens, np.full(4, length), np.zeros(4, dtype=bool), number))
    batch = collator(rows)
    predicted = batch["shift_labels"][batch["shift_labels"] != -100]
    assert len(predicted) > 20 * 150
    assert not (predicted == EOS).any()
    contexts = (batch["input_ids"] == EOS).sum(1)
    originally = [(row.tokens == EOS).sum() for row in rows]
    added = [int((row.tokens[length - 1 :: length] != EOS).sum()) for row in rows]
    assert all(a <= c <= a + b for a, b, c in zip(originally, added, contexts.tolist(), strict=True))


def test_moves_depend_on_no_neighbour():
    lengths = np.full(6, 200)
    is_end = ends_of(15, (6, 200))
    drawn = draw_word_spans(lengths, InfillingRecipe(), keys(6))
    together = keep_inside_documents(drawn, lengths, is_end, keys(6))
    for text in range(6):
        own = drawn.sample == text
        alone = Spans(np.zeros(own.sum(), np.int64), drawn.start[own] - 200 * text, drawn.length[own])
        ends = is_end[200 * text : 200 * text + 200]
        found = as_pairs(keep_inside_documents(alone, lengths[:1], ends, keys(6)[text : text + 1]))
        both = together.sample == text
        assert found == list(zip(together.start[both] - 200 * text, together.length[both], strict=True))


@pytest.mark.parametrize("objective", ["mask", "smask"])
def test_a_text_of_nothing_but_ends_has_a_blank_all_the_same(objective):
    collator = DataCollatorForBlankInfilling(
        CONFIG, InfillingRecipe(64, 32, smask_probability=0.1), sentence_end_ids=[TEXT]
    )
    rows = [Row(objective, np.full(count, EOS), np.array([count]), np.array([False]), 0) for count in (1, 2, 9)]
    assert ((collator(rows)["shift_labels"] != -100).sum(1) >= 2).all()

"""Corpora of numbers that occur once show in which row every token ends up."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from glm_hf import GLMConfig
from glm_hf.training import DataCollatorForBlankInfilling, InfillingRecipe
from glm_hf.training.data.packing import separate as separate_rows
from glm_hf.training.data.packing.joined import JoinedRows
from glm_hf.training.data.packing.rows import Row, next_fit, split_documents
from glm_hf.training.data.packing.separate import SeparateRows
from glm_hf.training.data.token_file import TokenFile

SPECIAL = {f"{name}_token_id": number for number, name in enumerate("pad eos mask gmask smask eod sop eop".split())}
CONFIG = GLMConfig(**SPECIAL)
EOS = CONFIG.eos_token_id
FIRST = 100  # of the numbers that stand for text

RECIPES = {
    "GLM-130B": InfillingRecipe(),
    "GLM-130B with sentences": InfillingRecipe(mask_probability=0.3, smask_probability=0.3),
    "one window per row": InfillingRecipe(row_length=16, window_length=16, mask_probability=0.5),
    "two windows of 8": InfillingRecipe(16, 8, mask_probability=0.4, smask_probability=0.4),
    "rows of 8": InfillingRecipe(8, 8, mask_probability=0.4, smask_probability=0.4),
    "window does not divide row": InfillingRecipe(50, 20, mask_probability=0.4, smask_probability=0.3),
    "many short spans": InfillingRecipe(64, 32, 0.5, 0.4, span_share=0.5, mean_span_length=0.1),
    "long spans": InfillingRecipe(64, 32, 0.9, 0.0, min_span_length=6, mean_span_length=9.0),
    "long blanks": InfillingRecipe(64, 32, 0.0, 0.0, min_blank_length=40, max_blank_length=50),
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def document_lengths(recipe: InfillingRecipe) -> list[int]:
    """Every length that something could go wrong at, a few times."""
    longest = [recipe.longest_text(name) for name in ("mask", "smask", "gmask")]
    around = [length + more for length in {*longest, recipe.window_length, recipe.row_length} for more in (-1, 0, 1)]
    return [1, 2, 3, 4, *around, 2 * recipe.row_length, 5 * recipe.row_length + 3] * 3


def documents(lengths: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of documents with their `</s>`, their boundaries, and of every number the document that it is in."""
    tokens, number = [], FIRST
    for length in lengths:
        tokens += [*range(number, number + length), EOS]
        number += length
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    return np.array(tokens), np.cumsum([0, *(length + 1 for length in lengths)]), document_of


def rows_of(layout: JoinedRows | SeparateRows, tokens: np.ndarray, epoch: int = 0) -> list[Row]:
    """Rows of an epoch in the order of the corpus."""
    num_rows = layout.num_rows(epoch % layout.num_partitions)
    corpus = TokenFile(Path("corpus"), tokens, np.empty(0), {})
    return [layout.pieces(epoch, number).read(corpus, sample_id=number) for number in range(num_rows)]


def joined_rows(num_tokens: int, recipe: InfillingRecipe, epoch: int = 0, seed: int = 0) -> list[Row]:
    return rows_of(JoinedRows(num_tokens, recipe, seed), np.arange(FIRST, FIRST + num_tokens), epoch)


def separate(tokens: np.ndarray, boundaries: np.ndarray, recipe: InfillingRecipe, kind: str = "text") -> SeparateRows:
    return SeparateRows(TokenFile(Path("corpus"), tokens, boundaries, {"kind": kind}), recipe, key=0)


def apart_rows(lengths: list[int], recipe: InfillingRecipe, epoch: int = 0) -> list[Row]:
    tokens, boundaries, _ = documents(lengths)
    return rows_of(separate(tokens, boundaries, recipe), tokens, epoch)


def instruction_rows(tokens: np.ndarray, boundaries: np.ndarray, recipe: InfillingRecipe, epoch: int = 0) -> list[Row]:
    return rows_of(separate(tokens, boundaries, recipe, "instructions"), tokens, epoch)


def texts_of(row: Row) -> list[np.ndarray]:
    return np.split(row.tokens, row.lengths.ravel().cumsum()[:-1])


def read_once(rows: list[Row]) -> list[int]:
    return sorted(int(token) for row in rows for token in row.tokens)


def infilled(
    collator: DataCollatorForBlankInfilling, rows: list[Row]
) -> Iterator[tuple[Row, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Every row with its ids, positions, segments and labels, one objective after the other."""
    for objective in sorted({row.objective for row in rows}):
        members = [row for row in rows if row.objective == objective]
        parts, lengths = collator.infill(members)
        ends = lengths.cumsum()
        assert {len(part) for part in parts} == {ends[-1]}
        yield from zip(members, *(np.split(part, ends[:-1]) for part in parts), strict=True)


def next_fit_by_hand(lengths: list[int], capacity: int) -> list[int]:
    starts, used = [0], 0
    for number, length in enumerate(lengths):
        if used + length > capacity:
            starts.append(number)
            used = 0
        used += length
    return [*starts, len(lengths)]


@pytest.mark.parametrize("seed", range(20))
def test_next_fit_packs_as_one_does_by_hand(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 40))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 200)))
    assert next_fit(lengths, capacity).tolist() == next_fit_by_hand(lengths.tolist(), capacity)


def test_next_fit_leaves_no_room_unused_that_the_next_item_fits():
    assert next_fit(np.array([4, 6, 10, 1, 10, 9, 1]), 10).tolist() == [0, 2, 3, 4, 5, 7]


def test_long_documents_are_cut_into_nearly_equal_pieces():
    document, offset, length = split_documents(np.array([10, 3, 4, 5]), 4)
    assert document.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert offset.tolist() == [0, 3, 6, 0, 0, 0, 2]
    assert length.tolist() == [3, 3, 4, 3, 4, 2, 3]


@recipes
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 40, 2046, 2047, 30_011])
def test_joined_rows_hold_every_token_once(recipe, num_tokens):
    rows = joined_rows(num_tokens, recipe)
    assert read_once(rows) == list(range(FIRST, FIRST + num_tokens))
    assert all(row.lengths.sum() == len(row.tokens) and row.lengths.min() > 0 for row in rows)


@recipes
@pytest.mark.parametrize("seed", range(2))
def test_rows_of_documents_hold_every_token_once(recipe, seed):
    lengths = document_lengths(recipe)
    assert read_once(apart_rows(lengths, recipe, seed)) == list(range(FIRST, FIRST + sum(lengths)))


def instructions(number: int, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and targets in turns, some of which fill a row together, and their boundaries."""
    rng = np.random.default_rng(0)
    contexts = rng.integers(1, row_length - 1, number)
    targets = rng.integers(1, row_length - contexts)
    contexts[:2], targets[:2] = (1, row_length - 2), (row_length - 2, 1)
    boundaries = np.append(0, np.stack((contexts, targets), axis=1).ravel().cumsum())
    tokens = np.arange(FIRST, FIRST + boundaries[-1])
    return tokens, boundaries


def test_rows_of_instructions_hold_every_token_once_and_keep_pairs_together():
    tokens, boundaries = instructions(100, 16)
    rows = instruction_rows(tokens, boundaries, InfillingRecipe(16, 16))
    assert read_once(rows) == tokens.tolist()
    pairs = sorted((context.tolist(), target.tolist()) for row in rows for context, target in in_pairs(row))
    parts = [part.tolist() for part in np.split(tokens, boundaries[1:-1])]
    assert pairs == sorted(zip(parts[::2], parts[1::2], strict=True))
    assert {row.objective for row in rows} == {"instruction"}
    assert all(row.is_end.all() and len(row.is_end) == len(row.lengths) for row in rows)


def in_pairs(row: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    texts = texts_of(row)
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_an_instruction_that_was_tokenized_for_longer_rows_is_an_error():
    tokens, boundaries = np.arange(26), np.array([0, 9, 10, 20, 26])
    assert len(instruction_rows(tokens, boundaries, InfillingRecipe(17, 16))) == 2
    with pytest.raises(ValueError, match="an instruction takes 17 tokens, but row_length is 16; tokenize"):
        instruction_rows(tokens, boundaries, InfillingRecipe(16, 16))
    with pytest.raises(ValueError, match="an instruction takes 17 tokens, but instruction_length is 16; tokenize"):
        instruction_rows(tokens, boundaries, InfillingRecipe(64, 16, instruction_length=16))


def test_short_instructions_share_a_row_as_if_their_length_were_not_limited():
    tokens, boundaries = instructions(100, 16)
    rows = [
        instruction_rows(tokens, boundaries, recipe)
        for recipe in (InfillingRecipe(64, 16), InfillingRecipe(64, 16, instruction_length=16))
    ]
    assert [row.tokens.tolist() for row in rows[0]] == [row.tokens.tolist() for row in rows[1]]
    assert max(len(row.lengths) for row in rows[1]) >= 4


def test_rows_of_instructions_are_packed_as_full_as_their_order_allows():
    tokens, boundaries = instructions(100, 64)
    rows = instruction_rows(tokens, boundaries, InfillingRecipe(64, 64))
    sizes = [(row.lengths.sum(1) + 1).tolist() for row in rows]  # each with its `sop`
    assert max(map(sum, sizes)) == 64
    assert len(rows) < 100
    collator = DataCollatorForBlankInfilling(CONFIG, InfillingRecipe(64, 64))
    assert [len(ids) for _, ids, *_ in infilled(collator, rows)] == list(map(sum, sizes))


@recipes
def test_no_infilled_row_is_too_long_whatever_is_drawn(recipe):
    rows = apart_rows(document_lengths(recipe), recipe)
    rows += joined_rows(10 * recipe.row_length + 3, recipe)
    ends = range(FIRST, CONFIG.vocab_size, 7)
    windows = {"mask": recipe.window_length, "smask": recipe.window_length, "gmask": recipe.row_length}
    for seed in range(6):
        collator = DataCollatorForBlankInfilling(CONFIG, recipe, seed, sentence_end_ids=ends)
        for row, ids, _, segments, _ in infilled(collator, rows):
            assert len(ids) <= recipe.row_length
            assert np.bincount(segments).max() <= windows[row.objective]


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("objective", ["mask", "smask", "gmask"])
def test_the_shortest_texts_fit_the_shortest_rows_whatever_is_drawn(length, objective):
    recipe = InfillingRecipe(8, 8, span_share=0.5)
    row = Row(objective, np.arange(FIRST, FIRST + length), np.array([length]), np.array([True]), 0)
    for seed in range(200):
        [(_, ids, *_)] = infilled(DataCollatorForBlankInfilling(CONFIG, recipe, seed), [row])
        assert len(ids) <= 8
        assert {*range(FIRST, FIRST + length)} <= {*ids.tolist()}


@pytest.mark.parametrize("sentence_length", [1, 2, 30, 10_000])
def test_sentences_of_any_length_fit_their_window(sentence_length):
    recipe = InfillingRecipe(128, 64, mask_probability=0.0, smask_probability=1.0, span_share=0.5)
    ends = range(FIRST, CONFIG.vocab_size, sentence_length)
    collator = DataCollatorForBlankInfilling(CONFIG, recipe, sentence_end_ids=ends)
    rows = joined_rows(2000, recipe) + apart_rows([1, 2, 3, 63, 64, 500], recipe)
    for _, _, _, segments, _ in infilled(collator, rows):
        assert np.bincount(segments).max() <= 64


def test_joined_rows_are_pieces_of_the_stream_and_full_but_for_the_last():
    recipe = InfillingRecipe(mask_probability=0.3, smask_probability=0.3)
    rows = joined_rows(60_000, recipe)
    collator = DataCollatorForBlankInfilling(CONFIG, recipe, sentence_end_ids=[FIRST])
    stream = np.concatenate([row.tokens for row in rows]) - FIRST
    assert (np.diff(stream) % 60_000 == 1).all()  # around the circle once
    for row in rows[:-1]:
        if row.objective == "gmask":
            assert row.lengths.tolist() == [2046]  # with the mask and `sop`
            assert [len(ids) for _, ids, *_ in infilled(collator, [row])] == [2048]
        else:
            room = 512 - row.lengths
            # each window is as full as its most spans allow: 2 tokens for each of them, and a `</s>`
            assert (room >= 1 + 2 * recipe.most_spans(row.lengths)).all()
            assert (room - 1 < 1 + 2 * recipe.most_spans(row.lengths + 1)).all()
            assert len(row.lengths) == 4


def test_objectives_of_joined_rows_come_by_the_shares_of_the_recipe_at_any_place():
    layout = JoinedRows(10**12, InfillingRecipe(mask_probability=0.3, smask_probability=0.2), key=0)
    for first in (0, 1000, layout.num_rows(0) - 1000):
        objectives = [layout.pieces(0, number).objective for number in range(first, first + 1000)]
        assert abs(np.bincount(objectives) - [300, 200, 500]).max() <= 3


def test_objectives_of_documents_come_by_the_shares_of_the_recipe():
    recipe = InfillingRecipe(mask_probability=0.3, smask_probability=0.2)
    counted = Counter()
    for row in apart_rows([1] * 20_000, recipe):
        counted[row.objective] += len(row.lengths)
    for objective, share in (("mask", 0.3), ("smask", 0.2), ("gmask", 0.5)):
        deviation = (share * (1 - share) * 20_000) ** 0.5
        assert abs(counted[objective] - share * 20_000) < 4 * deviation


@pytest.mark.parametrize("is_joined", [True, False])
def test_a_text_has_other_objectives_in_other_epochs(is_joined):
    recipe = InfillingRecipe(64, 32, mask_probability=0.3)
    found = Counter()
    for epoch in range(200 if is_joined else SeparateRows.num_partitions):
        rows = joined_rows(5000, recipe, epoch) if is_joined else apart_rows([20] * 250, recipe, epoch)
        [objective] = [row.objective for row in rows if FIRST + 1000 in row.tokens]
        found[objective] += 1
    assert {*found} == {"mask", "gmask"}
    assert not is_joined or abs(found["mask"] / 200 - 0.26) < 0.12  # its share of the tokens, which rows hold fewer of


def test_all_rows_have_the_only_objective_of_a_recipe():
    for probabilities, name in (((1.0, 0.0), "mask"), ((0.0, 1.0), "smask"), ((0.0, 0.0), "gmask")):
        recipe = InfillingRecipe(64, 32, *probabilities)
        rows = joined_rows(5000, recipe) + apart_rows([1, 50, 500] * 10, recipe)
        assert {row.objective for row in rows} == {name}


def test_joined_texts_do_not_end_where_a_document_does():
    assert not any(row.is_end.any() for row in joined_rows(5000, InfillingRecipe(64, 32)))


@recipes
def test_texts_apart_end_where_their_document_does(recipe):
    lengths = document_lengths(recipe)
    last_tokens = {*(FIRST - 1 + np.cumsum(lengths)).tolist()}
    for row in apart_rows(lengths, recipe):
        assert row.is_end.tolist() == [int(text[-1]) in last_tokens for text in texts_of(row)]


@recipes
def test_documents_apart_are_cut_into_the_fewest_pieces_of_nearly_one_length(recipe):
    lengths = document_lengths(recipe)
    *_, document_of = documents(lengths)
    pieces = {number: [] for number in range(len(lengths))}
    objective_of = {}
    for row in apart_rows(lengths, recipe):
        for text in texts_of(row):
            assert (np.diff(text) == 1).all()
            [document] = {*document_of[text - FIRST].tolist()}
            pieces[document].append(len(text))
            assert objective_of.setdefault(document, row.objective) == row.objective
    for document, sizes in pieces.items():
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-lengths[document] // recipe.longest_text(objective_of[document]))


def test_infilled_documents_see_nothing_of_their_neighbours():
    recipe = InfillingRecipe(128, 64, mask_probability=0.4, smask_probability=0.3)
    lengths = document_lengths(recipe)
    *_, document_of = documents(lengths)
    collator = DataCollatorForBlankInfilling(CONFIG, recipe, sentence_end_ids=range(FIRST, CONFIG.vocab_size, 5))
    for _, ids, _, segments, labels in infilled(collator, apart_rows(lengths, recipe)):
        for values in (ids, labels):
            for segment in range(1, segments.max() + 1):
                numbers = values[(segments == segment) & (values >= FIRST)]
                assert len({*document_of[numbers - FIRST].tolist()}) <= 1


def test_documents_that_stand_together_in_a_row_are_no_neighbours_in_the_corpus():
    recipe = InfillingRecipe(64, 32)
    neighbours = [(np.diff(row.tokens[::5]) == 5) for row in apart_rows([5] * 1000, recipe)]
    assert np.concatenate(neighbours).mean() < 0.02


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_blocks_have_the_same_rows_whatever_is_packed_with_them(kind, monkeypatch):
    recipe = InfillingRecipe(32, 32)
    tokens, boundaries = instructions(3000, 32)
    layout = separate(tokens, boundaries, recipe, kind)
    assert len(layout.first_documents) > 10
    rows = rows_of(layout, tokens)
    assert read_once(rows) == sorted(
        {*tokens.tolist()} - ({*(tokens[boundaries[1:] - 1]).tolist()} if kind == "text" else set())
    )
    monkeypatch.setattr(separate_rows, "DOCUMENTS_AT_ONCE", 100)
    monkeypatch.setattr(separate_rows, "BLOCKS_KEPT", 1)
    others = separate(tokens, boundaries, recipe, kind)
    for number in np.random.default_rng(0).permutation(len(rows)).tolist():
        assert others.pieces(0, number).read(others.corpus, number).tokens.tolist() == rows[number].tokens.tolist()


def test_epochs_pack_documents_in_other_ways_and_in_turns():
    lengths = np.random.default_rng(0).integers(1, 40, 500).tolist()
    rows = [
        [row.tokens.tolist() for row in apart_rows(lengths, InfillingRecipe(64, 32), epoch)] for epoch in (0, 1, 8)
    ]
    assert rows[0] != rows[1]
    assert rows[0] == rows[2]


def test_another_key_packs_documents_in_another_way():
    tokens, boundaries, _ = documents(np.random.default_rng(0).integers(1, 40, 500).tolist())
    corpus = TokenFile(Path("corpus"), tokens, boundaries, {"kind": "text"})
    packed = [rows_of(SeparateRows(corpus, InfillingRecipe(64, 32), key), tokens) for key in (0, 1)]
    first, second = ([row.tokens.tolist() for row in rows] for rows in packed)
    assert first != second
    assert read_once(packed[0]) == read_once(packed[1])

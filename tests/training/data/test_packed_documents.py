"""The C code, and what stands in for it, pack documents as is done here step by step, and refuse damage."""

import dataclasses
import os
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from glm_hf.training import InfillingRecipe
from glm_hf.training.data.packing import blocks, separate
from glm_hf.training.data.packing.blocks import BLOCK_ROWS, packing_library
from glm_hf.training.data.packing.rows import split_documents
from glm_hf.training.data.packing.separate import SeparateRows
from glm_hf.training.data.random_numbers import OBJECTIVE, ORDER, key_of, mix, uniform
from glm_hf.training.data.recipe import OBJECTIVES
from glm_hf.training.data.token_file import TokenFile, open_token_file, write_token_file


@pytest.fixture(autouse=True, params=["C", "numpy"])
def implementation(request, monkeypatch) -> None:
    """Pack by each of them."""
    if request.param == "numpy":
        monkeypatch.setattr(blocks, "packing_library", lambda: None)
    elif packing_library() is None:
        pytest.skip("the C code was not built")


KINDS = ("text", "instructions")
kinds = pytest.mark.parametrize("kind", KINDS)
Rows = list[tuple[int, list[int], list, list[bool]]]  # objective, starts, lengths and ends of the pieces


def corpus_of(boundaries: np.ndarray, kind: str = "text") -> TokenFile:
    tokens = np.broadcast_to(np.int32(0), (int(boundaries[-1]),))  # which takes no memory
    return TokenFile(Path("corpus"), tokens, boundaries, {"kind": kind})


def rows_of(layout: SeparateRows, partition: int) -> Rows:
    rows = [layout.pieces(partition, number) for number in range(layout.num_rows(partition))]
    return [(row.objective, row.start.tolist(), row.length.tolist(), row.is_end.tolist()) for row in rows]


def rows_by_numpy(boundaries: np.ndarray, recipe: InfillingRecipe, key: int, partition: int, kind: str) -> Rows:
    """Pack a whole corpus at once."""
    if kind == "instructions":
        start, length = boundaries[:-1:2], np.diff(boundaries).reshape(-1, 2)
    else:
        start, length = boundaries[:-1], np.diff(boundaries) - 1
    numbers = np.arange(len(start))
    keys = np.array([key_of(key, partition)], np.uint64)
    if kind == "instructions":
        objective = np.full(len(numbers), OBJECTIVES.index("instruction"))
    else:
        shares = recipe.mask_probability, recipe.smask_probability
        objective = np.searchsorted(np.cumsum(shares), uniform(keys, OBJECTIVE, numbers), side="right")
    group = start // (BLOCK_ROWS * recipe.row_length) * 4 + objective
    order = np.lexsort((numbers, mix(keys, ORDER, numbers) >> np.uint64(16), group))
    start, length, group = start[order], length[order], group[order]
    if kind == "instructions":
        infilled, is_end = length.sum(1) + 1, np.ones(len(length), bool)
    else:
        longest = np.array([recipe.longest_text(name) for name in OBJECTIVES[:3]])
        document, offset, piece = split_documents(length, longest[group % 4])
        is_end = offset + piece == length[document]
        start, length, group = start[document] + offset, piece, group[document]
        as_words, as_end = (recipe.infilled_length(length, name) for name in ("mask", "gmask"))
        infilled = np.where(group % 4 == OBJECTIVES.index("gmask"), as_end, as_words)
    first, used = [], 0
    for number, (tokens, of_group) in enumerate(zip(infilled.tolist(), group.tolist(), strict=True)):
        if not first or used + tokens > recipe.row_length or of_group != group[first[-1]]:
            first.append(number)
            used = 0
        used += tokens
    rows = [slice(*pair) for pair in pairwise([*first, len(start)])]
    return [(group[r.start] % 4, start[r].tolist(), length[r].tolist(), is_end[r].tolist()) for r in rows]


def any_recipe(rng: np.random.Generator, drawn: np.ndarray) -> InfillingRecipe:
    """A recipe whose shares may end exactly at numbers that documents draw."""
    row_length = int(rng.choice([8, 9, 16, 50, 300, 2048]))
    edges = sorted(rng.choice([0.0, 1.0, *rng.random(2), *drawn], 2).tolist())
    return InfillingRecipe(
        row_length,
        int(rng.integers(8, row_length + 1)),
        mask_probability=edges[0],
        smask_probability=edges[1] - edges[0],
        span_share=rng.uniform(0.01, 0.5),
        mean_span_length=rng.uniform(0.1, 10),
    )


def any_boundaries(rng: np.random.Generator, recipe: InfillingRecipe, kind: str) -> np.ndarray:
    """Boundaries of about 20 blocks at most, of documents from empty ones to some longer than blocks."""
    longest = recipe.row_length
    mean = rng.choice([1, 3, longest // 4, longest, 10 * longest, 100 * longest])
    count = int(min(rng.integers(2, 3000), 20 * BLOCK_ROWS * longest // mean + 2)) // 2 * 2
    lengths = rng.geometric(1 / mean, count) - rng.integers(0, 2)
    if kind == "instructions":
        contexts = rng.integers(0, longest - 1, count // 2)
        lengths = np.stack((contexts, rng.integers(0, longest - contexts)), axis=1).ravel()
    lengths[rng.random(count) < rng.choice([0, 0.1, 0.9])] = 0
    lengths[-1] += not lengths.any()
    return np.append(0, lengths.cumsum())


@kinds
@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_numpy(kind, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    key, partition = int(rng.integers(0, 2**63)), int(rng.integers(0, 8))
    drawn = uniform(np.array([key_of(key, partition)], np.uint64), OBJECTIVE, np.arange(4))
    recipe = any_recipe(rng, drawn)
    boundaries = any_boundaries(rng, recipe, kind)
    monkeypatch.setattr(separate, "DOCUMENTS_AT_ONCE", int(rng.integers(1, 2000)))
    monkeypatch.setattr(separate, "BLOCKS_AT_ONCE", int(rng.integers(1, 20)))
    layout = SeparateRows(corpus_of(boundaries, kind), recipe, key)
    assert rows_of(layout, partition) == rows_by_numpy(boundaries, recipe, key, partition, kind)


BLOCK = BLOCK_ROWS * 16


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [0, 0, 0, 2, 0],
        [1] * 100,
        [2],
        [BLOCK],
        [BLOCK, BLOCK, 1],
        [BLOCK - 1, 1, 1, BLOCK - 1, 2],
        [5 * BLOCK + 1, 3, 3],
        [3, 10 * BLOCK + 7, 0, 0, 3],
        [2] * (BLOCK + 1),
    ],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}",
)
def test_rows_of_corpora_at_their_limits_are_those_of_numpy(lengths):
    boundaries = np.cumsum([0, *lengths])
    recipe = InfillingRecipe(16, 16, 0.4, 0.3)
    for partition in range(8):
        layout = SeparateRows(corpus_of(boundaries), recipe, key=5)
        assert rows_of(layout, partition) == rows_by_numpy(boundaries, recipe, 5, partition, "text")


def test_documents_that_draw_the_same_place_stay_in_order():
    recipe = InfillingRecipe(65_535, mask_probability=0.0)
    boundaries = np.arange(BLOCK_ROWS * 65_535 // 2 + 1) * 2
    # With this key two documents draw the same 48 bits.
    chances = mix(np.array([key_of(264, 0)], np.uint64), ORDER, np.arange(len(boundaries) - 1)) >> np.uint64(16)
    order = np.argsort(chances, kind="stable")
    assert (np.diff(chances[order]) == 0).sum() == 1
    rows = rows_of(SeparateRows(corpus_of(boundaries), recipe, key=264), 0)
    assert np.array_equal([start for _, starts, _, _ in rows for start in starts], 2 * order)


@kinds
def test_copies_in_other_processes_have_the_same_rows(kind, tmp_path):
    rng = np.random.default_rng(0)
    parts = [[7] * int(length) for length in rng.integers(1, 20, 200)]
    write_token_file(tmp_path / "corpus", [parts], {"kind": kind, "source": "corpus"}, vocab_size=10)
    layout = SeparateRows(open_token_file(tmp_path / "corpus"), InfillingRecipe(64, 32), key=0)
    assert rows_of(pickle.loads(pickle.dumps(layout)), 1) == rows_of(layout, 1)


DAMAGED = "corpus/boundaries.npy is damaged: its numbers do not rise; tokenize it again"


def refused(boundaries: np.ndarray, num_tokens: int, kind: str, opened_with: np.ndarray | None = None) -> bool:
    """Tell whether boundaries are refused as damaged, if need be when others stood there at first."""
    held = boundaries.copy() if opened_with is None else opened_with.copy()
    corpus = TokenFile(Path("corpus"), np.broadcast_to(np.int32(0), (num_tokens,)), held, {"kind": kind})
    try:
        layout = SeparateRows(corpus, InfillingRecipe(32, 16), key=0)
        held[:] = boundaries
        rows_of(layout, 0)
    except ValueError as error:
        return str(error) == DAMAGED
    return False


def rises(boundaries: np.ndarray, num_tokens: int) -> bool:
    return bool(0 <= boundaries[0] and (boundaries[1:] >= boundaries[:-1]).all() and boundaries[-1] <= num_tokens)


@kinds
@pytest.mark.parametrize("number", [-(2**63), -1, 0, 4000, 2**40, 2**63 - 1])
def test_damaged_boundaries_are_refused(kind, number):
    boundaries = np.arange(1001) * 8
    for place in (1, 2, 300, 301, 777, 998, 999):
        damaged = boundaries.copy()
        damaged[place] = number
        if not rises(damaged, 8000):
            assert refused(damaged, 8000, kind)
            assert refused(damaged, 8000, kind, opened_with=boundaries)


@kinds
def test_boundaries_that_begin_or_end_elsewhere_are_refused(kind):
    boundaries = np.arange(1001) * 8
    assert not refused(boundaries, 8000, kind)
    assert refused(boundaries, 7999, kind)
    assert refused(boundaries - 1, 8000, kind)


@kinds
@pytest.mark.parametrize(("place", "start"), [(256, 2040), (254, 2048)])
def test_documents_that_leave_their_block_are_refused(kind, place, start):
    boundaries = np.arange(1001) * 8
    assert BLOCK_ROWS * 32 == boundaries[256]
    moved = boundaries.copy()
    moved[min(place, 255) : max(place, 255) + 1] = start  # the last document of a block, or the first of the next
    assert rises(moved, 8000)
    assert refused(moved, 8000, kind, opened_with=boundaries)


@kinds
@pytest.mark.parametrize("seed", range(20))
def test_nothing_outside_is_read_of_boundaries_at_random(kind, seed):
    rng = np.random.default_rng(seed)
    boundaries = np.arange(1001) * 8
    whole, limit = boundaries.copy(), 2 ** int(rng.integers(3, 63))
    boundaries[rng.integers(1, 1001, 3)] = rng.integers(-limit, limit, 3)
    assert refused(boundaries, 8000, kind) == (not rises(boundaries, 8000))
    assert rises(boundaries, 8000) or refused(boundaries, 8000, kind, opened_with=whole)


@kinds
def test_fewer_boundaries_than_documents_are_refused(kind):
    layout = SeparateRows(corpus_of(np.arange(1001) * 8, kind), InfillingRecipe(32, 16), key=0)
    read = layout._read(0, 0, len(layout.first_documents) - 1)
    with pytest.raises(ValueError, match="is damaged"):
        blocks.count_rows(layout.rules, dataclasses.replace(read, parts=read.parts[:-1]))


def test_an_instruction_that_is_too_long_is_refused():
    layout = SeparateRows(corpus_of(np.array([0, 5, 9, 30, 49]), "instructions"), InfillingRecipe(32, 16), key=0)
    with pytest.raises(ValueError, match="an instruction takes 41 tokens, but row_length is 32"):
        layout.num_rows(0)


def test_an_instruction_without_its_target_is_refused():
    assert refused(np.arange(1000) * 8, 8000, "instructions")


@kinds
def test_boundaries_that_were_cut_off_are_refused(kind, tmp_path):
    parts = [[7] * 3] * 400
    write_token_file(tmp_path / "corpus", [parts], {"kind": kind, "source": "corpus"}, vocab_size=10)
    layout = SeparateRows(open_token_file(tmp_path / "corpus"), InfillingRecipe(16, 16), key=0)
    layout.num_rows(0)
    path = tmp_path / "corpus" / "boundaries.npy"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(ValueError, match="is damaged"):
        layout.num_rows(1)


def test_a_boundary_at_the_end_of_the_corpus_hides_no_documents():
    boundaries = np.arange(BLOCK_ROWS * 32 + 1) * 8
    for place in range(1, len(boundaries) - 1, 97):
        damaged = boundaries.copy()
        damaged[place] = boundaries[-1]
        assert refused(damaged, int(boundaries[-1]), "text")

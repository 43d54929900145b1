"""Corpora of numbers that occur once are mixed; every row tells by its numbers where it comes from."""

import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest

from glm_hf.training import BlankInfillingDataset, InfillingRecipe
from glm_hf.training.data import dataset as mixture
from glm_hf.training.data.packing.rows import Row
from glm_hf.training.data.token_file import TokenFile, open_token_file, write_token_file
from glm_hf.training.schedules import PiecewiseLinear

RECIPE = InfillingRecipe(row_length=64, window_length=32)
SPACING = 1_000_000  # between the numbers of one corpus and the next


@pytest.fixture(scope="module")
def corpus_of(tmp_path_factory):
    """Return a function that writes corpus `number`, whose tokens count on from a million times that number."""
    folder = tmp_path_factory.mktemp("corpora")

    def write(number: int, num_documents: int, kind: str = "text", longest: int = 100) -> TokenFile:
        path = folder / f"{kind}-{number}-{num_documents}-{longest}"
        if not path.exists():
            rng = np.random.default_rng(number)
            parts = 2 * num_documents if kind == "instructions" else num_documents
            ends = (
                number * SPACING + rng.integers(2, longest // 2 if kind == "instructions" else longest, parts).cumsum()
            )
            starts = [number * SPACING, *ends[:-1].tolist()]
            batch = [range(start, end) for start, end in zip(starts, ends.tolist(), strict=True)]
            write_token_file(path, [batch], {"kind": kind, "source": f"corpus {number}"}, 150528)
        return open_token_file(path)

    return write


@pytest.fixture(scope="module")
def four_corpora(corpus_of) -> list[TokenFile]:
    texts = [corpus_of(0, 300), corpus_of(1, 40), corpus_of(2, 100)]
    return [*texts, corpus_of(3, 80, "instructions", longest=60)]


def mixed(corpora: list[TokenFile], **settings: object) -> BlankInfillingDataset:
    return BlankInfillingDataset(corpora, RECIPE, **settings)


def corpus_number(row: Row) -> int:
    return int(row.tokens[0]) // SPACING


def tokens_by_corpus(rows: list[Row], number: int) -> np.ndarray:
    """Share of the tokens of the rows that comes from each corpus."""
    counted = Counter()
    for row in rows:
        counted[corpus_number(row)] += len(row.tokens)
    return np.array([counted[corpus] for corpus in range(number)]) / counted.total()


def is_same(a: Row, b: Row) -> bool:
    same = (a.objective, a.sample_id) == (b.objective, b.sample_id)
    return same and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "lengths", "is_end"))


def epochs_of(rows: list[Row], tokens: set[int]) -> list[list[Row]]:
    """The rows of one corpus by epochs; fails unless every token comes once in each."""
    epochs, left = [[]], set(tokens)
    for row in rows:
        found = {*row.tokens.tolist()}
        assert len(found) == len(row.tokens)
        assert found <= left
        left -= found
        epochs[-1].append(row)
        if not left:
            epochs.append([])
            left = set(tokens)
    return epochs[:-1]


def tokens_in_rows(corpus: TokenFile, is_joined: bool) -> set[int]:
    """All tokens; of documents apart, all but the last of each, its `</s>`, which is no part of the text there."""
    found = {*corpus.tokens.tolist()}
    if corpus.facts["kind"] == "text" and not is_joined:
        found -= {*corpus.tokens[corpus.boundaries[1:] - 1].tolist()}
    return found


@pytest.mark.parametrize("join", [True, False])
def test_rows_are_the_same_whatever_was_read_before(four_corpora, join, monkeypatch):
    settings = {"join_documents": [join] * 4, "seed": 3}
    monkeypatch.setattr(mixture, "GROUPS_PER_BLOCK", 2)  # so that reading leads back and forth between blocks
    in_turn = mixed(four_corpora, **settings)
    rows = [in_turn[number] for number in range(1000)]
    shuffled = mixed(four_corpora, **settings)
    order = np.random.default_rng(0).permutation(1000).tolist()
    assert all(is_same(shuffled[number], rows[number]) for number in order)
    assert is_same(mixed(four_corpora, **settings)[999], rows[999])
    assert [row.sample_id for row in rows] == list(range(1000))


def test_rows_are_the_same_in_a_copy(four_corpora):
    dataset = mixed(four_corpora, seed=1, instruction_share=PiecewiseLinear(((0, 0.1), (100, 0.5))))
    rows = [dataset[number] for number in (0, 700, 50)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(is_same(copy[number], row) for number, row in zip((0, 700, 50), rows, strict=True))
    assert is_same(copy[5000], dataset[5000])


def test_rows_are_the_same_for_every_size_of_block(four_corpora, monkeypatch):
    dataset = mixed(four_corpora)
    rows = [dataset[number] for number in range(500)]
    monkeypatch.setattr(mixture, "GROUPS_PER_BLOCK", 1)
    in_small_blocks = mixed(four_corpora)
    assert all(is_same(in_small_blocks[number], row) for number, row in enumerate(rows))


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 2.0, 2.0]])
def test_every_corpus_comes_in_whole_epochs(four_corpora, join, weights):
    dataset = mixed(four_corpora, weights=weights, join_documents=[join] * 4, instruction_share=0.3)
    rows = defaultdict(list)
    for number in range(3 * len(dataset)):
        row = dataset[number]
        rows[corpus_number(row)].append(row)
    for number, corpus in enumerate(four_corpora):
        epochs = epochs_of(rows[number], tokens_in_rows(corpus, join))
        assert len(epochs) >= 2
        first, second = ([row.tokens.tolist() for row in epoch] for epoch in epochs[:2])
        assert first != second  # each in an order of its own


def test_epochs_go_on_far_beyond_the_length(corpus_of):
    corpus = corpus_of(1, 40)
    dataset = mixed([corpus])
    far = mixed([corpus])[100 * len(dataset)]
    rows = [dataset[number] for number in range(100 * len(dataset) + 1)]
    assert is_same(far, rows[-1])
    assert len(epochs_of(rows, tokens_in_rows(corpus, True))) >= 90


def test_joined_and_separate_corpora_stand_side_by_side(corpus_of):
    corpora = [corpus_of(0, 300), corpus_of(2, 100)]
    dataset = mixed(corpora, join_documents=[True, False])
    ends = [{*corpus.tokens[corpus.boundaries[1:] - 1].tolist()} for corpus in corpora]
    rows = [dataset[number] for number in range(len(dataset))]
    joined, separate = (
        {int(token) for row in rows if corpus_number(row) == number for token in row.tokens} for number in (0, 1 + 1)
    )
    assert ends[0] <= joined
    assert not ends[1] & separate


def test_tokens_come_by_weights_and_five_percent_from_instructions(corpus_of):
    corpora = [
        corpus_of(0, 300),
        corpus_of(1, 40, "instructions", longest=60),
        corpus_of(2, 500),
        corpus_of(3, 90, "instructions", longest=20),
    ]
    dataset = mixed(corpora, weights=[1, 1, 3, 4])
    shares = tokens_by_corpus([dataset[number] for number in range(20_000)], 4)
    expected = np.array([0.95 / 4, 0.05 / 5, 0.95 * 3 / 4, 0.05 * 4 / 5])
    assert abs(shares - expected).max() < 0.01
    assert abs(shares / expected - 1).max() < 0.05  # also of the small ones


def test_without_weights_corpora_are_seen_equally_often(corpus_of):
    corpora = [corpus_of(0, 300), corpus_of(2, 500), corpus_of(4, 1000)]
    dataset = mixed(corpora)
    shares = tokens_by_corpus([dataset[number] for number in range(20_000)], 5)[[0, 2, 4]]
    sizes = np.array([corpus.facts["num_tokens"] for corpus in corpora])
    assert abs(shares - sizes / sizes.sum()).max() < 0.01


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_corpora_of_one_kind_need_no_instruction_share(corpus_of, kind):
    corpora = [corpus_of(0, 100, kind, longest=60), corpus_of(1, 100, kind, longest=60)]
    dataset = mixed(corpora, weights=[1, 3])
    shares = tokens_by_corpus([dataset[number] for number in range(4000)], 2)
    assert abs(shares - [0.25, 0.75]).max() < 0.01


def test_the_share_of_instructions_follows_a_schedule(corpus_of):
    corpora = [corpus_of(0, 300), corpus_of(1, 200, "instructions", longest=60)]
    schedule = PiecewiseLinear(((0, 0.0), (1000, 0.0), (1000, 0.2), (5000, 0.6)))
    dataset = mixed(corpora, instruction_share=schedule)
    rows = [dataset[number] for number in range(9000)]
    shares = [tokens_by_corpus(rows[a:b], 2)[1] for a, b in ((0, 1000), (1000, 5000), (5000, 9000))]
    assert shares[0] == 0
    assert abs(np.array(shares) - [0, 0.4, 0.6]).max() < 0.02  # of 4000 rows, which are not equally long


@pytest.mark.parametrize(("share", "present"), [(0.0, {0, 1, 2}), (1.0, {3})])
def test_the_whole_share_leaves_nothing_to_the_other_kind(four_corpora, share, present):
    dataset = mixed(four_corpora, instruction_share=share)
    assert {corpus_number(dataset[number]) for number in range(2000)} == present


def test_corpora_are_spread_evenly_over_the_rows(four_corpora):
    dataset = mixed(four_corpora, weights=[2, 1, 3, 1], instruction_share=0.1)
    corpora = np.array([corpus_number(dataset[number]) for number in range(5000)])
    count = (corpora[:, None] == np.arange(4)).cumsum(0)
    share = dataset.row_shares(np.zeros(1))
    off = abs(count - share * np.arange(1, 5001)[:, None]).max(0)
    assert off.max() < 4  # draws would be off by about sqrt(5000 * 0.25) = 35


@pytest.mark.parametrize("join", [True, False])
def test_seeds_give_other_orders_and_objectives_and_mixtures(four_corpora, join):
    datasets = [mixed(four_corpora, join_documents=[join] * 4, seed=seed) for seed in (0, 1)]
    rows = [[dataset[number] for number in range(300)] for dataset in datasets]
    for of_row in (corpus_number, lambda row: row.objective, lambda row: row.tokens.tolist()):
        first, second = ([of_row(row) for row in part] for part in rows)
        assert first != second


def test_corpora_of_the_same_texts_have_orders_of_their_own(corpus_of):
    dataset = mixed([corpus_of(0, 300), corpus_of(0, 300)])
    starts = [[int(rows.row(number, 0).tokens[0]) for number in range(50)] for rows in dataset.rows]
    assert starts[0] != starts[1]


@pytest.mark.parametrize("join", [True, False])
def test_origin_names_the_corpus_and_all_documents_of_a_row(four_corpora, join):
    dataset = mixed(four_corpora, join_documents=[join] * 4, instruction_share=0.3)
    seen = set()
    for number in np.random.default_rng(0).integers(0, 3000, 500).tolist():
        row = dataset[number]
        corpus = four_corpora[corpus_number(row)]
        starts = corpus.boundaries[:-1:2] if corpus.facts["kind"] == "instructions" else corpus.boundaries[:-1]
        first_tokens = corpus.tokens[starts]
        documents = {int((first_tokens <= token).sum()) - 1 for token in row.tokens.tolist()}
        assert dataset.origin(number) == {
            "corpus": f"corpus {corpus_number(row)}",
            "documents": sorted(documents),
        }
        seen.add(len(documents))
    assert max(seen) > 2


@pytest.mark.parametrize("join", [True, False])
def test_the_length_of_one_corpus_is_its_rows_of_an_epoch(corpus_of, join):
    corpus = corpus_of(0, 300)
    dataset = mixed([corpus], join_documents=[join])
    [epoch] = epochs_of([dataset[number] for number in range(len(dataset))], tokens_in_rows(corpus, join))
    assert len(epoch) == len(dataset)


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1], [1, 5, 1, 1]])
def test_at_the_length_the_last_corpus_was_just_seen(four_corpora, weights):
    rows_per_epoch = np.array([len(mixed([corpus])) for corpus in four_corpora])
    for seed in range(10):
        dataset = mixed(four_corpora, weights=weights, instruction_share=0.2, seed=seed)
        missing = rows_per_epoch - np.bincount([dataset.find(number)[0] for number in range(len(dataset))])
        assert -8 < missing.max() < 8  # of hundreds; epochs differ in their number of rows, too


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": [1.0]}, r"weights must be 2 numbers above 0, got \[1.0\]"),
        ({"weights": [1.0, 0.0]}, r"weights must be 2 numbers above 0, got \[1.0, 0.0\]"),
        ({"weights": [1.0, -1.0]}, "above 0"),
        ({"weights": [1.0, float("nan")]}, "above 0"),
        ({"instruction_share": 1.5}, r"instruction_share must lie in \[0, 1\], got 1.5 to 1.5"),
        ({"instruction_share": PiecewiseLinear(((0, 0.1), (9, -1.0)))}, r"instruction_share must lie in \[0, 1\]"),
    ],
)
def test_impossible_shares_are_errors(corpus_of, settings, message):
    corpora = [corpus_of(0, 100), corpus_of(1, 40, "instructions", longest=60)]
    with pytest.raises(ValueError, match=message):
        mixed(corpora, **settings)[0]


def test_no_corpus_is_an_error():
    with pytest.raises(ValueError, match="give at least one corpus"):
        mixed([])


def test_rows_that_are_packed_alike_come_in_another_order_in_another_epoch(corpus_of):
    rows = mixture.CorpusRows(corpus_of(0, 300), RECIPE, join_documents=False, key=7)
    counts = [rows.layout.num_rows(partition) for partition in range(rows.layout.num_partitions)]
    first, later = (
        [rows.row(start + number, 0).tokens.tolist() for number in range(counts[0])] for start in (0, sum(counts))
    )
    assert sorted(first) == sorted(later)
    assert first != later

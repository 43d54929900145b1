"""Text tokens per second of the training data on one thread: masking spans, packing, and reading.

`collate` is `DataCollatorForBlankInfilling` on batches of 8 planned rows with GLM-130B's recipe and vocabulary, beside
the same recipe token by token in Python lists, which gets the same rows as lists. Both take turns, a batch each; the
ratio is the median over the rounds. The rows of the first batch are checked to hold the same texts.

`pack and read` plans one epoch of a corpus and reads all its rows through the memory map, from files that the page
cache holds. `predicted` is the share of the text that is in blanks, over the rows that were checked.

Masks, `sop`, `eop` and padding are no text and not counted. Run: make bench-data
"""

import argparse
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch

from glm_hf import GLMConfig
from glm_hf.training import BlankInfillingDataset, DataCollatorForBlankInfilling, InfillingRecipe
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.data.packing.rows import Row
from glm_hf.training.data.token_file import TokenFile, open_token_file, write_token_file

BATCH = 8
IDS = (20100, 150000)  # of text, in GLM-130B's vocabulary: behind the first special ids and before the others
WRITTEN_AT_ONCE = 1000  # parts
COLLATE_GOALS = {"mask": 2, "gmask": 5}  # million tokens per second
PACK_GOAL = 5
RATIO_GOAL = 10

Sample = tuple[list[int], list[tuple[list[int], int, bool]]]  # context, and of every blank tokens, position and end


class TokenByToken:
    """
    The recipe in plain Python, from lists of texts to the tensors of a batch.

    Args:
        config: Special ids.
        recipe: Share and lengths of `[MASK]` blanks.
    """

    def __init__(self, config: GLMConfig, recipe: InfillingRecipe) -> None:
        self.config, self.recipe, self.rng = config, recipe, random.Random(0)

    def __call__(self, rows: list[tuple[str, list[list[int]], list[bool]]]) -> dict[str, torch.Tensor]:
        """Return what the collator returns of rows given as objective, texts, and whether they end."""
        columns: tuple[list[list[int]], ...] = ([], [], [], [])
        for objective, texts, ends in rows:
            if objective == "mask":
                samples = [self.cut_words(text) for text in texts]
            elif objective == "gmask":
                samples = [self.cut_suffix(text, end) for text, end in zip(texts, ends, strict=True)]
            else:
                pairs = zip(texts[::2], texts[1::2], ends, strict=True)
                samples = [(context, [(target, -1, end)]) for context, target, end in pairs]
            for column, values in zip(columns, self.lay_out(samples), strict=True):
                column.append(values)
        names = ("input_ids", "position_ids", "segment_ids", "shift_labels")
        return {name: torch.tensor(column) for name, column in zip(names, columns, strict=True)}

    def cut_words(self, text: list[int]) -> Sample:
        """Draw `[MASK]` spans of Poisson lengths until they cover the share, and mask them in random order."""
        lengths: list[int] = []
        num_covered = 0
        while num_covered < self.recipe.span_share * len(text):
            if length := self.draw_poisson():
                lengths.append(length)
                num_covered += length
        gaps = sorted(self.rng.sample(range(len(text) - num_covered + 1), len(lengths)))
        ends = {}  # of the spans, by their start
        before = 0
        for gap, length in zip(gaps, lengths, strict=True):
            ends[gap + before] = gap + before + length
            before += length
        context: list[int] = []
        blanks = []
        index = 0
        while index < len(text):
            if index in ends:
                blanks.append((text[index : ends[index]], len(context), True))
                context.append(self.config.mask_token_id)
                index = ends[index]
            else:
                context.append(text[index])
                index += 1
        if context[-1] not in (self.config.mask_token_id, self.config.eos_token_id):
            context.append(self.config.eos_token_id)
        self.rng.shuffle(blanks)
        return context, blanks

    def draw_poisson(self) -> int:
        """Return a draw from the Poisson distribution, by Knuth's method."""
        limit = math.exp(-self.recipe.mean_span_length)
        number, product = 0, self.rng.random()
        while product > limit:
            number, product = number + 1, product * self.rng.random()
        return number

    def cut_suffix(self, text: list[int], end: bool) -> Sample:
        """Cut a `[gMASK]` blank of uniform length off the end."""
        start = self.rng.randint(1, len(text) - 1)
        return [*text[:start], self.config.gmask_token_id], [(text[start:], -1, end)]

    def lay_out(self, samples: list[Sample]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Lay samples side by side and pad the row."""
        ids, positions, segments, labels = [], [], [], []
        for segment, (context, blanks) in enumerate(samples, 1):
            for position, token in enumerate(context):
                ids.append(token)
                positions.append(position)
                segments.append(segment)
                labels.append(IGNORED)
            for blank, mask_position, is_closed in blanks:
                token = self.config.sop_token_id
                for offset, following in enumerate([*blank, self.config.eop_token_id if is_closed else IGNORED]):
                    ids.append(token)
                    positions.append(len(context) + offset if mask_position < 0 else mask_position)
                    segments.append(segment)
                    labels.append(following)
                    token = following
        while len(ids) < self.recipe.row_length:
            ids.append(self.config.pad_token_id)
            positions.append(0)
            segments.append(0)
            labels.append(IGNORED)
        return ids, positions, segments, labels


def as_lists(row: Row) -> tuple[str, list[list[int]], list[bool]]:
    """Return a row as `TokenByToken` takes it."""
    texts = np.split(row.tokens, row.lengths.ravel().cumsum()[:-1])
    return row.objective, [text.tolist() for text in texts], row.is_end.tolist()


def count_text(ids: torch.Tensor | np.ndarray) -> int:
    """Return how many ids are text."""
    return int(((ids >= IDS[0]) & (ids < IDS[1])).sum())


def check_same_job(
    rows: list[Row], config: GLMConfig, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """Return the shares of the text that ours and theirs predict; AssertionError if the batches are not alike."""
    objective = rows[0].objective
    shares, num_blanks = [], []
    for batch in (ours, theirs):
        ids, labels = batch["input_ids"], batch["shift_labels"]
        assert count_text(ids) == sum(count_text(row.tokens) for row in rows)
        predicts = (labels != IGNORED) & (labels != config.eop_token_id)
        assert (ids.roll(-1, 1)[predicts] == labels[predicts]).all(), "a label is not the token that follows"
        shares.append(int(predicts.sum()) / count_text(ids))
        num_blanks.append(int((ids == config.sop_token_id).sum()))
        is_closed = objective != "gmask"  # the rows of one stream end in no document
        assert int((labels == config.eop_token_id).sum()) == num_blanks[-1] * is_closed
    if objective == "instruction":
        assert all(torch.equal(values, theirs[name]) for name, values in ours.items())
    if objective == "mask":
        assert all(0.14 < share < 0.17 for share in shares), shares
        assert max(num_blanks) < 1.1 * min(num_blanks), num_blanks
    return shares[0], shares[1]


def draw_corpus(folder: Path, num_tokens: int, medians: tuple[int, ...], ending: int, config: GLMConfig) -> TokenFile:
    """
    Write parts of random ids and log-normal lengths, and open them.

    Args:
        folder: Where.
        num_tokens: At least.
        medians: Of the lengths of a document, or of a context and its target.
        ending: Last id of a document or a context: its `</s>` or mask.
        config: For the size of the vocabulary.
    """
    rng = np.random.default_rng(0)
    means = [median * math.exp(0.5) for median in medians]
    lengths = np.exp(rng.normal(np.log(medians), 1, (int(num_tokens / sum(means)) + 1, len(medians)))).astype(np.int64)
    lengths = lengths.clip(2, None if len(medians) == 1 else 900).ravel()

    def parts() -> Iterator[list[list[int]]]:
        for first in range(0, len(lengths), WRITTEN_AT_ONCE):
            batch = [rng.integers(*IDS, length).tolist() for length in lengths[first : first + WRITTEN_AT_ONCE]]
            for part in batch[:: len(medians)]:
                part[-1] = ending
            yield batch

    kind = "text" if len(medians) == 1 else "instructions"
    write_token_file(folder, parts(), {"kind": kind, "source": "random ids"}, config.vocab_size)
    return open_token_file(folder)


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare_collating(corpus: TokenFile, recipe: InfillingRecipe, config: GLMConfig, rounds: int) -> None:
    """Print how fast batches become blanks, ours and token by token."""
    collator = DataCollatorForBlankInfilling(config, recipe, with_labels=False)  # as GLMTrainer has it
    peer = TokenByToken(config, recipe)
    dataset = BlankInfillingDataset([corpus], recipe)
    ours, theirs = [], []
    for first in range(0, (rounds + 1) * BATCH, BATCH):
        rows = [dataset[number] for number in range(first, first + BATCH)]
        lists = [as_lists(row) for row in rows]
        if not first:
            shares = check_same_job(rows, config, collator(rows), peer(lists))
            continue  # which has warmed up
        num_tokens = sum(count_text(row.tokens) for row in rows)
        ours.append(num_tokens / seconds(lambda: collator(rows)))  # noqa: B023
        theirs.append(num_tokens / seconds(lambda: peer(lists)))  # noqa: B023
    speed, peer_speed = statistics.median(ours) / 1e6, statistics.median(theirs) / 1e6
    ratio = statistics.median(first / second for first, second in zip(ours, theirs, strict=True))
    objective = rows[0].objective
    goal = COLLATE_GOALS.get(objective, "-")
    print(
        f"{objective:<14} {speed:>8.2f} {goal:>8} {peer_speed:>15.2f} {ratio:>8.1f} {RATIO_GOAL:>8}"
        f" {shares[0]:>10.3f} {shares[1]:>8.3f}",
        flush=True,
    )


def measure_packing(name: str, corpus: TokenFile, join_documents: bool, rounds: int) -> None:
    """Print how fast an epoch is planned and its rows are read."""
    speeds = []
    num_tokens = corpus.facts["num_tokens"]
    for _ in range(rounds + 1):
        start = time.perf_counter()
        dataset = BlankInfillingDataset([corpus], InfillingRecipe(), join_documents=[join_documents])
        planned = time.perf_counter()
        read = sum(dataset[number].tokens.size for number in range(len(dataset)))
        done = time.perf_counter()
        speeds.append([num_tokens / taken for taken in (done - start, planned - start, done - planned)])
    ends = 0 if join_documents or name == "instructions" else corpus.num_documents  # `</s>`, which stay behind
    assert read == num_tokens - ends, (read, num_tokens)
    both, packing, reading = (statistics.median(column) / 1e6 for column in zip(*speeds[1:], strict=True))
    print(f"{name:<14} {both:>8.1f} {PACK_GOAL:>8} {packing:>15.1f} {reading:>8.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--num-tokens", type=int, default=20_000_000, help="of each corpus")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = GLMConfig()
    size, rounds = options.num_tokens, options.rounds
    print(f"{date.today()}, {platform.machine()}, torch {torch.__version__}, 1 thread, median of {rounds}")
    with tempfile.TemporaryDirectory() as folder:
        text = draw_corpus(Path(folder) / "text", size, (400,), config.eos_token_id, config)
        pairs = draw_corpus(Path(folder) / "pairs", size, (150, 30), config.gmask_token_id, config)
        print(f"{text.num_documents} documents, {pairs.num_documents} instructions, {size / 1e6:g} M tokens of each")
        print(f"\n{'collate':<14} {'M/s':>8} {'target':>8} {'token by token':>15} {'ratio':>8} {'target':>8}", end="")
        print(f" {'predicted':>10} {'by peer':>8}")
        compare_collating(text, InfillingRecipe(mask_probability=1), config, rounds)
        compare_collating(text, InfillingRecipe(mask_probability=0), config, rounds)
        compare_collating(pairs, InfillingRecipe(), config, rounds)
        print(f"\n{'pack and read':<14} {'M/s':>8} {'target':>8} {'pack':>15} {'read':>8}")
        measure_packing("joined", text, True, rounds)
        measure_packing("apart", text, False, rounds)
        measure_packing("instructions", pairs, False, rounds)

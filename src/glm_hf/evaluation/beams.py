"""The original's beam search, whose scores and order depend on how its batches were padded.

A beam's score is the sum of its log-probabilities over ((5 + length) / 6) ** length_penalty, where length counts the
context with its padding, the new tokens and the end token. Tokens are banned before the probabilities are made, so
that the others gain. `no_repeat_ngram_size` bans what was generated before behind the same tokens, the last of the
padded context among them. A row ends when it has as many ended beams as asked for, and no running one can overtake.

Shapes: `B` rows, `K` beams, `V` vocabulary, `S` tokens in the cache.
Source: the generation code released with GLM-130B, section "beam search".
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from glm_hf.decoding import Layout
from glm_hf.versions_glm import CACHE

BANNED = -65504.0
"""What the logits of banned tokens are set to: the lowest number of fp16."""
ROWS_AT_ONCE = 64
"""Most beams that are decoded together."""


@dataclass(frozen=True)
class BeamSettings:
    """How beams are searched; the names are those of the original's task files."""

    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    min_gen_length: int = 0
    max_gen_length: int = 128
    penalizes_context: bool = True
    """Whether the length penalty counts the padded context, as the original's does, or new tokens only."""
    banned_tokens: tuple[int, ...] = ()
    """Tokens that never come."""
    banned_prefixes: tuple[tuple[int, ...], ...] = ()
    """Beginnings that no answer has."""


@dataclass
class Beam:
    """A continuation."""

    ids: list[int]
    """New tokens, the end token among them if there is one."""
    length: int
    """What the length penalty counts."""
    score: float
    """With the penalty."""


@dataclass
class RunningRow:
    """One row of the search."""

    row: list[int]
    layout: Layout
    padded_length: int
    beams: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    bans: list[dict[tuple[int, ...], list[int]]] = field(default_factory=lambda: [{}])
    ended: list[Beam] = field(default_factory=list)
    is_done: bool = False


def search_beams(
    model: Any,
    rows: Sequence[tuple[list[int], Layout]],
    padded_lengths: Sequence[int],
    settings: BeamSettings,
    end_ids: Sequence[int],
    on_found: Callable[[int, list[Beam]], None] | None = None,
) -> list[list[Beam]]:
    """
    Return the best continuations of every row, the best first.

    Args:
        model: A `GLMForBlankInfilling` in evaluation mode, or an adapter of one without learned tokens in front.
        rows: Ids and layout of each row.
        padded_lengths: Length of each row as the length penalty and the bans see it.
        settings: How beams are searched.
        end_ids: Tokens that end a beam.
        on_found: Function that is called with the number of a row and its beams as soon as they are known.
    """
    found: list[list[Beam]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number][0]))
    at_once = max(ROWS_AT_ONCE // settings.num_beams, 1)
    for start in range(0, len(order), at_once):
        numbers = order[start : start + at_once]
        running = [RunningRow(*rows[number], padded_lengths[number]) for number in numbers]
        for row in BeamSearch(model, running, settings, end_ids).run():
            number = numbers[row]
            found[number] = running[row].ended
            if on_found is not None:
                on_found(number, found[number])
    return found


class BeamSearch:
    """The search of some rows at once, all of which have as many new tokens."""

    def __init__(self, model: Any, running: list[RunningRow], settings: BeamSettings, end_ids: Sequence[int]) -> None:
        self.model, self.running, self.settings, self.end_ids = model, running, settings, list(end_ids)
        self.config = model.config
        self.device = model.device
        self.active = list(range(len(running)))
        self.longest = max(len(row.row) for row in running)
        self.cache = DynamicCache()

    @torch.no_grad()
    def run(self) -> Iterator[int]:
        """Search, and yield the numbers of rows whose beams are found."""
        logits = self._read()
        for step in range(self.settings.max_gen_length):
            parents = self._extend(logits, step)
            for number in [number for number in self.active if self.running[number].is_done]:
                yield number
            kept = [i for i, number in enumerate(self.active) if not self.running[number].is_done]
            sources = [parent for i in kept for parent in parents[i]]
            self.active = [self.active[i] for i in kept]
            if not self.active or step + 1 == self.settings.max_gen_length:
                break
            self.cache.reorder_cache(torch.tensor(sources, device=self.device))
            logits = self._step(step)
        for number in self.active:
            row = self.running[number]
            for beam, score in zip(row.beams, row.scores, strict=True):
                self._end(row, beam, score)
            yield number

    def _read(self) -> Tensor:
        """Read the rows, padded on the right, and return the logits `(B, 1, V)` behind each."""
        count, length = len(self.running), self.longest
        input_ids = torch.full((count, length), self.config.pad_token_id)
        position_ids = torch.zeros((count, length), dtype=torch.long)
        visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(count, 1, 1, 1)  # (B, 1, L, L)
        for index, row in enumerate(self.running):
            input_ids[index, : len(row.row)] = torch.tensor(row.row)
            position_ids[index, : len(row.row)] = torch.tensor(row.layout.position_ids)
            visible[index, ..., : row.layout.num_context] = True
        last = torch.tensor([[len(row.row) - 1] for row in self.running])
        return self._forward(input_ids, visible, position_ids, last)

    def _step(self, step: int) -> Tensor:
        """Return the logits `(B, K, V)` behind the newest tokens of all beams."""
        rows = [self.running[number] for number in self.active]
        newest = torch.tensor([[beam[-1]] for row in rows for beam in row.beams])
        positions = torch.tensor(
            [[row.layout.next_position + step * row.layout.increment] for row in rows for _ in row.beams]
        )
        visible = torch.zeros(len(newest), 1, 1, self.longest + step + 1, dtype=torch.bool)
        visible[..., self.longest :] = True
        for index, length in enumerate(len(row.row) for row in rows for _ in row.beams):
            visible[index, ..., :length] = True
        logits = self._forward(newest, visible, positions, torch.zeros(len(newest), 1, dtype=torch.long))
        return logits.view(len(rows), -1, logits.shape[-1])

    def _forward(self, input_ids: Tensor, visible: Tensor, position_ids: Tensor, kept: Tensor) -> Tensor:
        """Run the model on new tokens, and return the logits `(B, 1, V)` of one of each row in fp32."""
        outputs = self.model(
            input_ids.to(self.device),
            attention_mask=visible.to(self.device),
            position_ids=position_ids.to(self.device),
            use_cache=True,
            logits_to_keep=kept.to(self.device),
            **{CACHE: self.cache},
        )
        return outputs.logits.float()

    def _extend(self, logits: Tensor, step: int) -> list[list[int]]:
        """Give every active row its next beams, and return where in the cache each has its past, row by row."""
        num_beams, vocab_size = self.settings.num_beams, logits.shape[-1]
        for index, number in enumerate(self.active):
            self._ban(logits[index], self.running[number], step)
        scores = logits.log_softmax(-1)
        scores = scores + torch.tensor([self.running[i].scores for i in self.active], device=scores.device)[..., None]
        num_candidates = min((max(1, len(self.end_ids)) + 1) * num_beams, scores[0].numel())
        best = scores.flatten(1).topk(num_candidates, dim=1)
        values, places = best.values.tolist(), best.indices.tolist()
        parents, first = [], 0
        for index, number in enumerate(self.active):
            row = self.running[number]
            pairs = zip(values[index], places[index], strict=True)
            candidates = [(value, *divmod(place, vocab_size)) for value, place in pairs]
            kept = self._take(row, candidates)
            parents.append([first + parent for parent in kept])
            first += logits.shape[1]
            row.is_done = len(row.ended) == num_beams and row.ended[-1].score >= self._penalized(
                max(row.scores), self._length(row, step + 1)
            )
        return parents

    def _take(self, row: RunningRow, candidates: list[tuple[float, int, int]]) -> list[int]:
        """Sort candidates, the best first, into ended and running beams, and return the parents of the latter."""
        beams: list[list[int]] = []
        scores: list[float] = []
        bans: list[dict[tuple[int, ...], list[int]]] = []
        parents: list[int] = []
        size = self.settings.no_repeat_ngram_size
        for value, parent, token in candidates:
            beam = [*row.beams[parent], token]
            if token in self.end_ids:
                self._end(row, beam, value)
            elif len(beams) < self.settings.num_beams:
                beams.append(beam)
                scores.append(value)
                parents.append(parent)
                if size > 0:
                    prefix = self._last(row, row.beams[parent], size - 1)
                    known = row.bans[parent]
                    bans.append({**known, prefix: [*known.get(prefix, ()), token]})
            else:
                break
        row.beams, row.scores, row.bans = beams, scores, bans
        return parents

    def _ban(self, logits: Tensor, row: RunningRow, step: int) -> None:
        """Set the logits `(K, V)` of tokens that may not come next in a row."""
        settings, size = self.settings, self.settings.no_repeat_ngram_size
        if settings.banned_tokens:
            logits[:, list(settings.banned_tokens)] = BANNED
        if step < settings.min_gen_length:
            logits[:, self.end_ids] = BANNED
        for index, beam in enumerate(row.beams):
            banned = [prefix[-1] for prefix in settings.banned_prefixes if tuple(beam) == prefix[:-1]]
            if size > 0:
                banned += row.bans[index].get(self._last(row, beam, size - 1), ())
            if banned:
                logits[index, banned] = BANNED

    def _last(self, row: RunningRow, beam: list[int], count: int) -> tuple[int, ...]:
        """Return the last tokens of a beam, with those of its padded context before."""
        padding = [self.config.pad_token_id] * (row.padded_length - len(row.row))
        tokens = beam if len(beam) >= count else [*row.row, *padding, *beam]
        return tuple(tokens[max(len(tokens) - count, 0) :])

    def _end(self, row: RunningRow, beam: list[int], score: float) -> None:
        """Put an ended beam where it belongs; before others of the same score."""
        length = self._length(row, len(beam))
        ended = Beam(beam, length, self._penalized(score, length))
        place = len(row.ended)
        while place > 0 and ended.score >= row.ended[place - 1].score:
            place -= 1
        row.ended.insert(place, ended)
        del row.ended[self.settings.num_beams :]

    def _length(self, row: RunningRow, num_new: int) -> int:
        """Return what the length penalty counts."""
        return num_new + (row.padded_length if self.settings.penalizes_context else 0)

    def _penalized(self, score: float, length: int) -> float:
        """Return a score with its length penalty."""
        return score / ((5 + length) / 6) ** self.settings.length_penalty

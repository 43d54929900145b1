"""What all tasks share: a model with its tokenizer, and what is known of rows from before."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from glm_hf.decoding import Answer, Decoder, Engine, Layout, Request, Sampling
from glm_hf.evaluation.beams import Beam, BeamSettings, search_beams
from glm_hf.evaluation.journal import Journal
from glm_hf.evaluation.samples import Sample
from glm_hf.evaluation.scoring import Scorer

NUM_SLOTS = 32
NUM_TEXTS_KEPT = 1024
"""Texts whose ids are remembered: choices come again, and context with every one of its continuations."""
GREEDY = Sampling(allows_blanks=True)
"""The most likely token, whichever it is, as the original has it."""
OnRow = Callable[[], None]
"""Function that is called when a row is done."""


@dataclass(frozen=True)
class Scores:
    """What is known of a row with answers."""

    log_probs: list[list[float]]
    """Of every token of every answer."""
    is_greedy: list[bool]
    """Whether each answer is what the model would write."""


@dataclass(frozen=True)
class Continuation:
    """What is known of a row that was continued."""

    ids: list[int]
    """Without the end token."""
    log_probs: list[float]
    """Of every token, the end token behind them if there is one."""
    margin: float
    """Least distance of the log-probabilities of the best two tokens of a step."""


class Pending:
    """
    Results of rows, as far as they are known; equal rows have one.

    Args:
        journal: Where results are kept.
        made_from: What each row's result is made from, as JSON.
        on_row: Function that is called when a row is done.

    Attributes:
        values: Results, None where one is missing.
        keys: Of the results that are missing.
        firsts: Numbers of the first rows of each of them.
    """

    def __init__(self, journal: Journal, made_from: Iterable[Sequence[Any]], on_row: OnRow | None) -> None:
        self.journal, self.on_row = journal, on_row
        self.values: list[Any] = []
        self._missing: dict[str, list[int]] = {}
        for number, parts in enumerate(made_from):
            key, value = journal.find(*parts)
            self.values.append(value)
            if value is None:
                self._missing.setdefault(key, []).append(number)
            elif on_row is not None:
                on_row()
        self.keys = list(self._missing)
        self.firsts = [numbers[0] for numbers in self._missing.values()]

    def settle(self, key: str, value: Any) -> None:
        """Note a result, for all rows that have it."""
        self.journal.record(key, value)
        for number in self._missing[key]:
            self.values[number] = value
            if self.on_row is not None:
                self.on_row()


class Evaluator:
    """
    Scores and continues rows, each once.

    Args:
        model: A `GLMForBlankInfilling`, or a PEFT model of one without learned tokens in front, in evaluation mode.
        tokenizer: Its `GLMTokenizer`.
        journal: Where results are kept.
        batch_size: Most rows at once; by default as many as have some thousand tokens.
    """

    def __init__(
        self, model: Any, tokenizer: Any, journal: Journal | None = None, batch_size: int | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.journal = journal or Journal(None, "")
        self.scorer = Scorer(model, batch_size)
        self.config = self.scorer.config
        self.num_slots = batch_size or NUM_SLOTS
        self._decoder: Decoder | None = None
        backend = tokenizer.backend_tokenizer  # many times faster than the tokenizer around it
        backend.no_truncation()
        backend.no_padding()
        self._encode = lru_cache(NUM_TEXTS_KEPT)(lambda text: tuple(backend.encode(text).ids))

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return [self.config.eop_token_id, self.config.eos_token_id]

    @property
    def decoder(self) -> Decoder:
        """The slots in which rows are continued."""
        if self._decoder is None:
            self._decoder = Decoder(Engine(self.model, self.num_slots))
        return self._decoder

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added and nothing left out."""
        return list(self._encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens among them."""
        return str(self.tokenizer.decode(ids))

    def score(self, samples: Sequence[Sample], on_row: OnRow | None = None) -> list[Scores]:
        """Return the log-probabilities of the targets of every row."""
        pending = Pending(self.journal, (("score", *vars(sample).values()) for sample in samples), on_row)

        def settle(number: int, log_probs: list[list[float]], is_greedy: list[bool]) -> None:
            pending.settle(pending.keys[number], [log_probs, is_greedy])

        self.scorer.score([samples[number] for number in pending.firsts], settle)
        return [Scores(*value) for value in pending.values]

    def search_beams(
        self,
        rows: Sequence[tuple[list[int], Layout]],
        padded_lengths: Sequence[int],
        settings: BeamSettings,
        on_row: OnRow | None = None,
    ) -> list[list[Beam]]:
        """
        Return the best continuations of every row, the best first.

        Args:
            rows: Ids and layout of each row.
            padded_lengths: Length of each row as the length penalty and the bans see it.
            settings: How beams are searched.
            on_row: Function that is called when a row is done.
        """
        for row, _ in rows:
            self.require_room(row, settings.max_gen_length)
        made_from = (
            ("beams", row, asdict(layout), padded, asdict(settings))
            for (row, layout), padded in zip(rows, padded_lengths, strict=True)
        )
        pending = Pending(self.journal, made_from, on_row)

        def settle(number: int, beams: list[Beam]) -> None:
            pending.settle(pending.keys[number], [[beam.ids, beam.length, beam.score] for beam in beams])

        search_beams(
            self.scorer.base,
            [rows[number] for number in pending.firsts],
            [padded_lengths[number] for number in pending.firsts],
            settings,
            self.end_ids,
            settle,
        )
        return [[Beam(*beam) for beam in value] for value in pending.values]

    def generate(
        self,
        rows: Sequence[tuple[list[int], Layout]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
        on_row: OnRow | None = None,
    ) -> list[Continuation]:
        """
        Return the continuation of every row, greedy by default.

        Args:
            rows: Ids and layout of each row.
            max_new_tokens: Most new tokens.
            sampling: How tokens are chosen.
            stops: Texts behind which an answer ends.
            on_row: Function that is called when a row is done.
        """
        for row, _ in rows:
            self.require_room(row, max_new_tokens)
        settings = (max_new_tokens, asdict(sampling), list(stops))
        pending = Pending(self.journal, (("generate", row, asdict(layout), *settings) for row, layout in rows), on_row)

        def is_stopped(ids: Sequence[int]) -> bool:
            text = self.decode(ids)
            return any(stop in text for stop in stops)

        def request(key: str, number: int) -> Request:
            def take(answer: Answer) -> None:
                if answer.error is not None:
                    raise ValueError(answer.error)
                if answer.is_finished:
                    margin = min(top[0][1] - top[1][1] for top in answer.top)
                    pending.settle(key, [answer.ids, answer.log_probs, margin])

            row, layout = rows[number]
            return Request(
                row,
                max_new_tokens,
                sampling,
                num_logprobs=2,
                is_stopped=is_stopped if stops else None,
                on_token=take,
                layout=layout,
            )

        self.decoder.run([request(*each) for each in zip(pending.keys, pending.firsts, strict=True)])
        return [Continuation(*value) for value in pending.values]

    def require_room(self, row: Sequence[int], max_new_tokens: int) -> None:
        """Raise ValueError if a row and what is to come do not fit the model."""
        window = self.config.max_position_embeddings
        if len(row) + max_new_tokens > window:
            raise ValueError(
                f"a row of {len(row)} tokens and {max_new_tokens} new ones do not fit the model's window of {window}; "
                "lower max_seq_length"
            )


def dtype_on(device: str | None, dtype: str) -> str:
    """Return the dtype that is computed in: `auto` means float32 on CPUs, which is as fast there and exact."""
    is_cpu = device == "cpu" or not torch.cuda.is_available()
    return "float32" if dtype == "auto" and is_cpu else dtype

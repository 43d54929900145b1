"""Log-probabilities of the tokens of rows, as many rows at once as are of like length."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from glm_hf.evaluation.samples import Sample, stack
from glm_hf.peft_glm import num_virtual_tokens

TOKENS_AT_ONCE = 2048
"""Most tokens of a batch, with their padding; a longer row is read alone."""
OUTPUTS_AT_ONCE = 2**27
"""Most logits of a batch: half a gigabyte in fp32."""


class Scorer:
    """
    Scores rows by a model.

    Args:
        model: A `GLMForBlankInfilling`, or a PEFT model of one, in evaluation mode.
        batch_size: Most rows of a batch; by default as many as have `TOKENS_AT_ONCE` tokens.

    Raises:
        ValueError: If the model has learned tokens in front, which rows of positions of their own cannot follow.
    """

    def __init__(self, model: Any, batch_size: int | None = None) -> None:
        if num_virtual_tokens(model):
            raise ValueError("rows cannot be scored behind the learned tokens of an adapter; merge it or use LoRA")
        self.model, self.batch_size = model, batch_size
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.base.config
        self.device = self.base.device

    def score(
        self, samples: Sequence[Sample], on_scored: Callable[[int, list[list[float]], list[bool]], None] | None = None
    ) -> list[list[list[float]]]:
        """
        Return the log-probability of every target of every answer of every row.

        Args:
            samples: Rows.
            on_scored: Function that is called with the number of a row, its log-probabilities, and whether the
                targets of each answer are the most likely tokens, as soon as they are known.
        """
        found: list[list[list[float]]] = [[] for _ in samples]
        for numbers in self.batches(samples):
            for number, scores, is_greedy in self._score([samples[number] for number in numbers], numbers):
                found[number] = scores
                if on_scored is not None:
                    on_scored(number, scores, is_greedy)
        return found

    def batches(self, samples: Sequence[Sample]) -> Iterator[list[int]]:
        """Yield numbers of rows that are read together, the longest first, so that memory is short at once if ever."""
        order = sorted(range(len(samples)), key=lambda number: -len(samples[number].input_ids))
        batch: list[int] = []
        num_outputs = 0
        for number in order:
            longest = len(samples[(batch or [number])[0]].input_ids)
            outputs = num_outputs + len(samples[number].rows)
            is_full = (
                longest * (len(batch) + 1) > TOKENS_AT_ONCE
                if self.batch_size is None
                else (len(batch) == self.batch_size)
            )
            if batch and (is_full or outputs * self.config.vocab_size > OUTPUTS_AT_ONCE):
                yield batch
                batch, outputs = [], len(samples[number].rows)
            batch.append(number)
            num_outputs = outputs
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, samples: list[Sample], numbers: list[int]) -> Iterator[tuple[int, list[list[float]], list[bool]]]:
        """Yield number, log-probabilities and greediness of rows that are read together."""
        window = self.config.max_position_embeddings
        if (last := max(max(sample.position_ids) for sample in samples)) >= window:
            raise ValueError(f"a row reaches position {last}, the model's window {window}; lower max_seq_length")
        arguments = {name: value.to(self.device) for name, value in stack(samples, self.config.pad_token_id).items()}
        batch, length = arguments["input_ids"].shape
        places = [index * length + row for index, sample in enumerate(samples) for row in sample.rows]
        kept, where = np.unique(places, return_inverse=True)
        is_kept = torch.zeros(batch * length, dtype=torch.bool)
        is_kept[kept] = True
        is_kept = is_kept.view(batch, length).to(self.device)
        logits = self.model(**arguments, use_cache=False, logits_to_keep=is_kept).logits.float()
        targets = torch.tensor([token for sample in samples for token in sample.targets], device=logits.device)
        rows = torch.from_numpy(where).to(logits.device)
        found = logits.log_softmax(1)[rows, targets].tolist()
        is_best = logits[rows, targets] == logits.amax(1)[rows]
        is_best[is_best.clone()] = logits[rows[is_best]].argmax(1) == targets[is_best]  # the first of equal ones
        is_best = is_best.tolist()
        if not all(map(math.isfinite, found)):
            raise ValueError("the model's scores are not finite; its weights are damaged, or too large for its dtype")
        start = 0
        for number, sample in zip(numbers, samples, strict=True):
            parts = list(pairwise(accumulate(sample.splits, initial=start)))
            yield number, [found[first:end] for first, end in parts], [all(is_best[first:end]) for first, end in parts]
            start += len(sample.targets)

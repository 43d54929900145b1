"""The choice of the next token of every slot, from logits to ids, with the settings of each in tensors.

Settings take effect in the order of transformers' `generate`: bias, repetition penalty, tokens that are never chosen,
temperature, top-k, top-p, min-p. Randomness comes from outside, a number for each slot, so that a request draws the
same tokens in whatever slot and company it is.

Shapes: `R` slots, `B` slots that take part, `V` vocabulary, `N` candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glm_hf.decoding.requests import Sampling

CANDIDATES = 1024
"""Most likely tokens that are looked at first, before all are sorted."""


class Kinds(NamedTuple):
    """What the slots that take part need; the same for all, so that a graph can be made for it."""

    draws: bool
    """Whether any samples."""
    filters: bool
    penalizes: bool
    is_biased: bool
    num_top: int
    """Number of most likely tokens to report."""


class Choice(NamedTuple):
    """The tokens of a step."""

    ids: Tensor
    """`(B,)`."""
    log_probs: Tensor
    """`(B,)` by the model, before any setting."""
    top_log_probs: Tensor
    """`(B, num_top)`, the highest first."""
    top_ids: Tensor
    """`(B, num_top)`."""


class SlotSettings:
    """
    Sampling settings of all slots.

    Args:
        num_slots: Slots `R`.
        vocab_size: `V`.
        never: Tokens that are never chosen, unless a slot allows blanks.
        device: Where the logits are.
    """

    def __init__(self, num_slots: int, vocab_size: int, never: Sequence[int], device: torch.device) -> None:
        self.never = torch.tensor(sorted(never), dtype=torch.long, device=device)
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty")
        self.numbers = {name: torch.ones(num_slots, 1, device=device) for name in numbers}
        self.top_k = torch.zeros(num_slots, 1, dtype=torch.long, device=device)
        self.is_filtered, self.allows_blanks = torch.zeros(2, num_slots, 1, dtype=torch.bool, device=device)
        self.bias = torch.zeros(num_slots, vocab_size, device=device)
        self.is_seen = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._of_slots: list[tuple[Sampling, int] | None] = [None] * num_slots

    def assign(self, slot: int, sampling: Sampling, num_top: int, seen: Sequence[int]) -> None:
        """Set what holds for a slot, whose row has the ids `seen`."""
        for name, values in self.numbers.items():
            values[slot] = getattr(sampling, name)
        vocab_size = self.bias.shape[1]
        self.top_k[slot] = min(sampling.top_k, vocab_size) or vocab_size
        self.is_filtered[slot], self.allows_blanks[slot] = sampling.has_filters, sampling.allows_blanks
        if self._is_biased(slot) or sampling.logit_bias:
            self.bias[slot] = 0
            for token_id, bias in sampling.logit_bias.items():
                self.bias[slot, token_id] = bias
        self.is_seen[slot] = False
        self.is_seen[slot, torch.tensor(seen, device=self.is_seen.device)] = True
        self._of_slots[slot] = (sampling, num_top)

    def _is_biased(self, slot: int) -> bool:
        """Tell whether a slot has biases, perhaps of its last request."""
        settings = self._of_slots[slot]
        return settings is not None and bool(settings[0].logit_bias)

    def move(self, source: int, target: int) -> None:
        """Move the settings of a slot to another."""
        flags = (self.is_filtered, self.allows_blanks, self.is_seen)
        for values in (*self.numbers.values(), self.top_k, self.bias, *flags):
            values[target] = values[source]
        self._of_slots[target] = self._of_slots[source]

    def kinds(self, slots: Sequence[int]) -> Kinds:
        """Return what these slots need."""
        found = [settings for slot in slots if (settings := self._of_slots[slot]) is not None]
        return Kinds(
            draws=any(sampling.temperature > 0 for sampling, _ in found),
            filters=any(sampling.has_filters for sampling, _ in found),
            penalizes=any(sampling.repetition_penalty != 1 for sampling, _ in found),
            is_biased=any(sampling.logit_bias for sampling, _ in found),
            num_top=max((num_top for _, num_top in found), default=0),
        )

    def choose(
        self, logits: Tensor, rows: Tensor, uniforms: Tensor, kinds: Kinds, at_once: int = CANDIDATES
    ) -> Choice:
        """
        Choose one token for each of some slots.

        Args:
            logits: `(B, V)`.
            rows: `(B,)` numbers of the slots.
            uniforms: `(B,)` random numbers above 0 and up to 1.
            kinds: What these slots need.
            at_once: Candidates that are sorted first; all if the graph may not depend on values.
        """
        scores = logits.float()
        total = scores.logsumexp(1, keepdim=True)  # (B, 1)
        allowed = scores + self.bias[rows] if kinds.is_biased else scores
        if kinds.penalizes:
            penalty = self.numbers["repetition_penalty"][rows]
            penalized = torch.where(allowed < 0, allowed * penalty, allowed / penalty)
            allowed = torch.where(self.is_seen[rows], penalized, allowed)
        kept = torch.where(self.allows_blanks[rows], allowed[:, self.never], -torch.inf)
        allowed = allowed.index_copy(1, self.never, kept)
        ids = allowed.argmax(1, keepdim=True)  # (B, 1)
        if kinds.draws:
            temperature = self.numbers["temperature"][rows]
            scaled = allowed / torch.where(temperature > 0, temperature, 1)
            if kinds.filters:
                scaled = self._filter(scaled, rows, at_once)
            drawn = draw(scaled, uniforms.to(scaled)[:, None])
            ids = torch.where(temperature > 0, drawn, ids)
        self.is_seen[rows, ids[:, 0]] = True
        top = (scores - total).topk(kinds.num_top, dim=1) if kinds.num_top else (scores[:, :0], ids[:, :0])
        return Choice(ids[:, 0], (scores.gather(1, ids) - total)[:, 0], *top)

    def _filter(self, scaled: Tensor, rows: Tensor, at_once: int) -> Tensor:
        """Return scores `(B, V)` with those left out that top-k, top-p and min-p leave out of some rows."""
        count = min(at_once, scaled.shape[1])
        candidates = scaled.topk(count, dim=1).values  # (B, N), the highest first
        is_filtered, top_k, rank = self.is_filtered[rows], self.top_k[rows], torch.arange(count, device=scaled.device)
        is_kept = rank < top_k
        of_k = candidates.masked_fill(~is_kept, -torch.inf).logsumexp(1, keepdim=True)
        total = torch.where(top_k < scaled.shape[1], of_k, scaled.logsumexp(1, keepdim=True))
        probabilities = (candidates - total).exp()
        above = probabilities.cumsum(1) - probabilities
        is_kept &= (above < self.numbers["top_p"][rows]) | (rank == 0)
        is_kept &= probabilities >= self.numbers["min_p"][rows] * probabilities[:, :1]
        if count < scaled.shape[1] and (is_kept[:, -1:] & is_filtered).any():  # there may be more of them
            return self._filter(scaled, rows, scaled.shape[1])
        least = candidates.masked_fill(~is_kept, torch.inf).amin(1, keepdim=True)
        return scaled.masked_fill((scaled < least) & is_filtered, -torch.inf)


def draw(scores: Tensor, target: Tensor) -> Tensor:
    """Return the columns `(B, 1)` at which the running sums of the softmax of `(B, N)` reach shares `(B, 1)`."""
    sums = scores.softmax(1).cumsum(1)
    return torch.searchsorted(sums, target * sums[:, -1:]).clamp(max=scores.shape[1] - 1)  # of NaN there is none

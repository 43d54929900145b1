"""What is asked of the decoder, and what it answers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the names and their order of effect are those of transformers' `generate`."""

    temperature: float = 0.0
    """0 for the most likely token (greedy)."""
    top_k: int = 0
    """Number of most likely tokens to choose from, 0 for all."""
    top_p: float = 1.0
    """Probability that the most likely tokens to choose from have together."""
    min_p: float = 0.0
    """Least probability of a token, as a share of that of the most likely."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, of tokens that were seen."""
    seed: int | None = None
    """Seed of the request's own random draws, None for any."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Summands of the logits of tokens."""
    allows_blanks: bool = False
    """Whether masks and `sop` may be chosen, which would start blanks of their own."""

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        bounds = (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
        )
        for name, is_right, expected in bounds:
            if not is_right:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise ValueError("every logit_bias must be a finite number")

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a row stand and what they see, where that is not what `infilling_layout` says of its ids."""

    position_ids: tuple[int, ...]
    num_context: int
    """Number of first tokens, which all tokens see; the others are causal."""
    next_position: int
    """Of the token behind the row."""
    increment: int
    """From one new token to the next: 0 where they stand at their mask, else 1."""


@dataclass(frozen=True)
class Request:
    """A row to be continued: a context, `sop`, and what its blank begins with, if anything."""

    input_ids: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    num_logprobs: int = 0
    """Number of most likely tokens to report of every step, with their log-probabilities."""
    is_stopped: Callable[[Sequence[int]], bool] | None = None
    """Function of the new tokens that tells whether to stop, besides end tokens."""
    on_token: Callable[["Answer"], None] | None = None
    """Function that is called after every token, and at the end."""
    layout: Layout | None = None
    """What overrules the layout rule."""


@dataclass(eq=False)
class Answer:
    """What has been decoded of a request so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    """New tokens, without the end token."""
    log_probs: list[float] = field(default_factory=list)
    """Log-probability of every new token, and of the end token behind them if there is one."""
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    """Most likely tokens of every step with their log-probabilities, if asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Why there is no answer."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    @property
    def score(self) -> float:
        """Sum of the log-probabilities."""
        return sum(self.log_probs)

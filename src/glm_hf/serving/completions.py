"""The answers to a request: choices as their tokens come, and what they are in OpenAI's form."""

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from glm_hf.decoding import Request, Sampling
from glm_hf.infilling_glm import splice_blank
from glm_hf.serving.prompts import BlankText, Prompt, ends_in
from glm_hf.serving.protocol import APIError
from glm_hf.serving.worker import Choices, Update, Worker

FIRST_TOKENS = 20
"""Likely first tokens of a blank that alternatives are made of."""


@dataclass
class Blank:
    """A blank of a choice."""

    text: BlankText
    context: list[int]
    """Context that it was read in."""
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    num_alternatives_left: int = 0

    def described(self) -> dict[str, Any]:
        """Return the text with its probability, that of its end included."""
        return {"text": self.text.text, "probability": math.exp(sum(self.log_probs))}


@dataclass(frozen=True)
class Delta:
    """What is new in a choice."""

    index: int
    blank: int
    text: str
    finish_reason: str | None = None
    """How the choice has ended."""
    alternatives: list[dict[str, Any]] | None = None
    """Other answers for the blank, the most probable first, when all are known."""


class Completion:
    """
    The choices for some prompts, `n` for each.

    Args:
        worker: Where they are decoded.
        prompts: The prompts.
        request: Settings of the choices, without ids, seed and end texts.
        samplings: How tokens are drawn, for each choice of a prompt.
        stops: Texts that end a blank.
        num_alternatives: Other answers to find for every blank: those that begin with the next likely tokens.

    Raises:
        APIError: If these are too many choices, now or at all.
        ValueError: If one does not fit.
    """

    def __init__(
        self,
        worker: Worker,
        prompts: Sequence[Prompt],
        request: Request,
        samplings: Sequence[Sampling],
        stops: Sequence[str] = (),
        num_alternatives: int = 0,
    ) -> None:
        self.prompts = [prompt for prompt in prompts for _ in samplings]
        self.stops, self.num_alternatives, self._per_prompt = stops, num_alternatives, len(samplings)
        self.request = replace(request, num_logprobs=FIRST_TOKENS) if num_alternatives else request
        config = worker.decoder.engine.config
        for prompt in prompts:
            row = [*prompt.context, config.sop_token_id, *prompt.begun]
            worker.decoder.require_fitting(replace(request, input_ids=row, sampling=samplings[0]))
        worker.require_room(len(self.prompts) * (1 + num_alternatives))
        self._config = config
        self._never = {config.eop_token_id, config.eos_token_id, *worker.decoder.engine.settings.never.tolist()}
        self.blanks: list[list[Blank]] = [[] for _ in self.prompts]
        self.num_generated = 0
        self.num_prompt_tokens = sum(prompt.num_tokens for prompt in prompts)
        self._choices = Choices(worker)
        self._of_alternatives: dict[int, tuple[int, int, Blank]] = {}
        for number, prompt in enumerate(self.prompts):
            settings = replace(
                self.request,
                sampling=samplings[number % len(samplings)],
                is_stopped=ends_in(prompt.decode, stops),
            )
            self._choices.submit(prompt, settings)
        worker.metrics.prompt_tokens.inc(self.num_prompt_tokens)

    def close(self) -> None:
        """Cancel what has not ended."""
        self._choices.close()

    async def deltas(self) -> AsyncIterator[Delta]:
        """
        Yield what is new until all choices have ended.

        Raises:
            APIError: If one has no answer.
        """
        async for update in self._choices.updates():
            if update.error is not None:
                raise APIError(update.error, 500)
            self.num_generated += 1
            if update.choice in self._of_alternatives:
                for delta in self._add_alternative(update):
                    yield delta
                continue
            for delta in self._add(update):
                yield delta

    def _add(self, update: Update) -> list[Delta]:
        """Add a token to a choice."""
        index, prompt, blanks = update.choice, self.prompts[update.choice], self.blanks[update.choice]
        if update.blank == len(blanks):
            blanks.append(Blank(BlankText(prompt.decode, self.stops), self._context(index)))
        blank = blanks[update.blank]
        blank.log_probs.append(update.log_prob)
        blank.top.append(update.top)
        blank.finish_reason = update.finish_reason
        text = blank.text.add(update.token_id, update.finish_reason is not None)
        reason = update.finish_reason if update.is_last else None
        deltas = [Delta(index, update.blank, text, reason)]
        if update.finish_reason is not None and self.num_alternatives:
            self._find_alternatives(index, update.blank, blank)
            if not blank.num_alternatives_left:
                deltas.append(Delta(index, update.blank, "", alternatives=self.ranked(blank)))
        return deltas

    def _context(self, index: int) -> list[int]:
        """Return the context of the next blank of a choice."""
        prompt, blanks = self.prompts[index], self.blanks[index]
        if not blanks:
            return prompt.context
        begun = prompt.begun if len(blanks) == 1 else []
        return splice_blank(blanks[-1].context, [*begun, *blanks[-1].text.ids], self._config)

    def _find_alternatives(self, index: int, number: int, blank: Blank) -> None:
        """Begin to fill a blank by the tokens that were likely at its start, too."""
        known = {*self._never, *blank.text.ids[:1]}
        begun = self.prompts[index].begun if number == 0 else []
        row = [*blank.context, self._config.sop_token_id, *begun, 0]
        most = min(self.request.max_new_tokens - 1, self._choices.worker.decoder.room_for(row))
        likely = [pair for pair in blank.top[0] if pair[0] not in known]
        for token_id, log_prob in likely[: self.num_alternatives]:
            other = Blank(BlankText(self.prompts[index].decode, self.stops), blank.context, [log_prob])
            other.text.add(token_id, most < 1)
            if most < 1:  # it is whole
                blank.alternatives.append(other.described())
                continue
            prompt = replace(self.prompts[index], context=blank.context, begun=[*begun, token_id], num_blanks=1)
            stop = ends_in(partial(decode_behind, prompt.decode, token_id), self.stops)
            settings = replace(self.request, sampling=Sampling(), max_new_tokens=most, num_logprobs=0, is_stopped=stop)
            self._of_alternatives[self._choices.submit(prompt, settings)] = (index, number, other)
            blank.num_alternatives_left += 1

    def _add_alternative(self, update: Update) -> list[Delta]:
        """Add a token to an alternative."""
        index, number, other = self._of_alternatives[update.choice]
        blank = self.blanks[index][number]
        other.log_probs.append(update.log_prob)
        other.text.add(update.token_id, update.is_last)
        if not update.is_last:
            return []
        blank.alternatives.append(other.described())
        blank.num_alternatives_left -= 1
        return [] if blank.num_alternatives_left else [Delta(index, number, "", alternatives=self.ranked(blank))]

    def ranked(self, blank: Blank) -> list[dict[str, Any]]:
        """Return the answer and its alternatives, the most probable first."""
        found = [blank.described(), *blank.alternatives]
        distinct = {each["text"]: each for each in sorted(found, key=lambda each: each["probability"])}
        return sorted(distinct.values(), key=lambda each: each["probability"], reverse=True)

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens."""
        prompt, completion = self.num_prompt_tokens, self.num_generated
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def best(self, count: int) -> list[int]:
        """Return the `count` choices of every prompt whose tokens are the most probable on average."""
        chosen: list[int] = []
        for start in range(0, len(self.prompts), self._per_prompt):
            group = range(start, start + self._per_prompt)
            chosen += sorted(group, key=self._mean_log_prob, reverse=True)[:count]
        return chosen

    def _mean_log_prob(self, index: int) -> float:
        values = [value for blank in self.blanks[index] for value in blank.log_probs]
        return sum(values) / max(1, len(values))


def decode_behind(decode: Callable[[list[int]], str], first: int, ids: list[int]) -> str:
    """Return the text of tokens and the one before them."""
    return decode([first, *ids])


def whole_text(prompt: Prompt, answers: Sequence[str], echoes: bool) -> str:
    """Return the text of a choice: the prompt with its blanks filled, or the answers, each in a line."""
    if not echoes:
        return "\n".join(answers)
    pieces = [piece for pair in zip(prompt.parts, [*answers, ""], strict=True) for piece in pair]
    return "".join(pieces)

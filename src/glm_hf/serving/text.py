"""`/v1/completions`: texts with blanks, texts to be continued, and texts with a blank before their suffix."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from glm_hf.serving.completions import Blank, Completion, Delta, whole_text
from glm_hf.serving.protocol import APIError, CompletionRequest
from glm_hf.serving.service import DEFAULT_TOKENS, Service, new_id


async def answer_completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Return the answer to a request, whole or as a stream."""
    service.require_model(body.model)
    n, best_of = body.n or 1, body.best_of or body.n or 1
    require_possible(body, n, best_of)
    prompts = await service.prompts(body)
    completion = service.complete(
        prompts, body, best_of, body.max_tokens or DEFAULT_TOKENS, body.logprobs or 0, body.alternatives
    )
    base = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": body.model}
    if body.stream:
        tail = {**base, "choices": []} if body.includes_usage else None
        writer = StreamWriter(completion, body, base)
        return service.stream(completion, writer.describe, tail)
    await service.finish(completion, request)
    choices = [
        describe_choice(completion, index, number, body)
        for number, index in enumerate(completion.best(n) if best_of > n else range(len(completion.prompts)))
    ]
    return JSONResponse({**base, "choices": choices, "usage": completion.usage()})


def require_possible(body: CompletionRequest, n: int, best_of: int) -> None:
    """Raise APIError if fields contradict each other, or ask for what there is not."""
    if best_of < n:
        raise APIError(f"best_of must be at least n ({n}), got {best_of}", param="best_of")
    if best_of > n and body.stream:
        raise APIError(
            "the best of several choices are known at their end; leave stream or best_of out", param="stream"
        )
    if body.echo and body.logprobs is not None:
        raise APIError(
            "a context that is read both ways has no log-probabilities; leave echo or logprobs out", param="logprobs"
        )


def describe_choice(completion: Completion, index: int, number: int, body: CompletionRequest) -> dict[str, Any]:
    """Return a choice that has ended; `blanks` and `alternatives` are ours."""
    prompt, blanks = completion.prompts[index], completion.blanks[index]
    answers = [blank.text.text for blank in blanks]
    choice: dict[str, Any] = {
        "index": number,
        "text": whole_text(prompt, answers, bool(body.echo)),
        "finish_reason": blanks[-1].finish_reason,
        "logprobs": None,
    }
    if body.logprobs is not None:
        choice["logprobs"] = join_logprobs([describe_logprobs(blank, body.logprobs) for blank in blanks])
    if prompt.num_blanks > 1:
        choice["blanks"] = answers
    if body.alternatives:
        choice["alternatives"] = [completion.ranked(blank) for blank in blanks]
    return choice


class StreamWriter:
    """
    The events of a stream, in order: what stands before a blank, its text, and at last what stands behind.

    Args:
        completion: What is streamed.
        body: What was asked for.
        base: Fields of every event.
    """

    def __init__(self, completion: Completion, body: CompletionRequest, base: dict[str, Any]) -> None:
        self.completion, self.body, self.base = completion, body, base
        self._begun: set[tuple[int, int]] = set()
        self._num_told: dict[tuple[int, int], int] = {}

    def describe(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """Yield the events of what is new in a choice."""
        prompt = self.completion.prompts[delta.index]
        if (place := (delta.index, delta.blank)) not in self._begun:
            self._begun.add(place)
            before = prompt.parts[delta.blank] if self.body.echo else "\n" if delta.blank else ""
            if before:
                yield self._event(delta.index, before)
        if delta.alternatives is not None:
            yield self._event(delta.index, "", blank=delta.blank, alternatives=delta.alternatives)
            return
        is_end = delta.finish_reason is not None
        behind = prompt.parts[-1] if is_end and self.body.echo else ""
        extra = {"blank": delta.blank} if prompt.num_blanks > 1 or self.body.alternatives else {}
        if delta.text or is_end:
            yield self._event(
                delta.index,
                delta.text,
                None if behind else delta.finish_reason,
                logprobs=self._new_logprobs(delta) if self.body.logprobs is not None else None,
                **extra,
            )
        if behind:
            yield self._event(delta.index, behind, delta.finish_reason)

    def _event(self, index: int, text: str, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": None, **fields}
        return {**self.base, "choices": [choice]}

    def _new_logprobs(self, delta: Delta) -> dict[str, Any]:
        """Return the log-probabilities of the tokens that have not been told."""
        place = delta.index, delta.blank
        blank, start = self.completion.blanks[delta.index][delta.blank], self._num_told.get(place, 0)
        new = describe_logprobs(blank, self.body.logprobs or 0, start)
        self._num_told[place] = start + len(new["tokens"])
        return new


def describe_logprobs(blank: Blank, num_top: int, start: int = 0) -> dict[str, Any]:
    """Return the log-probabilities of the tokens of a blank from `start` on, as far as its text is certain."""
    certain = blank.text.certain(start)
    top = [
        {blank.text.instead(step, token_id): log_prob for token_id, log_prob in blank.top[step][:num_top]}
        for step, _ in certain
    ]
    return {
        "tokens": [blank.text.pieces[step] for step, _ in certain],
        "token_logprobs": [blank.log_probs[step] for step, _ in certain],
        "top_logprobs": top if num_top else None,
        "text_offset": [offset for _, offset in certain],
    }


def join_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the log-probabilities of all blanks, one after another."""
    joined: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        joined[name] = None if values[0] is None else [value for part in values for value in part]
    return joined

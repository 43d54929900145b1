"""`/v1/chat/completions`: the turns of a chat by the tokenizer's template."""

import time
from collections.abc import Iterable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from glm_hf.serving.completions import Blank, Completion, Delta
from glm_hf.serving.prompts import chat_prompt
from glm_hf.serving.protocol import APIError, ChatRequest
from glm_hf.serving.service import Service, new_id


async def answer_chat(service: Service, body: ChatRequest, request: Request) -> Response:
    """Return the next turn of a chat, whole or as a stream."""
    service.require_model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise APIError("top_logprobs needs logprobs", param="top_logprobs")
    messages = [{"role": message.role, "content": message.content} for message in body.messages]
    prompt = await service.encoded(lambda: chat_prompt(messages, service.tokenizer, service.config), "messages")
    most = body.max_completion_tokens or body.max_tokens or service.config.max_position_embeddings
    n, num_top = body.n or 1, body.top_logprobs or 0
    completion = service.complete([prompt], body, n, most, num_top, 0)
    base = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model}
    if body.stream:
        base["object"] = "chat.completion.chunk"
        tail = {**base, "choices": []} if body.includes_usage else None
        return service.stream(completion, StreamWriter(completion, body, base).describe, tail)
    await service.finish(completion, request)
    choices = [describe_choice(completion, index, body) for index in range(n)]
    return JSONResponse({**base, "object": "chat.completion", "choices": choices, "usage": completion.usage()})


def describe_choice(completion: Completion, index: int, body: ChatRequest) -> dict[str, Any]:
    """Return a turn that has ended."""
    [blank] = completion.blanks[index]
    return {
        "index": index,
        "message": {"role": "assistant", "content": blank.text.text, "refusal": None},
        "finish_reason": blank.finish_reason,
        "logprobs": {"content": describe_logprobs(blank, body), "refusal": None} if body.logprobs else None,
    }


class StreamWriter:
    """
    The events of a stream.

    Args:
        completion: What is streamed.
        body: What was asked for.
        base: Fields of every event.
    """

    def __init__(self, completion: Completion, body: ChatRequest, base: dict[str, Any]) -> None:
        self.completion, self.body, self.base = completion, body, base
        self._begun: set[int] = set()
        self._num_told: dict[int, int] = {}

    def describe(self, delta: Delta) -> Iterable[dict[str, Any]]:
        """Yield the events of what is new in a choice."""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            yield self._event(delta.index, {"role": "assistant", "content": ""})
        if delta.text:
            logprobs = None
            if self.body.logprobs:
                start = self._num_told.get(delta.index, 0)
                content = describe_logprobs(self.completion.blanks[delta.index][0], self.body, start)
                self._num_told[delta.index] = start + len(content)
                logprobs = {"content": content, "refusal": None}
            yield self._event(delta.index, {"content": delta.text}, logprobs=logprobs)
        if delta.finish_reason is not None:
            yield self._event(delta.index, {}, delta.finish_reason)

    def _event(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return {**self.base, "choices": [choice]}


def describe_logprobs(blank: Blank, body: ChatRequest, start: int = 0) -> list[dict[str, Any]]:
    """Return the log-probabilities of the tokens of an answer from `start` on, as far as its text is certain."""
    content = []
    for step, _ in blank.text.certain(start):
        top = [
            describe_token(blank.text.instead(step, token_id), log_prob)
            for token_id, log_prob in blank.top[step][: body.top_logprobs or 0]
        ]
        content.append({**describe_token(blank.text.pieces[step], blank.log_probs[step]), "top_logprobs": top})
    return content


def describe_token(text: str, log_prob: float) -> dict[str, Any]:
    """Return a token with its log-probability."""
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

"""What the paths of the server have in common: prompts, choices, time limits, streams."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from glm_hf.decoding import Request as DecodingRequest
from glm_hf.serving.completions import Completion, Delta
from glm_hf.serving.prompts import Prompt, ids_prompt, text_prompt
from glm_hf.serving.protocol import APIError, CompletionRequest, Parameters
from glm_hf.serving.worker import Worker

DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's


@dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    model_name: str
    api_key: str | None = None
    most_bytes: int = 2**20
    """Of a body."""
    most_prompts: int = 64
    """Of a request."""
    timeout: float = 600.0
    """Seconds that a request may take."""


class Service:
    """
    What the paths have in common.

    Args:
        worker: Where tokens are decoded.
        tokenizer: Tokenizer of the model.
        settings: What the server is started with.
    """

    def __init__(self, worker: Worker, tokenizer: Any, settings: Settings) -> None:
        self.worker, self.tokenizer, self.settings = worker, tokenizer, settings
        self.config = worker.decoder.engine.config
        self.created = int(time.time())
        self._encoding = threading.Lock()

    def require_model(self, name: str) -> None:
        """Raise APIError unless a request is for this model."""
        if name != self.settings.model_name:
            message = f"the model {name[:80]!r} does not exist; this server has {self.settings.model_name!r}"
            raise APIError(message, 404, "model", "model_not_found")

    def complete(
        self, prompts: Sequence[Prompt], body: Parameters, num_choices: int, most: int, num_top: int, alternatives: int
    ) -> Completion:
        """Begin the choices of a request."""
        samplings = [body.sampling(number) for number in range(num_choices)]
        request = DecodingRequest((), most, num_logprobs=num_top)
        try:
            return Completion(self.worker, prompts, request, samplings, body.stops, alternatives)
        except ValueError as error:
            param = "logit_bias" if "logit_bias" in str(error) else "prompt"
            code = "context_length_exceeded" if "room for" in str(error) else "invalid_value"
            raise APIError(str(error), param=param, code=code) from error

    async def prompts(self, body: CompletionRequest) -> list[Prompt]:
        """Return the prompts of a completion, which are encoded beside the event loop."""
        if not 1 <= len(body.prompts) <= self.settings.most_prompts:
            message = f"prompt must hold from 1 to {self.settings.most_prompts} prompts, got {len(body.prompts)}"
            raise APIError(message, param="prompt")

        def encode() -> list[Prompt]:
            found = []
            for prompt in body.prompts:
                if isinstance(prompt, str):
                    found.append(text_prompt(prompt, body.suffix, self.tokenizer, self.config))
                elif body.suffix:
                    raise ValueError("a prompt with a suffix must be a text")
                else:
                    found.append(ids_prompt(prompt, self.tokenizer, self.config))
            return found

        return await self.encoded(encode, "prompt")

    async def encoded(self, encode: Callable[[], Any], param: str) -> Any:
        """Return what a function makes of a client's text, beside the event loop; its ValueError is the client's."""

        def encode_alone() -> Any:
            with self._encoding:  # settings of the tokenizer change while it encodes
                return encode()

        try:
            return await asyncio.to_thread(encode_alone)
        except ValueError as error:
            raise APIError(str(error), param=param, code="invalid_value") from error

    async def finish(self, completion: Completion, request: Request) -> None:
        """Wait for all of a completion; cancel it when its time is over or the client leaves."""
        consume = asyncio.create_task(self._consume(completion))
        leave = asyncio.create_task(until_disconnected(request))
        try:
            done, _ = await asyncio.wait(
                {consume, leave}, timeout=self.settings.timeout, return_when="FIRST_COMPLETED"
            )
            if consume in done:
                return consume.result()
            if leave in done:
                raise APIError("the client has left", 499)
            raise self.too_slow()
        finally:
            completion.close()
            for task in (consume, leave):
                task.cancel()
                with suppress(asyncio.CancelledError, APIError):
                    await task

    def too_slow(self) -> APIError:
        """Return the error of a request whose time is over."""
        return APIError(f"the answer took longer than {self.settings.timeout:g} s", 504, code="timeout")

    async def _consume(self, completion: Completion) -> None:
        async for _ in completion.deltas():
            pass

    def stream(
        self,
        completion: Completion,
        describe: Callable[[Delta], Iterable[dict[str, Any]]],
        tail: dict[str, Any] | None,
    ) -> StreamingResponse:
        """Return the events of a completion as they come."""

        async def events() -> AsyncIterator[str]:
            try:
                async with asyncio.timeout(self.settings.timeout):
                    async for delta in completion.deltas():
                        for event in describe(delta):
                            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
                if tail is not None:
                    yield f"data: {json.dumps({**tail, 'usage': completion.usage()})}\n\n"
                yield "data: [DONE]\n\n"
            except APIError as error:
                yield f"data: {json.dumps(error.body())}\n\n"
            except TimeoutError:
                yield f"data: {json.dumps(self.too_slow().body())}\n\n"

        return CompletionStream(completion, events())


class CompletionStream(StreamingResponse):
    """
    The events of a completion, which is cancelled when the client leaves, also before the first of them.

    Args:
        completion: The completion.
        events: Its events as text.
    """

    def __init__(self, completion: Completion, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.completion.close()


async def until_disconnected(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def new_id(kind: str) -> str:
    """Return the id of an answer."""
    return f"{kind}-{uuid.uuid4().hex}"

"""The thread that decodes, and how its tokens reach the event loop of the server."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from glm_hf.decoding import Decoder, Request
from glm_hf.decoding.fill import Filling
from glm_hf.decoding.ranks import RankedEngine
from glm_hf.serving.metrics import Metrics
from glm_hf.serving.prompts import Prompt
from glm_hf.serving.protocol import APIError

FAILED = "decoding failed, as the server's log tells"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one step has added to a choice."""

    choice: int
    blank: int
    """Number of the blank."""
    token_id: int | None
    """The new token, None for one that ends the blank."""
    log_prob: float
    top: list[tuple[int, float]]
    finish_reason: str | None
    """How the blank has ended."""
    error: str | None
    is_last: bool
    """Whether the choice has all of its blanks."""


class Worker(threading.Thread):
    """
    Run a decoder in a thread of its own.

    Args:
        decoder: The decoder, which nobody else touches.
        metrics: Where its work is counted.
        most: Choices that may be under way, with those that wait for a slot.

    Attributes:
        under_way: Number of choices under way, counted in the event loop.
    """

    def __init__(self, decoder: Decoder, metrics: Metrics, most: int) -> None:
        super().__init__(name="decoder", daemon=True)
        self.decoder, self.metrics, self.most, self.under_way = decoder, metrics, most, 0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def require_room(self, count: int) -> None:
        """Raise APIError if so many more choices are too many, or nothing is decoded any more."""
        if not self.is_alive():
            raise APIError("decoding has ended, as the server's log tells; it must be started anew", 503)
        if count > self.most:
            raise APIError(f"a request may have at most {self.most} choices here, got {count}", param="n")
        if self.under_way + count > self.most:
            raise APIError("too many requests are waiting; try again later", 429, code="rate_limited", retry_after=1)

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the thread, between two steps."""
        self._calls.put(function)

    def stop(self) -> None:
        """End the thread when all requests have their answers, and wait for it."""
        self._calls.put(None)
        self.join()

    def run(self) -> None:
        """Decode until `stop`."""
        is_stopping = False
        while not (is_stopping and self.decoder.is_idle):
            is_stopping |= self._take_calls()
            try:
                self.decoder.advance()
            except Exception:
                logger.exception("a decoding step failed")
                self.decoder.fail(FAILED)
                if isinstance(self.decoder.engine, RankedEngine):
                    return  # the other ranks may be elsewhere now
            self.metrics.slots_in_use.set(len(self.decoder.active))
            self.metrics.waiting.set(len(self.decoder.waiting))

    def _take_calls(self) -> bool:
        """Run what was called for, waiting for it if there is nothing else to do; tell whether to stop."""
        waits = self.decoder.is_idle
        while True:
            try:
                function = self._calls.get(block=waits)
            except queue.Empty:
                return False
            if function is None:
                return True
            try:
                function()
            except Exception:
                logger.exception("a call failed")
            waits = False


class Choices:
    """
    Choices of one request: texts that are filled, and their updates.

    Args:
        worker: Where they are decoded.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._fillings: dict[int, list[Filling]] = {}
        """One of each choice that has begun and not ended; lists are filled by the worker's thread."""
        self._started: dict[int, float] = {}
        self._num_choices = 0
        self._is_closed = False

    def submit(self, prompt: Prompt, request: Request) -> int:
        """Begin to fill the blanks of a prompt; return the number of the choice."""
        choice, self._num_choices = self._num_choices, self._num_choices + 1
        filling: list[Filling] = []
        self._fillings[choice], self._started[choice] = filling, time.monotonic()
        self.worker.under_way += 1
        blanks: dict[str, Any] = {"begun": prompt.begun, "most_blanks": prompt.num_blanks}

        def start() -> None:
            if self._is_closed:
                return
            tell = partial(self._tell, choice)
            try:
                filling.append(Filling(self.worker.decoder, prompt.context, request, tell, **blanks))
            except Exception:
                logger.exception("a request could not be begun")
                self._put(Update(choice, 0, None, 0.0, [], None, FAILED, True))

        self.worker.call(start)
        return choice

    async def updates(self) -> AsyncIterator[Update]:
        """Yield what is new until every choice has ended, also those that are submitted meanwhile."""
        while self._fillings:
            update = await self._updates.get()
            if update.choice in self._started:
                self.worker.metrics.first_token.observe(time.monotonic() - self._started.pop(update.choice))
            if update.is_last:
                self._fillings.pop(update.choice)
                self.worker.under_way -= 1
            yield update

    def close(self) -> None:
        """Cancel what has not ended, which frees its slots at once."""
        left, self._fillings, self._is_closed = list(self._fillings.values()), {}, True
        self.worker.under_way -= len(left)

        def cancel() -> None:
            for filling in (filling for fillings in left for filling in fillings):
                filling.cancel()

        if left:
            self.worker.call(cancel)

    def _tell(self, choice: int, filling: Filling) -> None:
        """Send what a step has added, from the thread of the worker."""
        answer = filling.answers[-1]
        is_end = answer.finish_reason == "stop" and len(answer.log_probs) > len(answer.ids)
        self.worker.metrics.tokens.inc()
        self._put(
            Update(
                choice,
                len(filling.answers) - 1,
                None if is_end or answer.error is not None else answer.ids[-1],
                answer.log_probs[-1] if answer.log_probs else 0.0,
                answer.top[-1] if answer.top else [],
                answer.finish_reason,
                answer.error,
                filling.is_finished,
            )
        )

    def _put(self, update: Update) -> None:
        with suppress(RuntimeError):  # of a loop that was closed
            self._loop.call_soon_threadsafe(self._updates.put_nowait, update)

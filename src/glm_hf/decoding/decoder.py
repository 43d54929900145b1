"""Who is decoded when: requests wait, are read into free slots, decode together and leave."""

import math
import random
from collections import deque
from collections.abc import Iterable, Sequence

from glm_hf.decoding.engine import Engine
from glm_hf.decoding.requests import Answer, Request
from glm_hf.decoding.sampling import Choice
from glm_hf.filling_glm import NOT_FINITE

TOKENS_AT_ONCE = 512
"""Most tokens of contexts, with their padding, that are read together; a longer one is read alone."""
LIKE_LENGTH = 1.25
"""Contexts are read together up to this ratio of their lengths."""


class Decoder:
    """
    Decode requests in slots: contexts are read as slots become free, and each step decodes one token of all.

    Answers are those that `fill_blanks` gives one by one, whatever else is decoded beside. It is made for one thread.

    Args:
        engine: The slots of a model, or of all ranks of one.

    Attributes:
        waiting: Requests without a slot, first come first served.
        active: Answers of the slots in use, by their numbers.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: deque[Answer] = deque()
        self.active: list[Answer] = []
        self._random: dict[Answer, random.Random] = {}

    @property
    def num_slots(self) -> int:
        """Requests that are decoded at once."""
        return self.engine.cache.num_slots

    def submit(self, request: Request, is_first: bool = False) -> Answer:
        """
        Take a request into the queue.

        Args:
            request: What is to be decoded.
            is_first: Whether it goes before all that wait.

        Returns:
            Its answer, which grows by `advance`.

        Raises:
            ValueError: If it has no `sop` and no layout, or does not fit.
        """
        self.require_fitting(request)
        answer = Answer(request)
        self._random[answer] = random.Random(request.sampling.seed)
        (self.waiting.appendleft if is_first else self.waiting.append)(answer)
        return answer

    def require_fitting(self, request: Request) -> None:
        """Raise ValueError if a request cannot be decoded."""
        config, room = self.engine.config, self.room_for(request.input_ids)
        if request.layout is not None and self.engine.num_virtual:
            raise ValueError("a layout of its own cannot stand behind the learned tokens of an adapter")
        if request.layout is None and config.sop_token_id not in request.input_ids:
            raise ValueError("the ids of a request must hold a context and the start-of-blank token (sop)")
        if any(not 0 <= token_id < config.vocab_size for token_id in request.input_ids):
            raise ValueError(f"every token id must be from 0 to {config.vocab_size - 1}")
        if any(not 0 <= token_id < config.vocab_size for token_id in request.sampling.logit_bias):
            raise ValueError(f"every token id of logit_bias must be from 0 to {config.vocab_size - 1}")
        if request.max_new_tokens < 1 or room < 1:
            raise ValueError(
                f"the text of {len(request.input_ids)} tokens must leave room for at least 1 new token, got "
                f"max_new_tokens={request.max_new_tokens} and {room} left of {self.engine.max_length}"
            )

    def room_for(self, row: Sequence[int]) -> int:
        """Return how many tokens may follow a row."""
        return self.engine.max_length - self.engine.num_virtual - len(row)

    def cancel(self, answer: Answer) -> None:
        """End a request and free its slot."""
        if answer.is_finished:
            return
        answer.finish_reason = "cancelled"
        if answer in self.waiting:
            self.waiting.remove(answer)
            self._random.pop(answer)
        else:
            self._leave(answer)

    def fail(self, error: str) -> None:
        """End all requests by an error, and free all slots."""
        answers = [*self.active, *self.waiting]
        for slot in range(len(self.active)):
            self.engine.release(slot)
        self.active.clear()
        self.waiting.clear()
        self._random.clear()
        for answer in answers:
            answer.error = error
            if answer.request.on_token is not None:
                answer.request.on_token(answer)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.active

    def advance(self) -> None:
        """Read contexts into free slots once, if any wait, then decode one token of every slot."""
        if self.waiting and len(self.active) < self.num_slots:
            self._admit()
        if self.active:
            choice = self.engine.step(len(self.active), [self._uniform(answer) for answer in self.active])
            self._take(self.active, choice)

    def run(self, requests: Iterable[Request]) -> list[Answer]:
        """Decode requests and return their answers in the same order."""
        answers = [self.submit(request) for request in requests]
        while not all(answer.is_finished for answer in answers):
            self.advance()
        return answers

    def _uniform(self, answer: Answer) -> float:
        """Return the next random number of a request, above 0 and up to 1."""
        return 1.0 - self._random[answer].random()

    def _admit(self) -> None:
        """Read the first context that waits into a free slot, and with it others of like length."""
        first = len(self.waiting[0].request.input_ids)
        chosen: list[Answer] = []
        longest = first
        for answer in self.waiting:
            length = len(answer.request.input_ids)
            if len(self.active) + len(chosen) == self.num_slots:
                break
            is_like = max(first, length) <= LIKE_LENGTH * min(first, length)
            fits = is_like and max(longest, length) * (len(chosen) + 1) <= TOKENS_AT_ONCE
            if fits or not chosen:
                chosen.append(answer)
                longest = max(longest, length)
        for answer in chosen:
            self.waiting.remove(answer)
        slots = range(len(self.active), len(self.active) + len(chosen))
        self.active += chosen
        choice = self.engine.prefill(
            [answer.request.input_ids for answer in chosen],
            list(slots),
            [answer.request.sampling for answer in chosen],
            [answer.request.num_logprobs for answer in chosen],
            [self._uniform(answer) for answer in chosen],
            [answer.request.layout for answer in chosen],
        )
        self._take(chosen, choice)

    def _take(self, answers: Sequence[Answer], choice: Choice) -> None:
        """Add a token to each of some answers, and let go those that end."""
        ids, log_probs = choice.ids.tolist(), choice.log_probs.tolist()
        top_ids, top_log_probs = choice.top_ids.tolist(), choice.top_log_probs.tolist()
        answers = list(answers)
        for index, answer in enumerate(answers):
            number = answer.request.num_logprobs
            top = list(zip(top_ids[index][:number], top_log_probs[index][:number], strict=True))
            self._add(answer, ids[index], log_probs[index], top)
        for answer in answers:
            if answer.is_finished:
                self._leave(answer)
        for answer in answers:
            if answer.request.on_token is not None:
                answer.request.on_token(answer)

    def _add(self, answer: Answer, token_id: int, log_prob: float, top: list[tuple[int, float]]) -> None:
        """Add one token to an answer, and note whether it ends."""
        if not math.isfinite(log_prob):
            answer.error = NOT_FINITE
            return
        request, config = answer.request, self.engine.config
        answer.log_probs.append(log_prob)
        if request.num_logprobs:
            answer.top.append(top)
        if token_id in (config.eop_token_id, config.eos_token_id):
            answer.finish_reason = "stop"
            return
        answer.ids.append(token_id)
        if request.is_stopped is not None and request.is_stopped(answer.ids):
            answer.finish_reason = "stop"
        elif len(answer.ids) >= min(request.max_new_tokens, self.room_for(request.input_ids)):
            answer.finish_reason = "length"

    def _leave(self, answer: Answer) -> None:
        """Free the slot of an answer; the last one in use moves there."""
        slot, last = self.active.index(answer), len(self.active) - 1
        if slot != last:
            self.engine.move(last, slot)
            self.active[slot] = self.active[last]
        self.engine.release(last)
        self.active.pop()
        self._random.pop(answer)

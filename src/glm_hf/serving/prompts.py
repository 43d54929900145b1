"""From what a client asks to ids, and from ids to text that streams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from glm_hf.infilling_glm import mask_token_ids, prepare_context
from glm_hf.pipelines.text_generation import continuation


@dataclass(frozen=True)
class Prompt:
    """A context, and how its blanks and the text around them read."""

    context: list[int]
    begun: list[int]
    """Tokens that the first blank begins with."""
    parts: list[str]
    """Texts around the blanks, one more than there are blanks."""
    num_blanks: int
    decode: Callable[[list[int]], str]
    """Function from the tokens of a blank to its text."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt, those included that complete it."""
        return len(self.context) + 1 + len(self.begun)


def text_prompt(text: str, suffix: str | None, tokenizer: Any, config: Any) -> Prompt:
    """
    Return the prompt of a text with blanks, or of one to be continued, or of two texts with a blank between them.

    Raises:
        ValueError: If the text cannot be filled, or has blanks besides the one in front of its suffix.
    """
    masks = (tokenizer.mask_token, tokenizer.smask_token, tokenizer.gmask_token)
    if suffix:
        if any(mask in text + suffix for mask in masks):
            raise ValueError("a prompt with a suffix has its blank between them; leave masks out, or the suffix")
        text = f"{text}{tokenizer.mask_token}{suffix}"
    context = prepare_context(tokenizer(text)["input_ids"], config)
    mask = next((mask for mask in masks if mask in text), None)
    if mask is None:
        ids = context[: context.index(config.gmask_token_id)]
        return Prompt(context, [], [text, ""], 1, lambda answer: continuation(tokenizer, ids, answer))
    parts = text.split(mask)
    return Prompt(context, [], parts, len(parts) - 1, tokenizer.decode)


def ids_prompt(ids: Sequence[int], tokenizer: Any, config: Any) -> Prompt:
    """
    Return the prompt of token ids: a text, or a context with `sop` and what its blank begins with.

    Raises:
        ValueError: If an id is none of the model's, or the ids cannot be filled.
    """
    if any(not 0 <= token_id < config.vocab_size for token_id in ids):
        raise ValueError(f"every token id must be from 0 to {config.vocab_size - 1}")
    if config.sop_token_id in ids:
        place = list(ids).index(config.sop_token_id)
        context, begun = list(ids[:place]), list(ids[place + 1 :])
        if not context or {config.sop_token_id, config.eop_token_id}.intersection(begun):
            raise ValueError("ids with sop must be a context, one sop, and what its blank begins with")
        text = tokenizer.decode(context)
        return Prompt(context, begun, [text, ""], 1, lambda answer: continuation(tokenizer, begun, answer))
    context = prepare_context(ids, config)
    found = [place for place, token_id in enumerate(ids) if token_id in mask_token_ids(config)]
    if not found:
        plain = list(ids)
        return Prompt(
            context, [], [tokenizer.decode(plain), ""], 1, lambda answer: continuation(tokenizer, plain, answer)
        )
    bounds = zip([-1, *found], [*found, len(ids)], strict=True)
    parts = [tokenizer.decode(list(ids[start + 1 : end])) for start, end in bounds]
    return Prompt(context, [], parts, len(found), tokenizer.decode)


def chat_prompt(messages: Sequence[dict[str, str]], tokenizer: Any, config: Any) -> Prompt:
    """
    Return the prompt of a chat, whose answer fills the first blank of the question.

    Raises:
        ValueError: If the turns are no chat.
    """
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)
    except TemplateError as error:
        raise ValueError(str(error)) from error
    ids = list(ids["input_ids"] if not isinstance(ids, list) else ids)
    return Prompt(ids[:-1], [], ["", ""], 1, tokenizer.decode)


class BlankText:
    """
    The text of a blank as its tokens come.

    Characters of which some bytes are missing, and what may be the beginning of a text that ends the answer, wait.

    Args:
        decode: Function from tokens to text.
        stops: Texts that end the answer, which are no part of it.

    Attributes:
        ids: Tokens so far.
        pieces: What each token has added to the text.
        text: What is certain so far.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self.decode, self.stops = decode, stops
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.text = self._decoded = ""

    def add(self, token_id: int | None, is_last: bool) -> str:
        """Add a token, or none at the end, and return the text that is new."""
        if token_id is not None:
            self.ids.append(token_id)
            before, self._decoded = self._decoded, self.decode(self.ids)
            self.pieces.append(self._decoded[len(before) :])
        text = self._decoded
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            text = text[: min(places)]
        elif not is_last:
            text = text.rstrip("\ufffd")
            held = [size for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
            text = text[: len(text) - max(held, default=0)]
        new = text[len(self.text) :]
        self.text += new
        return new

    def certain(self, start: int) -> list[tuple[int, int]]:
        """Return the numbers of the tokens from `start` on whose text is certain, and where each begins in it."""
        offsets = list(accumulate(map(len, self.pieces), initial=0))
        found = zip(range(start, len(self.pieces)), offsets[start:], strict=False)
        return [(step, offset) for step, offset in found if offset < len(self.text) or not self.pieces[step]]

    def instead(self, step: int, token_id: int) -> str:
        """Return the text that another token would have added at a step."""
        before = self.ids[:step]
        return self.decode([*before, token_id])[len("".join(self.pieces[:step])) :]


def ends_in(decode: Callable[[list[int]], str], stops: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Return a function that tells whether the text of tokens holds one that ends it, None if there is none."""
    if not stops:
        return None

    def is_stopped(ids: Sequence[int]) -> bool:
        text = decode(list(ids))
        return any(stop in text for stop in stops)

    return is_stopped

"""The filling of texts by the decoder: blank after blank, each spliced in before the next is decoded."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from glm_hf.decoding.decoder import Decoder
from glm_hf.decoding.requests import Answer, Request, Sampling
from glm_hf.filling_glm import Blank
from glm_hf.infilling_glm import next_blank, splice_blank

GOES_ON = ("stop", "length")
"""How a blank ends that others may follow."""
GREEDY = Sampling()


class Filling:
    """
    A text whose blanks are decoded one after another.

    The next blank goes before all requests that wait, into the slot that the last one has left: with an answer in its
    place the context is another, which all of its tokens see, so it is read again.

    Args:
        decoder: Where the blanks are decoded.
        context: Ids as `prepare_context` returns them.
        request: Settings of every blank; its ids are not used. Blank number `i` is drawn by `seed + i`.
        on_token: Function that is called after every token, and at the end, of the text.
        begun: Tokens that the first blank begins with.
        most_blanks: Number of blanks to fill, all by default.

    Attributes:
        context: Ids with the blanks filled so far.
        answers: Answers of the blanks, the last one still growing.

    Raises:
        ValueError: If the context does not fit; there is always room for a blank behind others.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: Sequence[int],
        request: Request,
        on_token: Callable[["Filling"], None] | None = None,
        begun: Sequence[int] = (),
        most_blanks: int | None = None,
    ) -> None:
        self.decoder, self.context, self.request, self.on_token = decoder, list(context), request, on_token
        self.begun, self.most_blanks = list(begun), most_blanks
        self.answers: list[Answer] = []
        self._submit()

    @property
    def is_finished(self) -> bool:
        """Whether every blank has its answer, or one has none."""
        last = self.answers[-1]
        return last.is_finished and not (last.finish_reason in GOES_ON and self._left())

    @property
    def error(self) -> str | None:
        """Why there is no answer."""
        return self.answers[-1].error

    def cancel(self) -> None:
        """End the text where it is."""
        self.decoder.cancel(self.answers[-1])

    def _left(self) -> bool:
        """Tell whether there is another blank to fill."""
        is_last = self.most_blanks is not None and len(self.answers) >= self.most_blanks
        return not is_last and self._has_blank()

    def _has_blank(self) -> bool:
        """Tell whether the context has a mask."""
        return next_blank(self.context, self.decoder.engine.config) is not None

    def _submit(self) -> None:
        """Submit the next blank."""
        number, config = len(self.answers), self.decoder.engine.config
        sampling = self.request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + number)
        row = [*self.context, config.sop_token_id, *(self.begun if number == 0 else ())]
        request = replace(self.request, input_ids=row, sampling=sampling, on_token=self._take)
        self.answers.append(self.decoder.submit(request, is_first=number > 0))

    def _take(self, answer: Answer) -> None:
        """Go on to the next blank when one is done."""
        if answer.finish_reason in GOES_ON and self._has_blank():
            blank = [*self.begun, *answer.ids] if len(self.answers) == 1 else answer.ids
            self.context = splice_blank(self.context, blank, self.decoder.engine.config)
        if self.on_token is not None:
            self.on_token(self)
        if answer.finish_reason in GOES_ON and self._left():
            self._submit()


def fill_texts(
    decoder: Decoder, contexts: Iterable[Sequence[int]], max_new_tokens: int = 128, sampling: Sampling = GREEDY
) -> list[list[Blank]]:
    """
    Fill every blank of every text, as many texts at once as there are slots.

    Args:
        decoder: Where the blanks are decoded.
        contexts: Ids as `prepare_context` returns them.
        max_new_tokens: Most tokens of a blank.
        sampling: How tokens are chosen.

    Returns:
        The blanks of every text.

    Raises:
        ValueError: If a text does not fit, or scores are not finite.
    """
    settings = Request((), max_new_tokens, sampling)
    texts = [Filling(decoder, context, settings) for context in contexts]
    while not all(text.is_finished for text in texts):
        decoder.advance()
    for text in texts:
        if text.error is not None:
            raise ValueError(text.error)
    return [[Blank(answer.ids, answer.score) for answer in text.answers] for text in texts]

"""Blanks that stay inside their documents, where several stand in one text and each ends in `</s>`.

Few spans of a batch hold such an end, so these are moved one by one, in lists.

Shapes: `S` texts, `N` spans, `M` spans to be moved.
"""

from bisect import bisect_left

import numpy as np

from glm_hf.training.data.blanks import Spans
from glm_hf.training.data.random_numbers import MOVE, uniform

TRIES = 8  # of places, most of which are free, before all free ones are listed


def keep_inside_documents(spans: Spans, lengths: np.ndarray, is_end: np.ndarray, keys: np.ndarray) -> Spans:
    """
    Move the spans that hold the end of a document to places that do not; all other spans stay where they are.

    All places in the text that touch neither another span nor an end are equally likely. A span keeps its length where
    it fits anywhere, and takes the longest place otherwise. Only a text of nothing but ends keeps an end as its blank.

    Args:
        spans: Spans in texts of several documents.
        lengths: `(S,)` of the texts.
        is_end: `(sum of lengths,)` bool, whether a token is the `</s>` of a document.
        keys: `(S,)` of all draws.
    """
    ends = is_end.nonzero()[0]
    holder = spans.start.searchsorted(ends, side="right") - 1  # the last span that begins before each end
    is_held = (holder >= 0) & (ends < spans.start[holder] + spans.length[holder])
    crossing = without_repeats(holder[is_held])  # (M,)
    if not len(crossing):
        return spans
    text = spans.sample[crossing]
    number = crossing - spans.sample.searchsorted(text)  # of each in its text
    draws = uniform(keys[text][:, None], MOVE, number[:, None] * (TRIES + 1) + np.arange(TRIES + 1))  # (M, TRIES + 1)
    texts = without_repeats(text)
    past = lengths.cumsum()[texts]
    first = past - lengths[texts]
    spans_of, ends_of = spans.sample.searchsorted((texts, texts + 1)), ends.searchsorted((first, past))
    moves_of = text.searchsorted((texts, texts + 1))
    bounds = (first, past, *spans_of, *ends_of, *moves_of)
    starts, span_lengths = spans.start.copy(), spans.length.copy()
    for start, end, a, b, c, d, e, f in zip(*(bound.tolist() for bound in bounds), strict=True):
        if d - c < end - start:
            taken = Taken(starts[a:b].tolist(), span_lengths[a:b].tolist(), ends[c:d].tolist(), start, end)
            taken.move(number[e:f].tolist(), draws[e:f].tolist())
            starts[a:b], span_lengths[a:b] = taken.starts, taken.lengths
    if span_lengths.all():
        return Spans(spans.sample, starts, span_lengths)
    has_place = span_lengths > 0
    return Spans(spans.sample[has_place], starts[has_place], span_lengths[has_place])


def without_repeats(values: np.ndarray) -> np.ndarray:
    """Return ascending values without those that repeat the one before."""
    is_new = np.ones(len(values), dtype=bool)
    is_new[1:] = values[1:] != values[:-1]
    return values[is_new]


class Taken:
    """
    The places of a text that are taken.

    Args:
        starts: Starts of the spans of the text, ascending.
        lengths: Lengths of the spans of the text.
        ends: Ends of the documents in the text, ascending.
        first: Index of the first token of the text.
        past: The token behind its last.
    """

    def __init__(self, starts: list[int], lengths: list[int], ends: list[int], first: int, past: int) -> None:
        self.starts, self.lengths, self.ends, self.first, self.past = starts, lengths, ends, first, past

    def move(self, numbers: list[int], draws: list[list[float]]) -> None:
        """Give spans other places, the longest first; one without a place gets the length 0 behind all others."""
        lengths = [self.lengths[number] for number in numbers]
        for number in reversed(numbers):
            del self.starts[number], self.lengths[number]
        for length, place_draws in sorted(zip(lengths, draws, strict=True), key=lambda pair: -pair[0]):
            start, length = self.place(length, place_draws)
            index = bisect_left(self.starts, start)
            self.starts.insert(index, start)
            self.lengths.insert(index, length)

    def place(self, length: int, draws: list[float]) -> tuple[int, int]:
        """Return start and length of a free place, drawn by trial, or among all if none of the trials is free."""
        if length <= self.past - self.first:
            for draw in draws[1:]:
                start = self.first + int(draw * (self.past - self.first - length + 1))
                if self.is_free(start, length):
                    return start, length
        runs = self.free_runs()
        length = min(length, max((end - start for start, end in runs), default=0))
        if not length:
            return self.past, 0
        places = [place for start, end in runs for place in range(start, end - length + 1)]
        return places[int(draws[0] * len(places))], length

    def is_free(self, start: int, length: int) -> bool:
        """Tell whether a span would hold no end and touch no other span."""
        index = bisect_left(self.starts, start)
        if index and self.starts[index - 1] + self.lengths[index - 1] >= start:
            return False
        if index < len(self.starts) and self.starts[index] <= start + length:
            return False
        return bisect_left(self.ends, start) == bisect_left(self.ends, start + length)

    def free_runs(self) -> list[tuple[int, int]]:
        """Return the runs of tokens that are no ends, in no span and beside none, as pairs of start and end."""
        spans = ((start - 1, start + length + 1) for start, length in zip(self.starts, self.lengths, strict=True))
        runs, free = [], self.first
        for start, end in sorted([*spans, *((end, end + 1) for end in self.ends)]):
            if start > free:
                runs.append((free, start))
            free = max(free, end)
        return [*runs, (free, self.past)] if free < self.past else runs

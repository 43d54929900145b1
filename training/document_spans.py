"""Blanks that stay inside their documents, where several stand in one text and each ends in `</s>`.

Shapes: `S` texts, `N` spans.
"""

import numpy as np

from glm_hf.training.blanks import Spans, exclusive_sum
from glm_hf.training.draws import MOVE, uniform


def keep_inside_documents(spans: Spans, lengths: np.ndarray, is_end: np.ndarray, keys: np.ndarray) -> Spans:
    """
    Move the spans that hold the end of a document to places that do not; all other spans stay where they are.

    All places in the text that touch neither another span nor an end are equally likely. A span keeps its length where
    it fits anywhere, and takes the longest place otherwise. Only a text of nothing but ends keeps an end as its blank.

    Args:
        spans: In texts of several documents.
        lengths: `(S,)` of the texts.
        is_end: `(sum of lengths,)` bool, whether a token is the `</s>` of a document.
        keys: `(S,)` of all draws.
    """
    ends_before = np.append(0, is_end.cumsum())
    crosses = ends_before[spans.start + spans.length] > ends_before[spans.start]
    if not crosses.any():
        return spans
    starts, span_lengths = spans.start.copy(), spans.length.copy()
    text_start = exclusive_sum(lengths)
    bounds = np.searchsorted(spans.sample, np.arange(len(lengths) + 1))
    for text in np.unique(spans.sample[crosses]):
        tokens = slice(text_start[text], text_start[text] + lengths[text])
        own = slice(bounds[text], bounds[text + 1])
        if is_end[tokens].all():
            continue
        moved = _moved(
            starts[own] - text_start[text], span_lengths[own], crosses[own], is_end[tokens], keys[text : text + 1]
        )
        starts[own], span_lengths[own] = moved[0] + text_start[text], moved[1]
    kept = np.flatnonzero(span_lengths)
    kept = kept[np.argsort(starts[kept])]
    return Spans(spans.sample[kept], starts[kept], span_lengths[kept])


def _moved(
    starts: np.ndarray, lengths: np.ndarray, crosses: np.ndarray, is_end: np.ndarray, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and lengths of a text's spans after those that cross were moved; one left out has length 0."""
    starts, lengths = starts.copy(), lengths.copy()
    is_free = ~is_end
    for start, length in zip(starts[~crosses], lengths[~crosses], strict=True):
        is_free[max(start - 1, 0) : start + length + 1] = False  # its neighbours, too, so that no two spans touch
    crossing = np.flatnonzero(crosses)
    draws = uniform(key, MOVE, np.arange(len(crossing)))
    for draw, span in zip(draws, crossing[np.argsort(-lengths[crossing], kind="stable")], strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], is_free, [False]))))
        first, room = edges[::2], edges[1::2] - edges[::2]
        length = min(lengths[span], room.max(initial=0))
        lengths[span] = length
        if length:
            places = np.maximum(room - length + 1, 0).cumsum()
            chosen = int(draw * places[-1])
            run = int(np.searchsorted(places, chosen, side="right"))
            start = first[run] + chosen - (places[run - 1] if run else 0)
            starts[span] = start
            is_free[max(start - 1, 0) : start + length + 1] = False
    return starts, lengths

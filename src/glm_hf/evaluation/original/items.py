"""What files of all types share: ids of their items, padding as the original's, and what is told of a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from glm_hf.evaluation.evaluator import Evaluator

PADDED_TO = 32
"""Lengths are padded to multiples of it in the original."""
MOST_SPELLED = 4
"""Number of first items whose masks are spelled out, where they have no more than `LONGEST_SPELLED` tokens."""
LONGEST_SPELLED = 64
T = TypeVar("T")
P = ParamSpec("P")


@dataclass
class FileResult:
    """What is known of a file."""

    metrics: dict[str, Any]
    length: int
    """Weight of the file in its group: number of items, or of windows."""
    items: list[dict[str, Any]]
    more: dict[str, Any] = field(default_factory=dict)
    """What else is told, by name."""


def read_ids(item: dict[str, Any], key: str, evaluator: Evaluator, where: str, is_list: bool = False) -> Any:
    """
    Return the ids of a field, or lists of ids of its texts; ids in `key` go before texts in `key_pretokenized`.

    Raises:
        ValueError: If there is neither, or one is not of its kind; `where` tells of which item.
    """
    if key in item:
        value, vocab_size = item[key], evaluator.config.vocab_size
        rows = value if is_list else [value]
        is_lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        if not is_lists or not all(type(token) is int and 0 <= token < vocab_size for row in rows for token in row):
            raise ValueError(f"{where}: {key} must be {'lists of ' if is_list else ''}ids of the vocabulary")
        return value
    texts = item.get(f"{key}_pretokenized")
    if is_list:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: {key}_pretokenized must be a list of texts, or {key} lists of ids")
        return [evaluator.tokenize(text) for text in texts]
    if not isinstance(texts, str):
        raise ValueError(f"{where}: {key}_pretokenized must be a text, or {key} ids")
    return evaluator.tokenize(texts)


def lay_out(path: Path, number: int, function: Callable[..., T], *arguments: Any) -> T:
    """Return what a layout function returns; its ValueError tells of which item."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ValueError(f"{path}, item {number}: {error}") from error


def padded_lengths(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Return the length of every row in the original's batches: those of consecutive items, a multiple of 32."""
    found: list[int] = []
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        found += [-(-max(batch) // PADDED_TO) * PADDED_TO] * len(batch)
    return found


def visible_rows(number: int, num_context: int, length: int, blocks: Sequence[Sequence[int]]) -> list[str] | None:
    """Return for the first items what every token sees, 1 for a token that is seen."""
    if number >= MOST_SPELLED or length > LONGEST_SPELLED:
        return None
    seen = []
    for query in range(length):
        first = next((start for start, end in blocks if start <= query < end), length)
        seen.append("".join("01"[key < num_context or first <= key <= query] for key in range(length)))
    return seen

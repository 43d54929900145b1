"""Micro-batches: a step's samples in pieces, and their form in a pipeline, whose micro-batches have one shape.

Shapes: `B` rows, `L` length.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from glm_hf.training.data.blanks import IGNORED

Batch = dict[str, torch.Tensor]
INPUTS = ("input_ids", "position_ids", "segment_ids")
LABELS = ("shift_labels", "segment_ids", "objectives", "corpora", "sample_ids")
NO_SAMPLE = -1  # sample id of a row that is padding


def split_rows(batch: Batch, count: int) -> list[Batch]:
    """Split a batch into `count` micro-batches, whose numbers of rows differ by one at most."""
    parts = zip(*(values.tensor_split(count) for values in batch.values()), strict=True)
    return [dict(zip(batch, values, strict=True)) for values in parts]


def predicted_by(batch: Batch) -> torch.Tensor:
    """Return the labels `(B, L)` of a batch, each at the token that predicts it."""
    return batch["shift_labels"] if "shift_labels" in batch else F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]


def require_names(batch: Batch) -> None:
    """Raise ValueError unless a batch is one of `DataCollatorForBlankInfilling`, with the origin of its rows."""
    if missing := [name for name in dict.fromkeys((*INPUTS, *LABELS)) if name not in batch]:
        raise ValueError(
            f"a pipeline takes batches as DataCollatorForBlankInfilling makes them with with_origin; these have no "
            f"{', '.join(missing)}"
        )


def pad_batch(batch: Batch, num_rows: int, length: int, pad_token_id: int) -> Batch:
    """
    Fill a batch up with padding that is neither seen nor predicted.

    Args:
        batch: Tensors `(B, L)` and `(B,)`.
        num_rows: Rows of the result.
        length: Length of the result.
        pad_token_id: Id that fills `input_ids` up.
    """
    fill = {"input_ids": pad_token_id, "shift_labels": IGNORED, "sample_ids": NO_SAMPLE}
    padded = {}
    for name, values in batch.items():
        rows = num_rows - len(values)
        columns = (0, length - values.shape[1]) if values.ndim > 1 else ()
        padded[name] = F.pad(values, (*columns, 0, rows), value=fill.get(name, 0))
    return padded


def empty_batch(pad_token_id: int) -> Batch:
    """Return a batch of one row without a token."""
    nothing = torch.empty(0, dtype=torch.int64)
    tensors = {name: nothing[:, None] if name in (*INPUTS, "shift_labels") else nothing for name in (*INPUTS, *LABELS)}
    return pad_batch(tensors, 1, 1, pad_token_id)


def micro_batches(
    pieces: Sequence[tuple[Batch, float]], pad_token_id: int, multiple: int = 1
) -> Iterator[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
    """
    Yield what a pipeline takes for every piece: the layout `(3, B, L)`, and labels with the factor of their loss.

    Args:
        pieces: Batches, each with its factor.
        pad_token_id: Id that fills `input_ids` up.
        multiple: Divisor of the length.
    """
    num_rows, length = common_shape([piece for piece, _ in pieces], multiple)
    for piece, factor in pieces:
        batch = pad_batch(piece, num_rows, length, pad_token_id)
        labels: list[Any] = [batch[name] for name in LABELS]
        labels.insert(1, torch.as_tensor(factor))
        yield (torch.stack([batch[name] for name in INPUTS]),), tuple(labels)


def common_shape(pieces: Sequence[Batch], multiple: int = 1) -> tuple[int, int]:
    """Return the number of rows and the length, a multiple of `multiple`, that hold the largest of some batches."""
    shapes = [piece["input_ids"].shape for piece in pieces]
    longest = max(length for _, length in shapes)
    return max(rows for rows, _ in shapes), longest + -longest % multiple

"""Arguments of `generate` that belong to the rows of a batch, for a part of its rows.

Texts with several blanks leave a batch when theirs are filled, and the context window may cut answers to different
lengths. What a caller says of row 3 must still reach the text that was row 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

PER_ROW = ("negative_prompt_ids", "negative_prompt_attention_mask")


def arguments_of_rows(arguments: Mapping[str, Any], rows: Sequence[int], num_rows: int) -> dict[str, Any]:
    """
    Return the arguments of `generate` for some rows of a batch.

    Args:
        arguments: Those for all rows.
        rows: Numbers of the rows that are generated, ascending.
        num_rows: Rows of the whole batch.
    """
    chosen = dict(arguments)
    if len(rows) == num_rows:
        return chosen
    for name in PER_ROW:
        if chosen.get(name) is not None:
            chosen[name] = chosen[name][list(rows)]
    if (allowed := chosen.get("prefix_allowed_tokens_fn")) is not None:
        chosen["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    if processors := chosen.get("logits_processor"):
        wrapped = [ProcessorOfAllRows(function, rows, num_rows) for function in processors]
        chosen["logits_processor"] = LogitsProcessorList(wrapped)
    if criteria := chosen.get("stopping_criteria"):
        wrapped = [CriterionOfAllRows(function, rows, num_rows) for function in as_list(criteria)]
        chosen["stopping_criteria"] = StoppingCriteriaList(wrapped)
    return chosen


def as_list(criteria: Any) -> list[Any]:
    """Return stopping criteria as a list, which a single one is not."""
    return [criteria] if isinstance(criteria, StoppingCriteria) else list(criteria)


class RowsOfBatch:
    """
    Some rows of a batch, put in their places in the whole of it.

    Args:
        function: Logits processor or stopping criterion of a caller, who counts the rows of the whole batch.
        rows: Numbers of the rows that are there.
        num_rows: Rows of the whole batch.
    """

    def __init__(self, function: Callable, rows: Sequence[int], num_rows: int) -> None:
        self.function, self.rows, self.num_rows = function, rows, num_rows

    def places(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each row of the whole batch one of `ids` `(B * n, L)`, the first for those missing, and back."""
        copies = len(ids) // len(self.rows)  # beams or samples of each row
        place = {row: number for number, row in enumerate(self.rows)}
        spread = [place.get(row, 0) * copies + copy for row in range(self.num_rows) for copy in range(copies)]
        back = [row * copies + copy for row in self.rows for copy in range(copies)]
        return torch.tensor(spread, device=ids.device), torch.tensor(back, device=ids.device)


class ProcessorOfAllRows(RowsOfBatch, LogitsProcessor):
    """A logits processor that is called with all rows of the batch."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores `(B * n, V)` that the processor makes of the rows that are there."""
        spread, back = self.places(input_ids)
        return self.function(input_ids[spread], scores[spread])[back]


class CriterionOfAllRows(RowsOfBatch, StoppingCriteria):
    """A stopping criterion that is called with all rows of the batch."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Tell which of the rows that are there `(B * n,)` are done."""
        spread, back = self.places(input_ids)
        scores = tuple(step[spread] for step in scores) if isinstance(scores, tuple) else scores
        done = self.function(input_ids[spread], scores, **kwargs)
        return done[back] if isinstance(done, torch.Tensor) and done.ndim else done

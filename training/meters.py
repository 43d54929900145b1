"""Losses by objective, and the loss of every row of the step at hand."""

import torch

from glm_hf.training.blanks import IGNORED
from glm_hf.training.micro_batches import NO_SAMPLE
from glm_hf.training.recipe import OBJECTIVES


class LossMeter:
    """
    Sum up losses between two logs, without waiting for the device.

    Args:
        device: Where losses are.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(OBJECTIVES), dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.sums)
        self.num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the rows of the step before."""
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(
        self,
        losses: torch.Tensor,
        labels: torch.Tensor,
        segment_ids: torch.Tensor,
        objectives: torch.Tensor,
        sample_ids: torch.Tensor,
    ) -> None:
        """
        Add a piece of a step.

        Args:
            losses: `(targets,)` of the tokens that are predicted, row after row.
            labels: `(B, L)`.
            segment_ids: `(B, L)`, 0 on padding.
            objectives: `(B,)` indices into `OBJECTIVES`.
            sample_ids: `(B,)`.
        """
        row_counts = (labels != IGNORED).sum(1)
        numbers = torch.arange(len(labels), device=labels.device)
        row = numbers.repeat_interleave(row_counts, output_size=len(losses))  # known, so that nothing has to wait
        row_sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device).index_add(
            0, row, losses.detach().double()
        )
        self.sums.index_add_(0, objectives, row_sums)
        self.counts.index_add_(0, objectives, row_counts.double())
        self.num_tokens += (segment_ids > 0).sum()
        self.rows.append((sample_ids, row_sums / row_counts))

    def losses_of_rows(self) -> list[tuple[int, float]]:
        """Return the sample and the mean loss of every row of the step at hand, without rows of padding."""
        pairs = [pair for ids, losses in self.rows for pair in zip(ids.tolist(), losses.tolist(), strict=True)]
        return [(sample, loss) for sample, loss in pairs if sample != NO_SAMPLE]

    def take(self) -> torch.Tensor:
        """Return sums and counts by objective and the number of tokens, as one vector, and begin anew."""
        taken = torch.cat((self.sums, self.counts, self.num_tokens.double()[None]))
        for total in (self.sums, self.counts, self.num_tokens):
            total.zero_()
        return taken

    @staticmethod
    def describe(taken: torch.Tensor) -> dict[str, float]:
        """Return the mean losses of the objectives that occurred, from what `take` has returned or a sum of it."""
        kinds = len(OBJECTIVES)
        sums, counts = taken[:kinds].tolist(), taken[kinds : 2 * kinds].tolist()
        return {
            f"loss_{name}": total / count for name, total, count in zip(OBJECTIVES, sums, counts, strict=True) if count
        }

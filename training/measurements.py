"""What a run reports: losses by objective and of every row of a step, operations and the peak of a device.

Shapes: `B` rows, `L` length, `K` kinds of rows: `OBJECTIVES`, and one for rows whose objective is not known.
"""

import torch

from glm_hf.configuration_glm import GLMConfig
from glm_hf.training.data.blanks import IGNORED
from glm_hf.training.data.recipe import OBJECTIVES
from glm_hf.training.pipeline.micro_batches import NO_SAMPLE

NOT_KNOWN = len(OBJECTIVES)


class LossMeter:
    """
    Sum up losses between two logs, or over an evaluation, without waiting for the device.

    Args:
        device: Device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(OBJECTIVES) + 1, dtype=torch.float64, device=device)  # (K,)
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
        rows = row_losses(losses, labels, objectives)
        self.add_rows(rows)
        self.num_tokens += (segment_ids > 0).sum()
        self.rows.append((sample_ids, rows[:, 0] / rows[:, 1]))

    def add_rows(self, rows: torch.Tensor) -> None:
        """Add rows `(B, 3)` as `row_losses` returns them."""
        kinds = rows[:, 2].long()
        self.sums.index_add_(0, kinds, rows[:, 0])
        self.counts.index_add_(0, kinds, rows[:, 1])

    def losses_of_rows(self) -> list[tuple[int, float]]:
        """Return the sample and the mean loss of every row of the step at hand, without rows of padding."""
        pairs = [pair for ids, losses in self.rows for pair in zip(ids.tolist(), losses.tolist(), strict=True)]
        return [(sample, loss) for sample, loss in pairs if sample != NO_SAMPLE]

    def take(self) -> torch.Tensor:
        """Return sums and counts by kind and the number of tokens, as one vector, and begin anew."""
        taken = torch.cat((self.sums, self.counts, self.num_tokens.double()[None]))
        for total in (self.sums, self.counts, self.num_tokens):
            total.zero_()
        return taken

    @staticmethod
    def describe(taken: torch.Tensor) -> dict[str, float]:
        """Return the mean losses of the objectives that occurred, from what `take` has returned or a sum of it."""
        sums, counts = taken[:-1].reshape(2, -1).tolist()
        found = zip(OBJECTIVES, sums, counts, strict=False)  # rows that are not known come last
        return {f"loss_{name}": total / count for name, total, count in found if count}

    @staticmethod
    def describe_evaluation(taken: torch.Tensor, prefix: str) -> dict[str, float]:
        """Return the mean loss over all predicted tokens, and those of `describe`; nothing if nothing was added."""
        total, count = taken[:-1].reshape(2, -1).sum(1).tolist()
        if not count:
            return {}
        kinds = {f"{prefix}_{name}": loss for name, loss in LossMeter.describe(taken).items()}
        return {f"{prefix}_loss": total / count} | kinds


def row_losses(losses: torch.Tensor, labels: torch.Tensor, objectives: torch.Tensor | None) -> torch.Tensor:
    """
    Return `(B, 3)` of every row the sum of its losses, the number of its predicted tokens, and its kind.

    Args:
        losses: `(targets,)` of the tokens that are predicted, row after row.
        labels: `(B, L)`.
        objectives: `(B,)` indices into `OBJECTIVES`, if they are known.
    """
    counts = (labels != IGNORED).sum(1)
    numbers = torch.arange(len(labels), device=labels.device)
    row = numbers.repeat_interleave(counts, output_size=len(losses))  # known, so that nothing has to wait
    sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    sums.index_add_(0, row, losses.detach().double())
    kinds = torch.full_like(counts, NOT_KNOWN) if objectives is None else objectives
    return torch.stack((sums, counts.double(), kinds.double()), dim=1)


# Dense matrix products in 16 bits with sums in 32, 10^12 operations per second, from the vendor's data sheets.
PEAK_TFLOPS = {"V100": 125, "A100": 312, "H100": 989, "H200": 989, "RTX 3090": 71, "RTX 4090": 165, "2080 Ti": 54}


def flops_per_token(config: GLMConfig, num_parameters: int, row_length: int) -> float:
    """
    Return the operations of forward and backward pass per token: 6 per parameter, and those of full attention.

    Args:
        config: Sizes of the model.
        num_parameters: Number of parameters of the model, a tied matrix counted once.
        row_length: Number of tokens that attend to each other.
    """
    return 6 * num_parameters + 12 * config.num_hidden_layers * config.hidden_size * row_length


def peak_tflops(device: torch.device) -> float | None:
    """Return the known peak of a device in 16 bits, None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAK_TFLOPS.items() if part in name), None)

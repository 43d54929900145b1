"""The ranks that hold a layer together, and their sums and slices, each with what its gradient needs.

With sequence parallelism, norms, dropout and residuals have a slice of `L/n` of every row's tokens on each rank. What
one all-reduce does without it, a reduce-scatter and an all-gather do.

Shapes: `B` batch, `L` length, `D` hidden, `n` ranks.

Source: Megatron-LM (arXiv 1909.08053), its f and g; Korthikanti et al. (arXiv 2205.05198), section 4.2.2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F

# The former are the latter's names since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TensorGroup:
    """
    The ranks that hold a layer together.

    Args:
        size: Number of ranks `n`.
        rank: This process's place among them.
        group: Their process group, None for a single rank.
        sequence_parallel: Whether hidden states between linears are slices of the tokens.
    """

    def __init__(
        self,
        size: int = 1,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        self.size, self.rank, self.group = size, rank, group
        self.sequence_parallel = sequence_parallel and size > 1

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """Combine a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op, group=self.group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return what all ranks have, of one shape, on the first of them; nothing on the others."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        dist.gather(tensor.contiguous(), parts or None, group=self.group, group_dst=0)
        return parts

    def start_gather(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to gather slices `(B, L/n, D)`, and return what waits for `(B, L, D)`."""
        parts = part.new_empty(self.size, *part.shape)  # (n, B, L/n, D)
        work = _all_gather(parts.flatten(0, 1), part.contiguous(), group=self.group, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return parts.transpose(0, 1).flatten(1, 2)  # (B, L, D), a view of the same memory for B = 1

        return finish

    def start_reduce_scatter(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to add `(B, L, D)` up, and return what waits for this rank's slice `(B, L/n, D)` of the sum."""
        parts = tensor.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()  # (n, B, L/n, D)
        part = torch.empty_like(parts[0])
        work = _reduce_scatter(part, parts.flatten(0, 1), group=self.group, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return part

        return finish


class _SumGradients(torch.autograd.Function):
    """Pass a tensor that all ranks have on to their parts, and add up what comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
        """Return the tensor."""
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the sum of the gradients, in place: what comes out of a product belongs to nobody else."""
        return ctx.ranks.all_reduce(gradients[0].contiguous()), None


class _Sum(torch.autograd.Function):
    """Add up what the ranks have, whose gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
        """Return the sum, in place."""
        ctx.mark_dirty(tensor)
        return ranks.all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient."""
        return gradients[0], None


class _SliceOfSum(torch.autograd.Function):
    """Add up what the ranks have and keep a slice of the tokens, whose gradients all ranks need."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
        """Return `(B, L/n, D)` of the sum of `(B, L, D)`."""
        ctx.ranks = ranks
        return ranks.start_reduce_scatter(tensor)()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradients of all tokens."""
        return ctx.ranks.start_gather(gradients[0])(), None


class _Gather(torch.autograd.Function):
    """Gather the tokens, whose gradient comes back whole on every rank."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
        """Return `(B, L, D)` of slices `(B, L/n, D)`."""
        ctx.ranks = ranks
        return ranks.start_gather(part)()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return this rank's slice."""
        return gradients[0].chunk(ctx.ranks.size, 1)[ctx.ranks.rank].contiguous(), None


class _GatheredLinear(torch.autograd.Function):
    """Map the tokens of all ranks by some of a linear's outputs, and keep this rank's slice of them only."""

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ranks: TensorGroup
    ) -> torch.Tensor:
        """Return `(B, L, out/n)` of slices `(B, L/n, in)`."""
        ctx.save_for_backward(part, weight)
        ctx.ranks = ranks
        return F.linear(ranks.start_gather(part)(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gather the tokens again while their gradients are computed, and add these up while the weight's is."""
        part, weight = ctx.saved_tensors
        [gradient], (needs_part, needs_weight, needs_bias, _) = gradients, ctx.needs_input_grad
        rows = gradient.flatten(0, 1)  # (B * L, out/n)
        gathered = ctx.ranks.start_gather(part) if needs_weight else None
        summed = ctx.ranks.start_reduce_scatter(gradient @ weight) if needs_part else None
        of_weight = None if gathered is None else rows.mT @ gathered().flatten(0, 1)
        of_bias = rows.sum(0) if needs_bias else None
        return None if summed is None else summed(), of_weight, of_bias, None


def sum_gradients(tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Return `tensor`, which is the same on all ranks, so that its gradient becomes the sum of theirs."""
    return tensor if ranks.size == 1 else _SumGradients.apply(tensor, ranks)


def sum_over_ranks(tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Return the sum of what the ranks have, the same on all of them; a tensor without another use is changed."""
    return tensor if ranks.size == 1 else _Sum.apply(tensor, ranks)


def sum_hidden_states(hidden_states: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Return the sum of `(B, L, D)` over the ranks, or this rank's slice of it, `(B, L/n, D)`."""
    if ranks.sequence_parallel:
        return _SliceOfSum.apply(hidden_states, ranks)
    return sum_over_ranks(hidden_states, ranks)


def gather_sequence(hidden_states: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Return `(B, L, D)` hidden states, whose gradient must be the same on all ranks, of slices if they are."""
    return _Gather.apply(hidden_states, ranks) if ranks.sequence_parallel else hidden_states


def gathered_linear(part: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Map slices `(B, L/n, in)` of the ranks to this rank's outputs of all tokens, `(B, L, out/n)`."""
    return _GatheredLinear.apply(part, weight, bias, ranks)

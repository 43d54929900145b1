"""The layers of the model, sharded over tensor-parallel ranks by the table that conversion uses for checkpoints.

A layer needs two sums over its ranks in each direction: a row-parallel linear adds up its outputs in the forward pass,
a column-parallel one the gradients of its input in the backward pass. What both passes hold whole (norms, biases of
row-parallel linears, residuals) is computed alike on every rank, to the last bit.

Shapes: `B` batch, `L` length, `D` hidden, `V` vocabulary, `n` ranks. Parameters have the names of `modeling_glm`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from glm_hf.configuration_glm import GLMConfig
from glm_hf.modeling_glm import GLMLayer
from glm_hf.sharding.rules import REPLICATED, shard_rule


class TensorGroup:
    """
    The ranks that hold a layer together.

    Args:
        size: Number of ranks `n`.
        rank: This process's place among them.
        group: Their process group, None for a single rank.
    """

    def __init__(self, size: int = 1, rank: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self.size, self.rank, self.group = size, rank, group

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


def sum_gradients(tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Return `tensor`, which is the same on all ranks, so that its gradient becomes the sum of theirs."""
    return tensor if ranks.size == 1 else _SumGradients.apply(tensor, ranks)


def sum_over_ranks(tensor: torch.Tensor, ranks: TensorGroup) -> torch.Tensor:
    """Return the sum of what the ranks have, the same on all of them; a tensor without another use is changed."""
    return tensor if ranks.size == 1 else _Sum.apply(tensor, ranks)


class ColumnParallelLinear(nn.Linear):
    """A linear of which every rank has some outputs: weight `(out/n, in)`."""

    ranks: TensorGroup

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `(..., in)`, the same on all ranks, to this rank's `(..., out/n)`."""
        return F.linear(sum_gradients(inputs, self.ranks), self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """A linear of which every rank has some inputs: weight `(out, in/n)`; the bias is whole and added once."""

    ranks: TensorGroup

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map this rank's `(..., in/n)` to `(..., out)`, the same on all ranks."""
        return sum_over_ranks(F.linear(inputs, self.weight), self.ranks) + self.bias


class VocabParallelEmbedding(nn.Module):
    """
    An embedding, and an LM head, of which every rank has `V/n` rows: weight `(V/n, D)`.

    Args:
        config: Sizes.
        ranks: Ranks that hold the layer together.
    """

    def __init__(self, config: GLMConfig, ranks: TensorGroup) -> None:
        super().__init__()
        self.ranks = ranks
        self.first = ranks.rank * config.vocab_size // ranks.size
        shape = shard_rule("model.embed_tokens.weight").shard_shape(
            (config.vocab_size, config.hidden_size), ranks.size
        )
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up `(B, L)` ids and return `(B, L, D)`, the same on all ranks."""
        if self.ranks.size == 1:
            return F.embedding(input_ids, self.weight)
        rows, is_here = self._rows(input_ids)
        return sum_over_ranks(F.embedding(rows, self.weight) * is_here[..., None], self.ranks)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits of this rank's tokens, `(..., V/n)`, for `(..., D)` hidden states."""
        return F.linear(sum_gradients(hidden_states, self.ranks), self.weight)

    def cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """
        Return the losses `(N,)` of the whole vocabulary in fp32, the same on all ranks.

        Args:
            logits: `(N, V/n)` of this rank.
            labels: `(N,)` ids.
            label_smoothing: Share of the target that is spread evenly over the vocabulary.
        """
        logits = logits.float()
        if self.ranks.size == 1:
            return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        highest = self.ranks.all_reduce(logits.detach().amax(-1), dist.ReduceOp.MAX)
        logits = logits - highest[:, None]
        rows, is_here = self._rows(labels)
        of_label = sum_over_ranks(logits.gather(1, rows[:, None])[:, 0] * is_here, self.ranks)
        if label_smoothing:
            mean = sum_over_ranks(logits.sum(-1), self.ranks) / (len(self.weight) * self.ranks.size)
            of_label = (1 - label_smoothing) * of_label + label_smoothing * mean
        return sum_over_ranks(logits.exp().sum(-1), self.ranks).log() - of_label

    def _rows(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of ids in this rank's part, any row for the others, and which are here."""
        rows = ids - self.first
        is_here = (rows >= 0) & (rows < len(self.weight))
        return rows.clamp(0, len(self.weight) - 1), is_here


def shard_layer(layer: GLMLayer, ranks: TensorGroup) -> GLMLayer:
    """
    Replace the linears of a layer on meta by those of one rank, and return the layer.

    Args:
        layer: Layer of the model, whole and on meta.
        ranks: Ranks that hold the layer together.
    """
    if ranks.size > 1:
        for name, linear in [
            (name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)
        ]:
            rule = shard_rule(f"{name}.weight")
            kind = ColumnParallelLinear if rule.dim == 0 else RowParallelLinear
            rows, columns = rule.shard_shape(linear.weight.shape, ranks.size)
            part = kind(columns, rows, device="meta", dtype=linear.weight.dtype)
            part.ranks = ranks
            layer.set_submodule(name, part)
        if layer.attention.config.attention_dropout:
            use_per_rank_dropout(layer.attention, ranks.rank)
    return layer


def mark_sharded(module: nn.Module, prefix: str, ranks: TensorGroup) -> None:
    """
    Mark the parameters of which every rank has its own part, so that norms of gradients count all of them.

    Args:
        module: Cut over the ranks.
        prefix: Prefix of its parameters' names in the model.
        ranks: Ranks that hold the layer together.
    """
    for name, parameter in module.named_parameters():
        is_cut = ranks.size > 1 and shard_rule(prefix + name) != REPLICATED
        parameter.tensor_model_parallel = is_cut  # type: ignore[attr-defined]


def use_per_rank_dropout(attention: nn.Module, rank: int) -> None:
    """
    Let the heads of every rank draw dropout of their own, while all else draws alike on all ranks.

    The seed of a pass comes from the generator that the ranks share, so that a pass repeated for activation
    checkpointing, which restores that generator, draws the same again.

    Args:
        attention: An attention block.
        rank: Place of the process among those of the layer.
    """
    forward = attention.forward

    def forward_apart(*args: Any, **kwargs: Any) -> Any:
        if not attention.training:
            return forward(*args, **kwargs)
        with per_rank_random_state(rank):
            return forward(*args, **kwargs)

    attention.forward = forward_apart


@contextmanager
def per_rank_random_state(rank: int) -> Iterator[None]:
    """Draw from generators that are seeded by the shared one on the CPU and by `rank`, and restore all at the end."""
    seed = int(torch.randint(2**62, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank)
        yield

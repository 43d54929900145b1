"""The layers of the model, sharded over tensor-parallel ranks by the table that conversion uses for checkpoints.

A layer needs two sums over its ranks in each direction: a row-parallel linear adds up its outputs in the forward pass,
a column-parallel one the gradients of its input in the backward pass. What both passes hold whole (norms, biases of
row-parallel linears, residuals) is computed alike on every rank, to the last bit; with sequence parallelism, for a
slice of the tokens on every rank, so that the gradients of these parameters have to be added up in the end.

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
from glm_hf.training.pipeline.collectives import (
    TensorGroup,
    gathered_linear,
    sum_gradients,
    sum_hidden_states,
    sum_over_ranks,
)


class ColumnParallelLinear(nn.Linear):
    """A linear of which every rank has some outputs: weight `(out/n, in)`."""

    ranks: TensorGroup

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map `(B, L, in)`, the same on all ranks or a slice of the tokens on each, to this rank's `(B, L, out/n)`."""
        if self.ranks.sequence_parallel:
            return gathered_linear(inputs, self.weight, self.bias, self.ranks)
        return F.linear(sum_gradients(inputs, self.ranks), self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """A linear of which every rank has some inputs: weight `(out, in/n)`; the bias is whole and added once."""

    ranks: TensorGroup

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map this rank's `(B, L, in/n)` to `(B, L, out)`, the same on all ranks, or to its slice of the tokens."""
        return sum_hidden_states(F.linear(inputs, self.weight), self.ranks) + self.bias


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
        """Look up `(B, L)` ids and return `(B, L, D)`, the same on all ranks, or its slice of the tokens."""
        if self.ranks.size == 1:
            return F.embedding(input_ids, self.weight)
        rows, is_here = self._rows(input_ids)
        return sum_hidden_states(F.embedding(rows, self.weight) * is_here[..., None], self.ranks)

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
        if ranks.sequence_parallel and (layer.hidden_dropout or layer.attention.config.attention_dropout):
            use_per_rank_dropout(layer, ranks.rank)  # residuals, too, are of other tokens on every rank
        elif layer.attention.config.attention_dropout:
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


def use_per_rank_dropout(module: nn.Module, rank: int) -> None:
    """
    Let a module draw dropout of its own on every rank, while all else draws alike on all ranks.

    The seed of a pass comes from the generator that the ranks share, so that a pass repeated for activation
    checkpointing, which restores that generator, draws the same again.

    Args:
        module: Attention block, whose heads are other ones on every rank, or layer, whose tokens are.
        rank: Place of the process among those of the layer.
    """
    forward = module.forward

    def forward_apart(*args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return forward(*args, **kwargs)
        with per_rank_random_state(rank):
            return forward(*args, **kwargs)

    module.forward = forward_apart


@contextmanager
def per_rank_random_state(rank: int) -> Iterator[None]:
    """Draw from generators that are seeded by the shared one on the CPU and by `rank`, and restore all at the end."""
    seed = int(torch.randint(2**62, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank)
        yield

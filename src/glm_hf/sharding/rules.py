"""How every parameter is cut over tensor-parallel ranks: one table, used to join ranks and to cut for them.

Shapes: `n` ranks, `D` hidden, `F` inner width of the MLP, `V` vocabulary. What one rank holds:
    COLUMN       (V/n, D), (3D/n, D), (3D/n)   the rank's rows; of query_key_value its whole heads
    ROW          (D, D/n), (D, F/n)            the rank's columns
    GATED        (2F/n, D), (2F/n)             the rank's F/n linear rows, then its F/n gate rows
    REPLICATED   (D)                           everything; a bias of a ROW weight is added once, after the sum
A quantized weight has a scale `(rows, groups)`, which is cut as the weight is: a ROW weight that was quantized rank by
rank has one group of columns per rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardRule:
    """
    The cut of one tensor over ranks.

    Attributes:
        dim: Dimension that is cut, None if every rank holds the whole tensor.
        blocks: Number of equal blocks stacked along `dim`; every rank holds its share of each.
    """

    dim: int | None
    blocks: int = 1

    def shard_shape(self, shape: Sequence[int], tp_size: int) -> tuple[int, ...]:
        """Return the shape of one rank's part of a tensor of `shape`; ValueError if it cannot be cut evenly."""
        shape = list(shape)
        if self.dim is not None:
            if shape[self.dim] % (self.blocks * tp_size):
                raise ValueError(
                    f"tp_size must cut dimension {self.dim} of a tensor of shape {tuple(shape)} into "
                    f"{self.blocks} x tp_size equal parts, got {tp_size}"
                )
            shape[self.dim] //= tp_size
        return tuple(shape)

    def full_shape(self, shard_shape: Sequence[int], tp_size: int) -> tuple[int, ...]:
        """Return the shape of the tensor of which one rank holds a part of `shard_shape`."""
        shape = list(shard_shape)
        if self.dim is not None:
            shape[self.dim] *= tp_size
        return tuple(shape)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the parts of all ranks, in rank order. Of replicated parts, which must be equal, the first is taken."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        unfolded = [part.unflatten(self.dim, (self.blocks, -1)) for part in parts]
        return torch.cat(unfolded, self.dim + 1).flatten(self.dim, self.dim + 1)

    def split(self, tensor: Tensor, tp_size: int) -> list[Tensor]:
        """Return the contiguous parts of all ranks, in rank order; ValueError if `tensor` cannot be cut evenly."""
        self.shard_shape(tensor.shape, tp_size)
        if self.dim is None:
            return [tensor] * tp_size
        parts = tensor.unflatten(self.dim, (self.blocks, -1)).chunk(tp_size, self.dim + 1)
        return [part.flatten(self.dim, self.dim + 1).contiguous() for part in parts]

    def row_runs(self, num_rows: int, tp_size: int) -> list[tuple[int, int]]:
        """Return (rank, number of rows) for every run of one rank's rows in a tensor of `num_rows` cut by rows."""
        assert self.dim == 0
        return [(rank, num_rows // (self.blocks * tp_size)) for _ in range(self.blocks) for rank in range(tp_size)]


COLUMN = ShardRule(dim=0)
ROW = ShardRule(dim=1)
GATED = ShardRule(dim=0, blocks=2)
REPLICATED = ShardRule(dim=None)

SHARD_RULES = {
    "model.embed_tokens.weight": COLUMN,
    "input_layernorm.weight": REPLICATED,
    "input_layernorm.bias": REPLICATED,
    "attention.query_key_value.weight": COLUMN,
    "attention.query_key_value.bias": COLUMN,
    "attention.dense.weight": ROW,
    "attention.dense.bias": REPLICATED,
    "post_attention_layernorm.weight": REPLICATED,
    "post_attention_layernorm.bias": REPLICATED,
    "mlp.dense_h_to_4h.weight": GATED,
    "mlp.dense_h_to_4h.bias": GATED,
    "mlp.dense_4h_to_h.weight": ROW,
    "mlp.dense_4h_to_h.bias": REPLICATED,
    "model.norm.weight": REPLICATED,
    "model.norm.bias": REPLICATED,
    "lm_head.weight": COLUMN,
}


def shard_rule(name: str) -> ShardRule:
    """Return the rule of the model's parameter `name`, or of its scale; KeyError if the table does not have it."""
    return SHARD_RULES[re.sub(r"^model\.layers\.\d+\.", "", name).removesuffix("_scale")]

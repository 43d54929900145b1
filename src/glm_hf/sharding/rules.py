"""How every parameter is sharded over tensor-parallel ranks: one table, used to join shards and to make them.

The table follows from the tensor-parallel plan of `GLMConfig`, which transformers reads; conversion, quantization,
plans and 3D training all ask it.

Shapes: `n` ranks, `D` hidden, `F` inner width of the MLP, `V` vocabulary. What one rank holds:
    COLUMN       (V/n, D), (3D/n, D), (3D/n)   the rank's rows; of query_key_value its whole heads
    ROW          (D, D/n), (D, F/n)            the rank's columns
    GATED        (2F/n, D), (2F/n)             the rank's F/n linear rows, then its F/n gate rows
    REPLICATED   (D)                           everything; a bias of a ROW weight is added once, after the sum
A quantized weight has a scale `(rows, groups)`, which is sharded as the weight is: a ROW weight that was quantized
rank by rank has one group of columns per rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm_hf.configuration_glm import GLMConfig


@dataclass(frozen=True)
class ShardRule:
    """
    How one tensor is sharded over ranks.

    Attributes:
        dim: Dimension that is sharded, None if every rank holds the whole tensor.
        blocks: Number of equal blocks stacked along `dim`, each of which is sharded by itself.
    """

    dim: int | None
    blocks: int = 1

    def shard_shape(self, shape: Sequence[int], tp_size: int) -> tuple[int, ...]:
        """Return the shape of a shard of a tensor of `shape`; ValueError if shards would not be equal."""
        shape = list(shape)
        if self.dim is not None:
            if shape[self.dim] % (self.blocks * tp_size):
                raise ValueError(
                    f"tp_size must split dimension {self.dim} of a tensor of shape {tuple(shape)} into "
                    f"{self.blocks} x tp_size equal parts, got {tp_size}"
                )
            shape[self.dim] //= tp_size
        return tuple(shape)

    def full_shape(self, shard_shape: Sequence[int], tp_size: int) -> tuple[int, ...]:
        """Return the shape of the tensor of which one rank holds a shard of `shard_shape`."""
        shape = list(shard_shape)
        if self.dim is not None:
            shape[self.dim] *= tp_size
        return tuple(shape)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Join the shards of all ranks, in rank order; of replicas, which must be equal, the first is taken."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        unfolded = [part.unflatten(self.dim, (self.blocks, -1)) for part in parts]
        return torch.cat(unfolded, self.dim + 1).flatten(self.dim, self.dim + 1)

    def split(self, tensor: Tensor, tp_size: int) -> list[Tensor]:
        """Return the contiguous shards of all ranks, in rank order; ValueError if they would not be equal."""
        self.shard_shape(tensor.shape, tp_size)
        if self.dim is None:
            return [tensor] * tp_size
        parts = tensor.unflatten(self.dim, (self.blocks, -1)).chunk(tp_size, self.dim + 1)
        return [part.flatten(self.dim, self.dim + 1).contiguous() for part in parts]

    def row_runs(self, num_rows: int, tp_size: int) -> list[tuple[int, int]]:
        """Return (rank, number of rows) for every run of one rank's rows in a tensor of `num_rows` sharded by rows."""
        assert self.dim == 0
        return [(rank, num_rows // (self.blocks * tp_size)) for _ in range(self.blocks) for rank in range(tp_size)]


COLUMN = ShardRule(dim=0)
ROW = ShardRule(dim=1)
GATED = ShardRule(dim=0, blocks=2)
REPLICATED = ShardRule(dim=None)

STYLES = {"colwise": COLUMN, "glu_colwise": GATED, "rowwise": ROW}
"""Rules of the styles in the model's tensor-parallel plan."""

PLAN = {name.removeprefix("layers.*."): style for name, style in (GLMConfig.base_model_tp_plan or {}).items()}
ROW_PARALLEL = tuple(name for name, style in PLAN.items() if style == "rowwise")
"""Names in a layer of the linears whose columns are sharded."""


def _shard_rules() -> dict[str, ShardRule]:
    """Return the rule of every parameter: those of linears follow from the model's plan, with biases as weights."""
    rules = {"model.embed_tokens.weight": COLUMN, "lm_head.weight": COLUMN}
    for norm in ("input_layernorm", "post_attention_layernorm", "model.norm"):
        rules |= {f"{norm}.weight": REPLICATED, f"{norm}.bias": REPLICATED}
    for linear, style in PLAN.items():
        rules[f"{linear}.weight"] = STYLES[style]
        rules[f"{linear}.bias"] = REPLICATED if linear in ROW_PARALLEL else STYLES[style]
    return rules


SHARD_RULES = _shard_rules()


def shard_rule(name: str) -> ShardRule:
    """
    Return the rule of the model's parameter `name`, or of its scale; KeyError if the table does not have it.

    Of LoRA's `lora_A` and `lora_B`, the one is sharded that has the dimension in which the linear's weight is.
    """
    linear, lora, rest = re.sub(r"^model\.layers\.\d+\.", "", name).partition(".lora_")
    if not lora:
        return SHARD_RULES[linear.removesuffix("_scale")]
    rule = SHARD_RULES[f"{linear}.weight"]
    return rule if rule.dim == {"A.weight": 1, "B.weight": 0}[rest] else REPLICATED

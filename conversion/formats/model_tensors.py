"""What tensors a model's folder holds: names, shapes and dtypes, plain or quantized."""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module

from glm_hf.configuration_glm import GLMConfig
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.quantization.functional import EMBEDDING_BITS
from glm_hf.sharding.rules import ROW, shard_rule

LINEARS = (
    "attention.query_key_value.weight",
    "attention.dense.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
QUANT_METHOD = "glm130b"


class Quantization(Protocol):
    """How weights are stored, as `GLMQuantizationConfig` tells, which transformers finds by its name."""

    bits: int
    group_size: int | None
    modules_to_not_convert: list[str] | None
    row_parallel_groups: int
    quantize_embeddings: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json."""


def quantization_config(**fields: Any) -> Quantization:
    """Return the settings with these `fields`, as in `GLMQuantizationConfig`; ValueError if one is not valid."""
    try:
        return cast(Quantization, AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD](**fields))
    except TypeError as error:
        raise ValueError(f"quantization_config has a field that is not known here: {error}") from error


def model_tensors(
    config: GLMConfig, dtype: torch.dtype, quantization: Quantization | None = None
) -> dict[str, Tensor]:
    """
    Return all tensors of `GLMForBlankInfilling(config)` that are stored, on meta by name and in order.

    Args:
        config: The model's configuration.
        dtype: Dtype of everything that is not quantized.
        quantization: How weights are quantized, None if they are not.

    Raises:
        ValueError: If a weight cannot be quantized in that way.
    """
    with torch.device("meta"):
        model = GLMForBlankInfilling(config)
        tensors = {}
        for name, parameter in model.state_dict().items():
            if name in model.all_tied_weights_keys:
                continue
            if quantization is None or (bits := _bits(name, quantization)) is None:
                tensors[name] = torch.empty(parameter.shape, dtype=dtype)
                continue
            rows, columns = parameter.shape
            groups = 1 if name.endswith(EMBEDDINGS) else _num_groups(name, columns, quantization)
            if columns % groups or columns // groups * bits % 8:
                what, other = (f" in {groups} groups", " or another group_size") if groups > 1 else ("", "")
                raise ValueError(
                    f"{name} has {columns} columns, which {bits} bits cannot pack{what}; use 8 bits{other}"
                )
            tensors[name] = torch.empty(rows, columns * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
            tensors[f"{name}_scale"] = torch.empty(rows, groups, dtype=torch.float16)
    return tensors


def _bits(name: str, quantization: Quantization) -> int | None:
    """Return the bits of the codes of a parameter, None if it is not quantized."""
    if name.endswith(EMBEDDINGS):
        return EMBEDDING_BITS if quantization.quantize_embeddings else None
    kept = quantization.modules_to_not_convert or []
    is_quantized = name.endswith(LINEARS) and should_convert_module(name.removesuffix(".weight"), kept)
    return quantization.bits if is_quantized else None


def _num_groups(name: str, num_columns: int, quantization: Quantization) -> int:
    """Return the scales per row of a linear's weight; ValueError if `group_size` does not divide the row."""
    if quantization.group_size is None:
        return quantization.row_parallel_groups if shard_rule(name) == ROW else 1
    if num_columns % quantization.group_size:
        raise ValueError(
            f"group_size must divide the {num_columns} input features of {name}, got {quantization.group_size}"
        )
    return num_columns // quantization.group_size

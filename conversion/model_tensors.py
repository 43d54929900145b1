"""What tensors a model's folder holds: names, shapes and dtypes, plain or quantized."""

import torch
from torch import Tensor

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.shard_rules import ROW, shard_rule
from glm_hf.modeling_glm import GLMForBlankInfilling

QUANTIZED = (
    "attention.query_key_value.weight",
    "attention.dense.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)
QUANT_METHOD = "glm130b"


def model_tensors(
    config: GLMConfig, dtype: torch.dtype, *, bits: int | None = None, row_parallel_groups: int = 1
) -> dict[str, Tensor]:
    """
    Return all tensors of `GLMForBlankInfilling(config)` that are stored, on meta by name and in order.

    Args:
        config: The model's configuration.
        dtype: Dtype of everything that is not quantized.
        bits: 4 or 8 if the linears of the layers are quantized.
        row_parallel_groups: Scales per row of the row-parallel weights, one for every rank that quantized them.
    """
    with torch.device("meta"):
        model = GLMForBlankInfilling(config)
        tensors = {}
        for name, parameter in model.state_dict().items():
            if name in model.all_tied_weights_keys:
                continue
            if bits is None or not name.endswith(QUANTIZED):
                tensors[name] = torch.empty(parameter.shape, dtype=dtype)
                continue
            rows, columns = parameter.shape
            if columns * bits % 8:
                raise ValueError(f"{name} has {columns} columns, which {bits} bits cannot pack; use 8 bits")
            groups = row_parallel_groups if shard_rule(name) == ROW else 1
            tensors[name] = torch.empty(rows, columns * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
            tensors[f"{name}_scale"] = torch.empty(rows, groups, dtype=torch.float16)
    return tensors


def quantization_config(bits: int, row_parallel_groups: int) -> dict[str, object]:
    """Return the entry of config.json that tells how the linears of the layers are stored; None means per row."""
    return {
        "quant_method": QUANT_METHOD,
        "bits": bits,
        "group_size": None,
        "modules_to_not_convert": None,
        "row_parallel_groups": row_parallel_groups,
    }

"""What tensors a model's folder holds: names, shapes and dtypes, plain or quantized."""

import torch
from torch import Tensor

from glm_hf.configuration_glm import GLMConfig
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.quantization.functional import EMBEDDING_BITS

LINEARS = (
    "attention.query_key_value.weight",
    "attention.dense.weight",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def model_tensors(
    config: GLMConfig, dtype: torch.dtype, quantization: GLMQuantizationConfig | None = None
) -> dict[str, Tensor]:
    """
    Return all tensors of `GLMForBlankInfilling(config)` that are stored, on meta by name and in order.

    Args:
        config: The model's configuration.
        dtype: Dtype of everything that is not quantized.
        quantization: Quantization of the weights, None for none.

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
            groups = 1 if name.endswith(EMBEDDINGS) else quantization.num_groups(name.removesuffix(".weight"), columns)
            if columns % groups or columns // groups * bits % 8:
                what, other = (f" in {groups} groups", " or another group_size") if groups > 1 else ("", "")
                raise ValueError(
                    f"{name} has {columns} columns, which {bits} bits cannot pack{what}; use 8 bits{other}"
                )
            tensors[name] = torch.empty(rows, columns * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
            tensors[f"{name}_scale"] = torch.empty(rows, groups, dtype=torch.float16)
    return tensors


def _bits(name: str, quantization: GLMQuantizationConfig) -> int | None:
    """Return the bits of the codes of a parameter, None if it is not quantized."""
    if name.endswith(EMBEDDINGS):
        return EMBEDDING_BITS if quantization.quantize_embeddings else None
    is_quantized = name.endswith(LINEARS) and quantization.quantizes(name.removesuffix(".weight"))
    return quantization.bits if is_quantized else None

"""INT4 and INT8 weights: quantize, dequantize and the linear layer that runs on them."""

from glm_hf.quantization.configuration import GLMQuantizationConfig
from glm_hf.quantization.functional import (
    dequantize_weight,
    pack_int4,
    quantize_weight,
    unpack_int4,
)
from glm_hf.quantization.linear import QuantizedLinear
from glm_hf.quantization.ops import quantized_linear

__all__ = [
    "GLMQuantizationConfig",
    "QuantizedLinear",
    "dequantize_weight",
    "pack_int4",
    "quantize_weight",
    "quantized_linear",
    "unpack_int4",
]

"""INT4 and INT8 weights: quantize, dequantize and the linear layer that runs on them.

The names below are imported when they are asked for, since plans need the configuration only.
"""

from typing import TYPE_CHECKING

from glm_hf import lazy_names

if TYPE_CHECKING:
    from glm_hf.quantization.configuration import GLMQuantizationConfig
    from glm_hf.quantization.functional import dequantize_weight, pack_int4, quantize_weight, unpack_int4
    from glm_hf.quantization.linear import QuantizedLinear
    from glm_hf.quantization.ops import quantized_linear

MODULES = {
    "GLMQuantizationConfig": "glm_hf.quantization.configuration",
    "QuantizedLinear": "glm_hf.quantization.linear",
    "dequantize_weight": "glm_hf.quantization.functional",
    "pack_int4": "glm_hf.quantization.functional",
    "quantize_weight": "glm_hf.quantization.functional",
    "quantized_linear": "glm_hf.quantization.ops",
    "unpack_int4": "glm_hf.quantization.functional",
}
"""Where the public names are defined."""

__getattr__, __dir__ = lazy_names(globals(), MODULES)

__all__ = [
    "GLMQuantizationConfig",
    "QuantizedLinear",
    "dequantize_weight",
    "pack_int4",
    "quantize_weight",
    "quantized_linear",
    "unpack_int4",
]

"""INT4 and INT8 weights: quantize, dequantize and the linear layer that runs on them."""

from glm_hf.quantization.functional import dequantize_weight, pack_int4, quantize_weight, unpack_int4

__all__ = ["dequantize_weight", "pack_int4", "quantize_weight", "unpack_int4"]

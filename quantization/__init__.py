"""INT4 and INT8 weights: quantize, dequantize and the linear layer that runs on them."""

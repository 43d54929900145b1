"""A linear layer whose weight is stored as INT4 or INT8 codes with scales, as functional.py lays them out."""

from typing import Any

import torch
from torch import Tensor, nn

from glm_hf.quantization.functional import dequantize_rows, quantized_linear


class QuantizedLinear(nn.Linear):
    """
    Linear layer on a quantized weight; gradients flow to the input and the bias, not to the weight.

    It is an `nn.Linear`, so that PEFT puts adapters on it.

    Args:
        in_features: Input features `K`; even for 4 bits.
        out_features: Output features `N`.
        bits: 4 or 8.
        num_groups: Scales per row, which must divide `K`.
        bias: Whether there is a bias `(N)`.
        dtype: Dtype of the bias.
        device: Device of all parameters.

    Attributes:
        weight: `(N, K)` int8 or `(N, K/2)` uint8.
        weight_scale: `(N, G)` fp16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        num_groups: int = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if in_features % num_groups or (bits == 4 and (in_features // num_groups) % 2):
            raise ValueError(
                f"{num_groups} groups must divide the {in_features} input features{' evenly' * (bits == 4)}"
            )
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        codes = torch.empty(
            out_features, in_features * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8, device=device
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(out_features, num_groups, dtype=torch.float16, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` for `x` `(..., K)`, in its dtype."""
        return _QuantizedLinearFunction.apply(x, self.weight, self.weight_scale, self.bits, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{super().extra_repr()}, bits={self.bits}, num_groups={self.weight_scale.shape[1]}"


class _QuantizedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, weight_scale)
        ctx.bits, ctx.has_bias = bits, bias is not None
        return quantized_linear(x, weight, weight_scale, bits, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            total = 0.0
            for start, rows in dequantize_rows(weight, weight_scale, ctx.bits):
                total = total + grad[..., start : start + len(rows)].float() @ rows  # (..., K)
            grad_x = torch.as_tensor(total).to(grad.dtype)
        if ctx.has_bias and ctx.needs_input_grad[4]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, None, None, None, grad_bias

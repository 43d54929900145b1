"""The linear layer on quantized weights as one torch operator, whatever the device, with its gradient.

Being an operator, `torch.compile` keeps it whole. Shapes and stored layout: functional.py.
"""

import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from glm_hf.quantization.functional import (
    dequantize_rows,
    fp16_scale,
    quantized_linear_reference,
    require_layout,
)
from glm_hf.quantization.kernels_cpu import decoded_rows, quantized_linear_cpu
from glm_hf.quantization.stored_parameter import plain

logger = logging.getLogger(__name__)


def quantized_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """
    Return `x @ (code * weight_scale).T + bias`; gradients flow to `x` and `bias`.

    Sums are fp32, rounded once to the dtype of `x`. On CPUs, fp16 and bf16 activations enter as 16-bit integers with a
    scale per token and 2048 input features, and for many tokens in bf16, weights are rounded to bf16, too.

    Args:
        x: `(..., K)`, floating point.
        weight: Codes in the stored layout.
        weight_scale: `(N, G)`, floating point; of values that fp16 holds.
        bits: Bits of a code, 8 or 4.
        bias: `(N)`, floating point.

    Returns:
        `(..., N)` in the dtype of `x`.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together, or fp16 would round a scale.
    """
    require_layout(x, weight, weight_scale, bits, bias)
    return _quantized_linear(x, plain(weight), weight_scale, bits, bias)


@torch.library.custom_op("glm_hf::quantized_linear", mutates_args=())
def _quantized_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    arguments = x, weight, fp16_scale(weight_scale), bits, bias
    if x.device.type == "cpu":
        out = quantized_linear_cpu(*arguments)
    elif x.is_cuda and x.dtype != torch.float64 and has_triton():
        from glm_hf.quantization.kernels_triton import quantized_linear_triton

        out = quantized_linear_triton(*arguments)
    else:
        out = quantized_linear_reference(*arguments)
    return torch.ops.aten._unsafe_view(out, out.shape)  # autograd lets adapters add to it in place, not to a view


@functools.cache
def has_triton() -> bool:
    """Tell whether Triton is installed; says so once if it is not."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("Triton is not installed, so INT4 and INT8 weights run by plain torch on GPUs, which is slow")
    return found


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("glm_hf::quantized_linear_input_gradient", mutates_args=())
def _input_gradient(grad: Tensor, weight: Tensor, weight_scale: Tensor, bits: int) -> Tensor:
    """Return the gradient `(..., K)` with respect to the input, given that of the output `(..., N)`."""
    total = grad.new_zeros(*grad.shape[:-1], weight.shape[1] * 8 // bits, dtype=torch.float32)
    for start, rows in _rows(grad, weight, fp16_scale(weight_scale), bits):
        total += grad[..., start : start + len(rows)].to(rows.dtype) @ rows
    return total.to(grad.dtype)


@_input_gradient.register_fake
def _(grad: Tensor, weight: Tensor, weight_scale: Tensor, bits: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1] * 8 // bits)


def _rows(grad: Tensor, weight: Tensor, weight_scale: Tensor, bits: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, some rows of the matrix) in the dtype that multiplies fastest with `grad`."""
    if grad.device.type == "cpu":
        yield from decoded_rows(weight, weight_scale, bits, grad.dtype)
    else:
        for start, rows in dequantize_rows(weight, weight_scale, bits):
            yield start, rows.to(grad.dtype)


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weight, weight_scale, ctx.bits, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(weight, weight_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = _input_gradient(grad, weight, weight_scale, ctx.bits) if ctx.needs_input_grad[0] else None
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias


_quantized_linear.register_autograd(_backward, setup_context=_save_for_backward)

"""Rotary positions, with the fp16 rounding that the released model was trained with.

The rounding decides where a token stands: near position 2000 neighbouring fp16 angles are a whole radian apart. Casts
do not survive compilation (fused kernels compute fp16 in fp32), so the rounding is done on bits, and frequencies are
kept as the bits of integers, which no cast of the model touches.

Shapes: `B` batch, `L` length, `K` head dim.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_glm import GLMConfig

SMALLEST_NORMAL_HALF = 2.0**-14
SMALLEST_HALF = 2.0**-24


class GLMRotaryEmbedding(nn.Module):
    """Compute rotary cosines and sines; with `rope_dtype="float16"` angles, cosines and sines are rounded to fp16."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        config.validate_architecture()  # rope_parameters may have been assigned after the config was made
        self.config = config
        self.attention_scaling = inverse_frequencies(config)[1]
        self.frequency_bits = nn.Buffer(torch.empty(config.head_dim // 2, dtype=torch.int32), persistent=False)
        self.frequency_bits.copy_(self.compute_frequency_bits())

    def compute_frequency_bits(self) -> torch.Tensor:
        """Return the `(K/2,)` fp32 inverse frequencies, read as int32, on the CPU."""
        return inverse_frequencies(self.config)[0].view(torch.int32)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GLMRotaryEmbedding":
        """Apply `fn` to the buffer, but keep its bits where all dtypes are cast, as by `model.type(torch.float32)`."""
        super()._apply(fn, recurse)
        if self.frequency_bits.dtype != torch.int32:
            bits = self.compute_frequency_bits().to(self.frequency_bits.device)
            self.frequency_bits = nn.Buffer(bits, persistent=False)
        return self

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for `position_ids` `(B, L)` what `apply_rotary` takes, in the dtype of the hidden states."""
        rope_dtype = getattr(torch, self.config.rope_dtype)
        round_off = round_to_half if rope_dtype == torch.float16 else torch.Tensor.float
        positions = round_off(position_ids[..., None].float())
        angles = round_off(positions * self.frequency_bits.view(torch.float32)).to(rope_dtype)  # (B, L, K/2)
        cos, sin = (round_off(values.float()) * self.attention_scaling for values in (angles.cos(), angles.sin()))
        dtype = hidden_states.dtype
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)  # 2 x (B, L, K)


def inverse_frequencies(config: GLMConfig) -> tuple[torch.Tensor, float]:
    """Return `(K/2,)` inverse frequencies in fp32 on the CPU, from fp16 ones, and the factor on cosines and sines."""
    rope = dict(config.rope_parameters or {})
    with torch.device("cpu"):  # also where a model is made on another device, such as meta
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        exact = 1.0 / rope["rope_theta"] ** exponents
        rounded = exact.to(torch.float16).float()
        if rope["rope_type"] == "default":
            return rounded, 1.0
        scaled, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return rounded * (scaled / exact), factor


def round_to_half(values: torch.Tensor) -> torch.Tensor:
    """Round fp32 values of less than 65520 to the nearest that fp16 has, ties to even, and return them in fp32."""
    bits = values.view(torch.int32)
    last_kept = (bits >> 13) & 1
    normal = ((bits + 0x0FFF + last_kept) & ~0x1FFF).view(torch.float32)  # 10 of 23 bits of the fraction are kept
    subnormal = (values / SMALLEST_HALF).round() * SMALLEST_HALF
    return torch.where(values.abs() < SMALLEST_NORMAL_HALF, subnormal, normal)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """
    Rotate each pair of dimensions `i` and `i + K/2` of `states` `(..., K)`.

    Args:
        states: Queries or keys.
        cos: Cosines `(..., K)`, the same in both halves.
        signed_sin: Sines `(..., K)`, negated in the first half.
    """
    first, second = states.chunk(2, dim=-1)
    return torch.addcmul(states * cos, torch.cat((second, first), dim=-1), signed_sin)

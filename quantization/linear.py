"""A linear layer whose weight is stored as INT4 or INT8 codes with scales, as functional.py lays them out."""

import torch
from torch import Tensor, nn

from glm_hf.quantization.ops import quantized_linear
from glm_hf.quantization.stored_parameter import StoredWeight


class QuantizedLinear(StoredWeight, nn.Linear):
    """
    Linear layer on a quantized weight; gradients flow to the input and the bias, not to the weight.

    It is an `nn.Linear`, so that PEFT puts adapters on it.

    Args:
        in_features: Input features `K`; even for 4 bits.
        out_features: Output features `N`.
        bits: Bits of a code, 4 or 8.
        num_groups: Scales per row, which must divide `K`.
        bias: Whether there is a bias `(N)`.
        dtype: Dtype of the bias.
        device: Device of all parameters.

    Attributes:
        weight: `(N, K)` int8 or `(N, K/2)` uint8.
        weight_scale: `(N, G)` fp16.
    """

    _hf_quantized_needs_local_tp = True  # of tensor-parallel weights, `forward` gets this rank's part in training too

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
        self.scale_shape = out_features, num_groups
        codes = torch.empty(
            out_features, in_features * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8, device=device
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(out_features, num_groups, dtype=torch.float16, device=device)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    @property
    def _hf_tp_plan(self) -> str | None:
        """How ranks share the layer, which PEFT notes here when it puts adapters on a layer of a parallel model."""
        return self.__dict__.get("_hf_tp_plan")

    @_hf_tp_plan.setter
    def _hf_tp_plan(self, style: str) -> None:
        """Raise ValueError for adapters that would not fit: PEFT takes the shape of codes for that of the weight."""
        if style != "colwise" or self.bits == 4:
            raise ValueError(
                "adapters on quantized weights work under tensor parallelism on INT8 query_key_value only, got "
                f"{self.bits} bits sharded {style}; train them without tensor parallelism"
            )
        self.__dict__["_hf_tp_plan"] = style

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` for `x` `(..., K)`, in its dtype."""
        weight = self._parameters["weight"]
        assert weight is not None
        return quantized_linear(x, weight, self.weight_scale, self.bits, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{super().extra_repr()}, bits={self.bits}, num_groups={self.weight_scale.shape[1]}"

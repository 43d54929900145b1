"""The parameter that holds the codes of a quantized weight of a loaded model."""

from typing import Any

from torch import Tensor, nn


class Codes(nn.Parameter):
    """
    Codes that can be moved to another device, but not be replaced by assigning to `data`.

    PEFT merges adapters in that way, and INT8 codes plus the rounded adapter would be another model without a word.

    Args:
        data: The codes, which are shared.
        requires_grad: Must be False.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "Codes":
        """Return a parameter on the memory of `data`."""
        return Tensor._make_subclass(cls, data.detach(), requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain parameter."""
        return nn.Parameter(self.detach(), requires_grad=False).__reduce_ex__(protocol)

    @property
    def data(self) -> Tensor:
        """The codes as a plain tensor."""
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.device == self.device and value is not self:
            raise ValueError(
                "codes of a quantized weight cannot be changed; to merge adapters, call model.dequantize() first, and "
                "load the model again if a merge has been tried"
            )
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

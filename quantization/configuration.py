"""How the weights of a model are stored as INT4 or INT8: the entry `quantization_config` of config.json."""

import re
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from glm_hf.sharding.rules import ROW_PARALLEL

QUANT_METHOD = "glm130b"


class GLMQuantizationConfig(QuantizationConfigMixin):
    """
    Settings of weight-only quantization, for `from_pretrained(..., quantization_config=...)`.

    Args:
        bits: Bits of the weights of the layers, 4 or 8.
        group_size: Input features that share a scale; None for one scale per row, the released form.
        modules_to_not_convert: Linears that stay as they are: names, their ends, or regular expressions for their
            beginnings. The LM head stays unless `quantize_embeddings` is set.
        row_parallel_groups: Scales per row of `attention.dense` and `mlp.dense_4h_to_h` in a model that was quantized
            on that many tensor-parallel ranks, each by itself.
        quantize_embeddings: Whether the token embedding and the LM head, tied or not, are stored as INT8 with
            one scale per row, for 4 bits too.
        quant_method: Name of this method in config.json.

    Raises:
        ValueError: If a value is not one of these.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        row_parallel_groups: int = 1,
        quantize_embeddings: bool = False,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD}, got {quant_method}")
        if type(bits) is not int or bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        if group_size is not None and not (type(group_size) is int and group_size > 0):
            raise ValueError(f"group_size must be a positive integer or None for whole rows, got {group_size}")
        names = [] if modules_to_not_convert is None else modules_to_not_convert
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}")
        for name in names:
            try:
                re.compile(name)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"modules_to_not_convert holds {name!r}, no regular expression: {error}") from error
        if not (type(row_parallel_groups) is int and row_parallel_groups > 0):
            raise ValueError(f"row_parallel_groups must be a positive integer, got {row_parallel_groups}")
        if group_size is not None and row_parallel_groups > 1:
            raise ValueError("weights have either groups of group_size or row_parallel_groups, not both")
        if type(quantize_embeddings) is not bool:
            raise ValueError(f"quantize_embeddings must be True or False, got {quantize_embeddings!r}")
        self.quant_method = quant_method
        self.bits = bits
        self.group_size = group_size
        self.modules_to_not_convert = modules_to_not_convert
        self.row_parallel_groups = row_parallel_groups
        self.quantize_embeddings = quantize_embeddings

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "GLMQuantizationConfig":
        """Return the settings of an entry of config.json; ValueError if a field is not known or not valid."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"quantization_config has a field that is not known here: {error}") from error

    def quantizes(self, linear: str) -> bool:
        """Tell whether a linear of a layer is quantized, by its name in the model."""
        if not self.modules_to_not_convert:
            return True
        from transformers.quantizers.quantizers_utils import should_convert_module  # with all of its quantizers

        return should_convert_module(linear, self.modules_to_not_convert)

    def num_groups(self, linear: str, in_features: int) -> int:
        """Return the scales per row of a linear; ValueError if `group_size` does not divide its input features."""
        if self.group_size is None:
            return self.row_parallel_groups if linear.endswith(ROW_PARALLEL) else 1
        if in_features % self.group_size:
            raise ValueError(
                f"group_size must divide the {in_features} input features of {linear}, got {self.group_size}"
            )
        return in_features // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of config.json, which tells of embeddings only where they are quantized."""
        fields = super().to_dict()
        if not self.quantize_embeddings:
            del fields["quantize_embeddings"]
        return fields

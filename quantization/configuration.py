"""How the weights of a model are stored as INT4 or INT8: the entry `quantization_config` of config.json."""

from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "glm130b"


class GLMQuantizationConfig(QuantizationConfigMixin):
    """
    Settings of weight-only quantization, for `from_pretrained(..., quantization_config=...)`.

    Args:
        bits: 4 or 8.
        group_size: Input features that share a scale; None for one scale per row, the released form.
        modules_to_not_convert: Linears that stay as they are: names, their ends, or regular expressions for their
            beginnings. The output matrix always stays.
        row_parallel_groups: Scales per row of `attention.dense` and `mlp.dense_4h_to_h` in a model that was quantized
            on that many tensor-parallel ranks, each by itself.
        quant_method: The name of this method in config.json.

    Raises:
        ValueError: If a value is not one of these.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        row_parallel_groups: int = 1,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD}, got {quant_method}")
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        if group_size is not None and not (type(group_size) is int and group_size > 0):
            raise ValueError(f"group_size must be a positive integer or None for whole rows, got {group_size}")
        if not (type(row_parallel_groups) is int and row_parallel_groups > 0):
            raise ValueError(f"row_parallel_groups must be a positive integer, got {row_parallel_groups}")
        if group_size is not None and row_parallel_groups > 1:
            raise ValueError("weights have either groups of group_size or row_parallel_groups, not both")
        self.quant_method = quant_method
        self.bits = bits
        self.group_size = group_size
        self.modules_to_not_convert = modules_to_not_convert
        self.row_parallel_groups = row_parallel_groups

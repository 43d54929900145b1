"""Quantize a model while transformers loads it, one tensor at a time, and load models that are quantized already."""

from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from glm_hf.quantization.configuration import QUANT_METHOD, GLMQuantizationConfig
from glm_hf.quantization.functional import absmax_of_groups, quantize_by_absmax
from glm_hf.quantization.linear import QuantizedLinear

ROW_PARALLEL = ("attention.dense", "mlp.dense_4h_to_h")


class GLMQuantizer(HfQuantizer):
    """Replaces linears by `QuantizedLinear`, before loading on meta."""

    quantization_config: GLMQuantizationConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError for what transformers would load wrongly without a word."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "weights that are quantized while loading cannot go to the disk; quantize the model first, save it "
                "and load that, or leave the disk out of device_map"
            )

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight."""
        return self.quantization_config.bits / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is a weight to be quantized while loading."""
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, QuantizedLinear) and name == "weight"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        kept = self.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
        linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        for name, linear in linears.items():
            if should_convert_module(name, kept):
                model.set_submodule(name, self._quantized(name, linear))

    def _quantized(self, name: str, linear: nn.Linear) -> QuantizedLinear:
        """Return the layer, on meta, that stands for `linear`."""
        config = self.quantization_config
        num_groups = config.row_parallel_groups if name.endswith(ROW_PARALLEL) else 1
        if config.group_size is not None:
            if linear.in_features % config.group_size:
                raise ValueError(f"group_size must divide the {linear.in_features} input features of {name}")
            num_groups = linear.in_features // config.group_size
        return QuantizedLinear(
            linear.in_features,
            linear.out_features,
            bits=config.bits,
            num_groups=num_groups,
            bias=linear.bias is not None,
            dtype=linear.weight.dtype,
            device="meta",
        )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.weight_scale.requires_grad_(False)  # loading turns it on for whatever is floating point
                if is_cut_by_columns(module) and module.weight_scale.shape[1] % module.weight.device_mesh.size():
                    if module.weight_scale.shape[1] > 1:
                        raise ValueError(
                            f"tp_size must divide the {module.weight_scale.shape[1]} groups of every row, got "
                            f"{module.weight.device_mesh.size()}"
                        )

    def get_quantize_ops(self) -> ConversionOps:
        """Return what makes codes and scales of a weight."""
        return QuantizeWeight(self.quantization_config)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Leave the scales of row-parallel weights whole where a row has one; groups are cut as their columns are."""
        super().update_parallel_plan(model, plan)
        if self.quantization_config.group_size is None and self.quantization_config.row_parallel_groups == 1:
            for name in [name for name, style in plan.items() if style == "rowwise"]:
                plan[f"{name}.weight_scale"] = "replicate"

    def is_serializable(self) -> bool:
        """Tell that `save_pretrained` saves codes and scales."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on the model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model."""
        return True


class QuantizeWeight(ConversionOps):
    """Makes `weight` and `weight_scale` of a weight that has just been read."""

    def __init__(self, config: GLMQuantizationConfig) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        full_layer_name: str | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return both by their names; of a rank's part of a weight, with the scales that the whole weight has."""
        assert full_layer_name is not None
        assert model is not None
        [[weight]] = input_dict.values()
        module = get_module_from_name(model, full_layer_name)[0]
        group_size = min(module.in_features // module.weight_scale.shape[1], weight.shape[1])
        try:
            absmax = absmax_of_groups(weight, group_size)
            if is_cut_by_columns(module) and module.weight_scale.shape[1] == 1:
                distributed.all_reduce(absmax, distributed.ReduceOp.MAX, module.weight.device_mesh.get_group())
            codes, scale = quantize_by_absmax(weight, absmax, self.config.bits)
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from error
        return {full_layer_name: codes, f"{full_layer_name}_scale": scale}


def is_cut_by_columns(module: QuantizedLinear) -> bool:
    """Tell whether every tensor-parallel rank holds some columns of the layer's weight."""
    return isinstance(module.weight, DTensor) and module.weight.placements[0].is_shard(dim=1)


def register_quantizer() -> None:
    """Make the method known to transformers; again is harmless."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GLMQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GLMQuantizer

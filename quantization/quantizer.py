"""Quantize a model while transformers loads it, one tensor at a time, and load models that are quantized already."""

import re
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from glm_hf.modeling_glm import GLMModel
from glm_hf.quantization.configuration import QUANT_METHOD, GLMQuantizationConfig
from glm_hf.quantization.embedding import QuantizedEmbedding
from glm_hf.quantization.functional import EMBEDDING_BITS, absmax_of_groups, dequantize_rows, quantize_by_absmax
from glm_hf.quantization.fused_step import fused_step
from glm_hf.quantization.linear import QuantizedLinear
from glm_hf.quantization.stored_parameter import StoredParameter
from glm_hf.sharding.rules import ROW_PARALLEL

CASTS_BEFORE_CONVERTING = Version(transformers.__version__) < Version("5.23")
"""Whether the installed transformers casts weights to the dtype of the codes before they are quantized."""

QUANTIZED = (QuantizedLinear, QuantizedEmbedding)


class GLMQuantizer(HfQuantizer):
    """Replaces linears by `QuantizedLinear`, and embeddings by `QuantizedEmbedding`, before loading on meta."""

    quantization_config: GLMQuantizationConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ValueError for what transformers would load wrongly without a word."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "weights that are quantized while loading cannot go to the disk; quantize the model first, save it "
                "and load that, or leave the disk out of device_map"
            )

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a parameter is a weight to be quantized while loading."""
        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, QUANTIZED) and name == "weight"

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        kept = self.get_modules_to_not_convert(model, config.modules_to_not_convert, add_default_skips=True)
        linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        for name, linear in linears.items():
            if should_convert_module(name, kept):
                model.set_submodule(name, self._quantized(name, linear))
        if config.quantize_embeddings:
            quantize_embeddings(model)
        if CASTS_BEFORE_CONVERTING and not self.pre_quantized:
            keep_floating_point(model)
        tp_size = getattr(getattr(model.config, "distributed_config", None), "tp_size", 1)
        if tp_size > 1 and CASTS_BEFORE_CONVERTING:
            raise ValueError(
                f"ranks share quantized weights from transformers 5.23 on, got {transformers.__version__}; upgrade it"
            )
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear) and name.endswith(ROW_PARALLEL):
                require_divisible(name, module, tp_size)

    def _quantized(self, name: str, linear: nn.Linear) -> QuantizedLinear:
        """Return the layer, on meta, that stands for `linear`."""
        config = self.quantization_config
        num_groups = config.num_groups(name, linear.in_features)
        try:
            return QuantizedLinear(
                linear.in_features,
                linear.out_features,
                bits=config.bits,
                num_groups=num_groups,
                bias=linear.bias is not None,
                dtype=linear.weight.dtype,
                device="meta",
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        known: dict[nn.Parameter, StoredParameter] = {}  # what is tied stays tied
        for name, module in model.named_modules():
            if isinstance(module, QUANTIZED):
                if module.weight_scale.shape != module.scale_shape:
                    shapes = f"{module.scale_shape}, got {tuple(module.weight_scale.shape)}"
                    raise ValueError(f"{name}.weight_scale must be {shapes}; make the folder again")
                module.protect(known)
            elif isinstance(module, GLMModel):
                module.fused_step = fused_step
        # By this mark, of whichever method, PEFT's helper for k-bit training knows that layers are to be checkpointed.
        model.hqq_quantized = True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """
        Replace quantized layers, also those with adapters, by plain ones of `dtype`, frozen as the codes were.

        Raises:
            ValueError: If weights are spread over devices, ranks or the disk.
        """
        modules = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}
        for name, module in modules.items():
            if module.weight.is_meta or isinstance(module.weight, DTensor) or hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"{name} is spread over devices, ranks or the disk; load the model on one device first"
                )
        dense: dict[Any, nn.Parameter] = {}  # what was tied stays tied
        for name, module in modules.items():
            codes = module._parameters["weight"]
            if codes not in dense:
                dense[codes] = dequantized_parameter(module, dtype or module.weight_scale.dtype)
            model.set_submodule(name, dense_layer(module, dense[codes]))
        for module in model.modules():
            if isinstance(module, GLMModel):
                module.fused_step = None
        untie_scales(model)
        model.hqq_quantized = False
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """Return what makes codes and scales of a weight."""
        return QuantizeWeight()

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Replicate scales of row-parallel weights with one per row; groups are sharded as their columns are."""
        super().update_parallel_plan(model, plan)
        for name, module in model.named_modules():
            layer = re.sub(r"\.\d+\.", ".*.", name)  # as the plan names all layers at once
            is_whole = isinstance(module, QuantizedLinear) and module.weight_scale.shape[1] == 1
            if is_whole and plan.get(layer) == "rowwise":
                plan[f"{layer}.weight_scale"] = "replicate"

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
        num_columns = module.weight.shape[1] * 8 // module.bits
        group_size = min(num_columns // module.weight_scale.shape[1], weight.shape[1])
        try:
            absmax = absmax_of_groups(weight, group_size)
            if is_sharded_by_columns(module) and module.weight_scale.shape[1] == 1:
                distributed.all_reduce(absmax, distributed.ReduceOp.MAX, module.weight.device_mesh.get_group())
            codes, scale = quantize_by_absmax(weight, absmax, module.bits)
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from error
        return {full_layer_name: codes, f"{full_layer_name}_scale": scale}


def is_sharded_by_columns(module: QuantizedLinear | QuantizedEmbedding) -> bool:
    """Tell whether every tensor-parallel rank holds some columns of the layer's weight."""
    return isinstance(module.weight, DTensor) and module.weight.placements[0].is_shard(dim=1)


def require_divisible(name: str, module: QuantizedLinear, tp_size: int) -> None:
    """Raise ValueError unless the columns of a row-parallel layer, and its groups, can be sharded over the ranks."""
    num_bytes, num_groups = module.weight.shape[1], module.weight_scale.shape[1]
    if num_bytes % tp_size or (num_groups > 1 and num_groups % tp_size):
        what = f"{num_groups} groups" if num_groups > 1 else f"{num_bytes} bytes"
        raise ValueError(f"tp_size must divide the {what} of a row of {name}, got {tp_size}")


def keep_floating_point(model: PreTrainedModel) -> None:
    """Make codes on meta floating point, since weights are cast to their dtype before they are converted."""
    placeholders: dict[nn.Parameter, nn.Parameter] = {}  # what is tied stays tied
    for module in model.modules():
        if isinstance(module, QUANTIZED):
            codes = module._parameters["weight"]
            assert codes is not None, "a quantized layer has codes"
            if codes not in placeholders:
                empty = torch.empty(codes.shape, dtype=model.dtype, device="meta")
                placeholders[codes] = nn.Parameter(empty, requires_grad=False)
            module._parameters["weight"] = placeholders[codes]


def quantize_embeddings(model: PreTrainedModel) -> None:
    """Replace the embedding and the LM head, on meta; where they are tied, their scales are tied as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    dtype = embedding.weight.dtype
    quantized = QuantizedEmbedding(embedding.num_embeddings, embedding.embedding_dim, dtype=dtype, device="meta")
    model.set_input_embeddings(quantized)
    if head is not None:
        sizes = (head.in_features, head.out_features)
        model.set_output_embeddings(QuantizedLinear(*sizes, bits=EMBEDDING_BITS, bias=False, device="meta"))
        scales = {f"{target}_scale": f"{source}_scale" for target, source in model._tied_weights_keys.items()}
        model._tied_weights_keys = model._tied_weights_keys | scales
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()


def untie_scales(model: PreTrainedModel) -> None:
    """Undo what `quantize_embeddings` did to the names of tied weights."""
    for names in (model._tied_weights_keys or {}, model.all_tied_weights_keys):
        for name in [name for name in names if name.endswith("_scale")]:
            del names[name]


def dequantized_parameter(module: QuantizedLinear | QuantizedEmbedding, dtype: torch.dtype) -> nn.Parameter:
    """Return the matrix that codes and scales of a layer stand for, every product rounded once to `dtype`."""
    weight = module.weight
    matrix = torch.empty(len(weight), weight.shape[1] * 8 // module.bits, dtype=dtype, device=weight.device)
    for start, rows in dequantize_rows(weight, module.weight_scale, module.bits):
        matrix[start : start + len(rows)] = rows
    return nn.Parameter(matrix, requires_grad=False)


def dense_layer(module: QuantizedLinear | QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    """Return the plain layer with this weight, and with the bias of `module` in its dtype."""
    bias = getattr(module, "bias", None)
    with torch.device("meta"):
        if isinstance(module, QuantizedEmbedding):
            layer: nn.Module = nn.Embedding(*weight.shape)
        else:
            layer = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    return layer.train(module.training)


def register_quantizer() -> None:
    """Make the method known to transformers; again is harmless."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GLMQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GLMQuantizer

"""One new token of each row through all layers of a quantized model, in one call of the C kernels.

Between its products, a layer of a quantized model on a CPU spends more time on calling torch than on computing. What
is not the plain case is left to the layers' own `forward`, which computes the same.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glm_hf.decoding.cache import SlotCache, SlotLayer
from glm_hf.growing_cache_glm import GrowingLayer
from glm_hf.modeling_glm import GLMMLP, GLMAttention, GLMLayer
from glm_hf.quantization.kernels_cpu import DTYPE_CODES, KernelLibrary, Layer, Linear, kernel_library, linear_arguments
from glm_hf.quantization.linear import QuantizedLinear
from glm_hf.quantization.stored_parameter import StoredParameter

LEAST_GROUP = 64
"""Input features of a group that the C kernels take at once."""


@dataclass
class PlainLayer:
    """
    A layer that was found to be what its class says, and where it lies.

    It does not hold the layer itself, which would then live as long as this is known for it.
    """

    attributes: dict[str, Any]
    attention: GLMAttention
    norms: list[nn.LayerNorm]
    parts: list[tuple[dict, str, Any]]
    """Modules and parameters, by the dictionaries that hold them."""
    addresses: list[tuple[Tensor, int]]
    modules: list[dict]
    """Attributes of the modules that are not called."""
    arguments: Layer

    def is_current(self) -> bool:
        """Tell whether nothing was exchanged or moved since, and nothing is watching."""
        for holder, name, part in self.parts:
            if holder[name] is not part:
                return False
        for tensor, address in self.addresses:
            if tensor.data_ptr() != address:
                return False
        for own in self.modules:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
                return False
        return True


known_layers: WeakKeyDictionary[nn.Module, PlainLayer] = WeakKeyDictionary()


def fused_step(
    layers: nn.ModuleList,
    hidden_states: Tensor,
    cache: Cache | None,
    attention_mask: Any,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Tensor | None:
    """
    Return what `layers` make of one new token of each row `(B, 1, D)`, None for what is not the plain case.

    That is a model whose linears are all quantized, without adapters, hooks and gradients, on a CPU, behind a cache
    that keeps room or has slots, with the attention of `sdpa`.
    """
    library = kernel_library()
    if library is None or is_watched() or not is_plain_tensor(hidden_states):
        return None
    if any(value is not None and value is not False for value in kwargs.values()):
        return None
    found = [plain_layer(layer, library) for layer in layers]
    plain = [layer for layer in found if layer is not None]
    if not plain or len(plain) < len(found):
        return None
    batch, num_heads, head_size = len(hidden_states), plain[0].arguments.num_heads, plain[0].arguments.head_size
    rooms = layers_with_room(cache, [layer.attention.layer_idx for layer in plain])
    if rooms is None or plain[0].attention.config._attn_implementation != "sdpa":
        return None
    dtype, seen = hidden_states.dtype, rooms[0].get_seq_length()
    lengths = cache.lengths[:batch] + 1 if isinstance(cache, SlotCache) else None
    length = seen if lengths is not None else seen + 1
    cos, sin = (table.expand(batch, 1, head_size).contiguous() for table in position_embeddings)
    for states in (*(room.keys for room in rooms), *(room.values for room in rooms)):
        taken = states if lengths is None else states[:batch, :, :seen]
        if taken.dtype != dtype or not taken.is_cpu or taken.shape != (batch, num_heads, seen, head_size):
            return None
    if cos.dtype != dtype or sin.dtype != dtype or hidden_states.shape[2] != num_heads * head_size:
        return None
    mask = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1:] != (1, 1, length):
            return None
        mask = attention_mask.expand(batch, 1, 1, length).contiguous()
    new = hidden_states.view(batch, num_heads, 1, head_size)
    x, out = hidden_states, torch.empty_like(hidden_states)
    common = {
        **{"cos": cos.data_ptr(), "signed_sin": sin.data_ptr(), "mask": None if mask is None else mask.data_ptr()},
        **{"mask_stride": length, "num_tokens": batch, "length": length},
        "lengths": None if lengths is None else lengths.data_ptr(),
        **{"dtype": DTYPE_CODES[dtype], "num_threads": torch.get_num_threads()},
    }
    calls = (Layer * len(plain))(*(layer.arguments for layer in plain))
    for call, layer, room in zip(calls, plain, rooms, strict=True):
        if isinstance(room, GrowingLayer):
            room.make_room(new, new)
        for name, value in common.items():
            setattr(call, name, value)
        call.x, call.out, call.keys, call.values = (t.data_ptr() for t in (x, out, room.keys, room.values))
        call.row_stride, call.head_stride = room.keys.stride()[:2]
        call.alpha, call.scaling = layer.attributes["alpha"], layer.attention.scaling
        call.eps = layer.norms[0].eps, layer.norms[1].eps
        x = out  # each token's states are read before they are overwritten
    library.decode_layers(calls)
    return out


def plain_layer(layer: nn.Module, library: KernelLibrary) -> PlainLayer | None:
    """Return where a layer lies now, None if it would not compute what its class says, or cannot be read."""
    plain = known_layers.get(layer)
    if plain is None or not plain.is_current():
        plain = find_plain_layer(layer, library)
        if plain is None:
            return None
        known_layers[layer] = plain
    return None if layer.training else plain


def layers_with_room(cache: Cache | None, indices: list[int]) -> list[GrowingLayer | SlotLayer] | None:
    """Return these layers of a cache that grows or has slots, None for any that keeps no room or has no tokens."""
    if cache is None or type(cache) not in (DynamicCache, SlotCache) or max(indices) >= len(cache.layers):
        return None
    found = [cache.layers[index] for index in indices]
    rooms = [layer for layer in found if type(layer) in (GrowingLayer, SlotLayer) and layer.is_initialized]
    rooms = [layer for layer in rooms if layer.get_seq_length()]
    return rooms if len(rooms) == len(indices) else None


def is_watched() -> bool:
    """Tell whether something goes on that torch would take into account: gradients, autocast, hooks, modes."""
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or bool(of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks)
        or _get_current_dispatch_mode() is not None
        or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    )


def find_plain_layer(layer: nn.Module, library: KernelLibrary) -> PlainLayer | None:
    """Return where a layer lies, None if it would not compute what its class says, or the C kernels cannot read it."""
    if type(layer) is not GLMLayer:
        return None
    attention, mlp = layer.attention, layer.mlp
    if type(attention) is not GLMAttention or type(mlp) is not GLMMLP:
        return None
    linears = [attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if any(type(linear) is not QuantizedLinear for linear in linears):
        return None
    if any(type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None for norm in norms):
        return None
    parents: list[nn.Module] = [layer, attention, mlp]
    modules: list[nn.Module] = [layer, attention, mlp, *linears, *norms]
    parts = [(parent._modules, name, part) for parent in parents for name, part in parent._modules.items()]
    parameters = [(module._parameters, name, part) for module in modules for name, part in module._parameters.items()]
    numbers = [part for _, _, part in parameters if part is not None]
    if not all(map(is_readable, numbers)) or not all(map(has_known_groups, linears)):
        return None
    if len({parameter.dtype for norm in norms for parameter in (norm.weight, norm.bias)}) > 1:
        return None
    plain = PlainLayer(
        layer.__dict__,
        attention,
        norms,
        [*parts, *parameters],
        [(part, part.data_ptr()) for part in numbers],
        [module.__dict__ for module in modules],
        Layer(
            *map(linear_of, linears),
            tuple(norm.weight.data_ptr() for norm in norms),
            tuple(norm.bias.data_ptr() for norm in norms),
            num_heads=attention.config.num_attention_heads,
            head_size=attention.head_dim,
            norm_dtype=DTYPE_CODES[norms[0].weight.dtype],
            level=library.level,
        ),
    )
    return plain if plain.is_current() else None


def linear_of(linear: nn.Linear) -> Linear:
    """Return where a quantized linear layer lies, for the C kernels."""
    assert isinstance(linear, QuantizedLinear)
    weight = linear._parameters["weight"]
    assert weight is not None
    return linear_arguments(weight, linear.weight_scale, linear.bits, linear.bias)


def is_plain_tensor(tensor: Tensor) -> bool:
    """Tell whether a tensor holds numbers that the C kernels can read, and is of no class of others."""
    is_plain = type(tensor) in (Tensor, nn.Parameter)
    return is_plain and tensor.is_cpu and tensor.dtype in DTYPE_CODES and tensor.is_contiguous()


def is_readable(parameter: Tensor) -> bool:
    """Tell whether the C kernels can read a parameter, codes and scales among them."""
    is_stored = type(parameter) is StoredParameter and parameter.is_cpu and parameter.is_contiguous()
    return is_stored or is_plain_tensor(parameter)


def has_known_groups(linear: nn.Linear) -> bool:
    """Tell whether the scales and groups of a quantized layer are as the C kernels take them."""
    assert isinstance(linear, QuantizedLinear)
    scale = linear.weight_scale
    is_whole = scale.shape[1] == 1 or linear.in_features // scale.shape[1] % LEAST_GROUP == 0
    return is_whole and scale.dtype == torch.float16

"""One new token of each row through a whole layer of a quantized model, in one call of the C kernels.

Between its products, a layer of a quantized model on a CPU spends more time on calling torch than on computing. What
is not the plain case is left to the layer's own `forward`, which computes the same.
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

from glm_hf.cache_glm import GrowingLayer
from glm_hf.modeling_glm import GLMMLP, GLMAttention, GLMLayer
from glm_hf.quantization.kernels_cpu import DTYPE_CODES, KernelLibrary, Layer, Linear, kernel_library, linear_arguments
from glm_hf.quantization.linear import QuantizedLinear
from glm_hf.quantization.stored_parameter import StoredParameter

LEAST_GROUP = 64
"""Input features of a group that the C kernels take at once."""


@dataclass
class PlainLayer:
    """A layer that was found to be what its class says, and where it lies."""

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


known_layers: WeakKeyDictionary[GLMLayer, PlainLayer] = WeakKeyDictionary()


def fused_step(
    layer: GLMLayer,
    hidden_states: Tensor,
    cache: Cache | None,
    attention_mask: Any,
    position_embeddings: tuple[Tensor, Tensor],
    context_length: int | None,
    **kwargs: Any,
) -> Tensor | None:
    """
    Return what `layer.forward` does for one new token of each row `(B, 1, D)`, None for what is not the plain case.

    That is a layer whose linears are all quantized, without adapters, hooks and gradients, on a CPU, behind a cache
    that keeps room, with the attention of `sdpa`.
    """
    library = kernel_library()
    if library is None or layer.training or is_watched() or context_length is not None:
        return None
    if any(value is not None and value is not False for value in kwargs.values()):
        return None
    plain = known_layers.get(layer)
    if plain is None or not plain.is_current():
        plain = find_plain_layer(layer, library)
        if plain is None:
            return None
        known_layers[layer] = plain
    arguments = Layer.from_buffer_copy(plain.arguments)
    attention, num_heads, head_size = layer.attention, arguments.num_heads, arguments.head_size
    tokens = growing_tokens(cache, attention.layer_idx)
    if tokens is None or attention.config._attn_implementation != "sdpa" or not is_plain_tensor(hidden_states):
        return None
    x, dtype, batch = hidden_states, hidden_states.dtype, len(hidden_states)
    past = tokens.get_seq_length()
    cos, sin = (table.expand(batch, 1, head_size).contiguous() for table in position_embeddings)
    if any(not t.is_cpu or t.dtype != dtype for t in (tokens.keys, tokens.values, cos, sin)):
        return None
    if x.shape[2] != num_heads * head_size or tokens.keys.shape != (batch, num_heads, past, head_size):
        return None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1:] != (1, 1, past + 1):
            return None
        mask = attention_mask.expand(batch, 1, 1, past + 1).contiguous()
        arguments.mask, arguments.mask_stride = mask.data_ptr(), past + 1
    new = x.view(batch, num_heads, 1, head_size)
    tokens.make_room(new, new)
    out = torch.empty_like(x)
    arguments.x, arguments.cos, arguments.signed_sin = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
    arguments.out, arguments.keys, arguments.values = out.data_ptr(), tokens.keys.data_ptr(), tokens.values.data_ptr()
    arguments.row_stride, arguments.head_stride = tokens.keys.stride()[:2]
    arguments.num_tokens, arguments.length = batch, past + 1
    arguments.alpha, arguments.scaling = layer.alpha, attention.scaling
    arguments.eps = layer.input_layernorm.eps, layer.post_attention_layernorm.eps
    arguments.dtype, arguments.num_threads = DTYPE_CODES[dtype], torch.get_num_threads()
    library.decode_layer(arguments)
    return out


def growing_tokens(cache: Cache | None, index: int) -> GrowingLayer | None:
    """Return the layer of a plain cache that keeps room, None for any other and for one without tokens."""
    if cache is None or type(cache) is not DynamicCache or index >= len(cache.layers):
        return None
    tokens = cache.layers[index]
    return tokens if type(tokens) is GrowingLayer and tokens.get_seq_length() else None


def is_watched() -> bool:
    """Tell whether something goes on that torch would take into account: gradients, autocast, hooks, modes."""
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or bool(of_all_modules._global_forward_hooks or of_all_modules._global_forward_pre_hooks)
        or _get_current_dispatch_mode() is not None
        or ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    )


def find_plain_layer(layer: GLMLayer, library: KernelLibrary) -> PlainLayer | None:
    """Return where a layer lies, None if it would not compute what its class says, or the C kernels cannot read it."""
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
    modules: list[nn.Module] = [attention, mlp, *linears, *norms]
    parts = [(parent._modules, name, part) for parent in parents for name, part in parent._modules.items()]
    parameters = [(module._parameters, name, part) for module in modules for name, part in module._parameters.items()]
    numbers = [part for _, _, part in parameters if part is not None]
    if not all(map(is_readable, numbers)) or not all(map(has_known_groups, linears)):
        return None
    if len({parameter.dtype for norm in norms for parameter in (norm.weight, norm.bias)}) > 1:
        return None
    plain = PlainLayer(
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

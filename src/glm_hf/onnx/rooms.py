"""The memory in which a graph finds keys and values, and writes those of new tokens.

Shapes: `B` batch, `L` new tokens, `C` tokens that there is room for, `H` heads, `K` head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from glm_hf.configuration_glm import GLMConfig
from glm_hf.decoding.cache import SlotCache
from glm_hf.growing_cache_glm import GrowingLayer, keep_room


@dataclass(frozen=True)
class Rooms:
    """Memory of all layers."""

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values `(B, H, C, K)`, contiguous, without NaN where no token is."""
    write_indices: Tensor
    """`(B,)` column of each row's first new token."""

    @property
    def capacity(self) -> int:
        """Tokens `C` that there is room for."""
        return self.layers[0][0].shape[2]


def length_with(cache: Cache, length: int) -> int:
    """Return how many tokens a mask tells of when `length` new ones come to a cache."""
    return cache.span if isinstance(cache, SlotCache) else int(cache.get_seq_length()) + length


def forget_last(cache: Cache | None, length: int) -> None:
    """Take the last tokens off a growing cache, which a pass that failed has not written."""
    for layer in [] if cache is None or isinstance(cache, SlotCache) else cache.layers:
        if (kept := layer.get_seq_length() - length) > 0:
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        else:
            layer.reset()
            layer.is_initialized = False


def make_rooms(cache: Cache | None, config: GLMConfig, batch: int, length: int, dtype: torch.dtype) -> Rooms:
    """
    Return where `length` new tokens of `batch` rows go, for which the cache counts them from now on.

    Args:
        cache: The cache; without one, all layers use the same memory one after another.
        config: Sizes of the model.
        batch: Rows `B`.
        length: New tokens `L`.
        dtype: Dtype of keys and values.

    Raises:
        ValueError: If the cache does not keep its tokens in one piece, or is of another dtype or batch.
    """
    shape = (batch, config.num_attention_heads, length, config.head_dim)
    if cache is None:
        layer = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        return Rooms([layer] * config.num_hidden_layers, torch.zeros(batch, dtype=torch.long))
    if isinstance(cache, SlotCache):
        slots = [(layer.keys[:batch], layer.values[:batch]) for layer in cache.layers]
        return Rooms(slots, cache.lengths[:batch])
    keep_room(cache, config.max_position_embeddings)
    prefix_length: int = getattr(cache, "prefix_length", 0)
    make_layer = getattr(cache, "layer_class_to_replicate", None)
    while make_layer is GrowingLayer and len(cache.layers) < config.num_hidden_layers:
        cache.layers.append(make_layer())
    past = cache.get_seq_length() if cache.layers else 0
    template = torch.empty((), dtype=dtype).expand(shape)
    layers: list[tuple[Tensor, Tensor]] = []
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(f"the cache has {len(cache.layers)} layers, but the graph {config.num_hidden_layers}")
    for layer in cache.layers:
        if type(layer) is not GrowingLayer or prefix_length:
            raise ValueError("an exported graph writes into the cache; pass a DynamicCache without a learned prefix")
        if layer.get_seq_length() != past:
            raise ValueError(f"all layers of the cache must hold {past} tokens, got {layer.get_seq_length()} in one")
        expected = (batch, config.num_attention_heads, past, config.head_dim)
        if past and (layer.keys.shape != expected or layer.keys.dtype != dtype or layer.keys.device.type != "cpu"):
            raise ValueError(
                f"the cache holds {tuple(layer.keys.shape)} {layer.keys.dtype} on {layer.keys.device}, but the graph "
                f"is to continue {expected} {dtype} on the CPU"
            )
    for layer in cache.layers:
        layer.make_room(template, template)
        assert layer.room is not None
        layers.append((layer.room.keys, layer.room.values))
    return Rooms(layers, torch.full((batch,), past))

"""A cache that keeps room for the tokens to come, so that a new one is written instead of everything copied.

Shapes: `B` batch, `H` heads, `S` cached tokens, `K` head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

LEAST_ROOM = 16
ROOM = 1 / 16
"""Share of the tokens there are, for which there is room besides."""


@dataclass
class Room:
    """Memory of a layer's keys and values `(B, H, more than S, K)`, of which the first `used` tokens are taken."""

    keys: torch.Tensor
    values: torch.Tensor
    used: int


class GrowingLayer(DynamicLayer):
    """
    transformers' growing layer of a cache, whose keys and values are the beginning of a larger piece of memory.

    Attributes:
        window: Most tokens that the model takes, beyond which no room is kept.
        room: This memory, None before the first token. Layers that were copied from this one may share it: the first
            that adds a token takes the place behind the tokens they have in common, the others move.
    """

    window: int | None = None
    room: Room | None = None
    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values `(B, H, L, K)`, and return all of them `(B, H, S + L, K)`."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # autograd may need the old ones unchanged
            return super().update(key_states, value_states, *args, **kwargs)
        past = self.make_room(key_states, value_states)
        self.keys[:, :, past:] = key_states
        self.values[:, :, past:] = value_states
        return self.keys, self.values

    def make_room(self, key_states: torch.Tensor, value_states: torch.Tensor) -> int:
        """Make keys and values longer by as many tokens as are given, which are left to be written; return `S`."""
        past, count = self.get_seq_length(), key_states.shape[2]
        if past == 0:
            self.lazy_initialization(key_states, value_states)
        room = self.room
        if room is None or room.used != past or not self.is_in(room) or past + count > room.keys.shape[2]:
            capacity = capacity_for(past + count, self.window)
            room = Room(with_capacity(key_states, capacity), with_capacity(value_states, capacity), past)
            if past:
                room.keys[:, :, :past], room.values[:, :, :past] = self.keys, self.values
            self.room = room
        room.used = past + count
        self.keys, self.values = room.keys[:, :, : room.used], room.values[:, :, : room.used]
        return past

    def is_in(self, room: Room) -> bool:
        """Tell whether the layer's tokens are still those in the memory, and more may be written there."""
        if room.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False
        keys, values = self.keys, self.values
        if keys.data_ptr() != room.keys.data_ptr() or values.data_ptr() != room.values.data_ptr():
            return False
        is_whole = keys.stride() == room.keys.stride() and values.stride() == room.values.stride()
        return is_whole and keys.shape[0] == room.keys.shape[0]

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.room = None


def with_capacity(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return memory for `(B, H, capacity, K)` of the kind of keys or values, in which nothing is NaN."""
    batch, heads, _, size = states.shape
    return states.new_zeros(batch, heads, capacity, size)


def capacity_for(length: int, window: int | None) -> int:
    """Return for how many tokens there is memory where `length` are kept."""
    capacity = length + max(LEAST_ROOM, int(length * ROOM))
    return capacity if window is None else max(length, min(capacity, window))


def keep_room(cache: Cache | None, window: int | None = None) -> None:
    """Let the layers of a plain growing cache keep room, up to `window` tokens; leave other kinds as they are."""
    if cache is None or type(cache) is not DynamicCache or cache.offloading or torch.compiler.is_compiling():
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    if cache.layers and type(cache.layers[0]) is DynamicLayer:
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__, layer.window = GrowingLayer, window

"""A cache of slots: each row holds the keys and values of one request, of a length of its own.

Shapes: `R` slots, `B` slots that take part in a step, `H` heads, `S` tokens that a slot has room for, `K` head dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 64
"""Slots get longer by multiples of so many tokens."""


class SlotLayer(CacheLayerMixin):
    """
    Keys and values of one layer.

    Args:
        cache: The cache that the layer belongs to.
    """

    is_compileable = True
    is_sliding = False
    keys: Tensor
    """`(R, H, S, K)`, once there was a request."""
    values: Tensor

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for states of the kind of `(B, H, L, K)`, in all slots."""
        shape = (self.cache.num_slots, key_states.shape[1], self.cache.capacity)
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def grow(self) -> None:
        """Move everything to memory of the capacity that the cache has now."""
        if not self.is_initialized:
            return
        old = self.keys, self.values
        self.lazy_initialization(*old)
        for states, before in zip((self.keys, self.values), old, strict=True):
            states[:, :, : before.shape[2]] = before

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token `(B, H, 1, K)` behind each of the first `B` slots; return what is there `(B, H, S, K)`."""
        rows, span = key_states.shape[0], self.cache.span
        columns = self.cache.lengths[:rows].to(self.keys.device)
        index = torch.arange(rows, device=self.keys.device)
        self.keys[index, :, columns] = key_states[:, :, 0]
        self.values[index, :, columns] = value_states[:, :, 0]
        return self.keys[:rows, :, :span], self.values[:rows, :, :span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a new one may see, and 0."""
        return self.cache.span, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens that are looked at in every slot."""
        return self.cache.span

    def get_max_length(self) -> int:
        """Return the number of tokens that a slot has room for."""
        return self.cache.capacity

    get_max_cache_shape = get_max_length
    """Its name in older versions of transformers."""


class SlotCache(Cache):
    """
    Keys and values of requests that are decoded together.

    Slots in use stand in front: who leaves is replaced by the last.

    Args:
        num_layers: Layers of the model.
        num_slots: Requests at once `R`.
        capacity: Tokens that a slot has room for at first.
        window: Most tokens that a slot may get room for.
        device: Where lengths are counted.

    Attributes:
        lengths: `(R,)` number of tokens in every slot.
        span: Tokens that are looked at in a step, more than in any slot that takes part.
    """

    def __init__(self, num_layers: int, num_slots: int, capacity: int, window: int, device: torch.device) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.num_slots, self.capacity, self.window = num_slots, min(capacity, window), window
        self.lengths = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.span = self.capacity

    def reserve(self, length: int) -> None:
        """Give every slot room for at least `length` tokens."""
        if length > self.capacity:
            self.capacity = min(self.window, max(round_up(length), self.capacity * 3 // 2))
            for layer in self.layers:
                layer.grow()

    def admit(self, slot: int, filled: Cache, row: int, num_virtual: int, length: int) -> None:
        """
        Take a context that has been read into a slot.

        Args:
            slot: Number of the slot.
            filled: Cache with keys and values `(B, H, P + L, K)` of contexts, padded on the left.
            row: Which of them.
            num_virtual: Learned tokens `P` in front of all of them.
            length: Tokens of this one, without learned ones and padding.
        """
        for layer, source in zip(self.layers, filled.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            for states, read in ((layer.keys, source.keys), (layer.values, source.values)):
                states[slot, :, :num_virtual] = read[row, :, :num_virtual]
                states[slot, :, num_virtual : num_virtual + length] = read[row, :, read.shape[2] - length :]
        self.lengths[slot] = num_virtual + length

    def move(self, source: int, target: int, length: int) -> None:
        """Move the `length` tokens of a slot to another."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[target, :, :length] = states[source, :, :length]
        self.lengths[target] = self.lengths[source]

    def release(self, slot: int) -> None:
        """Forget the tokens of a slot."""
        self.lengths[slot] = 0


def round_up(length: int) -> int:
    """Return the next multiple of tokens by which slots grow."""
    return -(-length // GROWTH) * GROWTH

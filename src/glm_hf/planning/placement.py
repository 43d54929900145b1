"""Which device holds which layers, so that the fullest one keeps as much memory free as possible.

Layers keep their order. Embedding, LM head and last norm are placed once: accelerate, asked to put a tied weight
on two devices, ties it again after placing it, and the first forward pass misses the weight. Layers on the host or the
disk are computed by the first GPU, which holds their cache, and one of their weights at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

from glm_hf.planning.devices import Device
from glm_hf.planning.memory import (
    Request,
    activation_bytes,
    embedding_bytes,
    head_bytes,
    kv_cache_bytes,
    layer_bytes,
    linear_bytes,
    linear_shapes,
)


@dataclass(frozen=True)
class Layout:
    """Where a candidate has embedding and LM head, as indices of devices, and how many layers it offloads."""

    embedding: int
    head: int
    num_offloaded: int = 0


@dataclass(frozen=True)
class DeviceUse:
    """What one device holds; sizes in bytes."""

    device: Device
    modules: tuple[str, ...]
    layers: range
    weights: int
    kv_cache: int
    activations: int
    reserve: int

    @property
    def free(self) -> int | None:
        """Bytes that stay free, negative if the device is too small; None without a limit."""
        used = self.weights + self.kv_cache + self.activations + self.reserve
        return None if self.device.num_bytes is None else self.device.num_bytes - used


def place(request: Request) -> tuple[DeviceUse, ...]:
    """Return the use of every device; of several layouts that of which the fullest device is the emptiest."""
    layers = [layer_bytes(request, layer) for layer in range(request.config.num_hidden_layers)]
    if request.tp_size is not None:
        return tuple(rank_use(request, layers, rank) for rank in range(request.tp_size))
    best: tuple[DeviceUse, ...] = ()
    for layout in layouts(request):
        if best and layout.num_offloaded and smallest_free(best) >= 0:
            break
        counts = layers_per_device(request, layout, layers)
        if sum(counts) < len(layers):
            continue
        ends = list(accumulate(counts))
        spans = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
        uses = [device_use(request, layout, layers, index, span) for index, span in enumerate(spans)]
        uses = [use if use.modules else replace(use, activations=0, reserve=0) for use in uses]
        if not best or smallest_free(uses) > smallest_free(best):
            best = tuple(uses)
    return best


def smallest_free(uses: Sequence[DeviceUse]) -> int:
    """Return the free bytes of the fullest device in use, negative if one is too small."""
    return min(use.free for use in uses if use.free is not None and use.modules)


def num_computing(request: Request) -> int:
    """Return how many of the devices compute: the GPUs, or the host where there are none."""
    return max(1, sum(isinstance(device.name, int) for device in request.devices))


def layouts(request: Request) -> Iterator[Layout]:
    """Yield the layouts worth comparing; accelerate computes offloaded layers on the first device."""
    sizes = [device.num_bytes for device in request.devices[: num_computing(request)]]
    firsts = [index for index, size in enumerate(sizes) if size not in sizes[:index]]  # equal devices are alike
    if request.config.tie_word_embeddings:
        yield from (Layout(index, index) for index in firsts)
    else:
        yield from (Layout(*pair) for pair in product(firsts, sorted({*firsts, len(sizes) - 1})))
    if len(request.devices) > len(sizes):
        yield from (Layout(0, 0, number) for number in range(1, request.config.num_hidden_layers + 1))


def other_modules(request: Request, layout: Layout, index: int) -> dict[str, int]:
    """Return the bytes of the modules beside layers that a device holds; the last norm sits with the LM head."""
    config, embedding = request.config, embedding_bytes(request)
    modules = (
        {"model.embed_tokens": embedding, "model.rotary_emb": 2 * config.head_dim} if index == layout.embedding else {}
    )
    if index == layout.head:
        modules |= {"model.norm": 2 * config.hidden_size * request.dtype.itemsize}
        modules |= {"lm_head": 0 if config.tie_word_embeddings else embedding}
    return modules


def passing_bytes(request: Request, layout: Layout) -> int:
    """Return the bytes of the largest linear that is brought from host or disk to be computed."""
    num_layers = request.config.num_hidden_layers
    layers, names = range(num_layers - layout.num_offloaded, num_layers), linear_shapes(request.config)
    return max((linear_bytes(request, layer, name) for layer in layers for name in names), default=0)


def layers_per_device(request: Request, layout: Layout, layers: Sequence[int]) -> list[int]:
    """Return how many layers each device gets; fewer in all than there are if host and disk are too small."""
    computing, size = num_computing(request), max(layers) + kv_cache_bytes(request)
    counts = [0] * len(request.devices)
    free = [device_use(request, layout, layers, index, range(0)).free or 0 for index in range(computing)]
    for _ in range(len(layers) - layout.num_offloaded):
        emptiest = max(range(computing), key=free.__getitem__)
        counts[emptiest] += 1
        free[emptiest] -= size
    for index in range(computing, len(counts)):
        room = device_use(request, layout, layers, index, range(0)).free
        left = len(layers) - sum(counts)
        counts[index] = left if room is None else min(left, max(0, room // max(layers)))
    return counts


def device_use(request: Request, layout: Layout, layers: Sequence[int], index: int, span: range) -> DeviceUse:
    """Return what a device holds with the layers of `span`, given the bytes of every layer."""
    device, modules = request.devices[index], other_modules(request, layout, index)
    weights = sum(modules.values()) + sum(layers[layer] for layer in span)
    names = (*modules, *(f"model.layers.{layer}" for layer in span))
    if index >= num_computing(request):
        return DeviceUse(device, names, span, weights, 0, 0, 0 if device.name == "disk" else request.reserve)
    activations, num_cached = activation_bytes(request), len(span)
    if modules:
        activations = max(activations, head_bytes(request))
    if index == layout.embedding:
        activations += passing_bytes(request, layout)
        num_cached += layout.num_offloaded
    return DeviceUse(device, names, span, weights, num_cached * kv_cache_bytes(request), activations, request.reserve)


def rank_use(request: Request, layers: Sequence[int], rank: int) -> DeviceUse:
    """Return what a tensor-parallel rank holds: its part of every layer, given their bytes, and of the embedding."""
    config, num_layers = request.config, len(layers)
    embedding = embedding_bytes(request, rank) * (1 if config.tie_word_embeddings else 2)
    others = 2 * config.head_dim + 2 * config.hidden_size * request.dtype.itemsize
    activations = max(activation_bytes(request), head_bytes(request))
    names = ("model.embed_tokens", "lm_head")
    return DeviceUse(
        request.devices[rank],
        names,
        range(num_layers),
        sum(layers) + embedding + others,
        num_layers * kv_cache_bytes(request),
        activations,
        request.reserve,
    )

"""Copies of a state in host memory, exact and independent of what training does next.

A state is what `state_dict` returns: tensors anywhere in dicts, lists, tuples and other objects. Tensors that share
memory share it in the copy, so `torch.save` and safetensors write the same file of it as of the original.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

ALIGNMENT = 16  # bytes, a multiple of the size of every dtype


class HostBuffers:
    """
    Host memory that copies are made in, kept from one copy to the next, and pinned where a device copies into it.

    Memory that is new costs more than the copy: the system clears its pages first, and CUDA pins them.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, bool], list[torch.Tensor]] = defaultdict(list)
        self._taken: Counter[tuple[int, bool]] = Counter()

    def reuse(self) -> None:
        """Give out all buffers anew, those that the last copy has not taken are freed."""
        kept = {kind: self._buffers[kind][:count] for kind, count in self._taken.items()}
        self._buffers = defaultdict(list, kept)
        self._taken.clear()

    def take(self, num_bytes: int, *, pinned: bool) -> torch.Tensor:
        """Return `(num_bytes,)` uint8 that nobody else has."""
        buffers, number = self._buffers[num_bytes, pinned], self._taken[num_bytes, pinned]
        if number == len(buffers):
            buffers.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned))
        self._taken[num_bytes, pinned] += 1
        return buffers[number]


def host_copy(state: Any, buffers: HostBuffers) -> Any:
    """
    Return a deep copy of a state whose tensors lie in host memory; it is complete when this returns.

    Args:
        state: Tensors in dicts, lists, tuples and other objects.
        buffers: Memory for the tensors, which the copy has until `buffers.reuse()`.
    """
    by_storage: dict[int, list[torch.Tensor]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in _tensors_of(state) if _is_plain(tensor)}.values():
        by_storage[tensor.untyped_storage()._cdata].append(tensor)
    memo: dict[int, Any] = {}
    for tensors in by_storage.values():
        memo |= _copy_storage(tensors, buffers)
    if any(tensors[0].device.type != "cpu" for tensors in by_storage.values()):
        torch.accelerator.synchronize()
    return copy.deepcopy(state, memo)


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (Mapping, list, tuple)):
        for part in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors_of(part)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is nothing but strides over memory; `deepcopy` copies the others on their device."""
    is_strided = tensor.layout == torch.strided and tensor.device.type != "meta"
    return type(tensor) in (torch.Tensor, nn.Parameter) and is_strided and not tensor.is_quantized


def _copy_storage(tensors: list[torch.Tensor], buffers: HostBuffers) -> dict[int, torch.Tensor]:
    """Return copies of tensors of one storage by the ids of the tensors, of its bytes those only that they have."""
    storage, device = tensors[0].untyped_storage(), tensors[0].device
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    copies = {}
    for start, end, members in _merged((*_span(tensor), tensor) for tensor in tensors):
        buffer = buffers.take(end - start, pinned=device.type == "cuda")
        buffer.copy_(whole[start:end], non_blocking=True)
        for tensor in members:
            offset = tensor.storage_offset() - start // tensor.element_size()
            view = torch.empty(0, dtype=tensor.dtype).set_(
                buffer.untyped_storage(), offset, tensor.size(), tensor.stride()
            )
            copies[id(tensor)] = _like(tensor, view)
    return copies


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in its storage a tensor begins, rounded down, and where it ends, in bytes."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return first - first % ALIGNMENT, first
    reach = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return first - first % ALIGNMENT, first + (reach + 1) * tensor.element_size()


def _merged(
    spans: Iterable[tuple[int, int, torch.Tensor]],
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """Yield spans that overlap or touch as one, with the tensors in it."""
    start, end, members = 0, 0, list[torch.Tensor]()
    for first, last, tensor in sorted(spans, key=lambda span: span[:2]):
        if members and first > end:
            yield start, end, members
            members = []
        if not members:
            start, end = first, last
        end = max(end, last)
        members.append(tensor)
    yield start, end, members


def _like(tensor: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(view, requires_grad=tensor.requires_grad)
    return view.requires_grad_(tensor.requires_grad)

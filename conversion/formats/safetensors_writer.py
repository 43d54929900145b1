"""Write a model's weights as safetensors shards, one block of rows in memory at a time.

Stored layout of a shard (the safetensors format): 8 bytes with the length of the header, little-endian; the header,
JSON padded with spaces to a multiple of 8 bytes, with dtype, shape and byte range of every tensor; then the bytes of
the tensors, in the order of the header, without gaps. Shard names, limits and index are those of `save_pretrained`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

DTYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class ShardFile:
    """
    One shard to be written, as a segment of a folder.

    Args:
        name: File name.
        units: Tensors on meta by name, in their order, in groups that are made together; a group has the name of its
            first tensor.
    """

    def __init__(self, name: str, units: dict[str, dict[str, Tensor]]) -> None:
        self.label = name
        self.units = units
        self.tensors = {name: tensor for unit in units.values() for name, tensor in unit.items()}
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self._header = _header(self.tensors)
        self.layout = self._header.decode("latin-1")
        self.end = {name: len(self._header) + self.num_bytes}

    @contextmanager
    def open(self, folder: Path) -> Iterator[Callable[[str, Tensor], None]]:
        """Yield the function that appends a contiguous block of rows to a tensor; tensors come in their order."""
        coming = [(name, tensor.nbytes) for name, tensor in reversed(self.tensors.items())]
        with open(folder / self.label, "wb") as file:
            file.write(self._header)

            def write(name: str, block: Tensor) -> None:
                due, left = coming.pop()
                assert (name, block.dtype) == (due, self.tensors[due].dtype)
                if left > block.nbytes:
                    coming.append((name, left - block.nbytes))
                file.write(block.flatten().view(torch.uint8).numpy().data)

            yield write
            assert not coming


def plan_shards(units: Mapping[str, dict[str, Tensor]], max_shard_size: int | str) -> list[ShardFile]:
    """
    Distribute groups of tensors over shards in their order.

    Args:
        units: Tensors on meta, by name, in groups that stay together; a group has the name of its first tensor.
        max_shard_size: Bytes, or a string such as `"5GB"`. A larger group gets a shard of its own.

    Returns:
        The shards, in their order.

    Raises:
        ValueError: If `max_shard_size` is not a size.
    """
    sizes = {
        name: torch.empty(sum(tensor.nbytes for tensor in unit.values()), dtype=torch.uint8, device="meta")
        for name, unit in units.items()
    }
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    return [
        ShardFile(file, {name: units[name] for name in names}) for file, names in split.filename_to_tensors.items()
    ]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return length and header of a shard that holds `tensors`."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header

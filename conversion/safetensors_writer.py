"""Write a model's weights as safetensors shards, one tensor in memory at a time.

Stored layout of a shard (the safetensors format): 8 bytes with the length of the header, little-endian; the header,
JSON padded with spaces to a multiple of 8 bytes, with dtype, shape and byte range of every tensor; then the bytes of
the tensors, in the order of the header, without gaps. Shard names, limits and index are those of `save_pretrained`.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def plan_shards(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, dict[str, Tensor]]:
    """
    Distribute tensors over shards in their order.

    Args:
        tensors: Tensors on meta, by name.
        max_shard_size: Bytes, or a string such as `"5GB"`. A larger tensor gets a shard of its own.

    Returns:
        The tensors of every shard, by file name.

    Raises:
        ValueError: If `max_shard_size` is not a size.
    """
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    return {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """
    Write one shard and flush it to the disk.

    Args:
        path: File to write.
        tensors: Tensors on meta, by name: what the shard will hold, in this order.
        read: Returns the contiguous tensor of a name, on the CPU; called when its bytes are due.
    """
    with open(path, "wb") as file:
        file.write(_header(tensors))
        for name, expected in tensors.items():
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write `model.safetensors.index.json` unless the single file of `shards` (as planned) needs none."""
    if len(shards) == 1:
        return
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


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

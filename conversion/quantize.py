"""Quantize a Hugging Face folder to another one, block by block, without loading the model.

The new folder holds what `from_pretrained(src, quantization_config=...)` and `save_pretrained` would write, and the
small files of the old one: configuration with a `quantization_config`, generation settings, tokenizer, model card.
"""

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from glm_hf.conversion.convert import converted, made_together
from glm_hf.conversion.formats.model_folder import ModelFolder
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.safetensors_writer import ShardFile, plan_shards, write_index
from glm_hf.conversion.streaming.segments import write_in_segments
from glm_hf.folders.model_folder import read_json
from glm_hf.quantization.configuration import GLMQuantizationConfig

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.index.json", ".*")


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int,
    group_size: int | None = None,
    quantize_embeddings: bool = False,
    max_shard_size: int | str = "5GB",
    resume: bool = True,
) -> None:
    """
    Quantize the weights of a model folder, with the codes and scales that `from_pretrained` gives while loading.

    Memory holds a few blocks of rows, not a tensor. Interrupted at any moment, the same call goes on where it was.

    Args:
        src: Folder of `GLMForBlankInfilling`, not quantized, as the converter and `save_pretrained` write it.
        dst: Folder to create; may exist if it is empty.
        bits: 4 or 8.
        group_size: Input features that share a scale; None for one scale per row, the released form.
        quantize_embeddings: Whether the embedding and the output matrix become INT8 too.
        max_shard_size: Largest shard in bytes, or a string such as `"5GB"`.
        resume: Whether to go on with an interrupted run for `dst`, rather than to throw away what it has left.

    Raises:
        FileNotFoundError: If `src` lacks a file.
        FileExistsError: If `dst` holds something already.
        ValueError: If `src` is not such a model, is quantized already or damaged, a weight is not finite in fp16, the
            settings do not fit the weights, or `src` has changed since an interrupted run.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    quantization = GLMQuantizationConfig(bits=bits, group_size=group_size, quantize_embeddings=quantize_embeddings)
    source = ModelFolder(src)
    if source.quantization is not None:
        raise ValueError(f"{src} is quantized to int{source.bits} already; quantize the model that is not")
    stored, dtype = source.tensors, _dtype(source)
    shards = plan_shards(made_together(model_tensors(source.config, dtype, quantization)), max_shard_size)

    def blocks_of(shard: ShardFile) -> Iterator[tuple[str, Tensor]]:
        for name, unit in shard.units.items():
            blocks = source.read(name)
            if len(unit) > 1:  # weights are quantized in the dtype that the model is loaded in
                blocks = (block.to(dtype) for block in blocks)
            yield from converted(name, blocks, stored[name].dtype, unit)

    def write_small_files(folder: Path) -> None:
        write_index(folder, shards)
        _copy_small_files(Path(src), folder)
        _write_config(Path(src), folder, dtype, quantization)

    dst = Path(dst).resolve()
    write_in_segments(dst, shards, blocks_of, write_small_files, sources=source.sources, resume=resume)


def _dtype(source: ModelFolder) -> torch.dtype:
    """Return the dtype in which `from_pretrained` loads the model: that of the config, else of the first tensor."""
    dtype = source.config.dtype or next(iter(source.tensors.values())).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _copy_small_files(src: Path, folder: Path) -> None:
    """Copy all files that hold no weights; folders in `src`, such as those of a training run, stay behind."""
    for path in src.iterdir():
        if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in WEIGHT_FILES):
            shutil.copyfile(path, folder / path.name)


def _write_config(src: Path, folder: Path, dtype: torch.dtype, quantization: GLMQuantizationConfig) -> None:
    """Write the configuration of `src` with how its weights are stored now."""
    fields = read_json(src / "config.json")
    fields |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization.to_dict()}
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")

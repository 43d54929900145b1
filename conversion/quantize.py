"""Quantize a Hugging Face folder to another one, block by block, without loading the model.

The new folder holds what `from_pretrained(src, quantization_config=...)` and `save_pretrained` would write, with the
tokenizer, model card and licence of the old one.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from glm_hf.conversion.convert import converted, made_together
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.safetensors_reader import ModelFolder
from glm_hf.conversion.formats.safetensors_writer import ShardFile, plan_shards
from glm_hf.conversion.streaming.segments import write_in_segments
from glm_hf.folders.atomic import destination
from glm_hf.folders.finite import FiniteWeights
from glm_hf.folders.model_folder import write_index, write_model_files
from glm_hf.folders.validation import read_json
from glm_hf.quantization.configuration import GLMQuantizationConfig


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int,
    group_size: int | None = None,
    quantize_embeddings: bool = False,
    max_shard_size: int | str = "5GB",
    resume: bool = True,
    overwrite: bool = False,
) -> None:
    """
    Quantize the weights of a model folder, with the codes and scales that `from_pretrained` gives while loading.

    Memory holds a few blocks of rows, not a tensor. Interrupted at any moment, the same call resumes;
    once it is complete, it does nothing.

    Args:
        src: Folder of `GLMForBlankInfilling`, not quantized, as the converter and `save_pretrained` write it.
        dst: Folder to create; may exist if it is empty.
        bits: Bits of the weights of the layers, 4 or 8.
        group_size: Input features that share a scale; None for one scale per row, the released form.
        quantize_embeddings: Whether the embedding and the LM head become INT8 too.
        max_shard_size: Largest shard in bytes, or a string such as `"5GB"`.
        resume: Whether to resume an interrupted run rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.

    Raises:
        FileNotFoundError: If `src` lacks a file.
        FileExistsError: If `dst` holds something else already.
        ValueError: If `src` is not such a model, is quantized already or damaged, a weight is not finite, or not in
            fp16, the settings do not fit the weights, or `src` has changed since an interrupted run.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    quantization = GLMQuantizationConfig(bits=bits, group_size=group_size, quantize_embeddings=quantize_embeddings)
    source = ModelFolder(src)
    if source.quantization is not None:
        raise ValueError(f"{src} is quantized to int{source.bits} already; quantize the model that is not")
    dtype = loaded_dtype(source)
    shards = plan_shards(made_together(model_tensors(source.config, dtype, quantization)), max_shard_size)

    finite = FiniteWeights(strict=True)

    def blocks_of(shard: ShardFile) -> Iterator[tuple[str, Tensor]]:
        yield from quantized_rows(source, shard.units, finite)

    def write_small_files(folder: Path) -> None:
        fields = read_json(Path(src) / "config.json")
        fields |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization.to_dict()}
        write_index(folder, {shard.label: shard.tensors for shard in shards})
        write_model_files(folder, fields, source=Path(src))

    dst = destination(dst)
    write_in_segments(
        dst, shards, blocks_of, write_small_files, sources=source.sources, resume=resume, overwrite=overwrite
    )


def quantized_rows(
    source: ModelFolder, units: dict[str, dict[str, Tensor]], finite: FiniteWeights
) -> Iterator[tuple[str, Tensor]]:
    """
    Yield what a quantized model stores in blocks of rows.

    Args:
        source: Model that is not quantized.
        units: What is made of each of its tensors, on meta by name: the tensor, and its scale if it is quantized.
        finite: Watches the values read.

    Yields:
        (name of a stored tensor, its next rows); a scale comes after its weight.
    """
    stored, dtype = source.tensors, loaded_dtype(source)
    for name, unit in units.items():
        blocks = finite.watch(name, source.read(name))
        if len(unit) > 1:  # weights are quantized in the dtype that the model is loaded in
            blocks = (block.to(dtype) for block in blocks)
        yield from converted(name, blocks, stored[name].dtype, unit)


def loaded_dtype(source: ModelFolder) -> torch.dtype:
    """Return the dtype in which `from_pretrained` loads the model: that of the config, else of the first tensor."""
    dtype = source.config.dtype or next(iter(source.tensors.values())).dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype

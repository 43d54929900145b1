"""Turn a checkpoint of 3D-parallel training into a model folder, block by block, without loading the model."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from glm_hf.conversion.convert import made_together
from glm_hf.conversion.formats.pipeline_checkpoint import EMBEDDING, Checkpoint3D
from glm_hf.conversion.formats.safetensors_writer import ShardFile, plan_shards
from glm_hf.conversion.streaming.segments import write_in_segments
from glm_hf.folders.atomic import destination
from glm_hf.folders.finite import FiniteWeights
from glm_hf.folders.model_folder import write_index, write_model_files
from glm_hf.folders.validation import read_json
from glm_hf.modeling_glm import GLMForBlankInfilling


def export_3d_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """
    Write the weights of a checkpoint of 3D-parallel training as a folder that `from_pretrained` loads.

    Weights keep their dtype, the one of the training. Memory holds a few blocks of rows, not a tensor. Interrupted at
    any moment, the same call resumes; once it is complete, it does nothing.

    Args:
        src: A checkpoint, `checkpoint-N` in the output folder of the run.
        dst: Folder to create; may exist if it is empty. It gets the tokenizer and other small files of `src`, too.
        max_shard_size: Largest shard in bytes, or a string such as `"5GB"`.
        resume: Whether to resume an interrupted export rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.
        strict: Whether NaN and infinity among the weights are an error rather than a warning.

    Raises:
        FileNotFoundError: If `src` is no such checkpoint or lacks a file.
        FileExistsError: If `dst` holds something else already.
        ValueError: If `src` is damaged, does not hold the model that its config.json tells, or its ranks have come to
            differ in what they share; if it has changed since an interrupted export.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    source = Checkpoint3D(src)
    shards = plan_shards(made_together(source.tensors), max_shard_size)
    source.check_values()
    finite = FiniteWeights(strict)

    def blocks_of(shard: ShardFile) -> Iterator[tuple[str, Tensor]]:
        for name in shard.tensors:
            for block in finite.watch(name, source.read(name)):
                yield name, block

    def write_small_files(folder: Path) -> None:
        write_index(folder, {shard.label: shard.tensors for shard in shards})
        _write_small_files(Path(src), folder, source)

    dst = destination(dst)
    write_in_segments(
        dst,
        shards,
        blocks_of,
        write_small_files,
        sources=source.sources,
        options={"strict": strict},
        resume=resume,
        overwrite=overwrite,
    )


def _write_small_files(src: Path, folder: Path, source: Checkpoint3D) -> None:
    """Write the configuration, with the weights' dtype, and what belongs to the model besides."""
    dtype = str(source.tensors[EMBEDDING].dtype).removeprefix("torch.")
    fields = read_json(src / "config.json") | {"architectures": [GLMForBlankInfilling.__name__], "dtype": dtype}
    write_model_files(folder, fields, source=src)

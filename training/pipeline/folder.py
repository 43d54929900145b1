"""Write what the stages of a pipeline hold as one Hugging Face folder, every stage its own files at the same time."""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import distributed as dist

from glm_hf.folders.atomic import sync_tree
from glm_hf.folders.model_folder import INDEX
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.sharding.rules import shard_rule
from glm_hf.training.pipeline.model import GLMPipeline
from glm_hf.training.pipeline.weights import named_weights

STAGING = ".partial-model"


def save_folder(pipeline: GLMPipeline, dst: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """
    Write the model to a folder on a file system that all processes share; all of them call this.

    Files appear when all of them are complete, and replace those of a model that is there.

    Args:
        pipeline: A process's share.
        dst: The folder; may hold other things, such as checkpoints.
        max_shard_size: Largest file in bytes, or a string such as `"5GB"`; a process holds one at a time in memory.

    Raises:
        OSError: If a file cannot be written.
    """
    dst, rank = Path(dst), dist.get_rank()
    staged = dst / STAGING
    if rank == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    dist.barrier()
    shards = plan_files(pipeline, max_shard_size)
    _write_stage(pipeline, staged, shards)
    dist.barrier()
    if rank == 0:
        _write_small_files(pipeline, staged, shards)
        sync_tree(staged)
        _replace_model(staged, dst)
    dist.barrier()


def plan_files(pipeline: GLMPipeline, max_shard_size: int | str) -> dict[str, list[str]]:
    """Return the names of the parameters of every file; a file belongs to one stage."""
    with torch.device("meta"):
        model = GLMForBlankInfilling(pipeline.config).to(pipeline.dtype)
    stages: list[dict[str, torch.Tensor]] = [{} for _ in range(pipeline.num_stages)]
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            stages[pipeline.stage_of(name)][name] = tensor
    split = [split_torch_state_dict_into_shards(stage, max_shard_size=max_shard_size) for stage in stages]
    groups = [names for stage in split for names in stage.filename_to_tensors.values()]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _write_stage(pipeline: GLMPipeline, folder: Path, shards: dict[str, list[str]]) -> None:
    """Write the files of this process's stage, by the first of its ranks."""
    _, data_rank, tensor_rank = pipeline.parallel.coordinates(dist.get_rank())
    if data_rank:
        return
    weights = dict(named_weights(pipeline))
    for file, names in shards.items():
        if pipeline.stage_of(names[0]) == pipeline.stage_id:
            tensors = {name: _joined(pipeline, name, weights[name]) for name in names}
            if tensor_rank == 0:
                save_file(tensors, folder / file, metadata={"format": "pt"})


def _joined(pipeline: GLMPipeline, name: str, part: torch.Tensor) -> torch.Tensor:
    """Return a whole parameter on the CPU of the first rank; on the others, something."""
    ranks, part = pipeline.ranks, part.detach()
    parts = [part]
    if ranks.size > 1:
        parts = [torch.empty_like(part) for _ in range(ranks.size)] if ranks.rank == 0 else []
        dist.gather(part, parts or None, group=ranks.group, group_dst=0)
    return shard_rule(name).merge(parts).cpu().contiguous() if parts else part


def _write_small_files(pipeline: GLMPipeline, folder: Path, shards: dict[str, list[str]]) -> None:
    """Write configuration, generation settings, and an index if there are several files."""
    with torch.device("meta"):
        model = GLMForBlankInfilling(pipeline.config).to(pipeline.dtype)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = pipeline.dtype
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if len(shards) > 1:
        count = model.num_parameters()
        index = {
            "metadata": {"total_parameters": count, "total_size": count * pipeline.dtype.itemsize},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace_model(staged: Path, dst: Path) -> None:
    """Move all files to their place, and remove the weights of an earlier model."""
    files = {path.name for path in staged.iterdir()}
    for path in dst.iterdir():
        if path.name not in files and re.fullmatch(
            r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX), path.name
        ):
            path.unlink()
    for name in sorted(files):
        os.replace(staged / name, dst / name)
    staged.rmdir()

"""Fill a stage's weights from a Hugging Face folder or at random, and write all stages as such a folder.

No process ever holds more than its own share and one tensor besides, or one file of the folder it writes.

Shapes: `n` tensor-parallel ranks.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn

from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.model_folder import write_index, write_model_files
from glm_hf.folders.validation import INDEX, weight_files
from glm_hf.modeling_glm import GLMForBlankInfilling, GLMLayer, GLMModel
from glm_hf.sharding.rules import ShardRule, shard_rule
from glm_hf.training.pipeline.model import GLMPipeline

STAGING = ".partial-model"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))


def named_weights(pipeline: GLMPipeline) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield this process's part of every parameter of its stage, with the parameter's name in the model."""
    for prefix, module in pipeline.named_parts():
        for name, parameter in module.named_parameters():
            yield prefix + name, parameter


def own_shard_block(parameter: torch.Tensor, rule: ShardRule, block: int) -> torch.Tensor:
    """Return the view of a rank's parameter that holds its share of one block: of `(2F/n, D)`, `(F/n, D)`."""
    assert rule.dim is not None
    return parameter.unflatten(rule.dim, (rule.blocks, -1)).select(rule.dim, block)


def whole_span(length: int, rule: ShardRule, block: int, size: int, rank: int) -> slice:
    """Return where a rank's share of a block lies along the sharded dimension, of `length`, of the whole tensor."""
    width = length // (rule.blocks * size)
    start = (block * size + rank) * width
    return slice(start, start + width)


@torch.no_grad()
def load_folder(pipeline: GLMPipeline, folder: str | Path) -> None:
    """
    Read this process's part of every weight of a model folder, as the converter and `save_pretrained` write it.

    Args:
        pipeline: Stage to be filled.
        folder: Folder of a model with the pipeline's sizes.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a weight is missing, has another shape, or a file is damaged.
    """
    places: dict[str, Path] = {}
    for path in weight_files(Path(folder)):
        with _opened(path) as file:
            places |= dict.fromkeys(file.keys(), path)
    for name, parameter in named_weights(pipeline):
        if name not in places:
            raise ValueError(f"{folder} has no {name}; it does not hold the model that config.json tells")
        with _opened(places[name]) as file:  # one at a time: what is mapped counts as memory in use
            _read_part(file.get_slice(name), name, parameter, pipeline)


def _opened(path: Path) -> safe_open:
    """Open a safetensors file; ValueError if it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; make the folder again") from error


def _read_part(stored: Any, name: str, parameter: nn.Parameter, pipeline: GLMPipeline) -> None:
    """Copy a rank's part of a stored tensor into its parameter."""
    rule, ranks = shard_rule(name), pipeline.ranks
    shape = tuple(stored.get_shape())
    expected = rule.full_shape(parameter.shape, ranks.size)
    if shape != expected:
        raise ValueError(f"{name} is {shape} in the folder, but config.json tells {expected}")
    if rule.dim is None:
        parameter.copy_(stored[:])
        return
    for block in range(rule.blocks):
        span = whole_span(shape[rule.dim], rule, block, ranks.size, ranks.rank)
        own_shard_block(parameter, rule, block).copy_(stored[span] if rule.dim == 0 else stored[:, span])


@torch.no_grad()
def initialize(pipeline: GLMPipeline, seed: int) -> None:
    """
    Draw new weights as the model does; they depend on the seed only, not on how the model is spread.

    A layer at a time is drawn as a whole, in fp32.
    """
    with torch.device("meta"):
        model = GLMModel(pipeline.config)
    for number, (prefix, module) in enumerate(pipeline.named_parts(), pipeline._local_start):
        if prefix == "model.embed_tokens." and not pipeline.is_first:
            number = 0  # the copy of the first stage's
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + number)
            whole = _drawn(model, module)
        for name, parameter in module.named_parameters():
            part = shard_rule(prefix + name).split(whole.get_parameter(name), pipeline.ranks.size)[pipeline.ranks.rank]
            parameter.copy_(part)


def _drawn(model: GLMModel, module: nn.Module) -> nn.Module:
    """Return a whole module of the kind of a stage's, with new weights."""
    config = model.config
    if isinstance(module, GLMLayer):
        whole: nn.Module = GLMLayer(config, module.attention.layer_idx)
    elif isinstance(module, nn.LayerNorm):
        whole = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    else:
        whole = nn.Embedding(config.vocab_size, config.hidden_size)
    return whole.apply(model._init_weights)  # children first, as the model does


def save_folder(pipeline: GLMPipeline, dst: str | Path, *, max_shard_size: int | str = "5GB") -> None:
    """
    Write the model to a folder on a file system that all processes share; all of them call this.

    Files appear when all of them are complete, and replace those of a model that is there.

    Args:
        pipeline: Stage of this process.
        dst: Folder of the model; may hold other things, such as checkpoints.
        max_shard_size: Largest file in bytes, or a string such as `"5GB"`; a process holds one at a time in memory.

    Raises:
        OSError: If a file cannot be written.
    """
    dst, is_first = Path(dst), dist.get_rank() == 0
    target = AtomicFolder(
        dst, home=dst / STAGING, work_name="model", completed_by="config.json", replaced_files=WEIGHT_FILES
    )
    shards = plan_files(pipeline, max_shard_size)
    with target.writing() if is_first else nullcontext(target.work) as staged:
        dist.barrier()  # the hidden folder is there
        _write_stage(pipeline, staged, shards)
        dist.barrier()  # the files of all stages are in it
        if is_first:
            _write_small_files(pipeline, staged, shards)
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
            tensors = {name: joined(pipeline, name, weights[name]) for name in names}
            if tensor_rank == 0:
                save_file(tensors, folder / file, metadata={"format": "pt"})


def joined(pipeline: GLMPipeline, name: str, part: torch.Tensor) -> torch.Tensor:
    """Return a whole parameter on the CPU of the first rank; on the others, something."""
    part = part.detach()
    parts = pipeline.ranks.gather(part)
    return shard_rule(name).merge(parts).cpu().contiguous() if parts else part


def _write_small_files(pipeline: GLMPipeline, folder: Path, shards: dict[str, list[str]]) -> None:
    """Write configuration, generation settings, and an index if there are several files."""
    with torch.device("meta"):
        model = GLMForBlankInfilling(pipeline.config).to(pipeline.dtype)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = pipeline.dtype
    weights = model.state_dict()
    write_index(folder, {file: {name: weights[name] for name in names} for file, names in shards.items()})
    write_model_files(folder, model.config)

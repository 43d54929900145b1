"""Fill a stage's weights from a Hugging Face folder or at random, and write all stages as such a folder.

No process ever holds more than its own share and one tensor besides, or one file of the folder it writes.

Shapes: `n` tensor-parallel ranks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from glm_hf.folders.model_folder import weight_files
from glm_hf.modeling_glm import GLMLayer, GLMModel
from glm_hf.sharding.rules import ShardRule, shard_rule
from glm_hf.training.pipeline.model import GLMPipeline


def named_weights(pipeline: GLMPipeline) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield this process's part of every parameter of its stage, with the parameter's name in the model."""
    for prefix, module in pipeline.named_parts():
        for name, parameter in module.named_parameters():
            yield prefix + name, parameter


def own_part(parameter: torch.Tensor, rule: ShardRule, block: int) -> torch.Tensor:
    """Return the view of a rank's parameter that holds its share of one block: of `(2F/n, D)`, `(F/n, D)`."""
    assert rule.dim is not None
    return parameter.unflatten(rule.dim, (rule.blocks, -1)).select(rule.dim, block)


def whole_span(length: int, rule: ShardRule, block: int, size: int, rank: int) -> slice:
    """Return where a rank's share of a block lies along the cut dimension, of `length`, of the whole tensor."""
    width = length // (rule.blocks * size)
    start = (block * size + rank) * width
    return slice(start, start + width)


@torch.no_grad()
def load_folder(pipeline: GLMPipeline, folder: str | Path) -> None:
    """
    Read this process's part of every weight of a model folder, as the converter and `save_pretrained` write it.

    Args:
        pipeline: To be filled.
        folder: Of a model with the pipeline's sizes.

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
        own_part(parameter, rule, block).copy_(stored[span] if rule.dim == 0 else stored[:, span])


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

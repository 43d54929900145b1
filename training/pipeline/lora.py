"""LoRA on the layers of a pipeline: the updates that PEFT would add to the model, sharded as the linears are.

Of `W x + s B A x`, the update of a column-parallel linear has a whole A and the rank's rows of B, that of a
row-parallel one the rank's columns of A and a whole B. What is whole gets its whole gradient on every rank: the
gradients of `A x` are added up over the ranks of a column-parallel linear, and `A x` itself over those of a
row-parallel one.

Shapes: `D_in`, `D_out` sizes of a linear, `r` rank of its update, `n` tensor-parallel ranks.
"""

import copy
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from glm_hf.configuration_glm import GLMConfig
from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.validation import reading
from glm_hf.modeling_glm import GLMForBlankInfilling
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.sharding.rules import ROW, shard_rule
from glm_hf.training.pipeline.collectives import TensorGroup, gather_sequence, sum_gradients, sum_hidden_states
from glm_hf.training.pipeline.tensor_parallel import mark_sharded, per_rank_random_state

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
STAGING = ".partial-adapter"
PREFIX = "base_model.model."  # of names in PEFT's files
INITIALIZATIONS = (True, "gaussian")
SHAPING = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
"""Fields of PEFT's `LoraConfig` that tell which updates there are, and their factors."""
HONOURED = {
    *(*SHAPING, "lora_dropout", "init_lora_weights"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
}
"""Fields of PEFT's `LoraConfig` that have their effect, or none on training."""


def require_lora(config: Any) -> None:
    """Raise ValueError unless a configuration of PEFT is one of an adapter that stages can have."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"under parallel, adapters are of type LORA, got {kind}; train it without parallel")
    defaults = type(config)().to_dict()
    given = [name for name, value in config.to_dict().items() if value != defaults[name] and name not in HONOURED]
    if given:
        raise ValueError(f"under parallel, LORA does not take {given[0]}; leave it out, or train without parallel")
    if config.init_lora_weights not in INITIALIZATIONS:
        raise ValueError(
            f"under parallel, init_lora_weights must be True or 'gaussian', got {config.init_lora_weights!r}"
        )


@dataclass(frozen=True)
class LoRAPlan:
    """
    Which linears of a model have updates, as PEFT finds them.

    Attributes:
        config: Configuration of PEFT, as it is saved.
        ranks: Rank of the update of every linear by its name in the model, in the model's order.
        scalings: Factor of the update of every linear.
        folder: Folder of the adapter whose training continues; None for a new one.
    """

    config: Any
    ranks: dict[str, int]
    scalings: dict[str, float]
    folder: Path | None

    @classmethod
    def of(
        cls, adapter: Any, model: str | Path | GLMConfig, config: GLMConfig, parallel: ParallelDegrees
    ) -> "LoRAPlan":
        """
        Return the plan of an adapter.

        Args:
            adapter: Configuration of PEFT, or the folder of an adapter whose training continues.
            model: Folder of the model.
            config: Configuration of the model.
            parallel: Degrees of parallelism.

        Raises:
            FileNotFoundError: If the folder lacks a file.
            ValueError: If stages cannot have this adapter.
        """
        import peft

        folder = Path(adapter) if isinstance(adapter, (str, Path)) else None
        if folder is not None:
            if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
                raise FileNotFoundError(f"{folder} must hold an adapter, as PEFT saves it, but has no {missing[0]}")
            with reading(folder / CONFIG_FILE):
                adapter = peft.PeftConfig.from_pretrained(str(folder))
        require_lora(adapter)
        if isinstance(model, GLMConfig):
            raise ValueError("an adapter is saved without its model: give the folder of a model, not a GLMConfig")
        adapter = copy.deepcopy(adapter)
        with torch.device("meta"):
            whole = peft.inject_adapter_in_model(adapter, GLMForBlankInfilling(config), low_cpu_mem_usage=True)
        layers = {name: m for name, m in whole.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        adapter.base_model_name_or_path, adapter.inference_mode = str(model), True  # as PEFT saves them
        ranks = {name: layer.r["default"] for name, layer in layers.items()}
        scalings = {name: layer.scaling["default"] for name, layer in layers.items()}
        plan = cls(adapter, ranks, scalings, folder)
        plan.require_fits(config, parallel)
        return plan

    def require_fits(self, config: GLMConfig, parallel: ParallelDegrees) -> None:
        """Raise ValueError unless the stages of a model can have these updates."""
        if others := [name for name in self.ranks if not name.startswith("model.layers.")]:
            raise ValueError(f"under parallel, target_modules must be linears of layers, got {others[0]}")
        for stage, layers in enumerate(parallel.stage_layers(config.num_hidden_layers)):
            if not any(layer_of(name)[0] in layers for name in self.ranks):
                raise ValueError(f"every stage must have a layer with an adapter, but stage {stage} has none")
        if parallel.tp_size > 1 and self.config.lora_dropout and config.attention_dropout:
            raise ValueError("lora_dropout with tp_size above 1 needs attention_dropout 0 in the model's overrides")

    def require_same(self, folder: Path) -> None:
        """Raise ValueError unless a checkpoint is of an adapter with the same updates."""
        import peft

        with reading(folder / CONFIG_FILE):
            saved = peft.PeftConfig.from_pretrained(str(folder))
        for name in SHAPING:
            there, here = getattr(saved, name, None), getattr(self.config, name)
            if there != here:
                raise ValueError(f"{folder} is of another adapter: its {name} is {there}, but here it is {here}")


def layer_of(name: str) -> tuple[int, str]:
    """Return the layer of a linear, and its name in that layer."""
    _, _, layer, inner = name.split(".", 3)
    return int(layer), inner


def add_lora(pipeline: Any, plan: LoRAPlan, seed: int) -> None:
    """
    Add an adapter to a stage, whose other weights are trained no more.

    Args:
        pipeline: Stage of this process, with its weights.
        plan: Which linears have updates.
        seed: Seed of new weights, which do not depend on how the model is spread.

    Raises:
        ValueError: If the folder of the adapter is damaged, or holds another one.
    """
    pipeline.requires_grad_(False)
    pipeline.adapter = plan
    parts = dict(pipeline.named_parts())
    for number, (name, r) in enumerate(plan.ranks.items()):
        layer, inner = layer_of(name)
        if f"model.layers.{layer}." not in parts:
            continue
        linear = parts[f"model.layers.{layer}."].get_submodule(inner)
        _add_update(linear, name, r, plan, pipeline.ranks)
        place = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
        _draw(linear.lora_A.weight, name, pipeline.ranks, int(place >> np.uint64(1)), plan.config)
        mark_sharded(linear, f"{name}.", pipeline.ranks)
        for weight in (linear.lora_A.weight, linear.lora_B.weight):
            weight.ds_pipe_replicated = False
    if plan.folder is not None:
        _load(pipeline, plan)


def _add_update(linear: Any, name: str, r: int, plan: LoRAPlan, ranks: TensorGroup) -> None:
    """Give a linear of a stage an update of zero, as modules `lora_A` and `lora_B` of its own."""
    like = {"dtype": linear.weight.dtype, "device": linear.weight.device, "bias": False}
    linear.lora_A = nn.Linear(linear.in_features, r, **like)  # (r, D_in), or (r, D_in/n)
    linear.lora_B = nn.Linear(r, linear.out_features, **like)  # (D_out/n, r), or (D_out, r)
    nn.init.zeros_(linear.lora_B.weight)
    is_row = shard_rule(f"{name}.weight") == ROW
    dropout = plan.config.lora_dropout
    linear.register_forward_hook(
        partial(_updated, scaling=plan.scalings[name], dropout=dropout, is_row=is_row, ranks=ranks)
    )


def _updated(
    linear: Any,
    inputs: tuple[torch.Tensor],
    output: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    is_row: bool,
    ranks: TensorGroup,
) -> torch.Tensor:
    """Return the output of a linear with its update; of inputs of its own every rank drops others."""
    [x] = inputs
    if dropout and linear.training:
        has_own = ranks.size > 1 and (is_row or ranks.sequence_parallel)
        with per_rank_random_state(ranks.rank) if has_own else nullcontext():
            x = F.dropout(x, dropout)
    low = linear.lora_A(x)  # (B, L, r), of a slice of the tokens where x is one
    low = sum_hidden_states(low, ranks) if is_row else sum_gradients(gather_sequence(low, ranks), ranks)
    return output + linear.lora_B(low) * scaling


@torch.no_grad()
def _draw(weight: torch.Tensor, name: str, ranks: TensorGroup, seed: int, config: Any) -> None:
    """Fill a rank's A with new values, as PEFT draws them."""
    rule = shard_rule(f"{name}.lora_A.weight")
    whole = torch.empty(rule.full_shape(weight.shape, ranks.size))  # (r, D_in)
    generator = torch.Generator().manual_seed(seed)
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(whole, std=1 / len(whole), generator=generator)
    else:
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    weight.copy_(rule.split(whole, ranks.size)[ranks.rank])


def _named_updates(pipeline: Any) -> dict[str, nn.Parameter]:
    """Return this process's part of the weights of its stage's updates, by their names in the model."""
    from glm_hf.training.pipeline.weights import named_weights

    return {name: weight for name, weight in named_weights(pipeline) if weight.requires_grad}


@torch.no_grad()
def _load(pipeline: Any, plan: LoRAPlan) -> None:
    """Read a rank's part of the weights of an adapter's folder."""
    assert plan.folder is not None
    path = plan.folder / WEIGHTS_FILE
    with reading(path):
        stored = load_file(path)
    names = {f"{PREFIX}{name}.lora_{part}.weight" for name in plan.ranks for part in "AB"}
    if names != stored.keys():
        odd = min(names ^ stored.keys())
        raise ValueError(f"{path} {'lacks' if odd in names else 'has an unknown'} {odd}; it is of another model")
    for name, weight in _named_updates(pipeline).items():
        rule, whole = shard_rule(name), stored[PREFIX + name]
        expected = rule.full_shape(weight.shape, pipeline.ranks.size)
        if whole.shape != expected:
            raise ValueError(f"{path}: {name} is {tuple(whole.shape)}, but the model takes {expected}")
        weight.copy_(rule.split(whole, pipeline.ranks.size)[pipeline.ranks.rank])


def save_adapter(pipeline: Any, dst: str | Path) -> None:
    """
    Write the adapter as PEFT does, to a folder on a file system that all processes share; all of them call this.

    Args:
        pipeline: Stage of this process.
        dst: Folder; may hold other things, such as checkpoints.

    Raises:
        OSError: If a file cannot be written.
    """
    from glm_hf.training.pipeline.weights import joined

    dst, is_first = Path(dst), dist.get_rank() == 0
    _, data_rank, tensor_rank = pipeline.parallel.coordinates(dist.get_rank())
    replaced = re.compile(re.escape(WEIGHTS_FILE))
    target = AtomicFolder(
        dst, home=dst / STAGING, work_name="adapter", completed_by=CONFIG_FILE, replaced_files=replaced
    )
    with target.writing() if is_first else nullcontext(target.work) as staged:
        dist.barrier()  # the hidden folder is there
        if data_rank == 0:
            tensors = {PREFIX + name: joined(pipeline, name, w) for name, w in _named_updates(pipeline).items()}
            if tensor_rank == 0:
                save_file(tensors, staged / f"stage-{pipeline.stage_id}.safetensors")
        dist.barrier()  # the files of all stages are in it
        if is_first:
            parts = sorted(staged.glob("stage-*.safetensors"))
            whole = {name: tensor for part in parts for name, tensor in load_file(part).items()}
            save_file(whole, staged / WEIGHTS_FILE, metadata={"format": "pt"})
            for part in parts:
                part.unlink()
            pipeline.adapter.config.save_pretrained(staged)
    dist.barrier()

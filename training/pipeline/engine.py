"""DeepSpeed's pipeline engine as GLM is trained with it: its configuration, its start, and a look before each update.

ZeRO stage 1 always: without it, the engine's clipping and norms leave out parameters that several ranks hold. Higher
stages shard gradients that a pipeline still adds to.
"""

import json
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.optim import Optimizer
from transformers.utils import logging

from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.saving.plain_writer import require_plain_writer

BUCKET_SIZE = 50_000_000  # elements; DeepSpeed's 500 million would take 2 GB more in fp32


def deepspeed_3d_config(
    tp_size: int,
    pp_size: int,
    dp_size: int,
    *,
    micro_batch_size: int = 1,
    global_batch_size: int | None = None,
    precision: str = "fp16",
    max_grad_norm: float = 1.0,
    base: dict[str, Any] | str | Path | None = None,
) -> dict[str, Any]:
    """
    Return the configuration of DeepSpeed for a pipeline, ready to be written as JSON.

    Args:
        tp_size: Number of tensor-parallel ranks.
        pp_size: Number of pipeline stages.
        dp_size: Number of replicas of the model.
        micro_batch_size: Samples of a micro-batch.
        global_batch_size: Samples of a step; by default a micro-batch per replica and stage, the least that keeps all
            stages busy at once.
        precision: Precision of the weights, `"fp16"`, `"bf16"` or `"fp32"`; in 16 bits, the optimizer keeps fp32
            weights, and gradients add up in fp32.
        max_grad_norm: Norm at which gradients are clipped, 0 for no clipping.
        base: Further keys of DeepSpeed, or a JSON file of them; those above win.

    Raises:
        ValueError: If a size is impossible, or `base` asks for ZeRO-2 or 3, an optimizer on the CPU, other dtypes or
            another writer of checkpoints.
    """
    ParallelDegrees(tp_size, pp_size, dp_size)
    given = _decided(json.loads(Path(base).read_text()) if isinstance(base, (str, Path)) else base or {})
    require_plain_writer(given)
    buckets = dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), BUCKET_SIZE)
    zero = buckets | given.get("zero_optimization", {})
    if zero.get("stage", 1) != 1:
        raise ValueError(f"a pipeline needs ZeRO stage 1, got {zero['stage']}; leave the stage out")
    if "offload_optimizer" in zero:
        raise ValueError("a pipeline keeps its optimizer on the GPUs; leave offload_optimizer out, or raise dp_size")
    if "data_types" in given:
        raise ValueError("in a pipeline, gradients add up in fp32; leave data_types out")
    if precision not in ("fp16", "bf16", "fp32"):
        raise ValueError(f"precision must be fp16, bf16 or fp32, got {precision!r}")
    per_round = micro_batch_size * dp_size
    global_batch_size = per_round * pp_size if global_batch_size is None else global_batch_size
    steps = -(-global_batch_size // per_round)
    config = given | {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": steps,
        "train_batch_size": steps * per_round,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero | {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    for name in ("fp16", "bf16"):
        config[name] = given.get(name, {}) | {"enabled": precision == name}
    return config


def _decided(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those that transformers would decide, at any depth."""
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {key: _decided(value) if isinstance(value, dict) else value for key, value in kept.items()}


def start_deepspeed() -> None:
    """Prepare DeepSpeed in a process of an initialized process group."""
    import deepspeed

    # Or it tries its compilers to see which operators can be had, and on a CPU builds one that nothing here uses.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.get_verbosity())
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def make_engine(pipeline: Any, optimizer: Optimizer, config: dict[str, Any]) -> Any:
    """Return the engine that trains a pipeline by `optimizer`, whose learning rate is the caller's to change."""
    from glm_hf.training.pipeline.fp32_gradients import FP32GradientsEngine

    with redirect_stdout(sys.stderr):
        return FP32GradientsEngine(pipeline, optimizer, config)


def check_before_update(engine: Any, may_update: Callable[[], bool]) -> None:
    """
    Ask `may_update` before every update, when the gradients of a step are reduced but not clipped.

    Args:
        engine: Engine of a pipeline.
        may_update: Called on all ranks at the same time, which must agree; False leaves the update out.
    """
    optimizer = engine.optimizer
    update = optimizer.step

    def step() -> None:
        if may_update():
            update()
            return
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))  # in place, as parameters refer to them
        optimizer.overflow = True  # which the engine counts as a step left out

    optimizer.step = step


def global_norm(engine: Any) -> float:
    """Return the norm of all gradients before an update, without a loss scale; infinity if one is not finite."""
    norm = float(engine.optimizer.scaled_global_norm())
    return norm / engine.optimizer.loss_scale if math.isfinite(norm) else math.inf


def summed(values: list[torch.Tensor], group: dist.ProcessGroup | None = None) -> list[float]:
    """Return the sums of some scalars over all processes, or over those of a group."""
    packed = torch.stack([value.detach().double().reshape(()) for value in values])
    dist.all_reduce(packed, group=group)
    return packed.tolist()

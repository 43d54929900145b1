"""Runs of a small model under 3D parallelism, on forked processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked import run_ranks, start, wait
from small_runs import RECIPE, Texts, make_arguments, make_trainer

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training import DataCollatorForBlankInfilling, GLM3DTrainer

SETTINGS = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "global_batch_size": 16,
    "embedding_gradient_shrink": 0.3,
    "max_grad_norm": 0.5,  # below every norm, so that all gradients are clipped
}
EVALUATED = 10  # samples


def allow_half_on_cpu() -> None:
    """DeepSpeed refuses fp16 where the processor has no instructions for it, though torch computes it."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True


def save_deep_model(source: Path, folder: Path, **changes: Any) -> Path:
    """Save a model of 4 layers with the tokens of `source`, of sizes that 4 ranks can share."""
    config = GLMConfig.from_pretrained(source, num_hidden_layers=4, **changes)
    config.vocab_size += -config.vocab_size % 8
    torch.manual_seed(0)
    model = GLMForBlankInfilling(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)  # biases that count, and norms that differ
    model.save_pretrained(folder)
    return folder


def make_3d_trainer(
    model: Path | GLMConfig,
    folder: Path,
    degrees: dict,
    *,
    dropout: float = 0.0,
    data: Any = None,
    objects: dict | None = None,
    **changes: Any,
) -> GLM3DTrainer:
    """Return a trainer; `objects` are further arguments of its own."""
    allow_half_on_cpu()
    args = make_arguments(folder, **(SETTINGS | changes), parallel=degrees)
    config = model if isinstance(model, GLMConfig) else GLMConfig.from_pretrained(model)
    config.hidden_dropout = config.attention_dropout = dropout
    return GLM3DTrainer(
        model,
        args,
        DataCollatorForBlankInfilling(config, RECIPE, seed=3),
        train_dataset=Texts() if data is None else data,
        eval_dataset=Texts(EVALUATED),
        config=config,
        **(objects or {}),
    )


def logs_of(trainer: Any, key: str = "loss") -> list[dict]:
    return [entry for entry in trainer.state.log_history if key in entry]


def train_3d(model: Path, folder: Path, degrees: dict, *, resume: Path | None = None, **changes: Any) -> list[dict]:
    """Train, save the model as `folder/model`, and return what was logged, which all ranks agree on."""

    def rank_main(rank: int) -> tuple[list[dict], list[dict]]:
        trainer = make_3d_trainer(model, folder, degrees, **changes)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model(str(folder / "model"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return same_on_all(rank_main, degrees, folder)


def train_alone(model: Path, folder: Path, **changes: Any) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train in one process, and return what was logged, and the weights at the end."""

    def whole() -> list[dict]:
        trainer = make_trainer(model, folder / "run", eval_dataset=Texts(EVALUATED), **(SETTINGS | changes))
        trainer.train()
        trainer.save_model(str(folder / "model"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return wait(start(whole, folder / "result"), folder / "result"), weights_of(folder / "model")


def same_on_all(rank_main: Callable[[int], Any], degrees: dict, folder: Path) -> Any:
    """Run a function on as many processes as degrees tell, and return what all of them return."""
    folder.mkdir(exist_ok=True, parents=True)
    first, *others = run_ranks(rank_main, ParallelDegrees.of(degrees).world_size, folder)
    assert all(other == first for other in others)
    return first


def without_times(entry: dict) -> dict:
    return {name: value for name, value in entry.items() if "second" not in name and "runtime" not in name}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = GLMForBlankInfilling.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def largest_difference(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    """Return how far the weights of a folder are from others."""
    found = weights_of(folder)
    assert found.keys() == weights.keys()
    return max(float((found[name] - weights[name]).abs().max()) for name in weights)

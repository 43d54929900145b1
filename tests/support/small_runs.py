"""Short training runs of a tiny model on random texts."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset, IterableDataset

from glm_hf import GLMForBlankInfilling
from glm_hf.training import DataCollatorForBlankInfilling, GLMTrainer, GLMTrainingArguments, InfillingRecipe

EXAMPLES = Path(__file__).parents[2] / "examples" / "training"
RECIPE = InfillingRecipe(row_length=48, window_length=24)


def zero(stage: int) -> dict:
    """The configuration that users are given, for a device without fp16."""
    return json.loads((EXAMPLES / f"zero{stage}.json").read_text())


def prepare_deepspeed() -> None:
    """
    Import once what every forked process would take seconds to import; without DeepSpeed, skip the test.

    It is kept from compiling an operator that nothing here uses, for minutes.
    """
    pytest.importorskip("deepspeed")
    import deepspeed.module_inject.auto_ep_layer  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, compiles a function
    import torch._dynamo  # noqa: F401

    import glm_hf.training.pipeline.weights  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Texts(Dataset):
    """Ordinary features."""

    def __init__(self, number: int = 24) -> None:
        rng = np.random.default_rng(0)
        self.texts = [rng.integers(30, 500, rng.integers(4, 20)).tolist() for _ in range(number)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> dict:
        return {"input_ids": self.texts[number]}


class Stream(IterableDataset):
    """Features one after another."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict]:
        return (self.data[number] for number in range(len(self.data)))


class SomeTwice:
    """A collator of one's own that makes two rows of some features, so that processes have unequal numbers."""

    def __init__(self, collator: DataCollatorForBlankInfilling, every: int) -> None:
        self.collator, self.every = collator, every

    def __call__(self, features: list[dict]) -> dict:
        return self.collator([f for f in features for _ in range(1 + (f["sample_id"] % self.every == 0))])


def make_arguments(folder: Path, **changes) -> GLMTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "global_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "warmup_share": 0.2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return GLMTrainingArguments(**(settings | changes))


def make_trainer(
    model_folder: Path,
    folder: Path,
    *,
    dropout: float = 0.0,
    data=None,
    eval_dataset=None,
    callbacks=(),
    objects: dict | None = None,
    args: GLMTrainingArguments | None = None,
    **changes,
) -> GLMTrainer:
    """Return a trainer; `objects` are further arguments of its own, `args` stand instead of `changes`."""
    model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32", hidden_dropout=dropout)
    given = {
        "model": model,
        "data_collator": DataCollatorForBlankInfilling(model.config, RECIPE, seed=3),
        "train_dataset": Texts() if data is None else data,
        "eval_dataset": eval_dataset,
        "callbacks": list(callbacks),
    }
    return GLMTrainer(args=make_arguments(folder, **changes) if args is None else args, **(given | (objects or {})))


def losses(trainer: GLMTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

"""Runs of transformers' own Trainer on the rows, and in the order, of GLMTrainer."""

from pathlib import Path
from typing import Any

from small_runs import RECIPE, Texts
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from glm_hf import GLMForBlankInfilling
from glm_hf.training import DataCollatorForBlankInfilling
from glm_hf.training.data.sampler import ShuffledEpochs


class InOrder(Dataset):
    """An epoch of a dataset in the order of `GLMTrainer`, each item with its `sample_id`."""

    def __init__(self, dataset: Any, seed: int = 42) -> None:
        self.items = ShuffledEpochs(dataset, seed)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict:
        return self.items[number]


def make_plain(
    model_folder: Path, folder: Path, *, data: Any = None, model: Any = None, objects: dict | None = None, **changes
) -> Trainer:
    """Return a Trainer that goes over the rows once; `objects` are arguments of its own."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if model is None:
        model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32", hidden_dropout=0.0)
    collator = DataCollatorForBlankInfilling(model.config, RECIPE, seed=3)
    given = {"data_collator": collator, "train_dataset": InOrder(Texts()) if data is None else data}
    return Trainer(model, TrainingArguments(**(settings | changes)), **(given | (objects or {})))


def logged(trainer: Any, *names: str) -> list[list[float]]:
    """Return what was logged of every step."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]

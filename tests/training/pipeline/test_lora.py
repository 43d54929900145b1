"""LoRA on the layers of a pipeline against PEFT on the whole model in one process."""

import json
from pathlib import Path

import peft
import pytest
import torch
from forked import start, wait
from pipeline_runs import EVALUATED, SETTINGS, logs_of, make_3d_trainer, same_on_all, without_times
from safetensors.torch import load_file
from small_runs import RECIPE, Texts, make_arguments

from glm_hf import GLMForBlankInfilling
from glm_hf.training import DataCollatorForBlankInfilling, GLMTrainer

ALL = {"tp_size": 2, "pp_size": 2, "dp_size": 2}
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CLIPPED = {"max_grad_norm": 0.05}  # below every norm, so that all gradients are clipped
SAVING = CLIPPED | {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
EXACT = 1e-5  # of losses, norms and weights: sums in another order


def lora(**changes) -> peft.LoraConfig:
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "target_modules": LINEARS} | changes)


def save_adapter_of_peft(model: Path, folder: Path, **changes) -> Path:
    """Save an adapter that changes the model's answers."""
    torch.manual_seed(0)
    whole = peft.get_peft_model(GLMForBlankInfilling.from_pretrained(model, dtype="float32"), lora(**changes))
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    whole.save_pretrained(folder)
    return folder


def train_in_one_process(model: Path, adapter: Path, folder: Path, **changes) -> list[dict]:
    """Train the adapter by PEFT, save it as `folder/adapter`, and return what was logged."""

    def whole():
        base = GLMForBlankInfilling.from_pretrained(model, dtype="float32", hidden_dropout=0.0)
        trained = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
        args = make_arguments(folder / "alone", **(SETTINGS | changes))
        collator = DataCollatorForBlankInfilling(base.config, RECIPE, seed=3)
        trainer = GLMTrainer(trained, args, collator, train_dataset=Texts(), eval_dataset=Texts(EVALUATED))
        trainer.train()
        trainer.save_model(str(folder / "adapter"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return wait(start(whole, folder / "result"), folder / "result")


def train_in_a_pipeline(model: Path, adapter, folder: Path, degrees: dict, resume=None, **changes) -> list[dict]:
    """Train the adapter, save it as `folder/adapter`, and return what was logged, which all ranks agree on."""

    def rank_main(rank: int):
        trainer = make_3d_trainer(model, folder, degrees, objects={"peft_config": adapter}, **changes)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model(str(folder / "adapter"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return same_on_all(rank_main, degrees, folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def largest_difference(folder: Path, other: Path) -> float:
    found, expected = weights_of(folder), weights_of(other)
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def compare(found: list[dict], expected: list[dict]) -> None:
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, abs=EXACT), theirs["step"]


@pytest.fixture(scope="module")
def adapter(deep_folder, tmp_path_factory) -> Path:
    return save_adapter_of_peft(deep_folder, tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture(scope="module")
def alone(deep_folder, adapter, tmp_path_factory):
    """Folder of one process, and what it logs."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train_in_one_process(deep_folder, adapter, folder, **SAVING)


@pytest.fixture(scope="module")
def spread(deep_folder, adapter, tmp_path_factory):
    """Folder of a run on 8 processes with checkpoints, and what it logs."""
    folder = tmp_path_factory.mktemp("spread") / "run"
    return folder, train_in_a_pipeline(deep_folder, adapter, folder, ALL, **SAVING)


def test_eight_processes_train_an_adapter_as_peft_does_in_one(alone, spread, adapter):
    (whole, expected), (folder, history) = alone, spread
    assert len(logs_of_history(history)) == 10
    compare(history[:-1], expected[:-1])  # the last entry sums up the run
    assert largest_difference(folder / "adapter", whole / "adapter") <= EXACT
    assert largest_difference(folder / "adapter", adapter) > 1e-2  # it has learned
    assert min(entry["grad_norm"] for entry in logs_of_history(history)) > CLIPPED["max_grad_norm"]


def logs_of_history(history: list[dict]) -> list[dict]:
    return [entry for entry in history if "loss" in entry]

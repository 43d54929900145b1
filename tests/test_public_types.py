"""What type checkers know of the public names: `mypy` reads this file, and would not accept `Any` for any of them."""

from typing import assert_type

import glm_hf
from glm_hf.conversion.verify import VerificationReport, verify_checkpoint
from glm_hf.planning import Plan, plan_devices
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training import GLM3DTrainer, GLMTrainer, GLMTrainingArguments


def check_trainers(trainer: GLMTrainer, trainer_3d: GLM3DTrainer, arguments: GLMTrainingArguments) -> None:
    assert_type(trainer, glm_hf.training.GLMTrainer)
    assert_type(trainer.data_rank, int)
    assert_type(trainer_3d.parallel, ParallelDegrees)
    assert_type(arguments.warmup_share, float)


def check_models(model: glm_hf.GLMForBlankInfilling, config: glm_hf.GLMConfig) -> None:
    assert_type(config.hidden_size, int)
    assert_type(plan_devices(config, []), Plan)
    assert_type(model.num_parameters(), int)


def check_the_rest(quantization: glm_hf.GLMQuantizationConfig) -> None:
    assert_type(quantization.num_groups("attention.dense", 64), int)
    assert_type(verify_checkpoint("folder"), VerificationReport)


def test_public_classes_are_those_of_their_modules() -> None:
    assert glm_hf.training.GLMTrainer is GLMTrainer
    assert GLMTrainer.__module__ == "glm_hf.training.trainer"

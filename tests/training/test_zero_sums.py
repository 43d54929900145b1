"""Sums of many gradients under ZeRO, in 16 bits, against the same gradients added up in fp64."""

from functools import partial

import pytest
import torch
from forked import run_ranks
from pipeline_runs import allow_half_on_cpu
from small_runs import Texts, make_trainer, prepare_deepspeed, zero
from torch import distributed as dist

prepare_deepspeed()
NUM_MICRO_BATCHES = 176
MOST_ERROR = 1e-4  # of the norm of all gradients


def errors(trainer) -> float:
    """Train one step and return the norm of what its gradients have lost, as a share of their norm."""
    from deepspeed.utils import safe_get_full_grad

    parameters = dict(trainer.model.named_parameters())
    sums = {}

    def add(name: str, gradient: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + gradient.double()

    for name, parameter in parameters.items():
        parameter.register_hook(partial(add, name))
    found = {}
    check = trainer._check_step

    def look(norm: float) -> bool:
        found.update({name: safe_get_full_grad(parameter).double() for name, parameter in parameters.items()})
        return check(norm)

    trainer._check_step = look
    trainer.train()
    for total in sums.values():
        dist.all_reduce(total)
    expected, actual = (torch.cat([part[name].flatten() for name in parameters]) for part in (sums, found))
    actual *= expected.dot(actual) / actual.dot(actual)  # they are divided by what DeepSpeed sees fit
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (1, "fp16"), (2, "bf16"), (3, "bf16"), (3, "fp16")])
def test_gradients_of_many_micro_batches_lose_nothing(model_folder, tmp_path, stage, precision):
    def rank_main(rank: int) -> float:
        allow_half_on_cpu()
        settings = {"max_steps": 1, "per_device_train_batch_size": 1, "global_batch_size": NUM_MICRO_BATCHES}
        settings |= {"data": Texts(NUM_MICRO_BATCHES), "deepspeed": zero(stage), precision: True}
        return errors(make_trainer(model_folder, tmp_path, **settings))

    assert max(run_ranks(rank_main, 2, tmp_path)) < MOST_ERROR


def test_sixteen_bits_without_zero_are_refused(model_folder, tmp_path):
    def rank_main(rank: int) -> None:
        with pytest.raises(ValueError, match="deepspeed without ZeRO adds up gradients in 16 bits"):
            make_trainer(model_folder, tmp_path, deepspeed=zero(1) | {"zero_optimization": {"stage": 0}}, bf16=True)

    run_ranks(rank_main, 1, tmp_path)

"""Sums of many gradients in 16 bits against the same gradients added up in fp64."""

from functools import partial

import pytest
import torch
from forked import run_ranks
from pipeline_runs import make_3d_trainer
from small_runs import Texts
from torch import distributed as dist

MOST_ERROR = 1e-4  # of the norm of all gradients
STAGES = {"tp_size": 1, "pp_size": 2, "dp_size": 1}


def errors(trainer) -> float:
    """Train one step and return the norm of what its gradients have lost, as a share of their norm."""
    model = trainer.model
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in parameters.items()}

    def add(name: str, gradient: torch.Tensor) -> None:
        sums[name] += gradient

    for name, parameter in parameters.items():
        parameter.register_hook(partial(add, name))
    found = {}
    may_update = trainer._may_update

    def look() -> bool:
        for name, parameter in parameters.items():
            fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            found[name] = fragment.double().reshape(parameter.shape)
        return may_update()

    trainer._may_update = look
    trainer.train()
    for weight, group in model.get_tied_weights_and_groups():
        name = next(name for name, parameter in parameters.items() if parameter is weight)
        dist.all_reduce(sums[name], group=group)
    lost = sum(float((found[name] - sums[name]).square().sum()) for name in sums)
    return (lost / sum(float(total.square().sum()) for total in sums.values())) ** 0.5


@pytest.mark.parametrize(("precision", "num_micro_batches"), [("bf16", 528), ("fp16", 176)])
def test_gradients_of_many_micro_batches_lose_nothing(deep_folder, tmp_path, precision, num_micro_batches):
    def rank_main(rank: int) -> float:
        settings = {"max_steps": 1, "per_device_train_batch_size": 1, "global_batch_size": num_micro_batches}
        scale = {"fp16": {"initial_scale_power": 8}}
        data = Texts(num_micro_batches)
        trainer = make_3d_trainer(
            deep_folder, tmp_path, STAGES, data=data, deepspeed=scale, **settings, **{precision: True}
        )
        return errors(trainer)

    assert max(run_ranks(rank_main, 2, tmp_path)) < MOST_ERROR

"""Norms and residuals of a slice of the tokens on every tensor-parallel rank, against whole ones."""

from pathlib import Path

import pytest
import torch
from forked import run_ranks, start, wait
from pipeline_runs import EVALUATED, SETTINGS, train_3d, weights_of, without_times
from small_runs import Texts, make_trainer
from torch import distributed as dist

from glm_hf import GLMConfig
from glm_hf.modeling_glm import GLMLayer
from glm_hf.sharding.rules import REPLICATED, shard_rule
from glm_hf.training.pipeline.collectives import TensorGroup
from glm_hf.training.pipeline.tensor_parallel import shard_layer

SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "mask_token_id": 2, "gmask_token_id": 3, "smask_token_id": 4}
CONFIG = GLMConfig(
    vocab_size=36, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=30,
    **SPECIAL, eod_token_id=5, sop_token_id=6, eop_token_id=7,
)  # fmt: skip
ALL = {"tp_size": 2, "pp_size": 2, "dp_size": 2, "sequence_parallel": True}
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
RUN |= {"per_device_eval_batch_size": 2}
EXACT = 1e-5  # of losses, norms and weights: sums in another order


def in_group(function, size: int, folder) -> list:
    """Run `function(ranks)` on as many processes, each with a slice of the tokens."""

    def rank_main(rank: int):
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        return function(TensorGroup(size, rank, dist.group.WORLD, sequence_parallel=True))

    return run_ranks(rank_main, size, folder)


@pytest.mark.parametrize("size", [2, 3])
def test_slices_of_a_layer_are_those_of_the_whole_one(tmp_path, size):
    """Outputs, the gradient of the input, each rank's part of sharded parameters, and sums of the others."""
    CONFIG._attn_implementation = "eager"
    torch.manual_seed(1)
    whole = GLMLayer(CONFIG, 1).double()
    inputs = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    positions = (torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64))
    outputs = whole(inputs, position_embeddings=positions)
    weight = torch.randn_like(outputs)
    (outputs * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}

    def of_rank(ranks):
        with torch.device("meta"):
            layer = GLMLayer(CONFIG, 1).double()
        layer = shard_layer(layer, ranks).to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(shard_rule(name).split(whole.get_parameter(name), size)[ranks.rank])
        mine = inputs.detach().chunk(size, 1)[ranks.rank].clone().requires_grad_()
        found = layer(mine, position_embeddings=positions)
        (found * weight.chunk(size, 1)[ranks.rank]).sum().backward()
        return found.detach(), mine.grad, {name: parameter.grad for name, parameter in layer.named_parameters()}

    states, input_gradients, gradients = zip(*in_group(of_rank, size, tmp_path), strict=True)
    assert torch.allclose(torch.cat(states, 1), outputs, atol=1e-12)
    assert torch.allclose(torch.cat(input_gradients, 1), inputs.grad, atol=1e-12)
    for name, whole_gradient in expected.items():
        parts = [of_rank[name] for of_rank in gradients]
        rule = shard_rule(name)
        found = torch.stack(parts).sum(0) if rule == REPLICATED else rule.merge(parts)
        assert torch.allclose(found, whole_gradient, atol=1e-12), name


@pytest.fixture(scope="module")
def alone(deep_folder, tmp_path_factory):
    """What one process logs, and the weights it ends with."""
    folder = tmp_path_factory.mktemp("alone")

    def train():
        trainer = make_trainer(deep_folder, folder / "run", eval_dataset=Texts(EVALUATED), **(SETTINGS | RUN))
        trainer.train()
        trainer.save_model(str(folder / "model"))
        return [without_times(entry) for entry in trainer.state.log_history]

    return wait(start(train, folder / "result"), folder / "result"), weights_of(folder / "model")


@pytest.fixture(scope="module")
def spread(deep_folder, tmp_path_factory):
    """Folder of a run on 8 processes with checkpoints, and what it logs."""
    folder = tmp_path_factory.mktemp("spread") / "run"
    return folder, train_3d(deep_folder, folder, ALL, **RUN)


def compare(found: list[dict], expected: list[dict]) -> None:
    """Compare all that was logged while training and evaluating, but for the summary at the end."""
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for mine, theirs in zip(found[:-1], expected[:-1], strict=True):
        assert mine == pytest.approx(theirs, abs=EXACT), theirs["step"]


def largest_difference(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    found = weights_of(folder)
    return max(float((found[name] - weight).abs().max()) for name, weight in weights.items())


def test_eight_processes_train_as_one_does(alone, spread):
    folder, history = spread
    compare(history, alone[0])
    assert largest_difference(folder / "model", alone[1]) <= EXACT

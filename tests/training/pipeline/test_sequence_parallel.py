"""Norms and residuals of a slice of the tokens on every tensor-parallel rank, against whole ones."""

import pytest
import torch
from forked import run_ranks, start, wait
from memory_peaks import peak_of
from pipeline_runs import (
    SETTINGS,
    largest_difference,
    logs_of,
    make_3d_trainer,
    train_3d,
    train_alone,
    without_times,
)
from small_runs import make_trainer
from torch import distributed as dist

from glm_hf import GLMConfig
from glm_hf.planning.training_memory import RECOMPUTE, Shape, activation_bytes, stage_parameters
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training.pipeline.micro_batches import pad_batch

ALL = {"tp_size": 2, "pp_size": 2, "dp_size": 2, "sequence_parallel": True}
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
RUN |= {"per_device_eval_batch_size": 2}
EXACT = 1e-5  # of losses, norms and weights: sums in another order


@pytest.fixture(scope="module")
def alone(deep_folder, tmp_path_factory):
    """What one process logs, and the weights it ends with."""
    return train_alone(deep_folder, tmp_path_factory.mktemp("alone"), **RUN)


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


def steps(history: list[dict]) -> list[dict]:
    return [entry for entry in history if "loss" in entry]


def test_eight_processes_train_as_one_does(alone, spread):
    folder, history = spread
    compare(history, alone[0])
    assert largest_difference(folder / "model", alone[1]) <= EXACT


def test_a_run_resumes_without_slices(deep_folder, tmp_path, spread):
    folder, history = spread
    whole = ALL | {"sequence_parallel": False}
    compare(train_3d(deep_folder, tmp_path / "run", whole, resume=folder / "checkpoint-2", **RUN), history)
    assert not (folder / "checkpoint-2" / "global_step2_universal").exists()  # weights are sharded alike


def test_a_checkpoint_of_whole_rows_is_resumed_from_with_slices(deep_folder, tmp_path, spread):
    whole = {"tp_size": 2, "pp_size": 1, "dp_size": 1}
    train_3d(deep_folder, tmp_path / "whole", whole, **RUN)
    again = tmp_path / "again"
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    compare(train_3d(deep_folder, again, whole | {"sequence_parallel": True}, resume=checkpoint, **RUN), spread[1])


class Odd:
    """A collator whose rows have a token more than its own, which is padding."""

    def __init__(self, collator) -> None:
        self.collator, self.recipe = collator, collator.recipe

    def __call__(self, features):
        batch = self.collator(features)
        return pad_batch(batch, len(batch["input_ids"]), batch["input_ids"].shape[1] | 1, 0)

    def __getattr__(self, name: str):
        return getattr(self.collator, name)


def test_rows_are_padded_to_equal_slices(deep_folder, tmp_path):
    degrees = {"tp_size": 2, "pp_size": 2, "dp_size": 1, "sequence_parallel": True}

    def train(trainer):
        trainer.data_collator = Odd(trainer.data_collator)
        trainer.train()
        return [without_times(entry) for entry in logs_of(trainer)]

    def whole():
        return train(make_trainer(deep_folder, tmp_path / "alone", **(SETTINGS | {"max_steps": 2})))

    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", degrees, max_steps=2)
        history = train(trainer)
        return history, trainer.shape[1]

    (history, length), *_ = run_ranks(rank_main, 4, tmp_path)
    expected = wait(start(whole, tmp_path / "result"), tmp_path / "result")
    assert length % 2 == 0
    for mine, theirs in zip(history, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=EXACT)


def test_slices_that_would_not_be_equal_are_refused(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(
            deep_folder, tmp_path / "run", {"tp_size": 2, "sequence_parallel": True}, max_steps=1
        )
        with pytest.raises(ValueError, match=r"tp_size \(2\) must divide the length of the rows, got 7; pad them"):
            trainer.model((torch.ones(3, 1, 7, dtype=torch.long),))

    run_ranks(rank_main, 2, tmp_path)


def test_sixteen_bits_stay_close(deep_folder, tmp_path, alone):
    history = train_3d(deep_folder, tmp_path / "run", ALL | {"dp_size": 1}, bf16=True, **RUN)
    for name in ("loss", "grad_norm"):
        expected = [entry[name] for entry in steps(alone[0])]
        assert [entry[name] for entry in steps(history)] == pytest.approx(expected, abs=1e-2)


def test_ranks_draw_dropout_of_their_slices_apart(deep_folder, tmp_path):
    def rank_main(rank: int):
        degrees = {"tp_size": 2, "sequence_parallel": True}
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", degrees, dropout=0.5, max_steps=2)
        layer, drawn = trainer.model.layers[0], []
        layer.mlp.register_forward_hook(lambda *_: drawn.append(torch.rand(3)))
        trainer.train()
        replicated = [p.detach() for p in trainer.model.parameters() if not p.tensor_model_parallel]
        return torch.stack(drawn), replicated

    (drawn, whole), (other_drawn, other_whole) = run_ranks(rank_main, 2, tmp_path)
    assert (drawn != other_drawn).all()
    assert all(map(torch.equal, whole, other_whole))


@pytest.mark.parametrize("is_sliced", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_activations_of_a_rank_are_those_of_the_plan(deep_folder, tmp_path, recompute, is_sliced):
    """Within 10%, forward and backward, of the whole model on two ranks, whose gradients are there already."""
    config = GLMConfig.from_pretrained(
        deep_folder, hidden_size=128, intermediate_size=344, num_attention_heads=4, num_hidden_layers=4
    )
    parallel = ParallelDegrees(2, sequence_parallel=is_sliced)
    shape = Shape(config, parallel, 4, 2, 256, "fp32")

    def rank_main(rank: int) -> int:
        from glm_hf.training.pipeline.engine import start_deepspeed
        from glm_hf.training.pipeline.model import GLMPipeline
        from glm_hf.training.pipeline.weights import initialize

        dist.init_process_group("gloo")
        start_deepspeed()
        pipeline = GLMPipeline(config, parallel, torch.float32).train()
        initialize(pipeline, seed=0)
        if recompute != "none":
            pipeline.activation_checkpointing_enable({"recompute_granularity": recompute})
        for parameter in pipeline.parameters():
            parameter.grad = torch.zeros_like(parameter)

        def work() -> None:
            ids = torch.randint(30, 500, (shape.micro_batch, shape.sequence))
            layout = torch.stack((ids, torch.arange(shape.sequence).expand_as(ids), torch.ones_like(ids)))
            pipeline.loss_of(pipeline((layout,)), (ids, 1.0)).backward()

        return peak_of(work)

    added = 4 * max(elements for _, elements in stage_parameters(shape, 0))  # a gradient before it is added
    outputs = 2 * shape.state_bytes  # of two micro-batches, which DeepSpeed's engine would keep
    planned = activation_bytes(shape, 0, 1, recompute) - outputs + added
    for measured in run_ranks(rank_main, 2, tmp_path):
        assert measured == pytest.approx(planned, rel=0.1)

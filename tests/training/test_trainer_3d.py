"""Tensor x pipeline x data parallel training against one process that runs GLMTrainer on the whole model."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from forked import run_ranks, start, wait
from pipeline_runs import (
    EVALUATED,
    SETTINGS,
    largest_difference,
    logs_of,
    make_3d_trainer,
    same_on_all,
    save_deep_model,
    train_3d,
    train_alone,
    weights_of,
    without_times,
)
from small_runs import SomeTwice, Texts, make_trainer

from glm_hf import GLMConfig
from glm_hf.conversion import export_3d_checkpoint
from glm_hf.sharding.degrees import ParallelDegrees
from glm_hf.training import GLM3DTrainer
from glm_hf.training.pipeline.evaluation import EVAL_ROUNDS

ALL = {"tp_size": 2, "pp_size": 2, "dp_size": 2}
SAVING = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
SAVING |= {"per_device_eval_batch_size": 2}  # 5 batches, which 2 copies of the model cannot share equally
EXACT = 1e-5  # of losses, norms and weights: sums in another order


@pytest.fixture(scope="module")
def alone(deep_folder, tmp_path_factory):
    """What one process logs and the weights it ends with."""
    return train_alone(deep_folder, tmp_path_factory.mktemp("alone"), **SAVING)


@pytest.fixture(scope="module")
def spread(deep_folder, tmp_path_factory):
    """Folder of a run on 8 processes with checkpoints, and what it logs."""
    folder = tmp_path_factory.mktemp("spread") / "run"
    return folder, train_3d(deep_folder, folder, ALL, **SAVING)


def compare(found: list[dict], expected: list[dict], tolerance: float) -> None:
    """Compare all that both have logged while training, or evaluating."""
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, abs=tolerance), theirs["step"]


def steps(history: list[dict]) -> list[dict]:
    return [entry for entry in history if "loss" in entry]


def test_eight_processes_train_as_one_does(alone, spread):
    folder, history = spread
    assert len(steps(history)) == 10
    compare(history[:-1], alone[0][:-1], EXACT)  # the last entry sums up the run
    assert largest_difference(folder / "model", alone[1]) <= EXACT


def test_a_checkpoint_becomes_a_folder(tmp_path, spread):
    folder, _ = spread
    export_3d_checkpoint(folder / "checkpoint-10", tmp_path / "model")
    assert largest_difference(tmp_path / "model", weights_of(folder / "model")) == 0


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(4, 1, 2), (2, 2, 1)])
def test_other_degrees_train_as_one_process_does(deep_folder, tmp_path, alone, pipeline, tensor, data):
    degrees = {"tp_size": tensor, "pp_size": pipeline, "dp_size": data}
    history = train_3d(deep_folder, tmp_path / "run", degrees)
    compare(steps(history), steps(alone[0]), EXACT)
    assert largest_difference(tmp_path / "run" / "model", alone[1]) <= EXACT


@pytest.mark.parametrize(("precision", "pipeline"), [("fp16", 2), ("bf16", 1)])
def test_sixteen_bits_stay_close(deep_folder, tmp_path, precision, pipeline):
    """At a rate with which rounding does not grow faster than the model learns."""
    options = {"learning_rate": 3e-3}

    def train():
        trainer = make_trainer(deep_folder, tmp_path / "alone", **(SETTINGS | options))
        trainer.train()
        return logs_of(trainer)

    expected = wait(start(train, tmp_path / "result"), tmp_path / "result")
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1
    degrees = ALL | {"pp_size": pipeline}
    found = steps(train_3d(deep_folder, tmp_path / "run", degrees, **options, **{precision: True}))
    for name in ("loss", "grad_norm", "embedding_grad_norm"):
        assert [entry[name] for entry in found] == pytest.approx([entry[name] for entry in expected], abs=2e-3)
    assert next(iter(weights_of(tmp_path / "run" / "model").values())).dtype == torch.float32


def test_a_run_goes_on_exactly_where_a_checkpoint_was(deep_folder, tmp_path, spread):
    folder, history = spread
    again = train_3d(deep_folder, tmp_path / "run", ALL, resume=folder / "checkpoint-8", **SAVING)
    assert steps(again) == steps(history)
    assert not (folder / "checkpoint-8" / "global_step8_universal").exists()  # nothing had to be cut anew
    assert largest_difference(tmp_path / "run" / "model", weights_of(folder / "model")) == 0


@pytest.mark.parametrize(
    ("pipeline", "tensor", "data", "partition"), [(4, 1, 1, None), (1, 2, 1, None), (2, 2, 2, [1, 3])]
)
def test_a_run_goes_on_with_other_degrees(deep_folder, tmp_path, spread, pipeline, tensor, data, partition):
    folder, history = spread
    degrees = {"tp_size": tensor, "pp_size": pipeline, "dp_size": data, "partition": partition}
    killed_before = folder / "checkpoint-4" / ".global_step4_universal.partial" / "zero"
    killed_before.mkdir(parents=True, exist_ok=True)
    again = train_3d(deep_folder, tmp_path / "run", degrees, resume=folder / "checkpoint-4", **SAVING)
    compare(again[:-1], history[:-1], EXACT)
    assert largest_difference(tmp_path / "run" / "model", weights_of(folder / "model")) <= EXACT
    assert (folder / "checkpoint-4" / "latest_universal").read_text() == "global_step4_universal"


def test_a_tied_matrix_comes_from_unequal_stages(deep_folder, tmp_path):
    """The copy of the last stage, which another part of the optimizer updates, must not be taken for a part."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unequal, equal = {"pp_size": 2, "dp_size": 2, "partition": [1, 3]}, {"pp_size": 2, "dp_size": 2}
    history = train_3d(deep_folder, tmp_path / "run", unequal, **options)
    again = train_3d(deep_folder, tmp_path / "again", equal, resume=tmp_path / "run" / "checkpoint-2", **options)
    compare(again[:-1], history[:-1], EXACT)
    config = json.loads((tmp_path / "run" / "checkpoint-2" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_an_output_matrix_of_its_own(model_folder, deep_folder, tmp_path):
    """It is cut as the embedding is, trained apart, and joined again."""
    untied = save_deep_model(model_folder, tmp_path / "model", tie_word_embeddings=False)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def train():
        trainer = make_trainer(untied, tmp_path / "alone", **(SETTINGS | options))
        trainer.train()
        trainer.save_model(str(tmp_path / "alone" / "model"))
        return [without_times(entry) for entry in logs_of(trainer)]

    expected = wait(start(train, tmp_path / "result"), tmp_path / "result")
    degrees = {"tp_size": 2, "pp_size": 2, "dp_size": 1}
    compare(steps(train_3d(untied, tmp_path / "run", degrees, **options)), expected, EXACT)
    again = train_3d(untied, tmp_path / "again", {"dp_size": 2}, resume=tmp_path / "run" / "checkpoint-2", **options)
    compare(steps(again), expected, EXACT)
    weights = weights_of(tmp_path / "alone" / "model")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert largest_difference(tmp_path / "run" / "model", weights) <= EXACT
    assert largest_difference(tmp_path / "again" / "model", weights) <= EXACT
    export_3d_checkpoint(tmp_path / "run" / "checkpoint-4", tmp_path / "exported")
    assert largest_difference(tmp_path / "exported", weights_of(tmp_path / "run" / "model")) == 0


def test_dropout_is_drawn_again_for_checkpointed_activations_and_resumed_runs(deep_folder, tmp_path):
    """A layer that is computed twice, or in another process after a resume, must drop the same."""
    degrees = {"tp_size": 2, "pp_size": 1, "dp_size": 1}
    options = {"dropout": 0.2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    history = train_3d(deep_folder, tmp_path / "plain", degrees, **options)
    checkpointed = train_3d(deep_folder, tmp_path / "less", degrees, activation_checkpointing=True, **options)
    resumed = train_3d(deep_folder, tmp_path / "again", degrees, resume=tmp_path / "plain" / "checkpoint-2", **options)
    assert steps(checkpointed) == steps(history)
    assert steps(resumed) == steps(history)


def test_ranks_of_a_layer_drop_alike_but_for_their_heads(deep_folder, tmp_path):
    """What is dropped from the residuals must be the same on both, and of the attention another for every head."""
    degrees = {"tp_size": 2, "pp_size": 1, "dp_size": 1}

    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", degrees, dropout=0.5, max_steps=2)
        layer = trainer.model.layers[0]
        drawn = []
        layer.attention.query_key_value.register_forward_hook(lambda *_: drawn.append(torch.rand(3)))
        layer.mlp.register_forward_hook(lambda *_: drawn.append(torch.rand(3)))
        trainer.train()
        whole = [trainer.model.forward_funcs[-2].weight, layer.attention.dense.bias]
        return torch.stack(drawn[0::2]), torch.stack(drawn[1::2]), [parameter.detach() for parameter in whole]

    (heads, rest, whole), (other_heads, other_rest, other_whole) = run_ranks(rank_main, 2, tmp_path)
    assert (heads != other_heads).all()
    assert torch.equal(rest, other_rest)
    assert len(rest.unique(dim=0)) == len(rest)  # another time, another draw
    assert len(heads.unique(dim=0)) == len(heads)
    assert all(map(torch.equal, whole, other_whole))


def test_the_batch_grows_as_it_does_in_one_process(deep_folder, tmp_path):
    ramp = {"max_steps": -1, "train_samples": 60, "batch_ramp_start": 4, "batch_ramp_share": 0.6}
    degrees = {"tp_size": 1, "pp_size": 2, "dp_size": 2}
    history = train_3d(deep_folder, tmp_path / "run", degrees, **ramp)

    def train():
        trainer = make_trainer(deep_folder, tmp_path / "alone", **(SETTINGS | ramp))
        trainer.train()
        return [without_times(entry) for entry in logs_of(trainer)]

    expected = wait(start(train, tmp_path / "result"), tmp_path / "result")
    assert len({after["samples"] - before["samples"] for before, after in pairwise(expected)}) > 2
    compare(steps(history), expected, EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.2},
        {"loss_normalization": "micro_batch"},
        {"lr_scheduler_type": "linear", "warmup_steps": 1, "warmup_share": 0.005},
        {"optim": "sgd", "learning_rate": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_have_the_effect_of_one_process(deep_folder, tmp_path, options):
    degrees = {"tp_size": 2, "pp_size": 1, "dp_size": 2}
    options = options | {"max_steps": 3}

    def train(trainer):
        trainer.train()
        return [without_times(entry) for entry in logs_of(trainer)], trainer.evaluate()["eval_loss"]

    def whole():
        settings = SETTINGS | options
        trainer = make_trainer(deep_folder, tmp_path / "alone", eval_dataset=Texts(EVALUATED), **settings)
        return train(trainer)

    history, eval_loss = same_on_all(
        lambda rank: train(make_3d_trainer(deep_folder, tmp_path / "run", degrees, **options)), degrees, tmp_path
    )
    expected, expected_eval_loss = wait(start(whole, tmp_path / "result"), tmp_path / "result")
    compare(history, expected, EXACT)
    assert eval_loss == pytest.approx(expected_eval_loss, abs=EXACT)


def test_rows_that_are_not_shared_equally_are_filled_up(deep_folder, tmp_path):
    """A collator of one's own may give a copy of the model more rows than the other, and pieces of unequal size."""
    options = {"max_steps": 3, "global_batch_size": 12}
    degrees = {"tp_size": 1, "pp_size": 2, "dp_size": 2}

    def train(trainer):
        trainer.data_collator = SomeTwice(trainer.data_collator, every=5)
        trainer.train()
        return [without_times(entry) for entry in logs_of(trainer)]

    def whole():
        return train(make_trainer(deep_folder, tmp_path / "alone", **(SETTINGS | options)))

    history = same_on_all(
        lambda rank: train(make_3d_trainer(deep_folder, tmp_path / "run", degrees, **options)),
        degrees,
        tmp_path / "run",
    )
    compare(history, wait(start(whole, tmp_path / "result"), tmp_path / "result"), EXACT)


def test_all_ranks_log_the_same(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(
            deep_folder, tmp_path / "run", {"tp_size": 2, "pp_size": 2, "dp_size": 1}, max_steps=1, peak_tflops=0.001
        )
        trainer.train()
        [log] = logs_of(trainer)
        rows = [sample for sample, _ in trainer.meter.losses_of_rows()]
        return (trainer.flops_per_token, trainer.state.total_flos), log["tokens_per_second"], log["mfu"], rows

    def whole():
        trainer = make_trainer(deep_folder, tmp_path / "alone", **(SETTINGS | {"max_steps": 1}))
        trainer.train()
        return trainer.flops_per_token, trainer.state.total_flos

    expected = wait(start(whole, tmp_path / "result"), tmp_path / "result")
    ranks = run_ranks(rank_main, 4, tmp_path)
    for found, speed, share, _ in ranks:
        assert found == pytest.approx(expected)
        assert share == pytest.approx(found[0] * speed / (4 * 1e9))
    assert [len(rows) for *_, rows in ranks] == [0, 0, 16, 0]  # every row is counted once


def test_the_best_model_comes_back_at_the_end(deep_folder, tmp_path):
    """The worst, in fact, which is the earliest."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    history = train_3d(deep_folder, tmp_path / "run", {"pp_size": 2}, save_total_limit=2, **options)
    first, last = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert first > last
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    for number, is_same in ((2, True), (4, False)):
        export_3d_checkpoint(tmp_path / "run" / f"checkpoint-{number}", tmp_path / str(number))
        assert (largest_difference(tmp_path / str(number), weights_of(tmp_path / "run" / "model")) == 0) == is_same


def test_evaluation_before_training(deep_folder, tmp_path):
    """Of more batches than are evaluated in one go."""
    single = {"per_device_eval_batch_size": 1}
    assert EVALUATED > EVAL_ROUNDS * 2

    def rank_main(rank: int) -> float:
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", {"tp_size": 1, "pp_size": 2, "dp_size": 1}, **single)
        return trainer.evaluate()["eval_loss"]

    def whole() -> float:
        trainer = make_trainer(deep_folder, tmp_path / "alone", eval_dataset=Texts(EVALUATED), **(SETTINGS | single))
        return trainer.evaluate()["eval_loss"]

    expected = wait(start(whole, tmp_path / "result"), tmp_path / "result")
    assert same_on_all(rank_main, {"pp_size": 2}, tmp_path / "ranks") == pytest.approx(expected, abs=EXACT)


def test_a_checkpoint_of_the_model_only_is_a_folder(deep_folder, tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    train_3d(deep_folder, tmp_path / "run", {"pp_size": 2}, **options)
    weights = weights_of(tmp_path / "run" / "model")
    assert largest_difference(tmp_path / "run" / "checkpoint-1", weights) == 0
    assert not (tmp_path / "run" / "checkpoint-1" / "parallel.json").exists()


def test_steps_and_places_draw_apart_but_ranks_of_a_layer_alike():
    def seed(rank: int, step: int = 3, seed: int = 1) -> int:
        parallel = ParallelDegrees(tp_size=2, pp_size=2, dp_size=2)
        stage, data_rank, _ = parallel.coordinates(rank)
        args, state = SimpleNamespace(seed=seed), SimpleNamespace(global_step=step)
        return GLM3DTrainer._seed_of_step(SimpleNamespace(args=args, state=state, stage=stage, data_rank=data_rank))

    assert [seed(rank) == seed(rank + 1) for rank in range(0, 8, 2)] == [True] * 4
    assert len({seed(0), seed(2), seed(4), seed(6), seed(0, step=4), seed(0, seed=2)}) == 6
    assert all(0 <= seed(rank) < 2**63 for rank in range(8))


def test_a_new_model_follows_the_seed(deep_folder, tmp_path):
    config = GLMConfig.from_pretrained(deep_folder)

    def rank_main(rank: int) -> list[float]:
        trainers = [make_3d_trainer(config, tmp_path / "run", {}, seed=seed) for seed in (1, 1, 2)]
        return [float(trainer.model.layers[0].mlp.dense_4h_to_h.weight.sum()) for trainer in trainers]

    first, again, other = same_on_all(rank_main, {}, tmp_path / "ranks")
    assert first == again != other

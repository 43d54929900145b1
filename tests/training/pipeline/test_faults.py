"""What goes wrong in 3D-parallel training: divergence, impossible settings, checkpoints of something else."""

import json
import math
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from forked import run_ranks, start, wait
from pipeline_runs import SETTINGS, logs_of, make_3d_trainer, same_on_all, train_3d, weights_of, without_times
from small_runs import make_arguments, make_trainer
from transformers.trainer_utils import get_last_checkpoint

from glm_hf import GLMConfig
from glm_hf.folders.checksums import write_checksums
from glm_hf.training import DivergenceError, GLM3DTrainer
from glm_hf.training.pipeline.checkpoint import require_own
from glm_hf.training.pipeline.engine import BUCKET_SIZE, deepspeed_3d_config

EXAMPLES = Path(__file__).parents[3] / "examples" / "training"

DEGREES = {"tp_size": 2, "pp_size": 2, "dp_size": 1}


def spoil(trainer, step: int, by: float) -> None:
    """Multiply the loss of a step, where it is computed."""
    loss_of = trainer.model.loss_fn

    def spoiled(*args):
        return loss_of(*args) * (by if trainer.state.global_step == step - 1 and trainer.model.training else 1)

    trainer.model.loss_fn = spoiled


@pytest.mark.parametrize("action", ["skip", "lower_alpha"])
def test_a_step_that_is_not_finite_is_left_out_as_in_one_process(deep_folder, tmp_path, action):
    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", DEGREES, max_steps=4, divergence_action=action)
        spoil(trainer, 3, math.nan)
        trainer.train()
        trainer.save_model(str(tmp_path / "run" / "model"))
        return trainer.alpha_factor, trainer.engine.skipped_steps, logs_of(trainer)[-1]["loss"]

    def whole():
        trainer = make_trainer(
            deep_folder, tmp_path / "alone", **(SETTINGS | {"max_steps": 4, "divergence_action": action})
        )
        measure = trainer.compute_loss

        def spoiled(*args, **kwargs):
            loss = measure(*args, **kwargs)
            return loss * math.nan if trainer.state.global_step == 2 else loss

        trainer.compute_loss = spoiled
        trainer.train()
        trainer.save_model(str(tmp_path / "alone" / "model"))
        return trainer.alpha_factor, logs_of(trainer)[-1]["loss"]

    factor, loss = wait(start(whole, tmp_path / "result"), tmp_path / "result")
    assert same_on_all(rank_main, DEGREES, tmp_path / "ranks") == (factor, 1, pytest.approx(loss, abs=1e-5))
    found, expected = weights_of(tmp_path / "run" / "model"), weights_of(tmp_path / "alone" / "model")
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= 1e-5
    [event] = json.loads((tmp_path / "run" / "divergence.json").read_text())
    [known] = json.loads((tmp_path / "alone" / "divergence.json").read_text())
    assert event["step"] == known["step"] == 3
    assert event["reason"] == known["reason"]
    assert {row["sample"] for row in event["samples"]} == {row["sample"] for row in known["samples"]}


def test_a_diverging_step_stops_all_ranks_before_its_update(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", DEGREES, max_steps=4)
        spoil(trainer, 2, math.inf)
        with pytest.raises(DivergenceError, match="before the update of step 2: the loss is inf"):
            trainer.train()
        return all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters())

    assert same_on_all(rank_main, DEGREES, tmp_path / "ranks")


def test_a_leap_of_the_embeddings_gradient_is_left_out_as_in_one_process(deep_folder, tmp_path):
    """Of a gradient that is finite nothing may reach the weights, nor the next step."""
    degrees = {"pp_size": 2, "dp_size": 2}
    options = {"max_steps": 24, "divergence_action": "skip"}

    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", degrees, **options)
        spoil(trainer, 22, 1e3)
        trainer.train()
        trainer.save_model(str(tmp_path / "run" / "model"))
        return trainer.engine.skipped_steps, [without_times(entry) for entry in logs_of(trainer)]

    def whole():
        trainer = make_trainer(deep_folder, tmp_path / "alone", **(SETTINGS | options))
        measure = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: (
            measure(*args, **kwargs) * (1e3 if trainer.state.global_step == 21 else 1)
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "alone" / "model"))
        return [without_times(entry) for entry in logs_of(trainer)]

    expected = wait(start(whole, tmp_path / "result"), tmp_path / "result")
    skipped, history = same_on_all(rank_main, degrees, tmp_path / "ranks")
    assert skipped == 1
    for found, known in zip(history, expected, strict=True):
        assert found == pytest.approx(known, rel=1e-5, abs=2e-5), known["step"]
    found, known = weights_of(tmp_path / "run" / "model"), weights_of(tmp_path / "alone" / "model")
    assert max(float((found[name] - known[name]).abs().max()) for name in known) <= 5e-5  # after 24 steps
    [event] = json.loads((tmp_path / "run" / "divergence.json").read_text())
    assert event["step"] == 22
    assert "the norm of the embedding's gradient is" in event["reason"]


def test_a_gradient_that_is_not_finite_stops_all_ranks_though_the_loss_is(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", DEGREES, max_steps=3)
        if rank == 3:
            weight = trainer.model.layers[-1].mlp.dense_4h_to_h.weight
            weight.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step == 1 else 1))
        with pytest.raises(DivergenceError, match="before the update of step 2: the norm of the gradient is inf"):
            trainer.train()
        return True

    assert same_on_all(rank_main, DEGREES, tmp_path / "ranks")


def test_norms_before_the_update_are_without_the_loss_scale(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", {"pp_size": 2}, max_steps=3, fp16=True)
        seen = []
        check = trainer._check_step
        trainer._check_step = lambda norm: seen.append(norm) or check(norm)
        trainer.train()
        return seen, [entry["grad_norm"] for entry in logs_of(trainer)], trainer.engine.skipped_steps

    seen, logged, skipped = same_on_all(rank_main, {"pp_size": 2}, tmp_path / "ranks")
    assert skipped == 0
    assert seen == pytest.approx(logged, rel=1e-5)


def test_an_overflow_of_fp16_lowers_the_loss_scale_only(deep_folder, tmp_path):
    def rank_main(rank: int):
        trainer = make_3d_trainer(
            deep_folder,
            tmp_path / "run",
            {"pp_size": 2},
            max_steps=3,
            fp16=True,
            deepspeed={"fp16": {"initial_scale_power": 30, "hysteresis": 1}},
        )
        trainer.train()
        return trainer.engine.skipped_steps, trainer.engine.optimizer.loss_scale, trainer.state.global_step

    skipped, scale, step = same_on_all(rank_main, {"pp_size": 2}, tmp_path / "ranks")
    assert (skipped, scale, step) == (3, 2.0**27, 3)
    assert not (tmp_path / "run" / "divergence.json").exists()


def test_a_killed_process_is_named_and_the_run_goes_on_from_its_last_checkpoint(deep_folder, tmp_path):
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    expected = train_3d(deep_folder, tmp_path / "whole", DEGREES, **saving)
    victim = 1

    def rank_main(rank: int):
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", DEGREES, **saving)
        if rank == victim:
            forward = trainer.model.forward

            def killed(inputs):
                if trainer.state.global_step == 4:  # in the middle of step 5
                    os.kill(os.getpid(), signal.SIGKILL)
                return forward(inputs)

            trainer.model.forward = killed
        with pytest.raises(ConnectionError) as error:
            trainer.train()
        return str(error.value)

    begin = time.monotonic()
    results = run_ranks(rank_main, 4, tmp_path, killed=(victim,))
    assert time.monotonic() - begin < 60
    for message in results[:victim] + results[victim + 1 :]:
        assert f"rank {victim} (host {socket.gethostname()}, pid " in message
        assert "has stopped answering; the run ends here" in message
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert last.endswith("checkpoint-4")
    again = train_3d(deep_folder, tmp_path / "run", DEGREES, resume=last, **saving)
    assert again[:-1] == expected[:-1]
    found, whole = (weights_of(tmp_path / folder / "model") for folder in ("run", "whole"))
    assert all(torch.equal(found[name], weight) for name, weight in whole.items())


def errors_of(rank_main, world_size: int, folder) -> set[str]:
    """Return what `rank_main(rank)` raises on all ranks, which must be the same."""

    def caught(rank: int) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            rank_main(rank)
        return str(error.value)

    folder.mkdir(exist_ok=True)
    return set(run_ranks(caught, world_size, folder))


@pytest.mark.parametrize(
    ("degrees", "settings", "message"),
    [
        ({"tp_size": 3}, {}, "takes 3 processes, but 2 were started"),
        ({"tp_size": 2, "heads": 2}, {}, "parallel takes tp_size, pp_size, dp_size, partition"),
        ({"pp_size": 2, "partition": [1, 2]}, {}, "partition must hold the 4 layers of the model, got 3"),
        ({"pp_size": 2}, {"deepspeed": {"zero_optimization": {"stage": 2}}}, "a pipeline needs ZeRO stage 1, got 2"),
        ({"pp_size": 2}, {"deepspeed": {"zero_optimization": {"stage": 3}}}, "a pipeline needs ZeRO stage 1, got 3"),
        ({"dp_size": 2}, {"global_batch_size": 5}, "2 processes cannot share a batch of 5 samples"),
        (None, {}, "GLM3DTrainer takes GLMTrainingArguments with parallel"),
    ],
)
def test_impossible_settings_are_one_error_on_all_ranks(deep_folder, tmp_path, degrees, settings, message):
    def rank_main(rank: int):
        make_3d_trainer(deep_folder, tmp_path / "run", degrees, **settings).train()

    [error] = errors_of(rank_main, 2, tmp_path / "ranks")
    assert message in error


def test_a_model_that_cannot_be_spread_is_one_error_on_all_ranks(deep_folder, tmp_path):
    def with_config(degrees: dict, **changes):
        config = GLMConfig.from_pretrained(deep_folder, **changes)
        return lambda rank: GLM3DTrainer(config, make_arguments(tmp_path / "run", parallel=degrees))

    [error] = errors_of(with_config({"tp_size": 2}, num_attention_heads=1), 2, tmp_path / "heads")
    assert "tp_size must divide num_attention_heads (1), got 2" in error
    [error] = errors_of(with_config({"pp_size": 2}, num_hidden_layers=1), 2, tmp_path / "layers")
    assert "pp_size must be at most the number of layers (1), got 2" in error


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 1024},
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2},  # of which no shape tells
        {"intermediate_size": 128},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_checkpoint_of_a_model_of_other_sizes_is_refused(deep_folder, tmp_path, change):
    config = GLMConfig.from_pretrained(deep_folder)
    config.save_pretrained(tmp_path)
    (tmp_path / "parallel.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="latest"):
        require_own(tmp_path, config)
    (tmp_path / "latest").write_text("global_step1")
    require_own(tmp_path, config)
    with pytest.raises(ValueError, match=f"of another model: its {next(iter(change))} is"):
        require_own(tmp_path, GLMConfig.from_pretrained(deep_folder, **change))


def test_a_batch_is_counted_by_copies_of_the_model(tmp_path):
    def rank_main(rank: int) -> int | None:
        settings = {"global_batch_size": None, "per_device_train_batch_size": 3}
        return make_arguments(tmp_path, parallel={"tp_size": 2}, **settings).global_batch_size

    assert run_ranks(rank_main, 2, tmp_path) == [3, 3]


def test_the_trainer_of_whole_models_refuses_degrees(deep_folder, tmp_path):
    with pytest.raises(ValueError, match=r"args.parallel is for GLM3DTrainer"):
        make_trainer(deep_folder, tmp_path, parallel={"dp_size": 1})


def test_a_quantized_model_is_refused(deep_folder, tmp_path):
    fields = json.loads((deep_folder / "config.json").read_text())
    (tmp_path / "model").mkdir()
    quantization = {"quant_method": "glm130b", "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields | {"quantization_config": quantization}))

    def rank_main(rank: int):
        make_3d_trainer(tmp_path / "model", tmp_path / "run", {})

    [error] = errors_of(rank_main, 1, tmp_path / "ranks")
    assert "is quantized, whose weights cannot be trained" in error


def test_checkpoints_of_something_else_are_refused(deep_folder, tmp_path):
    train_3d(deep_folder, tmp_path / "run", {"pp_size": 2}, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"

    def resume(model, folder):
        return lambda rank: make_3d_trainer(model, tmp_path / "again", {"pp_size": 2}).train(str(folder))

    config = json.loads((checkpoint / "config.json").read_text())
    wider = GLMConfig.from_dict(config | {"intermediate_size": 128})
    [error] = errors_of(resume(wider, checkpoint), 2, tmp_path / "wider")
    assert "is of another model: its intermediate_size is 64, but here it is 128" in error
    untied = GLMConfig.from_dict(config | {"tie_word_embeddings": False})
    [error] = errors_of(resume(untied, checkpoint), 2, tmp_path / "untied")
    assert "its tie_word_embeddings is True, but here it is False" in error
    [error] = errors_of(resume(deep_folder, tmp_path / "run" / "model"), 2, tmp_path / "folder")
    assert "is no checkpoint of 3D-parallel training; to begin with its weights, give it as the model" in error
    [error] = errors_of(resume(deep_folder, tmp_path / "nowhere"), 2, tmp_path / "nothing")
    assert "there is no checkpoint" in error


def test_a_checkpoint_that_would_run_code_is_refused(deep_folder, tmp_path):
    train_3d(deep_folder, tmp_path / "run", {}, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    [states] = checkpoint.glob("global_step1/mp_rank_00_model_states.pt")
    content = torch.load(states, weights_only=False)
    torch.save(content | {"harm": Harm(tmp_path / "harmed")}, states)
    write_checksums(checkpoint)

    def rank_main(rank: int):
        with pytest.raises(Exception, match="(?i)weights.only"):
            make_3d_trainer(deep_folder, tmp_path / "again", {}).train(str(checkpoint))

    run_ranks(rank_main, 1, tmp_path)
    assert not (tmp_path / "harmed").exists()


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, file) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_the_configuration_of_deepspeed():
    config = deepspeed_3d_config(
        4, 8, 24, micro_batch_size=1, global_batch_size=4224, base={"bf16": {"enabled": True}}
    )
    assert config["gradient_accumulation_steps"] == 176
    assert config["train_batch_size"] == 4224
    assert config["zero_optimization"]["stage"] == 1
    assert (config["fp16"]["enabled"], config["bf16"]["enabled"]) == (True, False)
    json.dumps(config)
    assert deepspeed_3d_config(1, 1, 1, base={"prescale_gradients": True})["prescale_gradients"] is True
    assert deepspeed_3d_config(1, 1, 1, micro_batch_size=2, global_batch_size=5)["gradient_accumulation_steps"] == 3
    assert deepspeed_3d_config(1, 2, 3, precision="fp32")["train_batch_size"] == 6
    file = EXAMPLES / "zero1.json"
    assert deepspeed_3d_config(1, 2, 1, base=file)["fp16"] == {"enabled": True, "initial_scale_power": 16}
    assert "auto" not in json.dumps(deepspeed_3d_config(1, 2, 1, base=file))
    zero = {"zero_optimization": {"reduce_bucket_size": "auto", "round_robin_gradients": True}}
    merged = deepspeed_3d_config(1, 1, 1, base=zero)["zero_optimization"]
    assert merged.items() >= {"stage": 1, "reduce_bucket_size": BUCKET_SIZE, "round_robin_gradients": True}.items()
    with pytest.raises(ValueError, match="leave data_types out"):
        deepspeed_3d_config(1, 1, 1, base={"data_types": {"grad_accum_dtype": "fp32"}})
    with pytest.raises(ValueError, match="keeps its optimizer on the GPUs"):
        deepspeed_3d_config(1, 1, 1, base={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(ValueError, match="deepspeed must not have checkpoint.writer"):
        deepspeed_3d_config(1, 1, 1, base={"checkpoint": {"writer": {"type": "python"}}})
    with pytest.raises(ValueError, match="precision must be fp16, bf16 or fp32, got 'fp8'"):
        deepspeed_3d_config(1, 1, 1, precision="fp8")
    with pytest.raises(ValueError, match="tp_size must be an integer of at least 1"):
        deepspeed_3d_config(0, 1, 1)

"""Divergence is provoked by a text that breaks the forward or the backward pass, and by a learning rate too high."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch
from forked import start, wait
from small_runs import Texts, losses, make_trainer

from glm_hf.training import DivergenceError
from glm_hf.training.divergence import LEAST_HISTORY, WINDOW, DivergenceWatch

POISON = 7  # no other text holds it


class Poisoned(Texts):
    """One text of every epoch holds the poison."""

    def __getitem__(self, number: int) -> dict:
        return {"input_ids": [31, POISON, 32, 33]} if number == 11 else super().__getitem__(number)


def poisoned_trainer(model_folder, folder, *, overflow: bool = False, leap: float = 1.0, **changes):
    """A trainer whose embedding gives infinity for the poison, or a gradient that is `leap` times too large."""
    trainer = make_trainer(model_folder, folder, data=Poisoned(), **changes)

    def poison(module, inputs, output):
        has_it = (inputs[0] == POISON)[..., None]
        if overflow:
            return output.masked_fill(has_it, math.inf)
        if has_it.any() and output.requires_grad:
            output.register_hook(lambda gradient: gradient * leap)
        return output

    trainer.model.get_input_embeddings().register_forward_hook(poison)
    return trainer


def poisoned_steps(trainer) -> list[int]:
    """Numbers of the steps whose batch holds the poison, from 1 on."""
    batches = trainer.get_train_dataloader()
    return [
        step
        for step, batch in enumerate(batches, 1)
        if POISON in torch.cat((batch["input_ids"], batch["shift_labels"]))
    ]


def events(folder) -> list[dict]:
    return json.loads((folder / "divergence.json").read_text())


def weights(trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.model.state_dict())


def is_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_stop_ends_training_before_the_update_and_names_the_samples(model_folder, tmp_path):
    trainer = poisoned_trainer(model_folder, tmp_path, overflow=True, divergence_action="stop")
    [step, *_] = poisoned_steps(trainer)
    with pytest.raises(DivergenceError, match=rf"before the update of step {step}: the loss is nan.*divergence.json"):
        trainer.train()
    clean = make_trainer(model_folder, tmp_path / "clean", data=Poisoned(), max_steps=6)
    clean.train_dataset = Poisoned()
    history = losses(trainer)
    assert len(history) == step - 1
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert is_same(weights(trainer), stopped_after(model_folder, tmp_path / "clean", step - 1))
    [event] = events(tmp_path)
    assert (event["step"], event["action"]) == (step, "stop")
    assert event["samples"][0]["loss"] == "nan"
    batch = list(trainer.get_train_dataloader())[step - 1]
    row = (batch["input_ids"] == POISON).any(1).nonzero().item()
    assert event["samples"][0]["sample"] == batch["sample_ids"][row]
    assert {sample["sample"] for sample in event["samples"]} == set(batch["sample_ids"].tolist())


def stopped_after(model_folder, folder, steps: int) -> dict[str, torch.Tensor]:
    """Weights after so many steps of the same run, stopped by hand."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

        def on_train_begin(self, args, state, control, **kwargs):
            control.should_training_stop = steps == 0

    trainer = make_trainer(model_folder, folder, data=Poisoned(), callbacks=[Stop])
    if steps:
        trainer.train()
    return weights(trainer)


def test_the_message_of_stop_tells_a_range_that_goes_on(model_folder, tmp_path):
    trainer = poisoned_trainer(model_folder, tmp_path, overflow=True, divergence_action="stop", max_steps=3)
    with pytest.raises(DivergenceError) as caught:
        trainer.train()
    ranges = json.loads(str(caught.value).split("skip_data_ranges=")[1].split(",")[0])
    going_on = poisoned_trainer(model_folder, tmp_path, overflow=True, max_steps=3, skip_data_ranges=ranges)
    step = int(ranges[0].split("-")[0])
    assert step not in poisoned_steps(going_on)[:1] or step > 2


def test_skip_leaves_the_weights_alone_and_goes_on(model_folder, tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights(trainer))

    trainer = poisoned_trainer(
        model_folder, tmp_path, overflow=True, divergence_action="skip", callbacks=[Keep], max_steps=6
    )
    steps = poisoned_steps(trainer)
    before = weights(trainer)
    trainer.train()
    for step, (old, new) in enumerate(zip([before, *seen[:-1]], seen, strict=True), 1):
        assert is_same(old, new) == (step in steps)
        assert all(torch.isfinite(tensor).all() for tensor in new.values())
    assert [event["step"] for event in events(tmp_path)] == steps
    assert trainer.alpha_factor == 1


def test_lower_alpha_halves_it_from_then_on(model_folder, tmp_path):
    settings = {"divergence_action": "lower_alpha", "embedding_gradient_shrink": 0.8, "max_steps": 6}
    trainer = poisoned_trainer(model_folder, tmp_path, overflow=True, **settings)
    steps = poisoned_steps(trainer)
    trainer.train()
    alphas = [entry["embedding_gradient_shrink"] for entry in trainer.state.log_history if "loss" in entry]
    assert alphas == pytest.approx([0.8 * 0.5 ** sum(step > poisoned for poisoned in steps) for step in range(1, 7)])
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_lower_alpha_begins_at_the_models_own(model_folder, tmp_path):
    trainer = poisoned_trainer(model_folder, tmp_path, overflow=True, divergence_action="lower_alpha", max_steps=4)
    trainer.model.config.embedding_gradient_shrink = 0.6
    trainer.train()
    assert trainer.model.config.embedding_gradient_shrink == pytest.approx(
        0.6 / 2 ** len(poisoned_steps(trainer)[:1]), abs=0.31
    )
    assert trainer.model.config.embedding_gradient_shrink < 0.6


@pytest.mark.parametrize("action", ["skip", "lower_alpha", "stop"])
def test_a_leap_of_the_embeddings_gradient_is_seen(model_folder, tmp_path, action):
    settings = {"divergence_action": action, "spike_threshold": 10.0, "max_steps": LEAST_HISTORY + 4}
    trainer = poisoned_trainer(model_folder, tmp_path, leap=1e4, global_batch_size=4, learning_rate=1e-3, **settings)
    trainer.watch.norms.extend([1.0] * LEAST_HISTORY)
    step = poisoned_steps(trainer)[0]
    if action == "stop":
        with pytest.raises(DivergenceError, match=f"step {step}: the norm of the embedding's gradient is"):
            trainer.train()
    else:
        trainer.train()
    [event, *_] = events(tmp_path)
    assert (event["step"], event["action"]) == (step, action)
    assert "1 in the median" in event["reason"] or "in the median" in event["reason"]
    assert trainer.alpha_factor == (1.0 if action != "lower_alpha" else 0.5 ** len(events(tmp_path)))


def test_a_learning_rate_far_too_high_is_stopped(model_folder, tmp_path):
    settings = {"learning_rate": 1e4, "initial_learning_rate": 1e4, "warmup_share": 0.0, "max_steps": 40}
    trainer = make_trainer(model_folder, tmp_path, spike_threshold=5.0, min_learning_rate=1e4, **settings)
    trainer.watch.norms.extend([1.0] * LEAST_HISTORY)
    with pytest.raises(DivergenceError):
        trainer.train()
    assert len(losses(trainer)) < 40
    assert events(tmp_path)[0]["action"] == "stop"


def test_none_only_logs(model_folder, tmp_path):
    trainer = poisoned_trainer(model_folder, tmp_path, overflow=True, divergence_action="none", max_steps=3)
    trainer.train()
    assert any(not math.isfinite(loss) for loss in losses(trainer))
    assert not (tmp_path / "divergence.json").exists()


def test_a_watch_tells_leaps_only_with_some_history():
    watch = DivergenceWatch(spike_threshold=4.0)
    assert watch.observe(2.0, 1.0, 100.0) is None
    for _ in range(LEAST_HISTORY):
        assert watch.observe(2.0, 1.0, 1.0) is None
    assert watch.observe(2.0, 1.0, 3.9) is None
    assert "4.5" in watch.observe(2.0, 1.0, 4.5)
    assert len(watch.norms) == LEAST_HISTORY + 2  # the leap is not remembered
    assert watch.observe(2.0, 1.0, None) is None
    assert watch.observe(math.nan, 1.0, 1.0) == "the loss is nan"
    assert watch.observe(2.0, math.inf, 1.0) == "the norm of the gradient is inf"
    assert watch.observe(2.0, 1.0, math.nan) == "the norm of the embedding's gradient is nan"
    again = DivergenceWatch(4.0)
    again.restore(json.loads(json.dumps(watch.state())))
    assert again.norms == watch.norms


def test_an_overflow_of_the_loss_scale_is_no_divergence(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path)
    trainer.accelerator.scaler = object()
    trainer.step_loss, trainer.embedding_norm = torch.tensor(2.0), torch.tensor(math.inf)
    trainer._check_step(math.inf)
    trainer.embedding_norm = torch.tensor(1.0)
    trainer._check_step(math.nan)
    assert not trainer.watch.norms
    trainer.step_loss = torch.tensor(math.nan)
    with pytest.raises(DivergenceError, match="the loss is nan"):
        trainer._check_step(math.inf)


def fp16_run(model_folder, folder, init_scale: float, *, breaks: bool = False, **changes):
    """A run whose losses are scaled as on a GPU in fp16; returns its logs, or the message of its end."""
    trainer = make_trainer(model_folder, folder, divergence_action="stop", **changes)
    trainer.accelerator.state._mixed_precision, trainer.accelerator.native_amp = "fp16", True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    if breaks:
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * torch.nan
    try:
        trainer.train()
    except DivergenceError as error:
        return str(error)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def in_child(function, folder):
    """What a function returns that leaves the state of accelerate in disorder."""
    return wait(start(function, folder / "result"), folder / "result")


def test_a_loss_scale_does_not_show_in_the_norm_of_the_embedding(model_folder, tmp_path):
    plain = make_trainer(model_folder, tmp_path, max_steps=1)
    plain.train()
    [scaled] = in_child(lambda: fp16_run(model_folder, tmp_path, 64.0, max_steps=1), tmp_path)
    expected = plain.state.log_history[0]["embedding_grad_norm"]
    assert scaled["embedding_grad_norm"] == pytest.approx(expected, rel=0.02)  # of half precision


def test_gradients_that_overflow_in_half_precision_are_no_divergence(model_folder, tmp_path):
    logs = in_child(lambda: fp16_run(model_folder, tmp_path / "run", 2.0**40, max_steps=3), tmp_path)
    assert not math.isfinite(logs[0]["grad_norm"])
    assert len(logs) == 3
    assert not (tmp_path / "run" / "divergence.json").exists()


def test_losses_after_a_step_that_was_left_out_are_logged(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, divergence_action="skip")
    measure = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (
        measure(*args, **kwargs) * (torch.nan if trainer.state.global_step == 2 else 1)
    )
    trainer.train()
    assert [math.isnan(loss) for loss in losses(trainer)] == [False, False, True, False, False, False]


def test_a_loss_that_is_nan_is_a_divergence_under_a_loss_scale_too(model_folder, tmp_path):
    message = in_child(lambda: fp16_run(model_folder, tmp_path / "run", 64.0, breaks=True), tmp_path)
    assert "before the update of step 1: the loss is nan" in message


def test_a_watch_compares_with_the_median_of_the_last_norms():
    watch = DivergenceWatch(spike_threshold=4.0)
    for norm in [1.0] * 15 + [3.9] * 10:
        assert watch.observe(2.0, 1.0, norm) is None
    assert watch.observe(2.0, 1.0, 4.1) is not None  # 4 times the mean is 8.6
    watch = DivergenceWatch(spike_threshold=4.0)
    watch.restore({"norms": [1.0] * WINDOW})
    for _ in range(WINDOW):
        assert watch.observe(2.0, 1.0, 3.0) is None
    assert watch.observe(2.0, 1.0, 11.0) is None  # the norms of 1 are forgotten
    assert len(watch.norms) == WINDOW


def test_lower_alpha_updates_where_all_is_finite(model_folder, tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(weights(trainer))

    settings = {"divergence_action": "lower_alpha", "spike_threshold": 10.0, "max_steps": 6, "callbacks": [Keep]}
    trainer = poisoned_trainer(model_folder, tmp_path, leap=1e4, **settings)
    trainer.watch.norms.extend([1.0] * LEAST_HISTORY)
    trainer.train()
    assert events(tmp_path)
    assert not any(is_same(old, new) for old, new in pairwise(seen))


def test_the_threshold_of_a_leap_is_that_of_the_arguments(model_folder, tmp_path):
    assert make_trainer(model_folder, tmp_path, spike_threshold=3.0).watch.spike_threshold == 3.0

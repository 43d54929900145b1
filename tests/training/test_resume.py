"""Runs that go on after an end of any kind: on purpose, by kill -9, or by a full disk."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import start, wait
from small_runs import Texts, losses, make_trainer
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from glm_hf.folders import atomic
from glm_hf.training import checkpoints

STEPS = 6
SETTINGS = {"dropout": 0.1, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def is_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(model_folder, tmp_path_factory):
    """The losses, the last weights and the checkpoints of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = make_trainer(model_folder, folder, **SETTINGS)
    trainer.train()
    return losses(trainer), weights(trainer), folder


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_goes_on_bit_for_bit_from_any_step(model_folder, tmp_path, undisturbed, step):
    expected, last_weights, folder = undisturbed
    trainer = make_trainer(model_folder, tmp_path, dataloader_num_workers=step % 3, **SETTINGS)
    torch.manual_seed(step)  # what the global generator does before must not matter
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert losses(trainer) == expected
    assert is_same(weights(trainer), last_weights)


def test_workers_and_evaluation_change_nothing(model_folder, tmp_path, undisturbed):
    expected, last_weights, _ = undisturbed
    settings = {**SETTINGS, "save_steps": 2, "dataloader_num_workers": 2}
    trainer = make_trainer(model_folder, tmp_path, **settings)
    trainer.train()
    assert losses(trainer) == expected
    assert is_same(weights(trainer), last_weights)


def test_a_ramped_run_with_skipped_data_goes_on(model_folder, tmp_path):
    settings = {"max_steps": -1, "train_samples": 48, "global_batch_size": 16, "batch_ramp_start": 4}
    settings |= {"batch_ramp_share": 0.5, "skip_data_ranges": ["2-3"], "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model_folder, tmp_path / "whole", dropout=0.1, **settings)
    whole.train()
    again = make_trainer(model_folder, tmp_path / "again", dropout=0.1, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    assert is_same(weights(again), weights(whole))


def test_other_batch_sizes_are_refused_when_a_run_goes_on(model_folder, tmp_path, undisturbed):
    trainer = make_trainer(model_folder, tmp_path, global_batch_size=4, **SETTINGS)
    with pytest.raises(ValueError, match="has seen 24 samples in 3 steps, but by these arguments it would be 12"):
        trainer.train(resume_from_checkpoint=str(undisturbed[2] / "checkpoint-3"))


def test_the_watch_and_a_lowered_alpha_go_on(model_folder, tmp_path):
    settings = {**SETTINGS, "embedding_gradient_shrink": 0.8, "divergence_action": "lower_alpha"}
    first = make_trainer(model_folder, tmp_path, **settings)
    first.alpha_factor = 0.25
    first.train()
    again = make_trainer(model_folder, tmp_path, **{**settings, "max_steps": STEPS + 1})
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert again.alpha_factor == 0.25
    assert again.model.config.embedding_gradient_shrink == pytest.approx(0.2)
    assert list(again.watch.norms)[:STEPS] == list(first.watch.norms)


def go_on(model_folder: Path, folder: Path):
    """Train from the last checkpoint, if there is one, to the end."""
    trainer = make_trainer(model_folder, folder, **SETTINGS)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    return losses(trainer), weights(trainer)


def test_ten_kills_at_random_moments_lose_nothing(model_folder, tmp_path, undisturbed):
    expected, last_weights, _ = undisturbed
    folder, result = tmp_path / "run", tmp_path / "result"
    rng = random.Random(1)
    begin = time.monotonic()
    wait(start(lambda: go_on(model_folder, folder), result), result)
    duration = time.monotonic() - begin
    kills = 0
    while kills < 10:
        shutil.rmtree(folder, ignore_errors=True)
        result.unlink(missing_ok=True)
        while not result.exists() and kills < 10:
            pid = start(lambda: go_on(model_folder, folder), result)
            time.sleep(duration * rng.random())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            assert_whole(folder)
    found, found_weights = wait(start(lambda: go_on(model_folder, folder), result), result)
    assert found == expected
    assert is_same(found_weights, last_weights)


def assert_whole(folder: Path) -> None:
    """Every checkpoint there holds everything."""
    names = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for checkpoint in folder.glob("checkpoint-*"):
        assert names | {"glm_training_state.json"} <= {path.name for path in checkpoint.iterdir()}
        step = int(checkpoint.name.split("-")[1])
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
        torch.load(checkpoint / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("call", [0, 3, 9, 10, 11])
def test_a_kill_while_saving_leaves_the_earlier_checkpoints(model_folder, tmp_path, undisturbed, call, monkeypatch):
    """The second checkpoint dies at one of its flushes: of its files, of its folder, of the run's folder."""
    expected, last_weights, _ = undisturbed
    folder, result = tmp_path / "run", tmp_path / "result"
    sync, calls = atomic.sync, []

    def sync_or_die(path: Path) -> None:
        if (folder / "checkpoint-1").exists():
            calls.append(path)
            if len(calls) > call + 1:
                os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    def killed():
        atomic.sync = sync_or_die
        return go_on(model_folder, folder)

    pid = start(killed, result)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert_whole(folder)
    assert {path.name for path in folder.glob("checkpoint-*")} <= {"checkpoint-1", "checkpoint-2"}
    found, found_weights = wait(start(lambda: go_on(model_folder, folder), result), result)
    assert found == expected
    assert is_same(found_weights, last_weights)
    assert not (folder / checkpoints.STAGING).exists()


def test_a_full_disk_is_one_error_and_loses_no_checkpoint(model_folder, tmp_path):
    folder, result = tmp_path / "run", tmp_path / "result"

    def fill_disk_after_two():
        trainer = make_trainer(model_folder, folder, **SETTINGS)
        save = trainer._save_optimizer_and_scheduler

        def full(output_dir: str) -> None:
            if trainer.state.global_step == 3:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            save(output_dir)

        trainer._save_optimizer_and_scheduler = full
        try:
            trainer.train()
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    message = wait(start(fill_disk_after_two, result), result)
    assert "checkpoint-3 cannot be saved: " in message
    assert message.endswith(f"training can be resumed from {folder / 'checkpoint-2'}")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2", "log.jsonl"]
    assert_whole(folder)


def test_the_first_checkpoint_failing_says_so(model_folder, tmp_path, monkeypatch):
    trainer = make_trainer(model_folder, tmp_path, **SETTINGS)

    def fail(output_dir: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_scaler", fail)
    with pytest.raises(OSError, match="No space left on device; there is no earlier checkpoint"):
        trainer.train()


def test_only_the_newest_checkpoints_are_kept(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, save_total_limit=2, **SETTINGS)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6", "log.jsonl"]
    assert trainer._get_output_dir(None) == str(tmp_path)  # no longer the folder of half-written ones


def test_the_best_checkpoint_is_known_by_its_own_name(model_folder, tmp_path):
    settings = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    trainer = make_trainer(model_folder, tmp_path, eval_dataset=Texts(4), **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    stored = json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert stored == str(best)


def test_pushed_checkpoints_have_their_name_and_are_whole(model_folder, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((folder, Path(folder).is_dir()))
    )
    trainer = make_trainer(model_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (1, 2)]


def test_other_batch_sizes_are_taken_where_no_data_is_skipped(model_folder, tmp_path):
    make_trainer(model_folder, tmp_path, **{**SETTINGS, "max_steps": 3, "save_steps": 3}).train()
    trainer = make_trainer(model_folder, tmp_path, global_batch_size=4, ignore_data_skip=True, **SETTINGS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(losses(trainer)) == 6


def test_another_order_of_samples_is_not_gone_on_with(model_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr("glm_hf.training.trainer.ROW_ORDER", 1)
        make_trainer(model_folder, tmp_path, **{**SETTINGS, "max_steps": 3, "save_steps": 3}).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="checkpoint-3 is of a version that took samples in another order; set ignor"):
        make_trainer(model_folder, tmp_path, **SETTINGS).train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(model_folder, tmp_path, ignore_data_skip=True, **SETTINGS)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert len(losses(trainer)) == 6


def test_an_alpha_lowered_from_the_models_own_goes_on(model_folder, tmp_path):
    settings = {**SETTINGS, "divergence_action": "lower_alpha", "save_steps": 6}
    first = make_trainer(model_folder, tmp_path, **settings)
    first.alpha_factor = 0.25
    first.train()
    again = make_trainer(model_folder, tmp_path, **{**settings, "max_steps": 7})
    again.model.config.embedding_gradient_shrink = 0.8
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.model.config.embedding_gradient_shrink == pytest.approx(0.2)

"""Checkpoints that are written while training goes on, against those for which it waits."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from forked import start, wait
from small_runs import Texts, losses, make_trainer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from glm_hf import GLMForBlankInfilling
from glm_hf.folders.checksums import find_damage, read_checksums
from glm_hf.training.saving import background

STEPS = 6
SETTINGS = {"dropout": 0.1, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1}
SHRINK = {"embedding_gradient_shrink": [[0, 0.1], [STEPS, 0.9]]}  # of which config.json has every step's value
OF_THE_RUN = {"training_args.bin", "trainer_state.json"}  # which hold its options and times


def checksums_of(checkpoint: Path) -> dict[str, dict]:
    assert find_damage(checkpoint) == []
    return {name: facts for name, facts in read_checksums(checkpoint).items() if name not in OF_THE_RUN}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def waiting(model_folder, tmp_path_factory):
    """The losses and checkpoints of a run that waits for each to be written."""
    folder = tmp_path_factory.mktemp("waiting")
    trainer = make_trainer(model_folder, folder, **SETTINGS, **SHRINK)
    trainer.train()
    return losses(trainer), folder


class AtStep(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, function) -> None:
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.function()


@pytest.fixture
def slow_disk(monkeypatch):
    """An event without which nothing is written, and the checkpoints that are being written or have been."""
    may_write, begun = threading.Event(), []
    write = background.write_parts

    def write_late(staged):
        begun.append(staged.path.name)
        assert may_write.wait(60), "training waits for the disk"
        return write(staged)

    monkeypatch.setattr(background, "write_parts", write_late)
    return may_write, begun


def test_checkpoints_are_byte_for_byte_those_of_a_run_that_waits(model_folder, tmp_path, waiting):
    trainer = make_trainer(model_folder, tmp_path, async_save=True, **SETTINGS, **SHRINK)
    trainer.train()
    assert losses(trainer) == waiting[0]
    for step in range(1, STEPS + 1):
        found, expected = (checksums_of(folder / f"checkpoint-{step}") for folder in (tmp_path, waiting[1]))
        assert found == expected


def test_training_goes_on_while_a_disk_is_slow_and_changes_nothing_in_the_checkpoint(
    model_folder, tmp_path, waiting, slow_disk
):
    seen = []

    def release() -> None:
        seen.append(names_in(tmp_path))
        slow_disk[0].set()

    settings = SETTINGS | SHRINK | {"save_steps": 3, "async_save": True}
    trainer = make_trainer(model_folder, tmp_path, callbacks=[AtStep(5, release)], **settings)
    trainer.train()
    assert seen == [[".lock", ".partial-checkpoint", "log.jsonl"]]
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-6", "log.jsonl"]  # written when training has ended
    for step in (3, 6):
        found, expected = (checksums_of(folder / f"checkpoint-{step}") for folder in (tmp_path, waiting[1]))
        assert found == expected


def test_a_save_waits_for_the_one_before(model_folder, tmp_path, slow_disk):
    may_write, begun = slow_disk
    seen = []

    def release_soon() -> None:
        timer = threading.Timer(0.5, lambda: (seen.append(list(begun)), may_write.set()))
        timer.start()

    trainer = make_trainer(
        model_folder, tmp_path, async_save=True, callbacks=[AtStep(2, release_soon)], **SETTINGS, save_total_limit=2
    )
    trainer.train()
    assert seen == [["checkpoint-1"]]
    assert begun == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    assert names_in(tmp_path) == ["checkpoint-5", "checkpoint-6", "log.jsonl"]  # the newest, each of them whole
    assert find_damage(tmp_path / "checkpoint-5") == find_damage(tmp_path / "checkpoint-6") == []


def test_the_best_model_is_returned_to_when_it_is_whole(model_folder, tmp_path, slow_disk):
    settings = SETTINGS | {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 3, "save_total_limit": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "async_save": True, "max_steps": 3}
    trainer = make_trainer(model_folder, tmp_path, eval_dataset=Texts(4), **settings)
    threading.Timer(0.5, slow_disk[0].set).start()
    trainer.train()
    best = tmp_path / "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    saved = GLMForBlankInfilling.from_pretrained(best, dtype="float32").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in trainer.model.state_dict().items())


def test_pushed_checkpoints_are_whole(model_folder, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(find_damage(Path(folder)))
    )
    trainer = make_trainer(model_folder, tmp_path, async_save=True, **(SETTINGS | {"max_steps": 2}))
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert pushed == [[], []]


def test_adapters_are_saved_as_without(model_folder, tmp_path):
    peft = pytest.importorskip("peft")

    def train(folder: Path, **changes) -> dict[str, dict]:
        torch.manual_seed(0)
        model = GLMForBlankInfilling.from_pretrained(model_folder, dtype="float32")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_key_value"], r=4))
        trainer = make_trainer(model_folder, folder, objects={"model": adapted}, **(SETTINGS | changes))
        trainer.train()
        return checksums_of(folder / f"checkpoint-{STEPS}")

    found = train(tmp_path / "going-on", async_save=True)
    assert "adapter_model.safetensors" in found
    assert found == train(tmp_path / "waiting")


def test_a_full_disk_ends_the_run_at_a_later_step_and_loses_no_checkpoint(model_folder, tmp_path, monkeypatch):
    folder, result = tmp_path / "run", tmp_path / "result"
    write = background.write_parts

    def fill_disk(staged):
        if staged.path.name == "checkpoint-3":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return write(staged)

    def run():
        monkeypatch.setattr(background, "write_parts", fill_disk)
        trainer = make_trainer(model_folder, folder, async_save=True, **SETTINGS)
        try:
            trainer.train()
        except OSError as error:
            return trainer.state.global_step, str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    step, message = wait(start(run, result), result)
    assert step == 4
    assert message.startswith(f"{folder / 'checkpoint-3'} cannot be saved: ")
    assert message.endswith(f"training can be resumed from {folder / 'checkpoint-2'}")
    assert names_in(folder) == ["checkpoint-1", "checkpoint-2", "log.jsonl"]
    assert find_damage(folder / "checkpoint-2") == []


def test_the_last_checkpoint_failing_is_an_error_of_the_run(model_folder, tmp_path, monkeypatch):
    def fail(staged):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(background, "write_parts", fail)
    trainer = make_trainer(model_folder, tmp_path, async_save=True, **(SETTINGS | {"save_steps": STEPS}))
    with pytest.raises(OSError, match="checkpoint-6 cannot be saved: .*No space left on device; there is no earlier"):
        trainer.train()
    assert names_in(tmp_path) == ["log.jsonl"]


def test_an_error_of_the_run_comes_first_and_its_last_checkpoint_is_completed(model_folder, tmp_path, slow_disk):
    def interrupt() -> None:
        threading.Timer(0.5, slow_disk[0].set).start()
        raise KeyboardInterrupt

    settings = SETTINGS | {"save_steps": 2, "async_save": True}
    trainer = make_trainer(model_folder, tmp_path, callbacks=[AtStep(3, interrupt)], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names_in(tmp_path) == ["checkpoint-2", "log.jsonl"]
    assert find_damage(tmp_path / "checkpoint-2") == []


def test_twenty_kills_while_saving_lose_nothing(model_folder, tmp_path, waiting):
    """At moments that are counted in calls of the thread that writes, whatever the load of the machine."""
    folder, result = tmp_path / "run", tmp_path / "result"
    trainer = make_trainer(model_folder, folder, async_save=True, **SETTINGS, **SHRINK)
    complete, rng = trainer.writer._complete, random.Random(1)

    def resume(killed_at: int | None = None) -> tuple[list[float], int]:
        calls = 0

        def count(*event) -> None:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def complete_counted(staged) -> None:
            sys.setprofile(count)  # of this thread
            complete(staged)

        trainer.writer._complete = complete_counted
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
        return losses(trainer), calls

    _, calls = wait(start(resume, result), result)
    shutil.rmtree(folder)
    kept = []
    for _ in range(20):
        killed_at = rng.randrange(1, 2 * calls // STEPS)  # in the first checkpoint that is saved, or the second
        _, status = os.waitpid(start(lambda at=killed_at: resume(at), result), 0)
        assert os.WIFSIGNALED(status) or len(list(folder.glob("checkpoint-*"))) == STEPS
        assert all(find_damage(checkpoint) == [] for checkpoint in folder.glob("checkpoint-*"))
        kept.append(len(list(folder.glob("checkpoint-*"))))
        if kept[-1] == STEPS:
            shutil.rmtree(folder)
    assert len(set(kept)) > 1  # some kills came after a checkpoint
    assert wait(start(resume, result), result)[0] == waiting[0]
    found, expected = (checksums_of(run / f"checkpoint-{STEPS}") for run in (folder, waiting[1]))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert found[name] == expected[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_jit_checkpoint": True}, "async_save does not support enable_jit_checkpoint=True"),
        ({"save_on_each_node": True}, "async_save does not support save_on_each_node=True"),
    ],
)
def test_what_cannot_be_written_later_is_refused(model_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_folder, tmp_path, async_save=True, **options)

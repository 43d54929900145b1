"""Several processes that save while they train: under DDP, DeepSpeed's ZeRO and 3D parallelism."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from pipeline_runs import make_3d_trainer
from small_runs import losses, make_trainer, prepare_deepspeed, zero
from transformers import TrainerCallback

from glm_hf.folders.checksums import find_damage, read_checksums
from glm_hf.folders.plain_types import only_plain_types
from glm_hf.training.saving import background

SAVING = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
SETTINGS = {"per_device_train_batch_size": 2, "embedding_gradient_shrink": 0.3} | SAVING
DEGREES = {"tp_size": 1, "pp_size": 2, "dp_size": 2}
OF_THE_RUN = {"training_args.bin", "trainer_state.json"}  # which hold its options and times


class SlowDisk(TrainerCallback):
    """Writes nothing until a step after the one that is saved has ended."""

    def __init__(self) -> None:
        self.may_write = threading.Event()
        write = background.write_parts

        def write_late(staged):
            assert self.may_write.wait(60), "training waits for the disk"
            return write(staged)

        background.write_parts = write_late

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % 2:
            self.may_write.set()

    def on_save(self, args, state, control, **kwargs) -> None:
        self.may_write.clear()
        if state.global_step == state.max_steps:
            self.may_write.set()


def assert_same(found: Any, expected: Any) -> None:
    """Compare all that a file holds, bit for bit."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for name in found:
            if name != "ds_config":
                assert_same(found[name], expected[name])
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_same(mine, theirs)
    elif hasattr(found, "__dict__"):
        assert_same(vars(found), vars(expected))
    else:
        assert found == expected


def compare(found: Path, expected: Path) -> None:
    """Compare checkpoints, and the state in files that DeepSpeed does not write the same twice."""
    assert find_damage(found) == []
    mine, theirs = read_checksums(found), read_checksums(expected)
    assert mine.keys() == theirs.keys()
    with only_plain_types():
        for name in mine.keys() - OF_THE_RUN:
            if "global_step" not in name:
                assert mine[name] == theirs[name], name
                continue
            assert_same(torch.load(found / name), torch.load(expected / name))


def run_both(rank_main, world_size: int, folder: Path) -> list[list[float]]:
    """Train on ranks with and without `async_save`, and compare the checkpoints; return the losses of the ranks."""
    results = []
    for name, changes in (("waiting", {}), ("going-on", {"async_save": True})):
        (folder / name).mkdir()
        results.append(run_ranks(lambda rank, n=name, c=changes: rank_main(folder / n, c), world_size, folder / name))
    assert results[0] == results[1]
    for step in (2, 4, 5):
        compare(folder / "going-on" / f"checkpoint-{step}", folder / "waiting" / f"checkpoint-{step}")
    return results[1]


def callbacks_for(changes: dict) -> list[TrainerCallback]:
    return [SlowDisk()] if changes else []


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_ranks_save_what_they_would_save_waiting(model_folder, tmp_path, stage):
    """One rank writes all under DDP, each its own part of the optimizer under ZeRO."""
    options = dict(SETTINGS)
    if stage is not None:
        prepare_deepspeed()
        options["deepspeed"] = zero(stage)

    def rank_main(folder: Path, changes: dict, resume: Path | None = None) -> list[float]:
        trainer = make_trainer(model_folder, folder, callbacks=callbacks_for(changes), **options, **changes)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return losses(trainer)

    expected = run_both(rank_main, 2, tmp_path)
    checkpoint = tmp_path / "going-on" / "checkpoint-2"
    (tmp_path / "again").mkdir()
    again = run_ranks(lambda rank: rank_main(tmp_path / "again", {}, checkpoint), 2, tmp_path / "again")
    assert again == expected


def test_stages_and_replicas_save_what_they_would_save_waiting(deep_folder, tmp_path):
    """In bf16, with fp32 weights in the optimizer."""

    def rank_main(folder: Path, changes: dict, resume: Path | None = None) -> list[float]:
        trainer = make_3d_trainer(deep_folder, folder, DEGREES, bf16=True, **SAVING, **changes)
        for callback in callbacks_for(changes):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return losses(trainer)

    expected = run_both(rank_main, 4, tmp_path)
    checkpoint = tmp_path / "going-on" / "checkpoint-2"
    (tmp_path / "again").mkdir()
    again = run_ranks(lambda rank: rank_main(tmp_path / "again", {}, checkpoint), 4, tmp_path / "again")
    assert again == expected


def test_a_rank_that_cannot_write_ends_the_run_on_all_and_leaves_the_checkpoint_before(deep_folder, tmp_path):
    def rank_main(rank: int) -> str:
        write = background.write_parts

        def write_or_fail(staged):
            if rank == 3 and staged.path.name == "checkpoint-4":
                raise OSError(28, "No space left on device")
            return write(staged)

        background.write_parts = write_or_fail
        trainer = make_3d_trainer(deep_folder, tmp_path / "run", DEGREES, async_save=True, **SAVING | {"max_steps": 4})
        with pytest.raises(OSError, match="No space left on device") as caught:
            trainer.train()
        return str(caught.value)

    for message in run_ranks(rank_main, 4, tmp_path):
        assert "checkpoint-4 cannot be saved" in message
        assert f"training can be resumed from {tmp_path / 'run' / 'checkpoint-2'}" in message
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "run" / "checkpoint-2") == []


def test_ranks_that_are_killed_while_they_write_leave_the_checkpoint_before(deep_folder, tmp_path):
    """One before it has written its part, the others after."""

    def rank_main(rank: int) -> None:
        write = background.write_parts

        def write_and_die(staged):
            if rank != 2 or staged.path.name == "checkpoint-2":
                report = write(staged)
            if staged.path.name == "checkpoint-4":
                os.kill(os.getpid(), signal.SIGKILL)
            return report

        background.write_parts = write_and_die
        make_3d_trainer(deep_folder, tmp_path / "run", DEGREES, async_save=True, **SAVING).train()

    run_ranks(rank_main, 4, tmp_path, killed=(0, 1, 2, 3))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "run" / "checkpoint-2") == []

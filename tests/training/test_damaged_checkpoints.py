"""Checkpoints that are damaged, incomplete, of another run, or made to run code: named, and never resumed from."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from small_runs import Texts, losses, make_trainer, prepare_deepspeed, zero

from glm_hf.cli import main
from glm_hf.folders.atomic import exclusive
from glm_hf.folders.checksums import CHECKSUMS, write_checksums
from glm_hf.training.checkpoints import STATE_FILE, find_problems

SETTINGS = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
FILES = (
    *("config.json", "glm_training_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"),
    *("scheduler.pt", "trainer_state.json", "training_args.bin"),
)


class Opener:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(model_folder, folder, **SETTINGS).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path) -> Path:
    return Path(shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2"))


def resume(model_folder: Path, checkpoint: Path, **changes):
    trainer = make_trainer(model_folder, checkpoint.parent / "again", **(SETTINGS | changes))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return losses(trainer)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = (Path.unlink, flip_a_bit, truncate, fill_with_zeros)


def test_the_checksums_are_of_all_files(run):
    listed = json.loads((run / "checkpoint-2" / CHECKSUMS).read_text())["files"]
    assert set(FILES) <= listed.keys()
    assert listed.keys() == {path.name for path in (run / "checkpoint-2").iterdir()} - {CHECKSUMS}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(model_folder, checkpoint, capsys, name, damage):
    damage(checkpoint / name)
    with pytest.raises(ValueError, match=rf"checkpoint-2/{name} (is|has)"):
        resume(model_folder, checkpoint)
    assert main(["verify", str(checkpoint)]) == 1
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checksums_are_named(model_folder, checkpoint, damage):
    damage(checkpoint / CHECKSUMS)
    with pytest.raises(ValueError, match=r"checkpoint-2/.* (is|has|holds)"):
        resume(model_folder, checkpoint)


def test_a_whole_checkpoint_is_verified(checkpoint, capsys):
    assert main(["verify", str(checkpoint)]) == 0
    assert "0 problems" in capsys.readouterr().out


def test_a_file_that_would_be_loaded_too_is_refused(model_folder, checkpoint):
    (checkpoint / "notes.txt").write_text("of the user")
    assert find_problems(checkpoint) == []
    shutil.copyfile(checkpoint / "optimizer.pt", checkpoint / "scaler.pt")
    with pytest.raises(ValueError, match=r"scaler.pt is not of this folder; remove it"):
        resume(model_folder, checkpoint)


def test_a_checkpoint_of_an_earlier_version_is_resumed_with_a_warning(model_folder, run, checkpoint, caplog):
    (checkpoint / CHECKSUMS).unlink()
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["has_checksums"]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    expected = [
        entry["loss"] for entry in json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    ]
    assert resume(model_folder, checkpoint) == expected
    assert "without checksums" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", [Path.unlink, fill_with_zeros])
def test_one_without_checksums_still_needs_its_state(model_folder, checkpoint, name, damage):
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / STATE_FILE).unlink()
    damage(checkpoint / name)
    with pytest.raises(ValueError, match="checkpoint-2"):
        resume(model_folder, checkpoint)


def test_a_checkpoint_of_the_model_only_cannot_be_resumed(model_folder, tmp_path):
    make_trainer(model_folder, tmp_path, save_only_model=True, **SETTINGS).train()
    with pytest.raises(
        ValueError, match=r"optimizer.pt is missing; a checkpoint saved with save_only_model can begin"
    ):
        resume(model_folder, tmp_path / "checkpoint-2")


def test_a_damaged_best_model_is_named(model_folder, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(model_folder, tmp_path, eval_dataset=Texts(8), **SETTINGS, **settings)
    return_to_best = trainer._load_best_model

    def damage_first() -> None:
        flip_a_bit(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        return_to_best()

    trainer._load_best_model = damage_first
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        trainer.train()


def test_a_checkpoint_of_another_model_is_refused(model_folder, checkpoint):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.dense_h_to_4h.bias"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_checksums(checkpoint)
    with pytest.raises(ValueError, match=r"of another model: it lacks model.layers.1.mlp.dense_h_to_4h.bias"):
        resume(model_folder, checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_code_in_a_file_never_runs(model_folder, checkpoint, tmp_path, name):
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": Opener(tmp_path / "opened")}, checkpoint / name)
    write_checksums(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-2 cannot be resumed from: "):
        resume(model_folder, checkpoint)
    assert not (tmp_path / "opened").exists()


def test_two_runs_do_not_share_a_folder(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, **SETTINGS)
    with exclusive(tmp_path / ".lock", tmp_path):
        with pytest.raises(OSError, match="another process is writing to"):
            trainer.train()
    trainer.train()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_reads_plain_types_only(model_folder, tmp_path, stage):
    """All files that DeepSpeed and the trainer unpickle, a kind after another, with checksums that are right."""
    prepare_deepspeed()
    settings = SETTINGS | {"per_device_train_batch_size": 2, "deepspeed": zero(stage)}
    kinds = ("scheduler.pt", "*model_states.pt", "*optim_states.pt", "rng_state_*.pth")

    def rank_main(rank: int) -> list[str]:
        make_trainer(model_folder, tmp_path / "run", **settings).train()
        checkpoint, found = tmp_path / "run" / "checkpoint-2", []
        for kind in kinds:
            trainer = make_trainer(model_folder, tmp_path / "again", **settings)
            kept = {path: path.read_bytes() for path in checkpoint.rglob(kind)}
            torch.distributed.barrier()
            if rank == 0:
                for path in kept:
                    torch.save(torch.load(path, weights_only=False) | {"extra": Opener(tmp_path / "opened")}, path)
                write_checksums(checkpoint)
            torch.distributed.barrier()
            with pytest.raises(ValueError, match="checkpoint-2 cannot be resumed from: ") as caught:
                trainer.train(resume_from_checkpoint=str(checkpoint))
            found.append(str(caught.value))
            torch.distributed.barrier()
            if rank == 0:
                for path, content in kept.items():
                    path.write_bytes(content)
        return found

    assert [len(found) for found in run_ranks(rank_main, 2, tmp_path)] == [len(kinds)] * 2
    assert not (tmp_path / "opened").exists()

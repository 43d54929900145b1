"""Checkpoints that appear as a whole, by the calls that the disk sees."""

import os
from pathlib import Path

import pytest
from accelerate import Accelerator
from safetensors import SafetensorError

from glm_hf.training.checkpoints import STAGING, staged_checkpoint


def test_every_byte_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    done = []
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"{path} -> {to}"), rename(path, to))[1])
    with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=True, is_shared=True) as staged:
        (staged / "part").mkdir()
        (staged / "part" / "weights").write_bytes(b"w")
        (staged / "state").write_bytes(b"s")
    final = tmp_path / "checkpoint-1"
    inner = ("part", "part/weights", "state", "checksums.json")
    assert {*done[:5]} == {str(staged), *(str(staged / name) for name in inner)}
    assert done[5:] == [f"{staged} -> {final}", str(tmp_path)]
    assert (final / "part" / "weights").read_bytes() == b"w"


def test_a_checkpoint_of_the_same_name_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=True, is_shared=True) as staged:
            (staged / content).write_text(content)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-1", "checksums.json", "new"]


def test_a_checkpoint_is_not_replaced_by_one_that_fails(tmp_path):
    with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=True, is_shared=True) as staged:
        (staged / "old").write_text("old")
    with pytest.raises(OSError, match=r"checkpoint-1 cannot be saved: full"):
        with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=True, is_shared=True) as staged:
            raise OSError("full")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-1", "checksums.json", "old"]


@pytest.mark.parametrize("error", [OSError, RuntimeError, SafetensorError])
def test_errors_of_every_writer_are_one_error(tmp_path, error):
    with pytest.raises(OSError, match="checkpoint-1 cannot be saved: no space; there is no earlier checkpoint"):
        with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=True, is_shared=True):
            raise error("no space")
    assert not list(tmp_path.iterdir())


def test_what_was_left_half_written_is_thrown_away(tmp_path):
    left = tmp_path / STAGING / "checkpoint-1" / "half"
    left.mkdir(parents=True)
    with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=True, is_shared=True) as staged:
        (staged / "whole").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoint-1", "checksums.json", "whole"]


def test_a_process_that_does_not_write_makes_no_folder(tmp_path):
    with staged_checkpoint(tmp_path, "checkpoint-1", Accelerator(cpu=True), writes=False, is_shared=True):
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())

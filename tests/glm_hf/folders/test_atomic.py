"""Folders that appear whole: what killed, failing and concurrent writers leave."""

import os
import re
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from glm_hf.folders import atomic
from glm_hf.folders.atomic import AtomicFolder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked to be killed")


def write(dst: Path, content: str, **options) -> None:
    with AtomicFolder(dst, **options).writing() as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text(content)


def read(dst: Path) -> str:
    return (dst / "part" / "file").read_text()


def kill_at(call: int, module: object, function: str, run) -> bool:
    """Run in a process that is killed before the given call of a function; tell whether it came to that."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    original, count = getattr(module, function), [0]

    def counted(*arguments, **options):
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        return original(*arguments, **options)

    setattr(module, function, counted)
    run()
    os._exit(0)


def test_a_folder_appears_with_nothing_beside_it(tmp_path):
    write(tmp_path / "new" / "out", "text")
    assert read(tmp_path / "new" / "out") == "text"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_an_error_leaves_nothing_new(tmp_path):
    def fail(replaces: bool) -> None:
        with AtomicFolder(tmp_path / "out", replaces=replaces).writing() as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    for replaces in (False, True):
        with pytest.raises(KeyboardInterrupt):
            fail(replaces)
        assert not list(tmp_path.iterdir())


def test_a_destination_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(FileExistsError, match="out exists already"):
        write(tmp_path / "out", "new")
    assert read(tmp_path / "out") == "old"
    write(tmp_path / "out", "new", replaces=True)
    assert read(tmp_path / "out") == "new"


@needs_fork
@pytest.mark.parametrize("function", [(Path, "rename"), (Path, "mkdir"), (atomic, "sync"), (atomic.shutil, "rmtree")])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_writer_killed_at_any_step_leaves_a_whole_folder_or_none(tmp_path, function, replaces):
    call, dst = 0, tmp_path / "out"
    while True:
        if replaces:
            write(dst, "old", replaces=True)
        if not kill_at(call, *function, lambda: write(dst, "new", replaces=replaces)):
            break
        if dst.exists():
            assert read(dst) in ("old", "new")
            if not replaces:
                atomic.shutil.rmtree(dst)
        write(dst, "again", replaces=replaces)
        assert read(dst) == "again"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if not replaces:
            atomic.shutil.rmtree(dst)
        call += 1
    assert call > 0


@needs_fork
def test_an_earlier_folder_is_given_back_where_the_new_one_did_not_get_its_name(tmp_path):
    write(tmp_path / "out", "old")
    assert kill_at(1, Path, "rename", lambda: write(tmp_path / "out", "new", replaces=True))
    with pytest.raises(ValueError, match="no content"):
        with AtomicFolder(tmp_path / "out", replaces=True).writing():
            raise ValueError("no content")
    assert read(tmp_path / "out") == "old"


def test_a_second_writer_is_refused(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    with FileLock(tmp_path / ".out.partial" / "lock"):
        with pytest.raises(OSError, match=r"another process is writing to \S+out; wait for it or choose another"):
            write(tmp_path / "out", "text")
    write(tmp_path / "out", "text")


def test_what_belongs_to_somebody_else_stays(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r".out.partial is not of an interrupted run; remove it or choose"):
        write(tmp_path / "out", "text")
    assert (tmp_path / ".out.partial" / "mine.txt").exists()


def test_every_byte_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done, rename, sync = [], Path.rename, atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"rename to {to.name}"), rename(path, to))[1])
    write(tmp_path / "out", "text")
    assert sorted(done[:3]) == ["file", "folder", "part"]
    assert done[3:] == ["rename to out", tmp_path.name]


def write_into(dst: Path, files: dict[str, str]) -> None:
    target = AtomicFolder(dst, home=dst / ".partial", completed_by="config", replaced_files=re.compile(r"model\d"))
    with target.writing() as folder:
        for name, content in files.items():
            (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_replace_those_of_their_kind_in_a_folder_with_others(tmp_path):
    write_into(tmp_path, {"config": "old", "model1": "old", "model2": "old"})
    (tmp_path / "other").write_text("mine")
    write_into(tmp_path, {"config": "new", "model1": "new"})
    assert contents(tmp_path) == {"config": "new", "model1": "new", "other": "mine"}
    assert not (tmp_path / ".partial").exists()


@needs_fork
@pytest.mark.parametrize("function", [(Path, "replace"), (Path, "unlink"), (atomic, "sync")])
def test_a_folder_is_never_complete_with_files_of_two_writers(tmp_path, function):
    old, new = ({"config": text, "model1": text, "model2": text} for text in ("old", "new"))
    call = 0
    while True:
        write_into(tmp_path, old)
        if not kill_at(call, *function, lambda: write_into(tmp_path, new)):
            break
        found = contents(tmp_path)
        assert "config" not in found or found in (old, new)
        call += 1
    assert call > 1

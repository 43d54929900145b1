"""A run that is stopped at any moment leaves nothing that looks finished, and the same call gives the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from golden import DATA, golden_config
from tqdm import tqdm

from glm_hf.conversion import (
    convert_sat_checkpoint,
    export_sat_checkpoint,
    quantize_checkpoint,
    reshard_sat_checkpoint,
)
from glm_hf.conversion.formats import rank_writer
from glm_hf.conversion.streaming import segments
from glm_hf.folders.atomic import AtomicFolder

SRC = DATA / "cfg2" / "sat_tp2"
CONVERT = partial(convert_sat_checkpoint, SRC, config=golden_config("cfg2"), max_shard_size="50KB")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork, to kill them")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Callable[[Path], None]]:
    """Functions that write a folder in six segments or more."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    CONVERT(folder)
    return {
        "convert": CONVERT,
        "convert to int4": partial(CONVERT, quantization="int4"),
        "quantize": partial(quantize_checkpoint, folder, bits=8, quantize_embeddings=True, max_shard_size="50KB"),
        "export": partial(export_sat_checkpoint, folder, tp_size=4),
        "reshard": partial(reshard_sat_checkpoint, SRC, tp_size=4),
    }


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch) -> None:
    monkeypatch.setattr(rank_writer, "SEGMENT_BYTES", 50_000)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fork(run: Callable[[], object]) -> int:
    """Run a function in a process of its own and return its id; the process ends without cleaning up."""
    if (pid := os.fork()) == 0:
        try:
            tqdm.set_lock(threading.RLock())  # its own is shared with this process, and would be held after a kill
            run()
        finally:
            os._exit(0)
    return pid


def finished_files(home: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of the shards that the manifest calls finished."""
    if not (home / "manifest.json").is_file():
        return {}
    paths = [home / "folder" / name for name in json.loads((home / "manifest.json").read_text())["finished"]]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths if path.is_file()}


def check_state_and_go_on(run: Callable[[Path], None], dst: Path, expected: dict[str, bytes]) -> str:
    """Check what a killed run has left, run again, and return how far the killed one came."""
    home = dst.with_name(f".{dst.name}.partial")
    if dst.exists():
        state = "finished"
        assert read_folder(dst) == expected
        if home.exists() and (home / "manifest.json").exists():
            run(dst)  # tidies up
    else:
        before = finished_files(home)
        state = "went on" if before else "began again"
        run(dst)
        after = {name: ((dst / name).stat().st_ino, (dst / name).stat().st_mtime_ns) for name in before}
        assert after == before  # finished shards are not written again
    assert read_folder(dst) == expected
    shutil.rmtree(home, ignore_errors=True)
    shutil.rmtree(dst)
    return state


@needs_fork
@pytest.mark.parametrize(
    ("name", "num_kills"), [("convert", 20), ("convert to int4", 5), ("quantize", 5), ("export", 5), ("reshard", 5)]
)
def test_killed_at_random_moments(name, num_kills, runs, tmp_path):
    run, dst = runs[name], tmp_path / "out"
    start = time.monotonic()
    os.waitpid(fork(partial(run, dst)), 0)
    duration = time.monotonic() - start
    expected = read_folder(dst)
    shutil.rmtree(dst)
    generator = random.Random(0)
    states = []
    for _ in range(num_kills):
        pid = fork(partial(run, dst))
        time.sleep(generator.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        states.append(check_state_and_go_on(run, dst, expected))
    assert len(states) == num_kills


@pytest.mark.parametrize("num_segments", [1, 3, 5])
@pytest.mark.parametrize("name", ["convert", "quantize", "export", "reshard"])
def test_run_goes_on_after_some_segments(name, num_segments, runs, stop_after, tmp_path):
    runs[name](tmp_path / "whole")
    stop_after(num_segments, Stop())
    with pytest.raises(Stop):
        runs[name](tmp_path / "out")
    home = tmp_path / ".out.partial"
    manifest = json.loads((home / "manifest.json").read_text())
    assert len(manifest["finished"]) == num_segments
    with open(home / "folder" / "model-99999.safetensors", "wb") as other:  # as if a segment had been begun
        other.write(b"x")
    for path in (home / "folder").glob("release/*"):
        with open(path, "ab") as file:
            file.write(b"the beginning of the next tensor")
    marks = {path: path.stat().st_size for path in (home / "folder").glob("*-00001-of-*")}
    for path in marks:
        os.utime(path, (1, 1))
    runs[name](tmp_path / "out")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
    for path in marks:
        assert (tmp_path / "out" / path.name).stat().st_mtime == 1  # it was not written again
    assert not home.exists()


def test_finished_ranks_are_not_written_again(runs, stop_after, tmp_path, monkeypatch):
    stop_after(3, Stop())
    with pytest.raises(Stop):
        runs["export"](tmp_path / "out")
    written = []
    whole = rank_writer._RankFile.begin
    monkeypatch.setattr(rank_writer._RankFile, "begin", lambda self, name: written.append(name) or whole(self, name))
    runs["export"](tmp_path / "out")
    assert "transformer.word_embeddings.weight" not in written
    assert "transformer.final_layernorm.bias" in written


def test_export_does_not_go_on_with_another_configuration(stop_after, tmp_path):
    CONVERT(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    stop_after(2, Stop())
    with pytest.raises(Stop):
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match=r"had other options or another version"):  # rotary frequencies differ
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2)
    export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2, resume=False)


def test_export_notices_a_model_that_was_saved_again(stop_after, tmp_path):
    CONVERT(tmp_path / "hf")
    stop_after(2, Stop())
    with pytest.raises(Stop):
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2)
    path = next((tmp_path / "hf").glob("*-00003-of-*"))
    os.utime(path, (1, 1))  # same size and header
    with pytest.raises(ValueError, match=rf"{path.name} has changed since the interrupted run"):
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2)


def test_another_number_of_ranks_is_noticed(stop_after, tmp_path):
    stop_after(2, Stop())
    with pytest.raises(Stop):
        reshard_sat_checkpoint(SRC, tmp_path / "sat", tp_size=4)
    with pytest.raises(ValueError, match=r"had other options or another version of glm_hf; start again .*--no-resume"):
        reshard_sat_checkpoint(SRC, tmp_path / "sat", tp_size=2)
    reshard_sat_checkpoint(SRC, tmp_path / "sat", tp_size=2, resume=False)


def test_another_kind_of_run_is_noticed(interrupted, tmp_path):
    CONVERT(tmp_path / "model")
    with pytest.raises(ValueError, match=r"had another source, with mp_rank_00_model_states.pt, mp_rank_01_model"):
        export_sat_checkpoint(tmp_path / "model", tmp_path / "hf", tp_size=2)


def test_another_version_is_noticed(interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "__version__", "0.0.0")
    with pytest.raises(ValueError, match=r"had other options or another version of glm_hf"):
        go_on(interrupted, tmp_path / "hf")


def test_small_files_of_an_interrupted_run_do_not_stay(monkeypatch, tmp_path):
    CONVERT(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("glm_hf.folders.atomic.sync_tree", fail_when_there_is_a_config)
        with pytest.raises(Stop):
            CONVERT(tmp_path / "hf")
    (tmp_path / ".hf.partial" / "folder" / "tokenizer.json").write_text("{}")
    CONVERT(tmp_path / "hf")
    assert read_folder(tmp_path / "hf") == read_folder(tmp_path / "whole")


def fail_when_there_is_a_config(folder: Path) -> None:
    if (folder / "config.json").exists():
        raise Stop


@pytest.mark.parametrize("resume", [True, False])
def test_hidden_folder_with_something_else_in_it_is_left_alone(resume, interrupted, tmp_path):
    (tmp_path / ".hf.partial" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r".hf.partial is not of an interrupted run"):
        go_on(interrupted, tmp_path / "hf", resume=resume)
    assert (tmp_path / ".hf.partial" / "precious.txt").read_text() == "mine"


def test_run_that_came_to_its_end_meanwhile(interrupted, tmp_path, monkeypatch):
    whole = AtomicFolder.locked

    @contextmanager
    def finish_first(target: AtomicFolder):
        monkeypatch.setattr(AtomicFolder, "locked", whole)
        go_on(interrupted, target.dst)
        with whole(target):
            yield

    monkeypatch.setattr(AtomicFolder, "locked", finish_first)
    go_on(interrupted, tmp_path / "hf")  # finds it done
    assert (tmp_path / "hf" / "config.json").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_space_of_an_interrupted_run_counts_as_free(resume, interrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("glm_hf.folders.atomic.free_space", lambda dst: 701_920 - 60_000)
    go_on(interrupted, tmp_path / "hf", resume=resume)
    monkeypatch.setattr("glm_hf.folders.atomic.free_space", lambda dst: 701_920 - 1)
    with pytest.raises(OSError, match=r"needs 701,920 free bytes"):
        go_on(interrupted, tmp_path / "other", resume=resume)


def kill_at(call: int, run: Callable[[], object], module: object, function: str) -> bool:
    """Kill a process right before its `call`-th call of a function; return whether it came so far."""
    whole, num_calls = getattr(module, function), 0

    def count(*args: object, **options: object) -> object:
        nonlocal num_calls
        if num_calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        num_calls += 1
        return whole(*args, **options)

    def run_until_killed() -> None:
        setattr(module, function, count)
        run()

    return os.WIFSIGNALED(os.waitpid(fork(run_until_killed), 0)[1])


@needs_fork
@pytest.mark.parametrize("function", [(Path, "replace"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")])
@pytest.mark.parametrize("name", ["convert", "export"])
def test_killed_before_every_step_that_counts(name, function, runs, tmp_path):
    run, dst = runs[name], tmp_path / "out"
    run(dst)
    expected = read_folder(dst)
    shutil.rmtree(dst)
    call = 0
    while kill_at(call, partial(run, dst), *function):
        check_state_and_go_on(run, dst, expected)
        call += 1
    assert call > 0


class Stop(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int, BaseException], None]:
    """Function that makes runs fail after a number of segments."""

    def prepare(num_segments: int, error: BaseException) -> None:
        whole = segments._save

        def save(home: Path, manifest: dict) -> None:
            whole(home, manifest)
            if len(manifest["finished"]) == num_segments:
                monkeypatch.setattr(segments, "_save", whole)
                raise error

        monkeypatch.setattr(segments, "_save", save)

    return prepare


def test_manifest_names_sources_and_finished_shards(stop_after, tmp_path):
    stop_after(2, Stop())
    with pytest.raises(Stop):
        CONVERT(tmp_path / "hf")
    manifest = json.loads((tmp_path / ".hf.partial" / "manifest.json").read_text())
    assert manifest["finished"] == ["model-00001-of-00016.safetensors", "model-00002-of-00016.safetensors"]
    for path in (SRC / "49300").iterdir():
        assert manifest["sources"][path.name]["size"] == path.stat().st_size
    assert not (tmp_path / "hf").exists()
    assert {path.name for path in (tmp_path / ".hf.partial" / "folder").iterdir()} == set(manifest["finished"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_error_after_a_finished_shard_tells_how_to_go_on(error, stop_after, tmp_path):
    stop_after(2, error)
    with pytest.raises(type(error)) as caught:
        CONVERT(tmp_path / "hf")
    assert caught.value.__notes__ == ["2 of 16 parts are finished; run the same command to resume"]
    assert not isinstance(error, OSError) or str(tmp_path / "hf") in str(caught.value)
    CONVERT(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_error_before_leaves_nothing(error, stop_after, tmp_path):
    stop_after(0, error)
    with pytest.raises(type(error)):
        CONVERT(tmp_path / "hf")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def interrupted(stop_after, tmp_path) -> Path:
    """Checkpoint whose conversion to `tmp_path / "hf"` was stopped after two shards."""
    src = shutil.copytree(SRC, tmp_path / "sat")
    stop_after(2, Stop())
    with pytest.raises(Stop):
        convert_sat_checkpoint(src, tmp_path / "hf", config=golden_config("cfg2"), max_shard_size="50KB")
    return src


def resize(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size + by)


def go_on(src: Path, dst: Path, **options) -> None:
    convert_sat_checkpoint(src, dst, **{"config": golden_config("cfg2"), "max_shard_size": "50KB", **options})


def test_changed_source_is_noticed_by_name(interrupted, tmp_path):
    path = interrupted / "49300" / "mp_rank_01_model_states.pt"
    content = torch.load(path, weights_only=True)
    content["module"]["transformer.layers.0.mlp.dense_4h_to_h.weight"][0, 0] += 1
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"^mp_rank_01_model_states.pt has changed since the interrupted run .*resume"
    ):
        go_on(interrupted, tmp_path / "hf")
    go_on(interrupted, tmp_path / "hf", resume=False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"max_shard_size": "60KB"}, {"quantization": "int8"}],
    ids=lambda o: next(iter(o)),
)
def test_other_options_are_noticed(options, interrupted, tmp_path):
    with pytest.raises(ValueError, match=r"the interrupted run in \S+ had other options or another version"):
        go_on(interrupted, tmp_path / "hf", **options)
    go_on(interrupted, tmp_path / "hf")  # what was there is still good


def test_moved_source_is_the_same(interrupted, tmp_path):
    go_on(interrupted.rename(tmp_path / "elsewhere"), tmp_path / "hf")


def test_run_without_resume_begins_again(interrupted, tmp_path):
    before = (tmp_path / ".hf.partial" / "folder" / "model-00001-of-00016.safetensors").stat().st_mtime_ns
    go_on(interrupted, tmp_path / "hf", resume=False)
    assert (tmp_path / "hf" / "model-00001-of-00016.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize("damage", [Path.unlink, partial(resize, by=-1), partial(resize, by=1)])
def test_finished_shard_that_was_lost_is_noticed(damage, interrupted, tmp_path):
    damage(tmp_path / ".hf.partial" / "folder" / "model-00002-of-00016.safetensors")
    with pytest.raises(ValueError, match=r"model-00002-of-00016.safetensors should have \S+ bytes .*--no-resume"):
        go_on(interrupted, tmp_path / "hf")


@pytest.mark.parametrize("text", ["{", "{}", "[]", "5", '{"finished": null}', "[" * 10_000])
def test_manifest_that_cannot_be_read(text, interrupted, tmp_path):
    (tmp_path / ".hf.partial" / "manifest.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"manifest.json (is not|is no|holds no).*; remove \S+.hf.partial and start again"
    ):
        go_on(interrupted, tmp_path / "hf")


def test_second_run_for_the_same_folder_is_refused(interrupted, tmp_path):
    with FileLock(tmp_path / ".hf.partial" / "lock"), pytest.raises(OSError, match=r"another process is writing to"):
        go_on(interrupted, tmp_path / "hf")
    go_on(interrupted, tmp_path / "hf")


def test_bit_that_flips_between_runs_is_noticed(interrupted, tmp_path):
    # in place: neither the size nor the directory of the file changes
    path = interrupted / "49300" / "mp_rank_01_model_states.pt"
    name = "transformer.layers.4.mlp.dense_4h_to_h.weight"
    weight = torch.load(path, weights_only=True)["module"][name].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mp_rank_01_model_states.pt: {name} is damaged"):
        go_on(interrupted, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """File system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs Linux and its administrator")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_refused_beforehand(small_disk):
    (small_disk / "other").write_bytes(bytes(600_000))
    with pytest.raises(OSError, match=r"disk needs 701,920 free bytes, but has \S+; free some space"):
        CONVERT(small_disk / "hf")
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("num_bytes", range(350_000, 1_040_000, 60_000))
def test_disk_that_fills_up_on_the_way(num_bytes, small_disk, monkeypatch, tmp_path):
    monkeypatch.setattr(segments, "require_space", lambda dst, num_bytes: None)  # someone else fills it later
    (small_disk / "other").write_bytes(bytes(num_bytes))
    with pytest.raises(OSError, match=r"No space left on device") as caught:
        CONVERT(small_disk / "hf")
    assert caught.value.errno == errno.ENOSPC
    assert not (small_disk / "hf").exists()
    finished = finished_files(small_disk / ".hf.partial")
    assert len(finished) > 0 or not (small_disk / ".hf.partial").exists()
    (small_disk / "other").unlink()
    CONVERT(small_disk / "hf")
    CONVERT(tmp_path / "hf")
    assert read_folder(small_disk / "hf") == read_folder(tmp_path / "hf")


@pytest.mark.parametrize("name", ["convert", "quantize", "export", "reshard"])
def test_bit_that_flips_in_a_finished_part_is_noticed(name, runs, stop_after, tmp_path):
    stop_after(2, Stop())
    with pytest.raises(Stop):
        runs[name](tmp_path / "out")
    home = tmp_path / ".out.partial"
    hashes = json.loads((home / "manifest.json").read_text())["hashes"]
    assert len(hashes) == 2
    for path in {home / "folder" / file for of_segment in hashes.values() for file in of_segment}:
        content = bytearray(path.read_bytes())
        content[900] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged: it has changed since .*--no-resume"):
            runs[name](tmp_path / "out")
        content[900] ^= 1
        path.write_bytes(content)
    runs[name](tmp_path / "out")

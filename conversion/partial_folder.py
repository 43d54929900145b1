"""Write a folder in segments over hours: an interrupted run goes on where it was, and the folder appears as a whole.

Beside the destination `NAME` lies a hidden folder `.NAME.partial` until the end:
    manifest.json   what is being written: version, hash of the plan, size and hash of every source, finished segments
    folder/         the destination as far as it is written
    lock            held by the process that writes
A segment counts once its files are on the disk and the manifest says so. At the end `folder` is renamed to the
destination.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from glm_hf._version import __version__
from glm_hf.conversion.streams import progress_bar, read_ahead
from glm_hf.new_folder import require_space, require_vacant

RESTART = "start again with resume=False (--no-resume), which throws away what is there"

logger = logging.getLogger(__name__)


class Segment(Protocol):
    """
    A part of a folder that is written in one go.

    Attributes:
        label: Its name in the manifest.
        layout: Name, shape and dtype of every tensor in it, as JSON.
        num_bytes: Bytes that it adds.
        end: Size of its files, by name, when it is finished.
    """

    label: str
    layout: Any
    num_bytes: int
    end: dict[str, int]

    def open(self, folder: Path) -> AbstractContextManager[Callable[[str, Tensor], None]]:
        """Return a context with the function that appends a block of rows to a tensor; the caller syncs the files."""


def write_in_segments(
    dst: Path,
    segments: Sequence[Segment],
    blocks_of: Callable[[Any], Iterator[tuple[str, Tensor]]],
    finish: Callable[[Path], None],
    *,
    sources: dict[str, Any],
    resume: bool = True,
) -> None:
    """
    Write all `segments` to the folder `dst`, going on with an interrupted run.

    On an error, finished segments stay for the next run; without any, nothing stays.

    Args:
        dst: Vacant destination, absolute; missing parents are made.
        segments: What to write, in order.
        blocks_of: Yields all tensors of a segment in order, as (name, block of rows).
        finish: Writes the small files into the folder when all segments are there.
        sources: Size and hash of every source file by its name, as JSON; they must not change between runs.
        resume: Whether to go on with an interrupted run rather than to throw away what it has left.

    Raises:
        FileExistsError: If `dst` holds something, or its hidden folder is not of an interrupted run.
        ValueError: If an interrupted run had other segments or sources.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    home = dst.with_name(f".{dst.name}.partial")
    work = home / "folder"
    plan = hashlib.sha256(json.dumps([(s.label, s.layout) for s in segments]).encode()).hexdigest()
    wanted: dict[str, Any] = {"version": __version__, "plan": plan, "sources": sources, "finished": []}
    whole = wanted | {"finished": [segment.label for segment in segments]}
    if _manifest(home) == whole and not work.exists() and dst.is_dir() and any(dst.iterdir()):
        shutil.rmtree(home)  # an earlier run came as far as this
        return
    require_vacant(dst)
    _require_ours(home)
    num_bytes = sum(segment.num_bytes for segment in segments)
    require_space(dst, num_bytes - (_bytes_in(work) if resume else 0))
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / "lock", dst):
        manifest = (_interrupted_run(home, wanted, segments) if resume else None) or wanted
        done = manifest["finished"]
        try:
            if not done:
                _save(home, manifest)
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
            with progress_bar("Writing", num_bytes, sum(s.num_bytes for s in segments[: len(done)])) as progress:
                for segment in segments[len(done) :]:
                    _write(segment, work, blocks_of, progress)
                    done.append(segment.label)
                    _save(home, manifest)
            finish(work)
            sync_tree(work)
            work.rename(dst)
            sync(dst.parent)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(dst)  # a full disk does not tell which
            if done:
                error.add_note(f"{len(done)} of {len(segments)} parts are finished; run the same command to go on")
            else:
                shutil.rmtree(home, ignore_errors=True)
            raise
    shutil.rmtree(home)


def _write(
    segment: Segment, work: Path, blocks_of: Callable[[Any], Iterator[tuple[str, Tensor]]], progress: tqdm
) -> None:
    """Write one segment and wait for the disk."""
    with segment.open(work) as write, closing(read_ahead(blocks_of(segment))) as blocks:
        for name, block in blocks:
            write(name, block)
            progress.update(block.nbytes)
    sync_tree(work)


def _require_ours(home: Path) -> None:
    """Raise FileExistsError if `home` holds something that no run of ours has left."""
    found = {path.name for path in home.iterdir()} if home.is_dir() else set()
    if "manifest.json" not in found and found - {"lock", "manifest.new"}:
        raise FileExistsError(f"{home} is not of an interrupted conversion; remove it or choose another destination")


def _interrupted_run(home: Path, wanted: dict[str, Any], segments: Sequence[Segment]) -> dict[str, Any] | None:
    """Return the manifest of an interrupted run to go on with, None without one; ValueError if it cannot go on."""
    manifest = _manifest(home)
    if manifest is None:
        return None
    for name in sorted(manifest["sources"].keys() | wanted["sources"].keys()):
        before, now = manifest["sources"].get(name), wanted["sources"].get(name)
        if before != now:
            raise ValueError(f"{name} has changed since the interrupted run in {home}: {before}, now {now}; {RESTART}")
    if (manifest["version"], manifest["plan"]) != (wanted["version"], wanted["plan"]):
        raise ValueError(f"the interrupted run in {home} had other options or another version of glm_hf; {RESTART}")
    for segment in segments[: len(manifest["finished"])]:
        for name, size in segment.end.items():
            path = home / "folder" / name
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(f"{path} should have {size:,} bytes from the interrupted run, but has not; {RESTART}")
    return manifest


def _manifest(home: Path) -> dict[str, Any] | None:
    path = home / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove {home} and start again") from error


def _save(home: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    new = home / "manifest.new"
    new.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(new)
    new.replace(home / "manifest.json")
    sync(home)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _locked(path: Path, dst: Path) -> Iterator[None]:
    """Hold a lock that other processes see and that goes when this process ends, however it ends."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OSError(f"another process is writing to {dst}; wait for it or choose another destination") from error
    except NotImplementedError:
        logger.warning("%s cannot be locked on this file system; do not start a second run for it", dst)
    try:
        yield
    finally:
        lock.release()


def sync_tree(folder: Path) -> None:
    """Wait until all files and folders in `folder` are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk, or a folder's list of names where the system can tell."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

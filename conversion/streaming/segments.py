"""Write a folder in segments over hours: an interrupted run is resumed, and the folder appears as a whole.

The folder is an `AtomicFolder`, whose hidden folder holds a manifest besides, `manifest.json`: version, hash of the
plan, size and hash of every source, the finished segments and hashes of their bytes. A segment counts once its files
are on the disk and the manifest says so; before a run goes on, their bytes are compared.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from glm_hf import __version__
from glm_hf.conversion.streaming.blocks import progress_bar, read_ahead
from glm_hf.folders.atomic import AtomicFolder, require_space, sync, sync_tree
from glm_hf.folders.checksums import hash_range
from glm_hf.folders.validation import read_json

RESTART = "start again with resume=False (--no-resume), which discards what is there"

logger = logging.getLogger(__name__)


class Segment(Protocol):
    """
    A part of a folder that is written in one go.

    Attributes:
        label: Name of the segment in the manifest.
        layout: Name, shape and dtype of every tensor of the segment, as JSON.
        num_bytes: Bytes that the segment adds to the folder.
        end: Size of the files of the segment, by name, when it is finished.
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
    options: dict[str, Any] | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> None:
    """
    Write all `segments` to the folder `dst`, resuming an interrupted run; nothing if `dst` is their result already.

    On an error, finished segments stay for the next run. Without any, or if the sources are at fault (ValueError), so
    that they must change before there can be another, nothing stays.

    Args:
        dst: Destination, absolute; missing parents are made.
        segments: Segments to write, in order.
        blocks_of: Yields all tensors of a segment in order, as (name, block of rows).
        finish: Writes the small files into the folder when all segments are there.
        sources: Size and hash of every source file by its name, as JSON; they must not change between runs.
        options: Options that change what counts as done, besides segments and sources, as JSON.
        resume: Whether to resume an interrupted run rather than to discard what it has written.
        overwrite: Whether to replace a folder at `dst`, once the new one is complete.

    Raises:
        FileExistsError: If `dst` holds something else, or its hidden folder is not of an interrupted run.
        ValueError: If an interrupted run had other segments or sources.
        OSError: If the disk has too little space, or another process is writing to `dst`.
    """
    content = [[(segment.label, segment.layout) for segment in segments], options]
    plan = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    target = _target(dst, overwrite, {"plan": plan, "sources": sources})
    wanted: dict[str, Any] = {"version": __version__, "plan": plan, "sources": sources, "finished": [], "hashes": {}}
    if _is_finished(target, finish):
        return
    num_bytes = sum(segment.num_bytes for segment in segments)
    require_space(dst, num_bytes - bytes_of_interrupted_run(dst))
    with target.locked():
        if not _is_finished(target, finish):  # another run may have come to its end meanwhile
            manifest = (_interrupted_run(target, wanted, segments) if resume else None) or wanted
            _run(target, manifest, segments, blocks_of, finish)
        target.remove()


def bytes_of_interrupted_run(dst: Path) -> int:
    """Return how many bytes an interrupted run has written for `dst`, which the next one keeps or discards."""
    return sum(path.stat().st_size for path in _target(dst).work.rglob("*") if path.is_file())


def _target(dst: Path, overwrite: bool = False, origin: dict[str, Any] | None = None) -> AtomicFolder:
    owns = frozenset({"manifest.json", "manifest.new"})
    return AtomicFolder(dst, replaces=overwrite, owns=owns, origin=origin)


def _is_finished(target: AtomicFolder, finish: Callable[[Path], None]) -> bool:
    """
    Tell whether the destination is the result already, the small files included.

    Raises:
        FileExistsError: If it holds something else, or the hidden folder is not of such a run.
    """
    target.require_own()
    if target.is_complete(finish):
        return True
    target.require_possible()
    return False


def _run(
    target: AtomicFolder,
    manifest: dict[str, Any],
    segments: Sequence[Segment],
    blocks_of: Callable[[Any], Iterator[tuple[str, Tensor]]],
    finish: Callable[[Path], None],
) -> None:
    """Write the segments that are not finished, and rename the folder."""
    home, work, done = target.home, target.work, manifest["finished"]
    num_bytes = [segment.num_bytes for segment in segments]
    try:
        if not done:
            _save(home, manifest)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        with ExitStack() as stack:
            progress = stack.enter_context(progress_bar("Writing", sum(num_bytes), sum(num_bytes[: len(done)])))
            # One thread reads for all segments: every thread would keep freed memory of its own.
            coming = ((segment, *block) for segment in segments[len(done) :] for block in blocks_of(segment))
            blocks = stack.enter_context(closing(read_ahead(coming)))
            for segment, group in groupby(blocks, key=itemgetter(0)):
                with segment.open(work) as write:
                    for _, name, block in group:
                        write(name, block)
                        progress.update(block.nbytes)
                sync_tree(work)
                manifest["hashes"][segment.label] = _hashes(work, segments, segment)
                done.append(segment.label)
                _save(home, manifest)
        _remove_others(work, {name for segment in segments for name in segment.end})
        finish(work)
        target.publish()
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(target.dst)  # a full disk does not tell which
        if done and not isinstance(error, ValueError):
            error.add_note(f"{len(done)} of {len(segments)} parts are finished; run the same command to resume")
        else:
            target.remove()
        raise


def _interrupted_run(
    target: AtomicFolder, wanted: dict[str, Any], segments: Sequence[Segment]
) -> dict[str, Any] | None:
    """Return the manifest of an interrupted run to resume, None without one; ValueError if it cannot be resumed."""
    home = target.home
    manifest = _manifest(home)
    if manifest is None or not manifest["finished"]:
        return None
    before, now = manifest["sources"], wanted["sources"]
    if before.keys() != now.keys():
        raise ValueError(f"the interrupted run in {home} had another source, with {', '.join(before)}; {RESTART}")
    if changed := [name for name in now if before[name] != now[name]]:
        raise ValueError(
            f"{changed[0]} has changed since the interrupted run in {home}: {before[changed[0]]}, now "
            f"{now[changed[0]]}; {RESTART}"
        )
    if (manifest["version"], manifest["plan"]) != (wanted["version"], wanted["plan"]):
        raise ValueError(f"the interrupted run in {home} had other options or another version of glm_hf; {RESTART}")
    _require_undamaged(target.work, manifest, segments)
    return manifest


def _require_undamaged(work: Path, manifest: dict[str, Any], segments: Sequence[Segment]) -> None:
    """Raise ValueError unless the finished segments have the bytes that were written."""
    num_done = len(manifest["finished"])
    growing = {name for segment in segments[num_done:] for name in segment.end}
    for name, size in {name: size for segment in segments[:num_done] for name, size in segment.end.items()}.items():
        path = work / name
        actual = path.stat().st_size if path.is_file() else -1
        if actual < size or (actual > size and name not in growing):
            raise ValueError(f"{path} should have {size:,} bytes from the interrupted run, but has not; {RESTART}")
    for segment in segments[:num_done]:
        expected = manifest["hashes"].get(segment.label)
        for name, found in _hashes(work, segments, segment).items():
            if not isinstance(expected, dict) or expected.get(name) != found:
                raise ValueError(f"{work / name} is damaged: it has changed since the interrupted run; {RESTART}")


def _hashes(work: Path, segments: Sequence[Segment], segment: Segment) -> dict[str, str]:
    """Return the hash of what a segment has added to each of its files."""
    starts: dict[str, int] = {}
    for before in segments[: segments.index(segment)]:
        starts |= before.end
    with ThreadPoolExecutor() as pool:
        names = list(segment.end)
        found = pool.map(lambda name: hash_range(work / name, starts.get(name, 0), segment.end[name]), names)
        return dict(zip(names, found, strict=True))


def _manifest(home: Path) -> dict[str, Any] | None:
    """Return the manifest in `home`, None without one; ValueError if it cannot be one."""
    path = home / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove {home} and start again") from error
    kinds = {"version": str, "plan": str, "sources": dict, "finished": list, "hashes": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is no manifest; remove {home} and start again")
    return manifest


def _save(home: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    new = home / "manifest.new"
    new.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(new)
    new.replace(home / "manifest.json")
    sync(home)


def _remove_others(work: Path, names: set[str]) -> None:
    """Remove what an interrupted run has left of the small files, which may have been meant to differ."""
    for path in work.rglob("*"):
        if path.is_file() and path.relative_to(work).as_posix() not in names:
            path.unlink()

"""Folders that appear whole or not at all, whatever happens to the process that writes them.

Beside the destination `NAME` lies a hidden folder `.NAME.partial` until the end:
    folder/         what is to become the destination, as far as it is written
    lock            held by the process that writes, and gone with it
    replaced.NAME/  an earlier destination, in the moment in which the new one takes its place
"""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from glm_hf.folders.records import is_complete, remember

logger = logging.getLogger(__name__)


class AtomicFolder:
    """
    A folder that gets its name once all of its bytes are on the disk.

    What a killed process has left is removed by the next one, or kept by one that resumes; two processes never write
    at once.

    Args:
        dst: Destination, absolute; missing parents are made.
        replaces: Whether a destination that is there is replaced, at once, rather than refused.
        home: Hidden folder, on the same file system; a folder given here may hold nothing else.
        work_name: Name in `home` of the folder that is written.
        owns: Names of files in `home` that the caller keeps there.
        completed_by: Name of the file that completes a destination which holds other things as well: it is removed
            first, and moved there last. None for a destination that is a folder of its own.
        replaced_files: Names of files in such a destination that the new ones replace.
        origin: What the destination is made from, as JSON, by which the same work is known to be done
            when it is asked for again; None to forget it.
    """

    def __init__(
        self,
        dst: Path,
        *,
        replaces: bool = False,
        home: Path | None = None,
        work_name: str = "folder",
        owns: frozenset[str] = frozenset(),
        completed_by: str | None = None,
        replaced_files: re.Pattern[str] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.dst, self.replaces, self.origin = dst, replaces, origin
        self.completed_by, self.replaced_files = completed_by, replaced_files
        self.has_own_home = home is None
        self.home = dst.with_name(f".{dst.name}.partial") if home is None else home
        self.work = self.home / work_name
        self.replaced = self.home / f"replaced.{dst.name}"
        self.known = owns | {"lock", self.work.name, self.replaced.name}

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """
        Yield the hidden folder, which becomes the destination at the end, or is removed on an error.

        Raises:
            FileExistsError: If the destination holds something and is not to be replaced, or the hidden folder holds
                what no writer has left there.
            OSError: If another process is writing to the destination, or the disk is full.
        """
        self.require_possible()
        with self.locked():
            self.clear()
            self.work.mkdir()
            try:
                yield self.work
                self.publish()
            finally:
                self.remove()

    def require_possible(self) -> None:
        """Raise FileExistsError if the destination holds something and is not to be replaced."""
        if self.replaces:
            require_replaceable(self.dst)
        elif self.completed_by is None:
            require_vacant(self.dst)

    def is_complete(self, write_small_files: Callable[[Path], None] | None = None) -> bool:
        """
        Tell whether the destination was made from the same origin, and has all of its files; logs it then.

        Args:
            write_small_files: Writes files to a folder that those of the destination have to equal.
        """
        if self.replaces or self.origin is None or not is_complete(self.dst, self.origin):
            return False
        if write_small_files is not None:
            with TemporaryDirectory() as folder:
                write_small_files(Path(folder))
                if any(path.read_bytes() != (self.dst / path.name).read_bytes() for path in Path(folder).iterdir()):
                    return False
        if self.home.is_dir():  # whose process was killed in its last moment, or is about to end
            with suppress(OSError), self.locked():
                self.remove()
        logger.warning("%s is already complete", self.dst)
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the hidden folder and hold its lock; FileExistsError if the folder is not of a writer."""
        self.require_own()
        self.home.mkdir(parents=True, exist_ok=True)
        with exclusive(self.home / "lock", self.dst):
            yield

    def require_own(self) -> None:
        """Raise FileExistsError if the hidden folder holds what no writer of this destination has left there."""
        found = {path.name for path in self.home.iterdir()} if self.has_own_home and self.home.is_dir() else set()
        if found - self.known:
            raise FileExistsError(f"{self.home} is not of an interrupted run; remove it or choose another destination")

    def clear(self) -> None:
        """Remove what a killed process has left."""
        self.give_back()
        for path in self.home.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def publish(self) -> None:
        """Give the written folder its name once all of its bytes are on the disk."""
        if self.origin is not None:
            remember(self.work, self.dst, self.origin)
        sync_tree(self.work)
        if self.completed_by is not None:
            self._move_files(self.completed_by)
            return
        if self.replaces and self.dst.exists():
            self.dst.rename(self.replaced)
        self.work.rename(self.dst)
        sync(self.dst.parent)

    def _move_files(self, last: str) -> None:
        """Move all files into the destination, which is never complete with files of two writers."""
        (self.dst / last).unlink(missing_ok=True)
        if (pattern := self.replaced_files) is not None:
            for path in [path for path in self.dst.iterdir() if pattern.fullmatch(path.name)]:
                path.unlink()
        for path in sorted(self.work.iterdir(), key=lambda path: path.name == last):
            path.replace(self.dst / path.name)
        sync(self.dst)

    def give_back(self) -> None:
        """Give a destination that was about to be replaced its name again."""
        if self.replaced.exists() and not self.dst.exists():
            self.replaced.rename(self.dst)

    def remove(self) -> None:
        """Remove the hidden folder, the files that tell what it is last."""
        self.give_back()
        shutil.rmtree(self.work, ignore_errors=True)
        for name in self.known - {"lock", self.work.name, self.replaced.name}:
            (self.home / name).unlink(missing_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)


@contextmanager
def exclusive(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock file, which is removed at the end; OSError if another process writes to `what`, which it guards."""
    held = FileLock(lock, thread_local=False)  # another thread may release it
    try:
        held.acquire(blocking=False)
    except Timeout as error:
        raise OSError(f"another process is writing to {what}; wait for it or choose another destination") from error
    except NotImplementedError:
        logger.warning("%s cannot be locked on this file system; do not start a second run for it", what)
    try:
        yield
    finally:
        with suppress(OSError):  # of systems that keep files which are open
            lock.unlink()
        held.release()


def remove_leftovers(parent: Path) -> None:
    """Remove the hidden folders in `parent` that killed processes have left, for whatever destination."""
    for home in parent.glob(".*.partial"):
        if home.is_dir() and {path.name for path in home.iterdir()} <= {"lock", "folder"}:
            with suppress(OSError), exclusive(home / "lock", home):
                shutil.rmtree(home)


def destination(dst: str | Path) -> Path:
    """Return a destination as an absolute path without links; ValueError if its links lead in a circle."""
    try:
        return Path(dst).resolve()
    except (RuntimeError, OSError) as error:  # whichever the version of Python raises
        raise ValueError(f"{dst} cannot be a destination: {error}") from error


def require_vacant(dst: Path) -> None:
    """
    Check that a finished folder can be renamed to `dst`: a new path or an empty folder.

    Raises:
        FileExistsError: If `dst` is a file or holds something.
        ValueError: If `dst` is a mount point.
    """
    if dst.is_mount():
        raise ValueError(f"{dst} is a mount point and cannot be replaced; choose a folder in it")
    if (dst.exists() and not dst.is_dir()) or (dst.is_dir() and any(dst.iterdir())):
        raise FileExistsError(
            f"{dst} exists already; choose another folder or remove it (or overwrite it, --overwrite)"
        )


def require_replaceable(dst: Path) -> None:
    """Raise FileExistsError if `dst` is no folder, ValueError if it is a mount point."""
    if dst.is_mount():
        raise ValueError(f"{dst} is a mount point and cannot be replaced; choose a folder in it")
    if dst.exists() and not dst.is_dir():
        raise FileExistsError(f"{dst} is a file; choose another destination or remove it")


def free_space(dst: Path) -> int:
    """Return the free bytes of the disk that `dst`, an absolute path, is to lie on."""
    return shutil.disk_usage(next(parent for parent in dst.parents if parent.exists())).free


def require_space(dst: Path, num_bytes: int) -> None:
    """Raise OSError if the disk that `dst` is to lie on has less than `num_bytes` free."""
    free = free_space(dst)
    if free < num_bytes:
        raise OSError(f"{dst.parent} needs {num_bytes:,} free bytes, but has {free:,}; free some space")


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

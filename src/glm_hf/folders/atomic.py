"""Folders that appear whole or not at all: written beside their destination, on the disk, renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        raise FileExistsError(f"{dst} exists already; choose another folder or remove it")


def free_space(dst: Path) -> int:
    """Return the free bytes of the disk that `dst`, an absolute path, is to lie on."""
    return shutil.disk_usage(next(parent for parent in dst.parents if parent.exists())).free


def require_space(dst: Path, num_bytes: int) -> None:
    """Raise OSError if the disk that `dst` is to lie on has less than `num_bytes` free."""
    free = free_space(dst)
    if free < num_bytes:
        raise OSError(f"{dst.parent} needs {num_bytes:,} free bytes, but has {free:,}; free some space")


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """
    Yield a hidden folder beside `dst` that is renamed to `dst` at the end, or removed on an error.

    Args:
        dst: Vacant destination; missing parents are made.

    Raises:
        FileExistsError: If a hidden folder is left from an earlier run that was killed.
    """
    folder = dst.with_name(f".{dst.name}.partial")
    if folder.exists():
        raise FileExistsError(f"{folder} is left from an interrupted run; remove it and start again")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(dst)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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

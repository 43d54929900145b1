"""Checkpoints that a thread completes: it writes large files from copies in host memory, hashes, syncs and renames.

No collective runs on the thread. Where several processes have files to write, as under DeepSpeed, each tells the one
that completes the checkpoint by the store of the process group, under a prefix of this checkpoint:

`RANK`: {"files": checksums of the rank's own files}, or {"error": why they cannot be written}
"""

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import distributed as dist
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.checksums import compute_checksums, files_of, write_checksums
from glm_hf.training.saving.host_copy import HostBuffers, host_copy

STAGING = ".partial-checkpoint"
POLL_SECONDS = 0.2
PATIENCE = 30.0  # seconds that a run which has failed waits for what other processes write

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """
    What is yet to be written of a checkpoint.

    Args:
        path: File, or folder of some.
        write: Writes it from a copy of the state.
    """

    path: Path
    write: Callable[[], object]


@dataclass(frozen=True)
class StagedCheckpoint:
    """
    A checkpoint that has its small files, and for the large ones copies of the state.

    Args:
        path: Path of the finished checkpoint.
        folder: Hidden folder that is to become it.
        place: Gives the folder its name when it is left, or removes it on an error; empty in a process that does not.
        parts: Files that this process has to write.
        writers: Ranks that have any.
        key: Prefix of this checkpoint in the store.
        then: What follows once the checkpoint is whole; None in a process that does not make it so.
    """

    path: Path
    folder: Path
    place: ExitStack
    parts: tuple[Part, ...]
    writers: tuple[int, ...]
    key: str
    then: Callable[[], object] | None


class BackgroundWriter:
    """
    Writes one checkpoint at a time while training goes on.

    As the context of a run, it returns once the last checkpoint is whole, or has failed.

    Args:
        accelerator: Accelerator that all processes share.

    Raises:
        OSError: On leaving, if the last checkpoint cannot be written and the body has no error of its own.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._buffers = HostBuffers()
        self._parts: list[Part] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._deadline = math.inf  # for what other processes write

    def __enter__(self) -> "BackgroundWriter":
        """Begin a run."""
        self._deadline = math.inf
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the last checkpoint."""
        if error is not None:
            self._deadline = time.monotonic() + PATIENCE
        self._join()
        self._buffers = HostBuffers()
        if error is None:
            self.raise_error()
        elif self._error is not None:
            logger.error(f"{self._error}")
            self._error = None

    def copy(self, state: Any) -> Any:
        """Return a copy of a state in host memory, which lasts until the checkpoint is whole."""
        return host_copy(state, self._buffers)

    def defer(self, path: Path, write: Callable[[], object]) -> None:
        """Let the thread write a file, or some in a folder, of the checkpoint that is being staged."""
        self._parts.append(Part(path, write))

    @contextmanager
    def staged(self, run: Path, name: str, *, writes: bool, then: Callable[[], object]) -> Iterator[Path]:
        """
        Yield a hidden folder for small files, and let the thread make it the checkpoint `name` afterwards.

        All processes enter together, and wait for the checkpoint before.

        Args:
            run: Output folder of the run.
            name: Name of the checkpoint.
            writes: Whether this process makes and moves the folder.
            then: What follows on the thread of a process that `writes`, once the checkpoint is whole.

        Raises:
            OSError: If the checkpoint before, or a small file of this one, cannot be written.
        """
        self.finish()
        self._buffers.reuse()
        self._parts.clear()
        with one_error(run / name), ExitStack() as stack:
            hidden = staging_folder(run, name)
            folder = stack.enter_context(hidden.writing()) if writes else hidden.work
            self.accelerator.wait_for_everyone()
            yield folder
            parts, rank = tuple(self._parts), self.accelerator.process_index
            writers = gather_object([(rank, uuid.uuid4().hex)] if parts else [])  # now all small files are there
            staged = StagedCheckpoint(
                path=run / name,
                folder=folder,
                place=stack.pop_all(),
                parts=parts,
                writers=tuple(rank for rank, _ in writers),
                key=writers[0][1] if writers else "",
                then=then if writes else None,
            )
        self._thread = threading.Thread(target=self._complete, args=(staged,), name=f"writer of {name}")
        self._thread.start()

    def finish(self) -> None:
        """Wait until no checkpoint is being written; OSError on all processes if the last cannot be."""
        self._join()
        problems = gather_object([] if self._error is None else [str(self._error)])
        self.raise_error()
        if problems:
            raise OSError(problems[0])

    def raise_error(self) -> None:
        """Raise, once, what the thread of this process has failed with."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _complete(self, staged: StagedCheckpoint) -> None:
        """Make a checkpoint whole, on the thread; an error is kept for the main thread."""
        try:
            with one_error(staged.path), staged.place:
                hashed = self._write(staged)
                if staged.then is not None:
                    names = files_of(staged.folder)
                    hashed |= compute_checksums(staged.folder, [name for name in names if name not in hashed])
                    write_checksums(staged.folder, {name: hashed[name] for name in names})
            if staged.then is not None:
                staged.then()
        except BaseException as error:
            self._error = error

    def _write(self, staged: StagedCheckpoint) -> dict[str, Any]:
        """Write this process's files, and return the checksums of all that are known here."""
        rank, cause = self.accelerator.process_index, None
        reports: list[dict[str, Any]]
        try:
            reports = [{"files": write_parts(staged)}]
        except BaseException as error:
            reports, cause = [{"error": str(error)}], error
        if staged.then is not None:
            others = [other for other in staged.writers if other != rank]
            reports += self._reports_of(others, staged.key) if others else []
        elif staged.parts:
            board_of(staged.key).set(str(rank), json.dumps(reports[0]))
        for report in reports:
            if "error" in report:
                raise OSError(report["error"]) from cause
        return {name: facts for report in reports for name, facts in report["files"].items()}

    def _reports_of(self, ranks: Iterable[int], key: str) -> Iterator[dict[str, Any]]:
        """Yield what other processes have put into the store, which forgets it."""
        board = board_of(key)
        for rank in ranks:
            while not board.check([str(rank)]):
                if time.monotonic() > self._deadline:
                    raise OSError(f"rank {rank} has not written its files")
                time.sleep(POLL_SECONDS)
            yield json.loads(board.get(str(rank)))
            board.delete_key(str(rank))


def board_of(key: str) -> dist.Store:
    """Return the store of the process group, under the prefix of a checkpoint."""
    return dist.PrefixStore(f"glm_hf.checkpoint.{key}", dist.distributed_c10d._get_default_store())


def write_parts(staged: StagedCheckpoint) -> dict[str, Any]:
    """Write the files of this process, and return the checksums of those whose names are known."""
    for part in staged.parts:
        part.write()
    names = [part.path.relative_to(staged.folder).as_posix() for part in staged.parts if part.path.is_file()]
    return compute_checksums(staged.folder, names)


def staging_folder(run: Path, name: str) -> AtomicFolder:
    """Return the hidden folder in a run's output folder that is to become the checkpoint `name`, or replace it."""
    return AtomicFolder(run / name, replaces=True, home=run / STAGING, work_name=name)


@contextmanager
def one_error(checkpoint: Path) -> Iterator[None]:
    """Turn what the writers of files raise into one OSError that says where a run can be resumed from instead."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        last = get_last_checkpoint(checkpoint.parent)
        where = f"training can be resumed from {last}" if last else "there is no earlier checkpoint"
        raise OSError(f"{checkpoint} cannot be saved: {error}; {where}") from error

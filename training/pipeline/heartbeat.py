"""Heartbeats of all ranks, so that one that dies ends the run with a message that names it.

What gloo reports then names nobody, and NCCL only hangs. The supervision of torchrun sees processes that end, not
ranks that hang, and only where torchrun is the launcher, which DeepSpeed's own is not. So the ranks write to the store
of the process group, each by a client of its own. Keys, under a prefix of this heartbeat:

`beat/RANK`: a counter; 0 before the rank has entered, -1 once it is done
`name/RANK`: the rank, its host and its process, in words
`machine/ID`: a line `RANK PID` for every rank on a machine
`verdict`: why the run ends; the first that is written stays
`settled/RANK`: above 0 once a rank is done, has read the verdict, or is dead
`settled`: how many are
"""

import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers.utils import logging

logger = logging.get_logger(__name__)

GRACE = 10.0  # seconds from the verdict until a process that hangs is ended
LINGER = 5.0  # seconds at most that a process stays for the others to read why; the store may end with it
POLL_SECONDS = 0.2  # seconds between two looks once there is trouble
MOST_NAMES = 8
MARKS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class Heartbeat:
    """
    Watch the ranks of a run while the body of a `with` is running, which all of them enter.

    A rank that dies, fails or is silent is named on all others: by `ConnectionError` where the body fails for want of
    it, on stderr where the body hangs. Rank 0 leaves last. A rank counts from when it has entered, so enter early.
    Without several processes, or with a store that is a file, nothing is watched.

    Args:
        rank: Rank of this process.
        world_size: Number of processes.
        interval: Seconds between two beats.
        patience: Seconds without a beat after which a rank counts as dead: more than Python's lock is ever held.
            A process that has gone is noticed within an interval by those on its machine.

    Raises:
        ConnectionError: On leaving, if another rank has failed, has gone or has stopped answering, and the body has
            ended or has failed in communication. Any other error of the body stays as it is.
    """

    def __init__(self, rank: int, world_size: int, interval: float = 2.0, patience: float = 30.0) -> None:
        self.rank, self.world_size = rank, world_size
        self.interval, self.patience = interval, patience
        self.verdict: str | None = None
        self._threads: tuple[threading.Thread, ...] = ()
        self._outcome: str | None = None  # of the body: empty, or how it has failed
        self._looks = 0
        self._deadline = 0.0  # for the others to read the verdict
        self._first, self._first_pid = "rank 0", 0  # whose process is known on its own machine only
        self._wake, self._decided, self._free, self._left = (threading.Event() for _ in range(4))

    def __enter__(self) -> "Heartbeat":
        """Start watching."""
        if self.world_size > 1 and dist.is_available() and dist.is_initialized():
            store = _get_default_store()
            if not store.has_extended_api():  # type: ignore[attr-defined]
                logger.warning("ranks that die are not noticed without a TCPStore, which init_method env:// makes")
                return self
            watch = threading.Thread(target=self._watch, args=(store,), daemon=True)
            self._threads = watch, threading.Thread(target=self._guard, daemon=True)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others how the body has ended, and stop watching."""
        if not self._threads:
            return
        try:
            self._wake.set()
            consequence = is_communication_error(error)
            if consequence:
                self._decided.wait(self.patience + 4 * self.interval)
            own = error is not None and not (consequence and self.verdict)
            self._outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}" if own else ""
            self._free.wait()
        finally:
            self._left.set()
        for thread in self._threads:
            thread.join(timeout=1.0)  # that of a store which hangs does not end
        if self.verdict and not own:
            raise ConnectionError(f"{self.verdict}; the run ends here") from error

    def _watch(self, store: dist.Store) -> None:
        """Beat and look, until the main thread may leave; rank 0 may serve all by `store`, which lives as long."""
        try:
            client = store.clone()  # type: ignore[attr-defined]
            client.set_timeout(timedelta(seconds=self.patience))
            board = Board(client, self.rank, self.world_size)
            silence = Silence(2 * self.interval)
            while not self._look(board, silence) and not self._left.is_set():
                if self._wake.wait(self.interval):
                    time.sleep(POLL_SECONDS)
        except RuntimeError:  # the store is gone, and rank 0 with it, or whoever else keeps it
            deadline = time.monotonic() + LINGER  # a process loses its connections before it is seen to be gone
            while self._first_pid and not is_gone(self._first_pid) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            self._conclude(self._lost_store())
        self._free.set()

    def _look(self, board: "Board", silence: "Silence") -> bool:
        """Beat, judge the others by what they have written, and tell whether the main thread may leave."""
        outcome = self._outcome
        view = board.look()
        self._looks += 1
        if view.beats.get(0) and self._first == "rank 0":
            [self._first] = board.names([0])
        self._first_pid = view.processes.get(0, 0)
        silence.hear(view.beats, time.monotonic())
        verdict = view.verdict or self._judge(board, view, silence)
        if verdict:
            board.settle(self.rank)
            self._conclude(verdict)
            return outcome is not None and (view.settled >= self.world_size or time.monotonic() > self._deadline)
        if outcome is None:
            return False
        board.leave()
        return self.rank > 0 or view.settled >= self.world_size

    def _judge(self, board: "Board", view: "View", silence: "Silence") -> str | None:
        """Return why the run ends, after it is written for all, or None if all is well."""
        if self._outcome:
            return board.decide(f"{board.name} has failed: {self._outcome}")
        if self.verdict:
            return board.decide(self.verdict)
        gone = [rank for rank, pid in view.processes.items() if is_gone(pid) and not board.is_done(rank)]
        ranks = gone or silence.longest(self.patience)
        if not ranks:
            return None
        for rank in ranks:
            board.settle(rank)
        names = ", ".join(board.names(ranks[:MOST_NAMES]))
        more = f" and {len(ranks) - MOST_NAMES} more" if len(ranks) > MOST_NAMES else ""
        return board.decide(f"{names}{more} {'has' if len(ranks) == 1 else 'have'} stopped answering")

    def _guard(self) -> None:
        """End the process if it hangs after the verdict; the store may hang, too."""
        silence = Silence(2 * self.interval)
        while not self._left.wait(min(self.interval, 1.0)) and not self._decided.is_set():
            silence.hear({self.rank: self._looks + 1}, time.monotonic())
            gone = self._first_pid and is_gone(self._first_pid)
            if silence.longest(3 * self.interval if gone else self.patience):
                self._conclude(self._lost_store())
                self._free.set()
        if not self._left.wait(GRACE):
            os.write(2, f"glm-hf: error: {self.verdict}; the run ends here\n".encode())
            os._exit(1)

    def _conclude(self, verdict: str) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self._deadline = time.monotonic() + LINGER
            self._decided.set()
            self._wake.set()

    def _lost_store(self) -> str:
        launcher = "" if self._first_pid and is_gone(self._first_pid) else ", or the process that launched the run,"
        return f"{self._first}{launcher} has stopped answering"


@dataclass(frozen=True)
class View:
    """
    What a rank reads at a time.

    Args:
        verdict: Empty while all is well.
        settled: Number of ranks that need the store no more.
        processes: Processes of the other ranks on this machine.
        beats: Heartbeats of the ranks that this one watches: of all for rank 0, and of rank 0 for the others.
    """

    verdict: str
    settled: int
    processes: dict[int, int]
    beats: dict[int, int]


class Board:
    """The keys in the store, which all exist once this one has been made."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store = dist.PrefixStore(f"heartbeat/{store.add(f'heartbeat/count/{rank}', 1)}", store)
        self.rank = rank
        self.watched = tuple(range(1, world_size)) if rank == 0 else (0,)
        self.name = f"rank {rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self.machine = f"machine/{machine_id()}"
        self.store.compare_set("verdict", "", "")
        for key in ("settled", *(f"beat/{other}" for other in self.watched)):
            self.store.add(key, 0)
        self.store.set(f"name/{rank}", self.name)
        self.store.add(f"beat/{rank}", 1)
        self.store.append(self.machine, f"{rank} {os.getpid()}\n")  # type: ignore[attr-defined]

    def look(self) -> View:
        """Beat, and read what others have written."""
        self.store.add(f"beat/{self.rank}", 1)
        keys = ["verdict", "settled", self.machine, *(f"beat/{rank}" for rank in self.watched)]
        verdict, settled, lines, *beats = (value.decode() for value in self.store.multi_get(keys))
        processes = {int(rank): int(pid) for rank, pid in map(str.split, lines.splitlines()) if int(rank) != self.rank}
        return View(verdict, int(settled), processes, dict(zip(self.watched, map(int, beats), strict=True)))

    def decide(self, verdict: str) -> str:
        """Write why the run ends, and return what the first rank has written."""
        return self.store.compare_set("verdict", "", verdict).decode()

    def settle(self, rank: int) -> None:
        """Count a rank that needs the store no more, once."""
        if self.store.add(f"settled/{rank}", 1) == 1:
            self.store.add("settled", 1)

    def leave(self) -> None:
        """Mark this rank as done; rank 0 keeps beating for the others."""
        if self.rank > 0:
            self.store.set(f"beat/{self.rank}", "-1")
        self.settle(self.rank)

    def is_done(self, rank: int) -> bool:
        """Tell whether a rank has left."""
        return self.store.add(f"beat/{rank}", 0) < 0

    def names(self, ranks: Iterable[int]) -> list[str]:
        """Return ranks that have entered in words."""
        return [value.decode() for value in self.store.multi_get([f"name/{rank}" for rank in ranks])]


class Silence:
    """
    Seconds that ranks have been silent, by the clock of who listens.

    Args:
        longest_step: Seconds that count at most between two looks: a listener that was paused has missed beats.
    """

    def __init__(self, longest_step: float) -> None:
        self.longest_step = longest_step
        self.heard = time.monotonic()
        self.beats: dict[int, int] = {}
        self.seconds: dict[int, float] = {}

    def hear(self, beats: Mapping[int, int], now: float) -> None:
        """Take note of counters; one of 0 or less is not waited for."""
        step, self.heard = min(now - self.heard, self.longest_step), now
        for rank, beat in beats.items():
            silent = beat > 0 and self.beats.get(rank) == beat
            self.seconds[rank] = self.seconds.get(rank, 0.0) + step if silent else 0.0
        self.beats = dict(beats)

    def longest(self, patience: float) -> list[int]:
        """Return the ranks that have fallen silent together if one has been for `patience`."""
        if max(self.seconds.values(), default=0.0) < patience:
            return []
        return [rank for rank, seconds in self.seconds.items() if seconds >= patience - self.longest_step]


def is_communication_error(error: BaseException | None) -> bool:
    """Tell whether an error, or one behind it, is of a lost connection to another rank."""
    while error is not None:
        is_marked = isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
        if is_marked or isinstance(error, dist.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_gone(pid: int) -> bool:
    """Tell whether a process of this machine has ended; its parent need not have taken note yet."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except ProcessLookupError:
        return True
    except OSError:  # it belongs to somebody else, or there is no /proc
        return False
    return status.rpartition(b")")[2].split()[0] in (b"Z", b"X")


def machine_id() -> str:
    """Return what only processes share that see each other's pids."""
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = (boot.read_text().strip(), str(pids.readlink())) if boot.is_file() and pids.is_symlink() else ()
    return "/".join((socket.gethostname(), *known))

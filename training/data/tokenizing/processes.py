"""Worker processes that make shards, each the next one as soon as it has made its last."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from glm_hf.training.data.tokenizing.shards import Job, ShardMaker
from glm_hf.training.data.tokenizing.sources import Task

# A fork needs no second import of transformers, which the package imports wherever it is used as a library.
CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


class ShardWorkers:
    """
    Worker processes for one job; all have ended when the context is left, and soon after this process was killed.

    Args:
        job: What the shards have in common.
        num_proc: Number of worker processes; a single one is this process itself.
    """

    def __init__(self, job: Job, num_proc: int) -> None:
        self.job = job
        self.processes: dict[Connection, BaseProcess] = {}
        for _ in range(num_proc if num_proc > 1 else 0):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self.processes[ours] = process

    def __enter__(self) -> "ShardWorkers":
        """Return the workers."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes; what they have not finished is made anew by the next run."""
        for connection, process in self.processes.items():
            connection.close()
            process.kill()
            process.join()

    def make(self, tasks: Iterable[tuple[int, Task]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        Yield the number of every shard and what `ShardMaker.make` returns for it, as they become ready.

        Args:
            tasks: Number and task of each shard.

        Raises:
            ValueError: If a source is not what it should be.
            OSError: If a process was killed, such as for want of memory, or the disk is full.
        """
        if not self.processes:
            maker = ShardMaker(self.job)
            yield from ((number, maker.make(number, task)) for number, task in tasks)
            return
        coming, busy = iter(tasks), {}
        for connection, (number, task) in zip(self.processes, coming, strict=False):
            connection.send((number, task))
            busy[connection] = number
        while busy:
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                yield busy.pop(connection), _receive(connection)
                if (more := next(coming, None)) is not None:
                    connection.send(more)
                    busy[connection] = more[0]


def _receive(connection: Connection) -> dict[str, Any]:
    try:
        result = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise OSError(
            "a process that tokenizes has died, perhaps for want of memory; run the same command to resume, with a "
            "smaller num_proc (--num-proc)"
        ) from error
    if isinstance(result, Exception):
        raise result
    return result


def _work(connection: Connection, job: Job) -> None:
    """Make shards as long as there are tasks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, which the main process is told, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    maker = ShardMaker(job)
    while True:
        number, task = connection.recv()
        try:
            result: Any = maker.make(number, task)
        except (ValueError, OSError, MemoryError) as error:
            result = error
        connection.send(result)


def _end_with_parent() -> None:
    """End this process when its parent has ended in whatever way."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

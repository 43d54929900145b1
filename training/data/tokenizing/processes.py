"""Worker processes that make shards, each the next one as soon as it has made its last."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from glm_hf.training.data.tokenizing.shards import Job, ShardMaker
from glm_hf.training.data.tokenizing.sources import Task


def make_shards(job: Job, tasks: Iterable[tuple[int, Task]], num_proc: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yield the number of every shard and what `ShardMaker.make` returns for it, as they become ready.

    All processes have ended when the iterator is closed.

    Args:
        job: What the shards have in common.
        tasks: Number and task of each shard.
        num_proc: Number of worker processes; a single one is this process itself.

    Raises:
        ValueError: If a source is not what it should be.
        OSError: If a process was killed, such as for want of memory, or the disk is full.
    """
    if num_proc == 1:
        maker = ShardMaker(job)
        yield from ((number, maker.make(number, task)) for number, task in tasks)
        return
    coming = iter(tasks)
    with ExitStack() as stack:
        busy: dict[Connection, int] = {}
        for (number, task), _ in zip(coming, range(num_proc), strict=False):
            connection = _start(job, stack)
            connection.send((number, task))
            busy[connection] = number
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                number = busy.pop(connection)
                yield number, _receive(connection)
                if (more := next(coming, None)) is not None:
                    connection.send(more)
                    busy[connection] = more[0]


def _start(job: Job, stack: ExitStack) -> Connection:
    """Start a worker, which ends with `stack`; return the connection to it."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of torch and tokenizers
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    stack.callback(_end, process, ours)
    return ours


def _end(process: BaseProcess, connection: Connection) -> None:
    connection.close()
    process.kill()  # what it has not finished is made anew
    process.join()


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

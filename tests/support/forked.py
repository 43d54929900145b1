"""Functions run in forked processes, which share what the parent has imported and can be killed."""

import gc
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(function: Callable[[], Any], result: Path) -> int:
    """Run `function` in a child and pickle what it returns, or its traceback, to `result`; return the child's pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    gc.freeze()  # or each collection walks through, and so copies, all that the parent has imported
    try:
        try:
            outcome = ("returned", function())
        except BaseException:
            outcome = ("raised", traceback.format_exc())
        result.write_bytes(pickle.dumps(outcome))
    finally:
        os._exit(0)


def wait(pid: int, result: Path) -> Any:
    """Return what a child has returned; AssertionError with its traceback if it has raised."""
    [value] = values_of([outcome_of(pid, result)])
    return value


def outcome_of(pid: int, result: Path) -> tuple[str, Any]:
    """Wait for a child; return how it has ended, and what it has returned or the reason."""
    _, status = os.waitpid(pid, 0)
    return pickle.loads(result.read_bytes()) if result.exists() else ("ended", f"ended with status {status}")


def values_of(outcomes: list[tuple[str, Any]]) -> list[Any]:
    """Return what children have returned; AssertionError with the reasons of all that have not."""
    reasons = [f"child {number}: {value}" for number, (kind, value) in enumerate(outcomes) if kind != "returned"]
    assert not reasons, "\n".join(reasons)
    return [value for _, value in outcomes]


def run_ranks(
    function: Callable[[int], Any], world_size: int, folder: Path, killed: tuple[int, ...] = ()
) -> list[Any]:
    """
    Run `function(rank)` on processes that a launcher would have started, and return what each returns.

    Of the ranks `killed`, which do not come to an end, it is None.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank_main(rank: int) -> Any:
        import torch
        from accelerate.state import AcceleratorState, GradientState, PartialState

        torch.set_num_threads(1)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        return function(rank)

    results = [folder / f"rank-{rank}.pickle" for rank in range(world_size)]
    pids = [start(lambda rank=rank: rank_main(rank), result) for rank, result in enumerate(results)]
    for rank in killed:
        os.waitpid(pids[rank], 0)
    ended = [
        ("returned", None) if rank in killed else outcome_of(pid, result)
        for rank, (pid, result) in enumerate(zip(pids, results, strict=True))
    ]
    return values_of(ended)

"""Runs a function in several processes, as the tensor-parallel tests ask for."""

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn `function(rank, *args)` into a function of `args` that runs it in every rank of a gloo group."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any) -> None:
            # A server that has imported everything once forks the ranks; processes of their own import for seconds.
            multiprocessing.set_forkserver_preload(["glm_hf", "transformers.testing_utils"])
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = (Path(folder) / "store").as_uri()
                arguments = (world_size, rendezvous, function, args)
                start_processes(run_rank, arguments, nprocs=world_size, start_method="forkserver")

        return run

    return decorate


def run_rank(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], args: tuple) -> None:
    """Run a function as one rank of a gloo group that meets in a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()

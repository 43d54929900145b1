"""Move tensors in blocks of rows, in order: merge shards, make shards, and read ahead of the writer."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from glm_hf.conversion.streaming.stored_tensor import RowReader, StoredTensor, rows_per_block
from glm_hf.sharding.rules import ShardRule

Item = TypeVar("Item")


def read_merged(rule: ShardRule, parts: Sequence[StoredTensor]) -> Iterator[Tensor]:
    """Yield, in blocks of rows, the tensor of which `parts` holds what each rank has, in rank order."""
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(RowReader(part))) for part in parts]
        shape = rule.full_shape(parts[0].shape, len(parts))
        if rule.dim == 0:
            for rank, num_rows in rule.row_runs(shape[0], len(parts)):
                yield from readers[rank].blocks(num_rows)
            return
        step = rows_per_block(shape, parts[0].dtype)
        for start in range(0, shape[0], step):
            num_rows = min(step, shape[0] - start)
            yield rule.merge([reader.take(num_rows) for reader in readers])


def split_block(
    rule: ShardRule, num_rows: int, tp_size: int, start: int, block: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """
    Yield (rank, rows) for a block of rows of a full tensor, so that every rank gets its own rows in order.

    Args:
        rule: Rule by which the tensor is sharded.
        num_rows: Rows of the full tensor.
        tp_size: Number of ranks.
        start: Index of the first row of `block`.
        block: Rows of the full tensor.
    """
    if rule.dim != 0:
        yield from enumerate(rule.split(block, tp_size))
        return
    runs = rule.row_runs(num_rows, tp_size)
    run_length = runs[0][1]
    while len(block):
        rank, left = runs[start // run_length][0], run_length - start % run_length
        yield rank, block[:left]
        start += len(block[:left])
        block = block[left:]


def read_ahead(items: Iterator[Item]) -> Generator[Item]:
    """
    Yield `items`, of which a thread makes the next one while the caller works on the last.

    Meanwhile torch uses one thread less, as the caller needs a core: threads of torch that wait for one that has no
    core, block by block, are several times slower than fewer threads.
    """
    end = object()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads - 1))
    try:
        with ThreadPoolExecutor(max_workers=1) as pool:
            coming = pool.submit(next, items, end)
            while (item := coming.result()) is not end:
                coming = pool.submit(next, items, end)
                yield item  # type: ignore[misc]
    finally:
        torch.set_num_threads(num_threads)


def progress_bar(action: str, num_bytes: int, num_done: int = 0) -> tqdm:
    """Return a progress bar with bytes per second and time left on stderr, silent where stderr is not a terminal."""
    return tqdm(total=num_bytes, initial=num_done, desc=action, unit="B", unit_scale=True, disable=None)

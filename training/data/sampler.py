"""Which samples every step of every process takes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments

from glm_hf.training.schedules import sample_indices


class StepSampler(Sampler[list[int]]):
    """
    Yield the numbers of one process's samples, step by step, through the whole run.

    Args:
        batch_sizes: `(steps,)` samples of every step on all processes.
        skipped: Ranges `[first, end)` of samples to leave out.
        rank: Rank of the process among those with samples of their own.
        world_size: Number of processes, among which every step is shared equally.

    Raises:
        ValueError: If `world_size` does not divide a batch.
    """

    def __init__(
        self, batch_sizes: np.ndarray, skipped: Sequence[tuple[int, int]], rank: int, world_size: int
    ) -> None:
        if odd := [int(size) for size in batch_sizes if size % world_size]:
            raise ValueError(
                f"{world_size} processes cannot share a batch of {odd[0]} samples equally; set global_batch_size and "
                "batch_ramp_start to multiples of the number of processes"
            )
        self.batch_sizes, self.skipped, self.rank, self.world_size = batch_sizes, skipped, rank, world_size

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.batch_sizes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's samples of every step."""
        first = 0
        for size in self.batch_sizes.tolist():
            share = size // self.world_size
            start = first + self.rank * share
            yield sample_indices(np.arange(start, start + share), self.skipped).tolist()
            first += size


class ShuffledEpochs(Dataset):
    """
    An ordinary dataset as an endless one: item `n` is from epoch `n // len`, each epoch in an order of its own.

    Args:
        dataset: Dataset of dicts, with a length.
        seed: Seed of the orders.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the items of an epoch."""
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return item `number`, counted through all epochs, with that as its `sample_id`."""
        epoch, place = divmod(number, len(self))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return {**self.dataset[int(self.order[1][place])], "sample_id": number}


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """Return how a `DataLoader` works, apart from what it loads."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
    }

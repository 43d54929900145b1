"""Which samples every step of every process takes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments

from glm_hf.training.data.random_numbers import Permutation, key_of
from glm_hf.training.schedules import sample_indices

ROW_ORDER = 2
"""Version of the order in which samples come, which a resumed run has to keep; the first was stored, not computed."""


class StepSampler(Sampler[Any]):
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

    def __iter__(self) -> Iterator[Sequence[int]]:
        """Yield this process's samples of every step; a resumed run skips a million of them in about a second."""
        first = 0
        for size in self.batch_sizes.tolist():
            share = size // self.world_size
            start = first + self.rank * share
            begin, last = self._place(start), self._place(start + share - 1)
            if last - begin == share - 1:
                yield range(begin, last + 1)
            else:
                yield sample_indices(np.arange(start, start + share), self.skipped).tolist()
            first += size

    def _place(self, sample: int) -> int:
        """Return what `sample_indices` does of one sample."""
        for first, end in self.skipped:
            if sample < first:
                break
            sample += end - first
        return sample


class ShuffledEpochs(Dataset):
    """
    An ordinary dataset as an endless one: item `n` is from epoch `n // len`, each epoch in an order of its own.

    Args:
        dataset: Dataset of dicts, with a length.
        seed: Seed of the orders.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.order: tuple[int, Permutation] | None = None

    def __len__(self) -> int:
        """Return the items of an epoch."""
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return item `number`, counted through all epochs, with that as its `sample_id`."""
        epoch, place = divmod(number, len(self))
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, Permutation(len(self), key_of(self.seed, epoch))
        return {**self.dataset[self.order[1](place)], "sample_id": number}


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """Return how a `DataLoader` works, apart from what it loads."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
    }

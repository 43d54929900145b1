"""
What checkpoints cost: their checksums, and a step while one is written in the background.

Checksums: saving a checkpoint, and resuming from one, with and without them, in turns in one run. Without: the same
code with the hashing left out. A model of 109 million parameters in fp32 with the state of AdamW, 1.3 GB, every byte
on the disk at the end of a save, and in the page cache when it is loaded. `hashing alone` is what saving has more to
do.

Steps: of the same model with `async_save`, in turns with nothing to write, and with the checkpoint of the step before
being written. `copy` is what a step waits for then, `saving` what it would wait for without.

Run: make bench-checkpoints
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.folders.checksums import compute_checksums, files_of
from glm_hf.training import GLMTrainer, GLMTrainingArguments, checkpoints

SIZES = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2736}


class Texts(Dataset):
    """Some ids."""

    def __len__(self) -> int:
        """Return how many."""
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a text."""
        return {"input_ids": list(range(100, 130))}


def make_trainer(folder: Path, **settings: Any) -> GLMTrainer:
    """Return a trainer of one short step, which saves where it is told to, unless `settings` change that."""
    names = ("mask", "gmask", "smask", "eod", "sop", "eop")
    special = {"eos_token_id": 2} | {f"{name}_token_id": number for number, name in enumerate(names, 3)}
    torch.manual_seed(0)
    model = GLMForBlankInfilling(GLMConfig(vocab_size=8192, **special, **SIZES))
    defaults = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no"}
    args = GLMTrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **(defaults | settings)
    )
    return GLMTrainer(model, args, train_dataset=Texts())


@contextmanager
def without_checksums() -> Iterator[None]:
    """Leave the hashing out."""
    names = ("_add_checksums", "require_whole")
    kept = {name: getattr(checkpoints, name) for name in names}
    for name in names:
        setattr(checkpoints, name, lambda *arguments: None)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(checkpoints, name, function)


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes, on a disk that has nothing else to do."""
    os.sync()
    time.sleep(0.5)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def load(trainer: GLMTrainer, checkpoint: Path) -> None:
    """Load weights, optimizer and schedule, as a run does that is resumed."""
    trainer._require_checkpoint(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))
    trainer._load_optimizer_and_scheduler(str(checkpoint))


class Turns(TrainerCallback):
    """Times steps while a checkpoint is being written, in turns with steps while none is."""

    def __init__(self, trainer: GLMTrainer) -> None:
        """Time the copies of a trainer, too."""
        self.trainer, self.save = trainer, trainer._save_checkpoint
        self.seconds: dict[str, list[float]] = {"without": [], "with": [], "copy": []}
        trainer._save_checkpoint = self.copy  # type: ignore[method-assign]

    def copy(self, *arguments: Any) -> None:
        """Time what a step waits for."""
        self.trainer.writer.finish()
        start = time.perf_counter()
        self.save(*arguments)
        self.seconds["copy"].append(time.perf_counter() - start)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let every second step have nothing beside it."""
        if state.global_step % 2 == 0:
            self.trainer.writer.finish()
            os.sync()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save after a step without, so that the next is one with."""
        is_with = state.global_step % 2 == 0
        self.seconds["with" if is_with else "without"].append(time.perf_counter() - self.start)
        control.should_save = not is_with


def time_steps(folder: Path, rounds: int, rows: int) -> dict[str, list[float]]:
    """Return the seconds of steps on `rows` texts with a checkpoint being written and without, and of the copy."""
    settings = {"async_save": True, "save_total_limit": 1, "per_device_train_batch_size": rows}
    trainer = make_trainer(folder, max_steps=2 * (rounds + 1), **settings)
    turns = Turns(trainer)
    trainer.add_callback(turns)
    trainer.train()
    return {name: seconds[1:] for name, seconds in turns.seconds.items()}  # the first time warms up


def print_steps(seconds: dict[str, list[float]], saving: float) -> None:
    """Print a table of what a step costs."""
    bare, full = seconds["without"], seconds["with"]
    ratio = statistics.median(b / a for a, b in zip(bare, full, strict=True))
    print(f"{'a step':14}{statistics.median(bare):>8.2f} s{statistics.median(full):>8.2f} s{ratio:>8.2f}")
    print(f"{'copy, saving':14}{statistics.median(seconds['copy']):>8.2f} s{saving:>8.2f} s")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=128, help="texts of 30 tokens that a step trains on")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: the system's temporary)")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        trainer = make_trainer(folder)
        trainer.train()
        checkpoint = folder / "checkpoint-1"
        seconds: dict[str, list[float]] = {}

        def save() -> None:
            trainer._save_checkpoint(trainer.model, None)

        save()
        for number in range(arguments.rounds):
            for is_checked in (number % 2 == 0, number % 2 == 1):
                name = "with" if is_checked else "without"
                save()  # every second one gets pages that the system has to clear first, whoever asks for them
                with nullcontext() if is_checked else without_checksums():
                    seconds.setdefault(f"saving {name}", []).append(timed(save))
            save()
            for is_checked in (number % 2 == 0, number % 2 == 1):
                name = "with" if is_checked else "without"
                with nullcontext() if is_checked else without_checksums():
                    seconds.setdefault(f"loading {name}", []).append(timed(lambda: load(trainer, checkpoint)))
            hashed = timed(lambda: compute_checksums(checkpoint, files_of(checkpoint)))
            seconds.setdefault("hashing", []).append(hashed)
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        print(f"{date.today()}, {os.cpu_count()} processors, {num_bytes / 1e9:.2f} GB, medians of {arguments.rounds}")
        print(f"{'':14}{'without':>10}{'with':>10}{'ratio':>8}")
        for what in ("saving", "loading"):
            bare, full = seconds[f"{what} without"], seconds[f"{what} with"]
            ratio = statistics.median(b / a for a, b in zip(bare, full, strict=True))
            print(f"{what:14}{statistics.median(bare):>8.2f} s{statistics.median(full):>8.2f} s{ratio:>8.2f}")
        alone = statistics.median(seconds["hashing"])
        print(
            f"{'hashing alone':14}{'':10}{alone:>8.2f} s{alone / statistics.median(seconds['saving without']):>8.2f}"
        )
        steps = time_steps(folder / "steps", arguments.rounds, arguments.rows)
        print_steps(steps, statistics.median(seconds["saving with"]))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

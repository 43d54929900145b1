"""
A trainer whose checkpoints are there as a whole or not at all, and resumed from only while every byte is as written.

All processes of a run write and check them together.
"""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from glm_hf.folders.atomic import exclusive
from glm_hf.folders.checksums import CHECKSUMS, compute_checksums, files_of, find_damage, spread, write_checksums
from glm_hf.folders.plain_types import only_plain_types
from glm_hf.folders.validation import read_json, reading
from glm_hf.training.saving.background import STAGING, BackgroundWriter, one_error, staging_folder
from glm_hf.training.saving.state_copies import copying_engine, frozen_model
from glm_hf.training.token_loss import TokenLossTrainer

LOCK = ".lock"
STATE_FILE = "glm_training_state.json"
"""What a resumed run needs besides the state of `Trainer`."""
HAS_CHECKSUMS = "has_checksums"
UNFIT = "cannot be resumed from"

logger = logging.getLogger(__name__)


class CheckpointingTrainer(TokenLossTrainer):
    """`Trainer` whose checkpoints appear when they are complete, and are resumed from only if they are whole."""

    is_saving = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """
        Train as `Trainer` does.

        Raises:
            OSError: If another run is writing to the output folder.
            ValueError: If the checkpoint to resume from lacks a file, is damaged, or holds more than tensors and plain
                types; on all processes.
        """
        run = Path(self.args.output_dir)
        with alone(run, self.accelerator, self.args.should_save), only_plain_types(), self.writer:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
            if resume_from_checkpoint not in (None, False, True):
                resume_from_checkpoint = str(resume_from_checkpoint)
                self._require_checkpoint(Path(resume_from_checkpoint))
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[Any, DataLoader]:
        """Wrap the model, and load a checkpoint; ValueError if that is impossible."""
        with nullcontext() if resume_from_checkpoint is None else reading(resume_from_checkpoint, UNFIT):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load weights; ValueError if they are damaged or of another model."""
        with reading(resume_from_checkpoint, UNFIT):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the states of random number generators; ValueError if they are damaged."""
        with reading(str(checkpoint), UNFIT):
            super()._load_rng_state(checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End a run when its last checkpoint is whole."""
        self.writer.finish()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Return to the best checkpoint; ValueError if it is damaged."""
        self._require_checkpoint(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _require_checkpoint(self, checkpoint: Path) -> None:
        """Raise ValueError unless a checkpoint is whole, on all processes."""
        require_whole(checkpoint, self.accelerator)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise ValueError if a checkpoint is of another model."""
        ignored = set(getattr(self.model, "all_tied_weights_keys", ()))
        missing, unexpected = set(load_result.missing_keys) - ignored, load_result.unexpected_keys
        if missing or unexpected:
            name, state = (min(missing), "lacks") if missing else (unexpected[0], "has an unknown")
            raise ValueError(f"the checkpoint is of another model: it {state} {name}")

    def _get_output_dir(self, trial: Any) -> str:
        """Return the output folder; while a checkpoint is written, a hidden folder in it."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self.is_saving else folder

    @cached_property
    def writer(self) -> BackgroundWriter:
        """Writer of the checkpoints that are saved while training goes on."""
        return BackgroundWriter(self.accelerator)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        Save a checkpoint beside its place, to be moved there when every byte is on the disk.

        With `async_save`, this returns when the state is copied, and the rest is done in the background.

        Raises:
            OSError: If it, or with `async_save` the one before, cannot be written; earlier ones stay as they are.
        """
        run, args = Path(super()._get_output_dir(trial)), self.args
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._staged(run, name) as staged:
            self.is_saving = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.is_saving = False
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(run / name)
            if args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                state = self._own_state() | {HAS_CHECKSUMS: True}
                (staged / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        if args.push_to_hub:
            self.writer.finish()
            super()._push_from_checkpoint(str(run / name))

    @contextmanager
    def _staged(self, run: Path, name: str) -> Iterator[Path]:
        """Yield the hidden folder of a checkpoint, after which old checkpoints are removed."""
        args = self.args

        def rotate() -> None:
            rotate_checkpoints(str(run), args.save_total_limit, best, use_mtime=True)

        if args.async_save:
            engine = copying_engine(self.model_wrapped, self.writer)
            with self.writer.staged(run, name, writes=args.should_save, then=rotate) as staged, engine:
                yield staged
                best = self.state.best_model_checkpoint
            return
        is_shared = not args.save_on_each_node
        with staged_checkpoint(run, name, self.accelerator, writes=args.should_save, is_shared=is_shared) as staged:
            yield staged
        best = self.state.best_model_checkpoint
        if args.should_save:
            rotate()

    @property
    def _copies_state(self) -> bool:
        """Whether large files are to be written in the background."""
        return self.is_saving and self.args.async_save

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model; within a checkpoint that is written in the background, from a copy of it and its config."""
        is_adapter = hasattr(self.model, "peft_config")  # which is small, and of quantized weights all that is saved
        if not (self._copies_state and self.args.should_save) or is_adapter or state_dict == {}:
            super()._save(output_dir, state_dict)
            return
        frozen = copy.copy(self)
        frozen.args, frozen.model = copy.copy(self.args), frozen_model(self.model)
        state_dict = self.writer.copy(self.model.state_dict() if state_dict is None else state_dict)
        save = super(CheckpointingTrainer, frozen)._save
        self.writer.defer(Path(str(output_dir)), partial(save, output_dir, state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer, or a copy of it in the background, and the scheduler."""
        if not self._copies_state or self.is_deepspeed_enabled:  # whose engine copies
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            path, state = Path(output_dir) / OPTIMIZER_NAME, self.writer.copy(self.optimizer.state_dict())
            self.writer.defer(path, partial(torch.save, state, path))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do what is due at the end of a step; OSError if a checkpoint cannot be written in the background."""
        self.writer.raise_error()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing yet: the folder still has to get its name."""

    def _own_state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the state of `Trainer`."""
        return {}


@contextmanager
def alone(run: Path, accelerator: Accelerator, writes: bool) -> Iterator[None]:
    """Keep an output folder to the processes of one run, which all enter; OSError on all if another run has it."""
    with ExitStack() as stack:
        problems = []
        if writes:
            try:
                run.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(run / LOCK, run))
            except OSError as error:
                problems.append(str(error))
        problems = gather_object(problems)
        if problems:
            raise OSError(problems[0])
        yield


@contextmanager
def staged_checkpoint(
    run: Path, name: str, accelerator: Accelerator, *, writes: bool, is_shared: bool
) -> Iterator[Path]:
    """
    Yield a hidden folder that becomes the checkpoint `name` once every byte is on the disk.

    All processes enter together. A checkpoint of that name is replaced; what an earlier run has left half-written is
    removed. The checksums of all files are added at the end.

    Args:
        run: Output folder of the run.
        name: Name of the checkpoint.
        accelerator: Accelerator that all processes share.
        writes: Whether this process makes and moves the folder.
        is_shared: Whether all processes see the same folder, of which each hashes a share.

    Raises:
        OSError: If it cannot be written; the folder is removed then, and earlier checkpoints stay as they are.
    """
    checkpoint = staging_folder(run, name)
    with one_error(run / name):
        with checkpoint.writing() if writes else nullcontext(checkpoint.work) as staged:
            accelerator.wait_for_everyone()
            yield staged
            accelerator.wait_for_everyone()
            _add_checksums(staged, accelerator, writes, is_shared)
    accelerator.wait_for_everyone()


def _add_checksums(staged: Path, accelerator: Accelerator, writes: bool, is_shared: bool) -> None:
    """Write the checksums of all files in a folder that is complete."""
    hashed = {}
    if is_shared:
        names = files_of(staged) if staged.is_dir() else []
        share = spread(staged, names, accelerator.process_index, accelerator.num_processes)
        hashed = dict(gather_object(list(compute_checksums(staged, share).items())))
    if writes:
        names = files_of(staged)
        hashed |= compute_checksums(staged, [name for name in names if name not in hashed])
        write_checksums(staged, {name: hashed[name] for name in names})


def require_whole(checkpoint: Path, accelerator: Accelerator) -> None:
    """
    Check every byte of a checkpoint, of which each process reads a share; all enter together.

    A checkpoint of glm_hf before 0.2 has no checksums: there is a warning, and only what must be there is checked.

    Raises:
        ValueError: If files are missing or damaged, on all processes.
    """
    try:
        problems = find_problems(checkpoint, share=(accelerator.process_index, accelerator.num_processes))
    except (OSError, ValueError) as error:
        problems = [str(error)]
    problems = sorted(set(gather_object(problems)))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}; copy the checkpoint again, or resume from another")


def find_problems(checkpoint: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """
    Return what is missing or damaged in a checkpoint, a line for each file; nothing if it is whole.

    Args:
        checkpoint: Checkpoint of `GLMTrainer` or `GLM3DTrainer`.
        share: (index, count) to read only a share of the files, as `find_damage` takes it.

    Raises:
        ValueError: If a file that tells of the others is damaged.
    """
    if not checkpoint.is_dir():
        return [f"there is no checkpoint {checkpoint}"]
    if (checkpoint / CHECKSUMS).is_file():
        return find_damage(checkpoint, share=share) or _missing_state(checkpoint)
    state = checkpoint / STATE_FILE
    if state.is_file() and read_json(state).get(HAS_CHECKSUMS):
        return [f"{checkpoint / CHECKSUMS} is missing"]
    logger.warning("%s was saved without checksums, so damage in it cannot be noticed", checkpoint)
    return _missing_state(checkpoint)


def _missing_state(checkpoint: Path) -> list[str]:
    """Return what a run cannot be resumed without and a checkpoint does not have, a line for each."""
    needed = [TRAINER_STATE_NAME]
    if not (checkpoint / "latest").is_file():  # DeepSpeed's, which misses its files itself
        needed += [OPTIMIZER_NAME, SCHEDULER_NAME]
    if (checkpoint / TRAINER_STATE_NAME).is_file():
        with reading(checkpoint / TRAINER_STATE_NAME):
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    hint = "; a checkpoint saved with save_only_model can begin a new run, as its model"
    return [f"{checkpoint / name} is missing{hint if name == OPTIMIZER_NAME else ''}" for name in missing]

"""Checkpoints that are there as a whole or not at all, written and checked by several processes together."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from glm_hf.folders.atomic import AtomicFolder
from glm_hf.folders.checksums import CHECKSUMS, compute_checksums, files_of, find_damage, spread, write_checksums
from glm_hf.folders.model_folder import read_json

STAGING = ".partial-checkpoint"
STATE_FILE = "glm_training_state.json"
"""What a resumed run needs besides the state of `Trainer`."""
HAS_CHECKSUMS = "has_checksums"

logger = logging.getLogger(__name__)


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
    checkpoint = AtomicFolder(run / name, replaces=True, home=run / STAGING, work_name=name)
    try:
        with checkpoint.writing() if writes else nullcontext(checkpoint.work) as staged:
            accelerator.wait_for_everyone()
            yield staged
            accelerator.wait_for_everyone()
            _add_checksums(staged, accelerator, writes, is_shared)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        last = get_last_checkpoint(run)
        where = f"training can be resumed from {last}" if last else "there is no earlier checkpoint"
        raise OSError(f"{run / name} cannot be saved: {error}; {where}") from error
    accelerator.wait_for_everyone()


def _add_checksums(staged: Path, accelerator: Accelerator, writes: bool, is_shared: bool) -> None:
    """Write the checksums of all files in a folder that is complete."""
    if is_shared:
        share = spread(staged, files_of(staged), accelerator.process_index, accelerator.num_processes)
        hashed = dict(gather_object(list(compute_checksums(staged, share).items())))
    elif writes:
        hashed = compute_checksums(staged, files_of(staged))
    if writes:
        write_checksums(staged, hashed)


def require_whole(checkpoint: Path, accelerator: Accelerator) -> None:
    """
    Check every byte of a checkpoint, of which each process reads a share; all enter together.

    A checkpoint of glm_hf before 0.2 has no checksums: there is a warning then, and only what must be there is checked.

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
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    hint = "; a checkpoint saved with save_only_model can begin a new run, as its model"
    return [f"{checkpoint / name} is missing{hint if name == OPTIMIZER_NAME else ''}" for name in missing]

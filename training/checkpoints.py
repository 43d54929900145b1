"""Checkpoints that are there as a whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from glm_hf.folders.atomic import sync, sync_tree

STAGING = ".partial-checkpoint"


@contextmanager
def staged_checkpoint(run: Path, name: str, accelerator: Accelerator, writes: bool) -> Iterator[Path]:
    """
    Yield a hidden folder that becomes the checkpoint `name` once every byte is on the disk.

    All processes enter together. A checkpoint of that name is replaced; what an earlier run has left half-written is
    thrown away.

    Args:
        run: Output folder of the run.
        name: Of the checkpoint.
        accelerator: Of the processes.
        writes: Whether this process makes and moves the folder.

    Raises:
        OSError: If it cannot be written; the folder is removed then, and earlier checkpoints stay as they are.
    """
    staged = run / STAGING / name
    if writes:
        shutil.rmtree(run / STAGING, ignore_errors=True)
        staged.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield staged
        accelerator.wait_for_everyone()
        if writes:
            publish(staged, run / name)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        last = get_last_checkpoint(run)
        where = f"training can be resumed from {last}" if last else "there is no earlier checkpoint"
        raise OSError(f"{run / name} cannot be saved: {error}; {where}") from error
    finally:
        if writes:
            shutil.rmtree(run / STAGING, ignore_errors=True)
    accelerator.wait_for_everyone()


def publish(staged: Path, final: Path) -> None:
    """
    Give a written folder its name once all of its bytes are on the disk; one of that name is replaced.

    Args:
        staged: The folder as it was written, on the same file system.
        final: Its name.
    """
    sync_tree(staged)
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    sync(final.parent)

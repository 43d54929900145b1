"""Checkpoints that are there as a whole or not at all, written by several processes together."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from glm_hf.folders.atomic import AtomicFolder

STAGING = ".partial-checkpoint"


@contextmanager
def staged_checkpoint(run: Path, name: str, accelerator: Accelerator, writes: bool) -> Iterator[Path]:
    """
    Yield a hidden folder that becomes the checkpoint `name` once every byte is on the disk.

    All processes enter together. A checkpoint of that name is replaced; what an earlier run has left half-written is
    removed.

    Args:
        run: Output folder of the run.
        name: Name of the checkpoint.
        accelerator: Accelerator that all processes share.
        writes: Whether this process makes and moves the folder.

    Raises:
        OSError: If it cannot be written; the folder is removed then, and earlier checkpoints stay as they are.
    """
    checkpoint = AtomicFolder(run / name, replaces=True, home=run / STAGING, work_name=name)
    try:
        with checkpoint.writing() if writes else nullcontext(checkpoint.work) as staged:
            accelerator.wait_for_everyone()
            yield staged
            accelerator.wait_for_everyone()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        last = get_last_checkpoint(run)
        where = f"training can be resumed from {last}" if last else "there is no earlier checkpoint"
        raise OSError(f"{run / name} cannot be saved: {error}; {where}") from error
    accelerator.wait_for_everyone()

"""Where a checkpoint is written before it has its name, and the one error of whatever cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from glm_hf.folders.atomic import AtomicFolder

STAGING = ".partial-checkpoint"


def staging_folder(run: Path, name: str) -> AtomicFolder:
    """Return the hidden folder in a run's output folder that is to become the checkpoint `name`, or replace it."""
    return AtomicFolder(run / name, replaces=True, home=run / STAGING, work_name=name)


@contextmanager
def one_error(checkpoint: Path) -> Iterator[None]:
    """Turn what the writers of files raise into one OSError that says where a run can be resumed from instead."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
        last = get_last_checkpoint(checkpoint.parent)
        where = f"training can be resumed from {last}" if last else "there is no earlier checkpoint"
        raise OSError(f"{checkpoint} cannot be saved: {error}; {where}") from error

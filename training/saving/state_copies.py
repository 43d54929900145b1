"""What a checkpoint is written from while training goes on: models and DeepSpeed's files as they are at a step."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from glm_hf.training.saving.background import BackgroundWriter


def frozen_model(model: nn.Module) -> nn.Module:
    """Return a model with the same weights, whose configuration stays as it is when that of `model` changes."""
    frozen = copy.copy(model)
    if isinstance(frozen, PreTrainedModel):
        for name in ("config", "generation_config"):
            setattr(frozen, name, copy.deepcopy(getattr(frozen, name)))
    return frozen


class CopyingCheckpointEngine:
    """
    DeepSpeed's checkpoint engine, with files that are written in the background from copies.

    Args:
        engine: The engine that writes a file.
        writer: The writer that copies, and has it written.
    """

    def __init__(self, engine: Any, writer: BackgroundWriter) -> None:
        self._engine, self._writer = engine, writer

    def __getattr__(self, name: str) -> Any:
        """Return whatever else the engine has."""
        return getattr(self._engine, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Copy a state, to be written to a file."""
        self._writer.defer(Path(path), partial(self._engine.save, self._writer.copy(state_dict), path))

    def preserves_storage_sharing(self) -> bool:
        """Tell DeepSpeed that it need not copy layers, which share the memory of all, itself."""
        return False


@contextmanager
def copying_engine(model: Any, writer: BackgroundWriter) -> Iterator[None]:
    """Let DeepSpeed write from copies, if `model` is an engine of its."""
    own = getattr(model, "checkpoint_engine", None)
    if own is None:
        yield
        return
    model.checkpoint_engine = CopyingCheckpointEngine(own, writer)
    try:
        yield
    finally:
        model.checkpoint_engine = own

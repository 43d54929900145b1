"""Who writes the files of DeepSpeed's checkpoints."""

from collections.abc import Mapping
from typing import Any


def require_plain_writer(config: Mapping[str, Any]) -> None:
    """
    Check that DeepSpeed writes files when it is told to, as a checkpoint is hashed and renamed right after.

    Args:
        config: Configuration of DeepSpeed.

    Raises:
        ValueError: If it asks for a writer of its own.
    """
    checkpoint = config.get("checkpoint") or {}
    asked = {"checkpoint.writer": checkpoint.get("writer"), "datastates_ckpt": config.get("datastates_ckpt")}
    for name, settings in asked.items():
        if settings is not None:
            raise ValueError(f"deepspeed must not have {name}; for saving in the background, set async_save")

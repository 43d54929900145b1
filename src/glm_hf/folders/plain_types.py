"""Keep libraries from running what a file holds: torch unpickles tensors and plain types, and nothing else."""

import collections
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FORCED, FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_plain_types() -> Iterator[None]:
    """
    Let every `torch.load` of this process and its children read nothing but tensors, plain types and DeepSpeed's own.

    DeepSpeed asks for anything that a file holds, `weights_only=False`; torch's environment variable overrules it.
    """
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORBIDDEN)}
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals([collections.OrderedDict, *_deepspeed_types()]):
            yield
    finally:
        del os.environ[FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_types() -> list[Any]:
    """Return what DeepSpeed writes to its checkpoints besides tensors and plain types; nothing if it is not used."""
    if "deepspeed" not in sys.modules:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]

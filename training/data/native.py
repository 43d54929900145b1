"""The C code of this room, `packing/packing.c` and `tokenizing/unigram.c`, in one library.

It is called without Python's lock, so threads run it side by side.
"""

import ctypes
import functools
import importlib.util
import logging
import os
from typing import Any

POINTER: Any = ctypes.c_void_p
SIZE: Any = ctypes.c_int64
NUMBER: Any = ctypes.c_int32

logger = logging.getLogger(__name__)


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """Return what the C files were compiled to, None if they were not; says so once."""
    spec = importlib.util.find_spec("glm_hf.training.data._native")
    if spec is None or spec.origin is None:
        logger.warning(
            "glm_hf was installed without its C code, so to tokenize, and to pack documents that stay apart, takes "
            "several times as long. Install glm_hf where a C compiler is at hand to have it built."
        )
        return None
    return ctypes.CDLL(spec.origin)


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Processes that torchrun starts again."""

import os


def require_fresh_store() -> None:
    """
    Check that processes which are started again would not read addresses of the dead ones.

    torchrun's agent keeps one store for all attempts, unless it is told not to, and so a process may connect to one of
    the attempt before, which ends in an error or in an endless wait.

    Raises:
        ValueError: If torchrun may restart processes, `--max-restarts`, and shares its store with them.

    Source: pytorch/pytorch issue 135712.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "restarted processes may wait for dead ones, whose addresses torchrun keeps: with --max-restarts give it "
            "--rdzv-backend c10d as well, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )

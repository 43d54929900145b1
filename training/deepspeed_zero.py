"""DeepSpeed's ZeRO under the trainer: the update waits until a step's gradients were looked at."""

from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn


class DeferredStep(DeepSpeedEngineWrapper):
    """Run backward passes without the update that accelerate makes at the end of the last one."""

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Add the gradients of `loss`, and reduce them over the processes if `sync_gradients`."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)


def gradient_norm(parameter: nn.Parameter) -> torch.Tensor | None:
    """
    Return the norm of a gradient that is sharded over the processes, all of which must ask; None if there is none.

    In stage 3 no process ever holds the whole gradient, which is 7 GB for the embedding of GLM-130B.
    """
    from deepspeed import comm
    from deepspeed.utils import safe_get_full_grad, safe_get_local_grad

    if not hasattr(parameter, "ds_id"):
        gradient = safe_get_full_grad(parameter)
        return None if gradient is None else gradient.float().norm()
    total = safe_get_local_grad(parameter).float().square().sum()
    comm.all_reduce(total)
    return total.sqrt()

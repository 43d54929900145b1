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


def full_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the whole gradient of a parameter whose gradient is cut over the processes; all of them must ask."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)

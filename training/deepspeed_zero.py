"""DeepSpeed's ZeRO under the trainer: the update waits until a step's gradients were looked at."""

from collections.abc import Iterable
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


def add_up_in_fp32(config: Any) -> None:
    """
    Make the gradients of a step's micro-batches, and of all processes, add up in fp32, unless it says otherwise.

    Args:
        config: DeepSpeed's configuration, as transformers holds it.

    Raises:
        ValueError: If weights have 16 bits and nothing is sharded, where DeepSpeed adds up in 16 bits.
    """
    has_16_bits = config.is_true("fp16.enabled") or config.is_true("bf16.enabled")
    if has_16_bits and not config.get_value("zero_optimization.stage"):
        raise ValueError(
            "deepspeed without ZeRO adds up gradients in 16 bits; set zero_optimization.stage to 1 or above"
        )
    config.config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    config.config.setdefault("communication_data_type", "fp32")


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor | None]:
    """
    Return the part of every gradient that this process updates, with the loss scale; None if others update it all.

    No process asks others for anything: in stage 3 none ever holds the whole gradient, which is 7 GB for the embedding
    of GLM-130B.
    """
    return [_local_gradient(parameter) for parameter in parameters]


def loss_scale_of(optimizer: Any) -> float:
    """Return the factor of the gradients of DeepSpeed's optimizer, of which only those for fp16 have one."""
    return float(getattr(optimizer, "loss_scale", 1.0))


def _local_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    from deepspeed.utils import safe_get_local_grad

    if hasattr(parameter, "ds_id"):
        return safe_get_local_grad(parameter)
    if not hasattr(parameter, "_hp_mapping"):  # stage 0, in which all processes have the whole gradient
        return parameter.grad if torch.distributed.get_rank() == 0 else None
    fragment = parameter._hp_mapping  # None if other processes update it
    if fragment is None:
        return None
    gradient = fragment.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    if gradient.numel() == parameter.numel():  # which BF16_Optimizer keeps whole
        address = fragment.lp_fragment_address
        return gradient.narrow(0, address.start, address.numel)
    return gradient

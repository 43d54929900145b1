"""What a layer computes again in the backward pass instead of keeping it: all, or what is large and cheap.

    full       the layer keeps its input
    selective  it keeps its projections besides: attention is computed again from query, key and value, and the MLP's
               gate from its up-projection, up to the matrix products behind them, which are not repeated

Source: Korthikanti et al. (arXiv 2205.05198), section 5, which keeps the output of attention and the gate's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from glm_hf.modeling_glm import GLMLayer
from glm_hf.training.measurements import attention_flops_per_token, layer_flops_per_token

GRANULARITIES = ("full", "selective")


def set_recomputation(layer: GLMLayer, granularity: str | None, repeat: Callable[..., Any]) -> None:
    """
    Let a layer compute what it needs in the backward pass again.

    Args:
        layer: A layer, which may have been set before.
        granularity: One of `GRANULARITIES`, None to keep everything.
        repeat: `torch.utils.checkpoint.checkpoint` with its settings.
    """
    layer.gradient_checkpointing = granularity == "full"
    layer._gradient_checkpointing_func = repeat
    for block, name in ((layer.attention, "attend"), (layer.mlp, "contract")):
        vars(block).pop(name, None)
        if granularity == "selective":
            setattr(block, name, partial(repeat, getattr(block, name)))


def recomputed_flops_per_token(model: nn.Module, row_length: int) -> int:
    """Return the operations per token that a model, or a share of it, does again in the backward pass."""
    layers = [module for module in model.modules() if isinstance(module, GLMLayer)]
    return sum(_flops_of(layer)(layer.attention.config, row_length) for layer in layers)


def _flops_of(layer: GLMLayer) -> Callable[..., int]:
    if layer.gradient_checkpointing:
        return layer_flops_per_token
    return attention_flops_per_token if "attend" in vars(layer.attention) else lambda *_: 0

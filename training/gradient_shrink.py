"""Embedding gradient shrink, GLM-130B's remedy for gradients of the embedding that explode before the loss does."""

from torch import nn

from glm_hf.configuration_glm import GLMConfig

DEFAULT_ALPHA = 0.1


def shrink_embedding_gradient(model: nn.Module, alpha: float = DEFAULT_ALPHA) -> None:
    """
    Let only a share of the gradient reach the input embedding; a tied LM head keeps the whole of its own.

    Outputs stay what they are. The model saves the share as `embedding_gradient_shrink` of its config.

    Args:
        model: A GLM model, or one that wraps it, such as PEFT's.
        alpha: The share, in `(0, 1]`; 1 switches shrinking off.

    Raises:
        ValueError: If `alpha` is out of range, or `model` holds no GLM model.

    Source: GLM-130B (arXiv 2210.02414), section 2.4: `w = w * alpha + w.detach() * (1 - alpha)`.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in found if isinstance(config, GLMConfig)]
    if not configs:
        raise ValueError(f"{type(model).__name__} holds no GLM model")
    for config in configs:
        config.embedding_gradient_shrink = alpha

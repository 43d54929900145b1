"""Find a checkpoint's configuration: sizes from the weights, special ids and numerics from the user or GLM-130B."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from glm_hf.configuration_glm import GLMConfig
from glm_hf.conversion.formats.model_tensors import model_tensors
from glm_hf.conversion.formats.sat_checkpoint import SatCheckpoint
from glm_hf.folders.validation import read_json
from glm_hf.quantization.configuration import GLMQuantizationConfig

HELP = "pass config= (a GLMConfig, a dict of its fields or a JSON file) with the right values"


def checkpoint_config(
    checkpoint: SatCheckpoint, config: GLMConfig | dict[str, Any] | str | Path | None = None
) -> GLMConfig:
    """
    Return the configuration of the model that `checkpoint` holds.

    Args:
        checkpoint: The checkpoint; its weights tell all sizes, and heads if it has rotary frequencies.
        config: Configuration, for what weights cannot tell: a GLMConfig, a dict of its fields or a JSON file; that of
            GLM-130B by default.

    Returns:
        A new configuration of `GLMForBlankInfilling`.

    Raises:
        FileNotFoundError: If the JSON file does not exist.
        ValueError: If `config` contradicts the weights, lacks what they cannot tell, or has an unknown field.
    """
    fields = _fields(config)
    for name, size in _sizes(checkpoint).items():
        if fields.setdefault(name, size) != size:
            raise ValueError(f"config has {name} = {fields[name]}, but the weights have {size}; {HELP}")
    if not fields.get("tie_word_embeddings", True):
        raise ValueError(f"config has tie_word_embeddings = False, but a SAT checkpoint has no LM head; {HELP}")
    try:
        model_config = GLMConfig.from_dict(fields | {"architectures": ["GLMForBlankInfilling"]})
    except (StrictDataclassError, AttributeError, TypeError) as error:
        raise ValueError(f"the configuration does not fit the weights: {error.__cause__ or error}; {HELP}") from error
    if model_config.num_attention_heads % checkpoint.tp_size:
        raise ValueError(
            f"the number of ranks ({checkpoint.tp_size}) must divide num_attention_heads, "
            f"got {model_config.num_attention_heads}; {HELP}"
        )
    return model_config


def require_model(checkpoint: SatCheckpoint) -> GLMConfig:
    """
    Check that a checkpoint holds a whole model, for work on its tensors alone.

    Returns:
        A configuration with its sizes and with meaningless special ids. Where the weights do not tell how many heads
        there are, it has one per rank; no tensor's shape depends on that.

    Raises:
        ValueError: If sizes or tensors are not those of a model, or the files do not belong together.
    """
    names = [name for name, value in GLMConfig().to_dict().items() if name.endswith("_token_id") and value is not None]
    fields = {"num_attention_heads": checkpoint.tp_size} | {name: number for number, name in enumerate(names)}
    config = checkpoint_config(checkpoint, fields | _sizes(checkpoint))
    checkpoint.require(model_tensors(config, torch.float16, stored_quantization(checkpoint)))
    checkpoint.check_values()
    return config


def stored_quantization(checkpoint: SatCheckpoint) -> GLMQuantizationConfig | None:
    """Return how the weights of a checkpoint are quantized, each rank having scales of its own; None if not."""
    if checkpoint.bits is None:
        return None
    return GLMQuantizationConfig(bits=checkpoint.bits, row_parallel_groups=checkpoint.tp_size)


def _sizes(checkpoint: SatCheckpoint) -> dict[str, int]:
    """Return the fields of the configuration that the weights tell."""
    hidden_size = checkpoint.hidden_size
    sizes = {
        "vocab_size": checkpoint.numel("model.embed_tokens.weight") // hidden_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": checkpoint.num_layers,
        "intermediate_size": checkpoint.numel("model.layers.0.mlp.dense_h_to_4h.bias") // 2,
    }
    if head_dim := checkpoint.head_dim:
        if hidden_size % head_dim:
            raise ValueError(f"head size {head_dim} of the rotary frequencies must divide hidden size {hidden_size}")
        sizes["num_attention_heads"] = hidden_size // head_dim
    return sizes


def _fields(config: GLMConfig | dict[str, Any] | str | Path | None) -> dict[str, Any]:
    """Return the fields that the user gives, as a new dict."""
    if isinstance(config, GLMConfig):
        return config.to_dict()
    fields = read_json(Path(config)) if isinstance(config, (str, Path)) else dict(config or {})
    for name in ("quantization_config", "auto_map"):  # of a config.json that was written beside other weights
        fields.pop(name, None)
    if unknown := sorted(fields.keys() - GLMConfig().to_dict().keys()):
        raise ValueError(f"config has unknown fields {', '.join(unknown)}; expected fields of GLMConfig")
    return fields

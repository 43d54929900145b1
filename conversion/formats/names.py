"""Names of parameters in the model and in SAT checkpoints, which differ in their prefixes only."""

import re

# Prefix in the model -> prefix in SAT
SAT_PREFIXES = {
    "model.embed_tokens.": "transformer.word_embeddings.",
    "model.layers.": "transformer.layers.",
    "model.norm.": "transformer.final_layernorm.",
}
MODEL_PREFIXES = {sat_prefix: prefix for prefix, sat_prefix in SAT_PREFIXES.items()}


def to_sat_name(name: str) -> str:
    """Return the SAT name of the model's parameter `name`; KeyError if SAT has none."""
    return _replace_prefix(name, SAT_PREFIXES)


def to_model_name(sat_name: str) -> str:
    """Return the model's name of the SAT tensor `sat_name`; KeyError if the model has none."""
    return _replace_prefix(sat_name, MODEL_PREFIXES)


def _replace_prefix(name: str, prefixes: dict[str, str]) -> str:
    for prefix, replacement in prefixes.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise KeyError(name)


def rotary_buffer_name(layer: int) -> str:
    """Return the name under which the released checkpoint holds the rotary frequencies of a layer."""
    return f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"


def is_rotary_buffer(sat_name: str) -> bool:
    """
    Tell whether a SAT tensor holds rotary frequencies, which SAT saves and the model computes.

    They are named as `rotary_buffer_name` tells, or `mixins.rotary-embedding.rotary_emb.inv_freq`.
    """
    return sat_name.endswith(".rotary_emb.inv_freq")


def layer_index(sat_name: str) -> int | None:
    """Return the layer that a SAT tensor belongs to, None outside the layers."""
    match = re.match(r"transformer\.layers\.(\d+)\.", sat_name)
    return int(match[1]) if match else None

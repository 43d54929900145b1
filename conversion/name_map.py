"""Names of parameters in the model and in SAT checkpoints, which differ in their prefixes only."""

import re

# Prefix in the model -> prefix in SAT
SAT_PREFIXES = {
    "model.embed_tokens.": "transformer.word_embeddings.",
    "model.layers.": "transformer.layers.",
    "model.norm.": "transformer.final_layernorm.",
}


def to_sat_name(name: str) -> str:
    """Return the SAT name of the model's parameter `name`; KeyError if SAT has none."""
    for prefix, sat_prefix in SAT_PREFIXES.items():
        if name.startswith(prefix):
            return sat_prefix + name.removeprefix(prefix)
    raise KeyError(name)


def is_rotary_buffer(sat_name: str) -> bool:
    """
    Tell whether a SAT tensor holds rotary frequencies, which SAT saves and the model computes.

    They are `transformer.layers.I.attention.rotary_emb.inv_freq` or `mixins.rotary-embedding.rotary_emb.inv_freq`.
    """
    return sat_name.endswith(".rotary_emb.inv_freq")


def layer_index(sat_name: str) -> int | None:
    """Return the layer that a SAT tensor belongs to, None outside the layers."""
    match = re.match(r"transformer\.layers\.(\d+)\.", sat_name)
    return int(match[1]) if match else None

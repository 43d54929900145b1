"""Numbers of the original GLM-130B code, and models with the same weights."""

import functools
import json
from pathlib import Path

import numpy as np
import torch

from glm_hf import GLMConfig, GLMForBlankInfilling

DATA = Path(__file__).parents[1] / "data" / "golden"
CONFIGS = ("cfg1", "cfg2")
TOLERANCE = (
    5e-4  # of fp32 logits with a standard deviation of 3 to 4: noise stays below 2e-4, any change of the maths above
)


def read_json(name: str, file: str) -> dict:
    return json.loads((DATA / name / file).read_text())


@functools.cache
def golden_config(name: str, **changes: object) -> GLMConfig:
    facts = read_json(name, "config.json")
    special = facts["special_tokens"]
    return GLMConfig(
        vocab_size=facts["vocab_size"],
        hidden_size=facts["hidden_size"],
        num_hidden_layers=facts["num_layers"],
        num_attention_heads=facts["num_attention_heads"],
        intermediate_size=facts["inner_hidden_size"],
        eos_token_id=special["eos"],
        mask_token_id=special["[MASK]"],
        gmask_token_id=special["[gMASK]"],
        smask_token_id=special["[sMASK]"],
        eod_token_id=special["eod"],
        sop_token_id=special["sop"],
        eop_token_id=special["eop"],
        **changes,
    )


def golden_state_dict(name: str) -> dict[str, torch.Tensor]:
    """Rename the original's tensors by hand, independently of the converter."""
    path = DATA / name / "sat_tp1" / "49300" / "mp_rank_00_model_states.pt"
    state = {}
    for key, tensor in torch.load(path, weights_only=True)["module"].items():
        if key.endswith("inv_freq"):
            continue
        key = key.removeprefix("transformer.")
        key = key.replace("word_embeddings", "embed_tokens").replace("final_layernorm", "norm")
        state["model." + key] = tensor.float()
    return state


@functools.cache
def golden_model(name: str, attn_implementation: str = "sdpa", **changes: object) -> GLMForBlankInfilling:
    config = GLMConfig(**{**golden_config(name).to_dict(), **changes})
    config._attn_implementation = attn_implementation
    model = GLMForBlankInfilling(config)
    missing, unexpected = model.load_state_dict(golden_state_dict(name), strict=False)
    assert missing == ["lm_head.weight"], missing
    assert unexpected == [], unexpected
    return model.eval()


@functools.cache
def golden_arrays(name: str, file: str = "cases.npz") -> dict[str, torch.Tensor]:
    with np.load(DATA / name / file) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def golden_cases(name: str) -> list[str]:
    return sorted({key.split(".")[0] for key in golden_arrays(name)})

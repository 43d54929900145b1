"""Every kind of adapter in PEFT on a quantized model, beside the same adapter on the model dequantized."""

import copy
import warnings
from typing import Any

import peft
import torch
from torch import nn

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig

LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
IDS = torch.tensor([[83, 23, 144, 53, 71, 80, 2, 148, 21, 22]])
LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "use_rslora=True": {"use_rslora": True},
    "bias='lora_only'": {"bias": "lora_only"},
    "lora_bias=True": {"lora_bias": True},
    "use_dora=True": {"use_dora": True},
    "use_bdlora": {
        "use_bdlora": {
            "nblocks": 2,
            "target_modules_bd_a": ["dense"],
            "target_modules_bd_b": [],
            "match_strict": False,
        }
    },
    "alora_invocation_tokens": {"alora_invocation_tokens": [2, 148]},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "trainable_token_indices": {"trainable_token_indices": [21, 22]},
    "kasa_config": {"kasa_config": {}},
    "init_lora_weights='gaussian'": {"init_lora_weights": "gaussian"},
    "init_lora_weights='eva'": {"init_lora_weights": "eva"},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights='mica'": {"init_lora_weights": "mica"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "init_lora_weights='orthogonal'": {"init_lora_weights": "orthogonal"},
    "target_parameters": {"target_modules": [], "target_parameters": ["attention.dense.weight"]},
    "modules_to_save": {"target_modules": ["query_key_value"], "modules_to_save": ["dense_4h_to_h"]},
}
VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
SETTINGS: dict[str, dict[str, Any]] = {
    "CARTRIDGE": {**VIRTUAL, "num_frozen_tokens": 1},
    "CPT": {
        "task_type": "CAUSAL_LM",
        "cpt_token_ids": [11, 12],
        "cpt_mask": [1, 1],
        "cpt_tokens_type_mask": [1, 1],
    },
    "MULTITASK_PROMPT_TUNING": {**VIRTUAL, "num_tasks": 2},
    "POLY": {"target_modules": LINEARS, "n_tasks": 2, "n_skills": 2, "task_type": "CAUSAL_LM"},
    "ROAD": {"target_modules": LINEARS, "group_size": 16},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "ADALORA": {"target_modules": LINEARS, "total_step": 10},
    "IA3": {},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [21, 22], "target_modules": ["embed_tokens"]},
    "VBLORA": {"target_modules": LINEARS, "num_vectors": 20, "vector_length": 8, "topk": 2},
    "OFT": {"target_modules": LINEARS, "oft_block_size": 8},
    "BOFT": {"target_modules": LINEARS, "boft_block_size": 8},
    "C3A": {"target_modules": LINEARS, "block_size": 8},
    "FOURIERFT": {"target_modules": LINEARS, "n_frequency": 20},
}
TASK_KINDS = ("MULTITASK_PROMPT_TUNING", "POLY")  # whose rows each name a task


def quantized(bits: int) -> GLMForBlankInfilling:
    """Return the golden model in INT4 or INT8."""
    return copy.deepcopy(QUANTIZED[bits])


def load(folder: Any, bits: int) -> GLMForBlankInfilling:
    """Quantize the golden model while it is loaded from a folder."""
    config = GLMQuantizationConfig(bits=bits)
    return GLMForBlankInfilling.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


QUANTIZED: dict[int, GLMForBlankInfilling] = {}
SAME = "as the dequantized model"


def kinds() -> dict[str, tuple[type, dict[str, Any]]]:
    """Return class and arguments of every kind, and of LoRA with options that read the weight of a layer."""
    found = {}
    for kind, config in sorted(peft.PEFT_TYPE_TO_CONFIG_MAPPING.items(), key=lambda item: item[0].value):
        found[kind.value] = (config, SETTINGS.get(kind.value, {"target_modules": LINEARS}))
    for name, options in LORA_OPTIONS.items():
        found[f"LORA, {name}"] = (peft.LoraConfig, {"target_modules": LINEARS, **options})
    if hasattr(peft, "MissConfig"):
        found["MISS, init_weights='bat'"] = (
            peft.MissConfig,
            {"target_modules": LINEARS, "init_weights": "bat", "r": 8},
        )
    return found


def outcome(kind: str, bits: int) -> str:
    """Say what a kind of adapter does on a quantized model."""
    config, arguments = kinds()[kind]
    try:
        dense = measured(quantized(bits).dequantize(), config, arguments)
    except ImportError as error:
        return f"not installed: {error}"
    except Exception as error:
        return f"not for GLM: {type(error).__name__}"
    try:
        found = measured(quantized(bits), config, arguments)
    except ValueError as error:
        return f"refused: {error}"
    for one, other in zip(found, dense, strict=True):  # fp32 noise, and that of activations in 16 bits
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    return SAME


def row(kind: str, outcomes: list[str]) -> str:
    """Return the row of the page that tells what a kind of adapter does in INT8 and INT4."""
    return f"| {' | '.join([kind, *(text if text == SAME else 'refused' for text in outcomes)])} |"


def measured(model: nn.Module, config: type, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Return logits and gradients of a model whose adapter has random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config(**arguments))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    task = {"task_ids": torch.tensor([1])} if adapted.peft_config["default"].peft_type.value in TASK_KINDS else {}
    logits = adapted.eval()(input_ids=IDS, use_cache=False, **task).logits
    logits.square().mean().backward()
    assert trained, "an adapter has something to train"
    return [logits.detach(), *(p.grad for p in trained if p.grad is not None)]

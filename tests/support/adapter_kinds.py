"""Every kind of adapter in PEFT on a quantized model, beside the same adapter on the model dequantized."""

import copy
import warnings
from typing import Any

import peft
import torch
from torch import nn

from glm_hf import GLMForBlankInfilling, GLMQuantizationConfig

IDS = torch.tensor([[83, 23, 144, 53, 71, 80, 2, 148, 21, 22]])
LORA_OPTIONS: dict[str, dict[str, Any]] = {
    "use_rslora=True": {"use_rslora": True},
    "bias='lora_only'": {"bias": "lora_only"},
    "lora_bias=True": {"lora_bias": True},
    "use_dora=True": {"use_dora": True},
    "init_lora_weights='gaussian'": {"init_lora_weights": "gaussian"},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "init_lora_weights='orthogonal'": {"init_lora_weights": "orthogonal"},
    "init_lora_weights='loftq'": {"init_lora_weights": "loftq"},
    "init_lora_weights='lora_ga'": {"init_lora_weights": "lora_ga"},
    "target_parameters": {"target_modules": [], "target_parameters": ["attention.dense.weight"]},
    "modules_to_save": {"modules_to_save": ["dense_4h_to_h"]},
}
VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
SETTINGS: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "ADALORA": {"target_modules": ["attention.dense"], "total_step": 10},
    "IA3": {},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [21, 22], "target_modules": ["embed_tokens"]},
    "VBLORA": {"target_modules": ["attention.dense"], "num_vectors": 20, "vector_length": 8, "topk": 2},
    "OFT": {"target_modules": ["attention.dense"], "oft_block_size": 8},
    "BOFT": {"target_modules": ["attention.dense"], "boft_block_size": 8},
    "C3A": {"target_modules": ["attention.dense"], "block_size": 8},
    "FOURIERFT": {"target_modules": ["attention.dense"], "n_frequency": 20},
}


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
        found[kind.value] = (config, SETTINGS.get(kind.value, {"target_modules": ["attention.dense"]}))
    for name, options in LORA_OPTIONS.items():
        found[f"LORA, {name}"] = (peft.LoraConfig, {"target_modules": ["attention.dense"], **options})
    if hasattr(peft, "MissConfig"):
        found["MISS, init_weights='bat'"] = (
            peft.MissConfig,
            {"target_modules": ["attention.dense"], "init_weights": "bat", "r": 8},
        )
    return found


def outcome(kind: str, bits: int) -> str:
    """Say what a kind of adapter does on a quantized model."""
    config, arguments = kinds()[kind]
    try:
        dense = measured(quantized(bits).dequantize(), config, arguments)
    except Exception as error:
        return f"not for GLM: {type(error).__name__}"
    try:
        found = measured(quantized(bits), config, arguments)
    except ValueError as error:
        return f"refused: {error}"
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)
    return SAME


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
    logits = adapted.eval()(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    assert trained, "an adapter has something to train"
    return [logits.detach(), *(p.grad for p in trained if p.grad is not None)]

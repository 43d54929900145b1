"""Every kind of adapter in PEFT on a quantized model gives what it gives on the dequantized one, or is refused."""

import re
from pathlib import Path

import adapter_kinds
import peft
import pytest
import torch
from adapter_kinds import IDS, QUANTIZED, SAME, kinds, load, outcome, quantized, row
from golden import golden_model
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    golden_model("cfg1").save_pretrained(folder)
    for bits in (8, 4):
        QUANTIZED[bits] = load(folder, bits)
    yield
    adapter_kinds.QUANTIZED.clear()


@pytest.mark.parametrize("kind", kinds())
def test_adapter_is_right_or_refused_as_the_page_says(kind):
    found = [outcome(kind, bits) for bits in (8, 4)]
    page = PAGE.read_text(encoding="utf-8")
    if found[0].startswith("not installed"):
        pytest.skip(found[0])
    if found[0].startswith("not for GLM"):
        assert kind in re.search(r"\n(.+) do not work on GLM", page)[1].replace(" and ", ", ").split(", ")
        return
    for text in found:
        assert text == SAME or "quantized" in text or "not a plain torch.nn.Linear" in text
    assert row(kind, found) in page.splitlines()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("safe", [False, True])
def test_merges_are_refused_and_change_nothing(bits, method, safe):
    model = peft.get_peft_model(quantized(bits), peft.LoraConfig(target_modules=["dense"], init_lora_weights=False))
    expected = logits_of(model)
    options = {"safe_merge": safe}
    with pytest.raises(ValueError, match=r"call model.dequantize\(\) first"):
        getattr(model, method)(**options)
    fresh = peft.get_peft_model(quantized(bits), peft.LoraConfig(target_modules=["dense"], init_lora_weights=False))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits_of(fresh), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["LORA", "LOHA", "LOKR", "OFT", "VERA"])
def test_adapters_load_again(kind, bits, tmp_path):
    config, arguments = kinds()[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(quantized(bits), config(**arguments))
    with torch.no_grad():
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(bits), tmp_path)
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_k_bit_helper_leaves_scales_and_checkpoints_layers(bits):
    def gradients(model: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["dense"], init_lora_weights=False)
        ).train()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in adapted.parameters() if p.grad is not None]

    prepared = peft.prepare_model_for_kbit_training(quantized(bits))
    assert prepared.is_gradient_checkpointing
    layer = prepared.model.layers[0].attention.dense
    assert layer.weight_scale.dtype == torch.float16
    assert all(layer.gradient_checkpointing for layer in prepared.model.layers)
    for one, other in zip(gradients(prepared), gradients(quantized(bits)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits

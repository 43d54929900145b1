"""Weights that are quantized while they stream, and checkpoints that the original tool has quantized."""

import json
from pathlib import Path

import pytest
import torch
from golden import DATA, TOLERANCE, golden_arrays, golden_config, golden_model
from safetensors.torch import load_file
from transformers.quantizers import auto

from glm_hf import GLMForBlankInfilling
from glm_hf.conversion import convert_sat_checkpoint, export_sat_checkpoint
from glm_hf.conversion.streaming import stored_tensor
from glm_hf.quantization import dequantize_weight, quantize_weight

LINEARS = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def dequantized_model(folder: Path) -> GLMForBlankInfilling:
    """Return the model with the fp16 weights that a quantized folder stands for, upcast."""
    weights = read_weights(folder)
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    state = {name: weight.float() for name, weight in weights.items() if not name.endswith(("_scale", *LINEARS))}
    for name in weights:
        if name.endswith(LINEARS):
            state[name] = dequantize_weight(weights[name], weights[f"{name}_scale"], bits).float()
    model = GLMForBlankInfilling(golden_config("cfg2"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval()


@pytest.mark.parametrize("case", ["gmask_batch", "mask_infill"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_checkpoint_gives_the_logits_of_the_original(bits, tp_size, case, tmp_path):
    convert_sat_checkpoint(DATA / "cfg2" / f"sat_int{bits}_tp{tp_size}", tmp_path / "hf", config=golden_config("cfg2"))
    cases = golden_arrays("cfg2")
    with torch.no_grad():
        logits = dequantized_model(tmp_path / "hf")(cases[f"{case}.input_ids"]).logits
    expected = golden_arrays("cfg2", "quant.npz")[f"{case}.int{bits}.tp{tp_size}.half"]
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_checkpoint_comes_back_bit_for_bit(bits, tp_size, tmp_path):
    src = DATA / "cfg2" / f"sat_int{bits}_tp{tp_size}"
    convert_sat_checkpoint(src, tmp_path / "hf", config=golden_config("cfg2"), max_shard_size="30KB")
    export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=tp_size)
    for rank in range(tp_size):
        name = f"mp_rank_{rank:02d}_model_states.pt"
        before = torch.load(src / "49300" / name, weights_only=True)["module"]
        after = torch.load(tmp_path / "sat" / "release" / name, weights_only=True)["module"]
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype, key
            assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_on_the_way_gives_what_the_original_tool_made(bits, tmp_path):
    config = golden_config("cfg2")
    convert_sat_checkpoint(DATA / "cfg2" / f"sat_int{bits}_tp1", tmp_path / "imported", config=config)
    for tp_size in (1, 2, 4):
        dst = tmp_path / str(tp_size)
        convert_sat_checkpoint(DATA / "cfg2" / f"sat_tp{tp_size}", dst, config=config, quantization=f"int{bits}")
        for path in (tmp_path / "imported").iterdir():
            assert (dst / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("block_bytes", [1, 2000])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantizing_does_not_depend_on_blocks_or_shards(quantization, block_bytes, monkeypatch, tmp_path):
    options = {"config": golden_config("cfg2"), "quantization": quantization}
    convert_sat_checkpoint(DATA / "cfg2" / "sat_tp2", tmp_path / "whole", **options)
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", block_bytes)
    convert_sat_checkpoint(DATA / "cfg2" / "sat_tp2", tmp_path / "blocks", **options, max_shard_size="10KB")
    whole, blocks = read_weights(tmp_path / "whole"), read_weights(tmp_path / "blocks")
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(blocks[name], tensor) for name, tensor in whole.items())


def test_weight_and_scale_are_in_one_shard(tmp_path):
    options = {"config": golden_config("cfg2"), "quantization": "int4", "max_shard_size": 6400}  # an int4 QKV alone
    convert_sat_checkpoint(DATA / "cfg2" / "sat_tp2", tmp_path / "hf", **options)
    shard_of = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in shard_of:
        if name.endswith("_scale"):
            assert shard_of[name] == shard_of[name.removesuffix("_scale")]


def test_config_tells_how_weights_are_stored(tmp_path):
    for tp_size in (1, 2):
        src = DATA / "cfg2" / f"sat_int4_tp{tp_size}"
        convert_sat_checkpoint(src, tmp_path / str(tp_size), config=golden_config("cfg2"))
        config = json.loads((tmp_path / str(tp_size) / "config.json").read_text())
        assert config["quantization_config"] == {
            "quant_method": "glm130b",
            "bits": 4,
            "group_size": None,
            "modules_to_not_convert": None,
            "row_parallel_groups": tp_size,
        }
        scale = read_weights(tmp_path / str(tp_size))["model.layers.0.attention.dense.weight_scale"]
        assert scale.shape == (80, tp_size)


def test_only_the_linears_of_the_layers_are_quantized(tmp_path):
    src, config = DATA / "cfg2" / "sat_tp2", golden_config("cfg2")
    convert_sat_checkpoint(src, tmp_path / "hf", config=config, quantization="int4", dtype="float32")
    state = golden_model("cfg2").state_dict()
    for name, tensor in read_weights(tmp_path / "hf").items():
        if name.endswith(LINEARS):
            assert torch.equal(tensor, quantize_weight(state[name], bits=4)[0])
        elif not name.endswith("_scale"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_folder_without_a_backend_is_refused_rather_than_read_as_weights(quantization, tmp_path, monkeypatch):
    src, config = DATA / "cfg2" / "sat_tp2", golden_config("cfg2")
    convert_sat_checkpoint(src, tmp_path / "hf", config=config, quantization=quantization)
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "glm130b")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "glm130b")
    with pytest.raises(ValueError, match=r"the weights are quantized by 'glm130b', for which nothing is registered"):
        GLMForBlankInfilling.from_pretrained(tmp_path / "hf")

"""Models that are quantized while they load, saved, loaded again, and trained with adapters."""

import json
from pathlib import Path

import pytest
import torch
from golden import DATA, TOLERANCE, golden_arrays, golden_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.conversion import convert_sat_checkpoint
from glm_hf.quantization import QuantizedLinear


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Golden cfg2 in fp16, in several shards."""
    folder = tmp_path_factory.mktemp("plain") / "hf"
    convert_sat_checkpoint(DATA / "cfg2" / "sat_tp1", folder, config=golden_config("cfg2"), max_shard_size="50KB")
    return folder


def converted(bits: int, tp_size: int, folder: Path) -> Path:
    convert_sat_checkpoint(DATA / "cfg2" / f"sat_int{bits}_tp{tp_size}", folder, config=golden_config("cfg2"))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", ["gmask_batch", "mask_infill"])
@pytest.mark.parametrize("bits", [8, 4])
def test_logits_are_those_of_the_original_with_exact_weights(bits, case, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(converted(bits, 1, tmp_path / "hf"), dtype=torch.float32)
    with torch.no_grad():
        logits = model(golden_arrays("cfg2")[f"{case}.input_ids"]).logits
    expected = golden_arrays("cfg2", "quant.npz")[f"{case}.int{bits}.tp1.exact"]
    assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_folder_loads_without_a_word_and_is_saved_as_it_was(bits, tp_size, tmp_path):
    folder = converted(bits, tp_size, tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_while_loading_is_what_the_original_tool_made(bits, plain, tmp_path):
    config = GLMQuantizationConfig(bits=bits)
    model, info = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "saved")
    expected = tensors_of(converted(bits, 1, tmp_path / "hf"))
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_row_parallel_groups_are_those_of_the_ranks(plain, tmp_path):
    config = GLMQuantizationConfig(bits=4, row_parallel_groups=2)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config).save_pretrained(tmp_path / "saved")
    saved, expected = tensors_of(tmp_path / "saved"), tensors_of(converted(4, 2, tmp_path / "hf"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_are_more_exact_and_load_again(bits, plain, tmp_path):
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    options = {"dtype": torch.float32}
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(plain, **options)(ids).logits
        errors = {}
        for group_size in (None, 10):
            config = GLMQuantizationConfig(bits=bits, group_size=group_size)
            model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, **options)
            logits = model(ids).logits
            errors[group_size] = (logits - exact).square().mean()
            model.save_pretrained(tmp_path / str(group_size))
            again = AutoModelForCausalLM.from_pretrained(tmp_path / str(group_size), **options)
            assert torch.equal(again(ids).logits, logits)
    assert errors[10] < 0.8 * errors[None]


def test_only_the_linears_of_the_layers_are_quantized(plain):
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=GLMQuantizationConfig())
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    linears = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert quantized == {f"model.layers.{layer}.{linear}" for layer in range(5) for linear in linears}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float16
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(("scale", "dense.weight")))


def test_linears_can_be_left_alone(plain, tmp_path):
    config = GLMQuantizationConfig(bits=4, modules_to_not_convert=["dense_4h_to_h", r"model\.layers\.0"])
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    linears = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h")
    assert quantized == {f"model.layers.{layer}.{linear}" for layer in range(1, 5) for linear in linears}
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 4])
def test_blanks_are_filled_as_by_the_dequantized_model(bits, plain):
    config = GLMQuantizationConfig(bits=bits)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = exact_weight(module)
    ids = [[20, 21, model.config.mask_token_id, 22], [30, 31]]
    assert model.fill_blanks(ids, max_new_tokens=6).sequences == dense.fill_blanks(ids, max_new_tokens=6).sequences


def exact_weight(module: QuantizedLinear) -> torch.Tensor:
    """Read the weight off the layer, one input feature at a time."""
    with torch.no_grad():
        columns = torch.eye(module.in_features)
        return (module(columns) - module.bias).T.contiguous()


def test_adapters_train_and_load_again(plain, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = GLMQuantizationConfig(bits=4)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    lora = LoraConfig(target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], r=4)
    adapted = get_peft_model(model, lora)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted.eval()(ids).logits)


def test_disk_is_refused_while_quantizing_and_used_afterwards(plain, tmp_path):
    layers = {f"model.layers.{layer}": "cpu" if layer < 3 else "disk" for layer in range(5)}
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
        **layers,
    }
    config = GLMQuantizationConfig(bits=4)
    with pytest.raises(ValueError, match=r"quantized while loading cannot go to the disk; quantize the model first"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map=device_map)
    folder = converted(4, 1, tmp_path / "hf")
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    options = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload", **options
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(folder, **options)(ids).logits)


def test_weights_that_are_not_finite_are_named(plain, tmp_path, caplog):
    model = GLMForBlankInfilling.from_pretrained(plain)
    model.model.layers[2].mlp.dense_4h_to_h.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(RuntimeError, match=r"issues during automatic conversion of the weights"):
        GLMForBlankInfilling.from_pretrained(tmp_path / "hf", quantization_config=GLMQuantizationConfig())
    assert "model.layers.2.mlp.dense_4h_to_h.weight: weights must be finite in fp16" in caplog.text


def test_missing_scale_is_no_weight(tmp_path):
    folder = converted(4, 1, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.attention.dense.weight_scale"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.attention.dense.weight_scale of a quantized model was not loaded"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(79, 1), (80,), (80, 2)])
def test_scale_of_another_shape_is_no_scale(shape, tmp_path):
    folder = converted(4, 1, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.attention.dense.weight_scale"] = torch.ones(shape).half()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    message = f"{caught.value} {caught.value.__context__}"
    assert "layers.1.attention.dense.weight_scale" in message
    assert "make the folder again" in message


def test_odd_input_features_need_8_bits(tmp_path):
    config = GLMConfig(**golden_config("cfg1").to_dict() | {"intermediate_size": 33})
    GLMForBlankInfilling(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"mlp.dense_4h_to_h: 1 groups must divide the 33 input features evenly"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=GLMQuantizationConfig(bits=4))
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=GLMQuantizationConfig(bits=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"bits must be 4 or 8, got 3"),
        ({"group_size": 0}, r"group_size must be a positive integer or None for whole rows, got 0"),
        ({"group_size": 1.5}, r"group_size must be a positive integer"),
        ({"row_parallel_groups": 0}, r"row_parallel_groups must be a positive integer, got 0"),
        ({"group_size": 8, "row_parallel_groups": 2}, r"either groups of group_size or row_parallel_groups"),
        ({"modules_to_not_convert": "dense"}, r"modules_to_not_convert must be a list of names, got 'dense'"),
        ({"modules_to_not_convert": [1]}, r"modules_to_not_convert must be a list of names, got \[1\]"),
        ({"quant_method": "gptq"}, r"quant_method must be glm130b, got gptq"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        GLMQuantizationConfig(**settings)


def test_group_size_that_does_not_divide(plain):
    with pytest.raises(ValueError, match=r"group_size must divide the 80 input features of model.layers.0.attention"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=GLMQuantizationConfig(group_size=32))

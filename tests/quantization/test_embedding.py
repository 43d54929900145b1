"""INT8 rows for the embedding and the output matrix: one copy, looked up row by row."""

import json
from pathlib import Path

import pytest
import torch
from golden import TOLERANCE, golden_arrays, golden_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.integrations.accelerate import compute_module_sizes

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.quantization import QuantizedLinear, quantize_weight
from glm_hf.quantization.embedding import QuantizedEmbedding
from glm_hf.quantization.quantizer import CASTS_BEFORE_CONVERTING

EMBEDDINGS = GLMQuantizationConfig(bits=4, quantize_embeddings=True)
NAMES = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """Small model in fp32 with an output matrix of its own."""
    folder = tmp_path_factory.mktemp("untied") / "hf"
    torch.manual_seed(1)
    GLMForBlankInfilling(
        GLMConfig(**golden_config("cfg1").to_dict() | {"tie_word_embeddings": False})
    ).save_pretrained(folder)
    return folder


def load(folder: Path, config: GLMQuantizationConfig | None = EMBEDDINGS, **options: object) -> GLMForBlankInfilling:
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options)


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory) -> Path:
    """Golden cfg2 with INT4 layers and an INT8 embedding."""
    folder = tmp_path_factory.mktemp("quantized") / "hf"
    load(plain, dtype=torch.float16).save_pretrained(folder)
    return folder


def with_dense_embeddings(folder: Path, bits: int, is_tied: bool = True) -> GLMForBlankInfilling:
    """Return the model whose embeddings are plain, but hold what INT8 rows stand for."""
    model = load(folder, GLMQuantizationConfig(bits=bits))
    for name in NAMES[: 1 if is_tied else 2]:
        weight = model.get_submodule(name).weight
        codes, scale = quantize_weight(weight.detach(), bits=8)
        weight.data = codes.float() * scale.float()
    return model


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_codes_times_their_scales(shape, dtype):
    codes, scale = quantize_weight(torch.randn(11, 6), bits=8)
    embedding = QuantizedEmbedding(11, 6, dtype=dtype)
    embedding.weight.data, embedding.weight_scale.data = codes, scale
    for ids in (torch.randint(11, shape), torch.randint(11, shape, dtype=torch.int32)):
        rows = embedding(ids)
        expected = [
            [float(code) * float(scale[token]) for code in codes[token].tolist()] for token in ids.flatten().tolist()
        ]
        assert rows.dtype == dtype
        assert torch.equal(rows, torch.tensor(expected).view(*shape, 6).to(dtype))


def test_result_follows_casts_of_the_model():
    embedding = QuantizedEmbedding(4, 6, dtype=torch.float16)
    assert embedding.float()(torch.tensor([1])).dtype == torch.float32
    assert list(embedding.state_dict()) == ["weight", "weight_scale"]
    assert isinstance(embedding, nn.Embedding)
    assert not any(parameter.requires_grad for parameter in embedding.parameters())


@pytest.mark.parametrize("case", ["gmask_batch", "mask_infill"])
@pytest.mark.parametrize("bits", [8, 4])
def test_logits_change_by_the_rounding_of_the_embedding_only(bits, case, plain):
    ids = golden_arrays("cfg2")[f"{case}.input_ids"]
    logits = logits_of(load(plain, GLMQuantizationConfig(bits=bits, quantize_embeddings=True)), ids)
    assert (logits - logits_of(with_dense_embeddings(plain, bits), ids)).abs().max() < 1e-4
    assert (logits - logits_of(load(plain, GLMQuantizationConfig(bits=bits)), ids)).abs().max() > TOLERANCE


def test_embedding_and_output_matrix_are_one_copy(plain, quantized):
    weights = load_file(quantized / "model.safetensors")
    expected = {"model.embed_tokens.weight", "model.embed_tokens.weight_scale"}
    assert {name for name in weights if name.startswith(NAMES)} == expected
    assert (weights["model.embed_tokens.weight"].dtype, weights["model.embed_tokens.weight"].shape) == (
        torch.int8,
        (320, 80),
    )
    for model in (load(plain), load(quantized, None)):
        embedding, head = model.model.embed_tokens, model.lm_head
        assert isinstance(embedding, QuantizedEmbedding)
        assert isinstance(head, QuantizedLinear)
        assert head.weight is embedding.weight
        assert head.weight_scale is embedding.weight_scale
        assert not head.weight_scale.requires_grad
        num_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.dtype == torch.int8)
        assert num_bytes == 320 * 80


def test_saved_model_is_the_same_again(plain, quantized, tmp_path):
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    again, info = AutoModelForCausalLM.from_pretrained(quantized, output_loading_info=True)
    assert not any(info.values()), info
    again.save_pretrained(tmp_path / "again")
    before, after = load_file(quantized / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (quantized, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"] == {**GLMQuantizationConfig().to_dict(), "quantize_embeddings": True}
    assert torch.equal(logits_of(load(plain), ids), logits_of(load(quantized, None), ids))


def test_folders_without_it_do_not_mention_it():
    assert "quantize_embeddings" not in GLMQuantizationConfig().to_dict()
    with pytest.raises(ValueError, match=r"quantize_embeddings must be True or False, got 'yes'"):
        GLMQuantizationConfig(quantize_embeddings="yes")


def test_output_matrix_of_its_own_is_quantized_by_itself(untied, tmp_path):
    ids = torch.tensor([[5, 6, 7, 150]])
    model = load(untied)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    logits = logits_of(model, ids)
    assert (logits - logits_of(with_dense_embeddings(untied, 4, is_tied=False), ids)).abs().max() < 1e-4
    model.save_pretrained(tmp_path / "saved")
    assert "lm_head.weight_scale" in load_file(tmp_path / "saved" / "model.safetensors")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert again.dtype == model.dtype == torch.float32
    assert torch.equal(logits_of(again, ids), logits)


@pytest.mark.skipif(CASTS_BEFORE_CONVERTING, reason="older transformers load AutoModel in another dtype")
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_other_heads_load_it_as_well(auto, plain, quantized):
    ids = torch.tensor([[20, 21, golden_config("cfg2").mask_token_id, 22]])
    first = auto.from_pretrained(plain, quantization_config=EMBEDDINGS, dtype=torch.float32)
    again = auto.from_pretrained(quantized, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(first(ids)[0], again(ids)[0])
    assert isinstance(again.get_input_embeddings(), QuantizedEmbedding)


def test_blanks_are_filled_as_by_dense_embeddings(plain):
    model, dense = load(plain), with_dense_embeddings(plain, 4)
    ids = [[20, 21, model.config.mask_token_id, 22], [30, 31]]
    for options in ({}, {"num_beams": 3}):
        expected = dense.fill_blanks(ids, max_new_tokens=6, **options).sequences
        assert model.fill_blanks(ids, max_new_tokens=6, **options).sequences == expected


@pytest.mark.parametrize("embeddings_on", ["cpu", "disk"])
def test_disk_and_cpu_may_share_a_quantized_model(embeddings_on, quantized, tmp_path):
    device_map = {"model.norm": "cpu", "model.rotary_emb": "cpu", **dict.fromkeys(NAMES, embeddings_on)}
    device_map |= {f"model.layers.{layer}": "cpu" if layer < 3 else "disk" for layer in range(5)}
    model = load(quantized, None, device_map=device_map, offload_folder=tmp_path / "offload")
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    assert torch.equal(logits_of(model, ids), logits_of(load(quantized, None), ids))


@pytest.mark.skipif(CASTS_BEFORE_CONVERTING, reason="older transformers cast weights to the dtype of the codes first")
@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_for_a_device_map_are_those_of_the_stored_tensors(bits, plain):
    config = GLMQuantizationConfig(bits=bits, quantize_embeddings=True)
    sizes = {}
    quantizer_of = type(load(plain, config).hf_quantizer)

    class Measuring(quantizer_of):
        def _process_model_before_weight_loading(self, model, **kwargs):
            super()._process_model_before_weight_loading(model, **kwargs)
            sizes["planned"] = compute_module_sizes(model, self, only_modules=False)[0][""]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(auto_quantizers(), "glm130b", Measuring)
        model = load(plain, config)
    actual = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert sizes["planned"] == actual


def auto_quantizers() -> dict[str, type]:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return AUTO_QUANTIZER_MAPPING


def test_resizing_is_refused(quantized):
    model = load(quantized, None)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    for arguments in ({"new_num_tokens": 400}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match=r"a quantized embedding cannot be resized; resize the model that is not"):
            model.resize_token_embeddings(**arguments)
    assert model.get_input_embeddings().weight.shape == (320, 80)


@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_missing_part_of_the_embedding_is_no_embedding(name, quantized, tmp_path):
    weights = load_file(quantized / "model.safetensors")
    del weights[f"model.embed_tokens.{name}"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((quantized / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"embed_tokens.{name} of a quantized model was not loaded"):
        load(tmp_path, None)


def adapted(folder: Path, config: GLMQuantizationConfig | None, shrink: float = 1.0) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = load(folder, config) if config else with_dense_embeddings(folder, 4)
    model.config.embedding_gradient_shrink = shrink
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["embed_tokens", "query_key_value"], r=4)
    return get_peft_model(model, lora)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("shrink", [1.0, 0.1])
def test_adapters_on_it_get_the_gradients_that_dense_embeddings_give(shrink, plain):
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    gradients = []
    for model in (adapted(plain, EMBEDDINGS, shrink), adapted(plain, None, shrink)):
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name:
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
        model.train()(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("lora_embedding_B" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_adapters_on_it_train_and_load_again(plain, tmp_path):
    from peft import PeftModel

    model = adapted(plain, EMBEDDINGS)
    ids = golden_arrays("cfg2")["mask_infill.input_ids"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(plain), tmp_path / "adapter")
    assert torch.equal(logits_of(again, ids), logits_of(model.eval(), ids))

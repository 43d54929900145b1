"""What an export writes: weights in every form, once each, in bounded memory, whole or not at all."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.conversion import quantize_checkpoint
from glm_hf.onnx import ORTGLMForBlankInfilling, export_onnx, verify_onnx

SIZES = {"vocab_size": 150, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {
    f"{name}_token_id": 140 + number
    for number, name in enumerate(("eos", "mask", "gmask", "smask", "eod", "sop", "eop"))
}
ROW = torch.tensor([[5, 6, 7, 141, 8, 9, 140, 145, 10, 11]])


def save_model(folder: Path, dtype: torch.dtype = torch.float16, **changes: object) -> Path:
    torch.manual_seed(1)
    model = GLMForBlankInfilling(GLMConfig(**{**SIZES, "intermediate_size": 208, **SPECIAL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ROW).logits.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"layer_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, "rope_dtype": "float32"},
        {"num_hidden_layers": 1, "num_attention_heads": 12},
    ],
    ids=str,
)
def test_models_of_all_kinds(tmp_path, dtype, changes):
    src = save_model(tmp_path / "model", dtype, **changes)
    export_onnx(src, tmp_path / "graph")
    expected = logits_of(GLMForBlankInfilling.from_pretrained(src, dtype=torch.float32).eval())
    actual = logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"))
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


WHOLE_ROWS = [{"bits": bits, "quantize_embeddings": quantized} for bits in (4, 8) for quantized in (False, True)]
GROUPS = [
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 16},
    {"bits": 8, "group_size": 48},
    {"bits": 4, "row_parallel_groups": 2},
]


@pytest.mark.parametrize(
    ("inner", "settings"),
    [(192, settings) for settings in WHOLE_ROWS + GROUPS] + [(170, settings) for settings in WHOLE_ROWS],
    ids=str,
)  # 170 columns fill no block
def test_quantized_models_keep_their_codes(tmp_path, inner, settings):
    src = save_model(tmp_path / "model", intermediate_size=inner)
    config = GLMQuantizationConfig(**settings)
    quantized = GLMForBlankInfilling.from_pretrained(src, quantization_config=config)
    quantized.save_pretrained(tmp_path / "quantized")
    export_onnx(tmp_path / "quantized", tmp_path / "graph")
    model = GLMForBlankInfilling.from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval()
    actual = logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"))
    for expected in (logits_of(model), logits_of(model.dequantize())):
        assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "bits"), [("int4", 4), ("int8", 8)])
def test_an_export_quantizes_as_from_pretrained_does(tmp_path, quantization, bits, loaded):
    src = save_model(tmp_path / "model", torch.float32)
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "dtype": loaded}))
    export_onnx(src, tmp_path / "graph", quantization=quantization)
    settings = GLMQuantizationConfig(bits=bits)
    model = GLMForBlankInfilling.from_pretrained(src, dtype="auto", quantization_config=settings).eval()
    torch.nn.Module.float(model)  # transformers' own refuses quantized models
    expected = logits_of(model)
    actual = logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"))
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(comparison.difference < 1e-3 for comparison in verify_onnx(src, tmp_path / "graph"))


def test_unquantized_modules_stay_as_they_are(tmp_path):
    src = save_model(tmp_path / "model", torch.float32)
    settings = GLMQuantizationConfig(bits=4, modules_to_not_convert=["mlp.dense_h_to_4h"])
    model = GLMForBlankInfilling.from_pretrained(src, quantization_config=settings)
    model.save_pretrained(tmp_path / "quantized")
    export_onnx(tmp_path / "quantized", tmp_path / "graph")
    kinds = [
        node.op_type for node in onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False).graph.node
    ]
    assert kinds.count("MatMulNBits") == 3 * 2
    expected = logits_of(model.eval())
    actual = logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"))
    assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()


def test_half_precision_is_as_near_as_torch_in_half(tmp_path):
    src = save_model(tmp_path / "model")
    export_onnx(src, tmp_path / "graph", dtype="fp16")
    graph = ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph")
    exact = logits_of(GLMForBlankInfilling.from_pretrained(src, dtype=torch.float32).eval())
    of_torch = logits_of(GLMForBlankInfilling.from_pretrained(src, dtype=torch.float16).eval())
    assert graph.dtype == torch.float16
    assert (logits_of(graph) - exact).abs().max() < 2 * (of_torch - exact).abs().max()
    generated = graph.generate(ROW[:, :7], max_new_tokens=5, min_new_tokens=5)
    assert generated.shape[1] == 7 + 1 + 5


def test_scores_beyond_half_precision_do_no_harm(tmp_path):
    src = save_model(tmp_path / "model", torch.float32)
    model = GLMForBlankInfilling.from_pretrained(src)
    with torch.no_grad():
        for layer in model.model.layers:
            rows = layer.attention.query_key_value.weight.view(SIZES["num_attention_heads"], 3, -1)
            rows[:, :2] *= 400  # queries and keys
    model.save_pretrained(src)
    export_onnx(src, tmp_path / "graph", dtype="fp16")
    found = logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"))
    expected = logits_of(model.eval())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_lie_in_the_file_once_and_unchanged(tmp_path):
    src = save_model(tmp_path / "model", torch.float32)
    export_onnx(src, tmp_path / "graph")
    model = onnx.load(tmp_path / "graph" / "model.onnx")  # reads the weights by onnx's own code
    onnx.checker.check_model(str(tmp_path / "graph" / "model.onnx"))
    found = {
        entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in model.graph.initializer
    }
    tensors = load_file(src / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert "lm_head.weight" not in found
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "graph" / "model.onnx.data").stat().st_size < num_bytes + 4096 * len(tensors)


def test_the_graph_is_what_the_standard_says(tmp_path):
    """By onnx's reference implementation, which shares no code with onnxruntime."""
    src = save_model(tmp_path / "model", torch.float32)
    export_onnx(src, tmp_path / "graph")
    expected = logits_of(GLMForBlankInfilling.from_pretrained(src).eval())
    length, capacity = ROW.shape[1], ROW.shape[1] + 3
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3, 3, 3]])
    visible = torch.zeros(1, 1, length, capacity, dtype=torch.bool)
    visible[..., :length] = torch.ones(length, length, dtype=torch.bool).tril()
    visible[..., :7] = True
    cache = torch.zeros(1, 4, capacity, 24).numpy()
    past = {f"past_key_values.{layer}.{kind}": cache for layer in range(2) for kind in ("key", "value")}
    given = {"input_ids": ROW, "position_ids": positions, "attention_mask": visible}
    given |= {"write_indices": torch.tensor([0]), "num_logits_to_keep": torch.tensor(length)}
    session = ReferenceEvaluator(str(tmp_path / "graph" / "model.onnx"))
    logits, *_ = session.run(None, {**{name: tensor.numpy() for name, tensor in given.items()}, **past})
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("opset", [24, 25, 26])
def test_newer_opsets_run_too(tmp_path, opset):
    src = save_model(tmp_path / "model", torch.float32)
    export_onnx(src, tmp_path / "graph", opset=opset)
    expected = logits_of(GLMForBlankInfilling.from_pretrained(src).eval())
    actual = logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"))
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


MEASURE = """
import sys, threading, time, psutil
from glm_hf.onnx import export_onnx
from glm_hf.onnx import graph
me, most = psutil.Process(), [0]
start = me.memory_info().rss
def watch():
    while True:
        most[0] = max(most[0], me.memory_info().rss)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
export_onnx(*sys.argv[1:3], dtype="fp32", **({"quantization": sys.argv[3]} if sys.argv[3:] else {}))
print(most[0] - start)
"""


@pytest.mark.parametrize("quantization", [[], ["int4"]], ids=["plain", "int4"])
def test_memory_does_not_grow_with_the_model(tmp_path, quantization):
    """A model of 140 MB in fp16, twice as much in the file: every tensor passes by in blocks."""
    sizes = {"vocab_size": 2000, "hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 8}
    with torch.device("meta"):
        model = GLMForBlankInfilling(GLMConfig(**{**SPECIAL, **sizes, "intermediate_size": 3072}))
    model = model.to_empty(device="cpu").half()
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.zero_().view(-1)[:7] = 0.5
    model.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "graph"), *quantization]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (tmp_path / "graph" / "model.onnx.data").stat().st_size > (40e6 if quantization else 270e6)
    assert grown < 120e6


def test_an_export_that_fails_leaves_nothing(tmp_path):
    src = save_model(tmp_path / "model")
    with open(src / "model.safetensors", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\xff\x7f")  # NaN in fp16
    with pytest.raises(ValueError, match="not finite"):
        export_onnx(src, tmp_path / "graph")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_there_is_replaced_only_when_asked(tmp_path):
    src = save_model(tmp_path / "model")
    export_onnx(src, tmp_path / "graph")
    written = (tmp_path / "graph" / "model.onnx.data").stat().st_ino
    export_onnx(src, tmp_path / "graph")  # is complete already
    assert (tmp_path / "graph" / "model.onnx.data").stat().st_ino == written
    with pytest.raises(FileExistsError, match="exists already"):
        export_onnx(src, tmp_path / "graph", dtype="fp16")
    export_onnx(src, tmp_path / "graph", dtype="fp16", overwrite=True)
    assert ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph").dtype == torch.float16


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def of_another_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (None, {"opset": 17}, "opset must be from 24"),
        (None, {"opset": 99}, "opset must be from 24"),
        (None, {"dtype": "int3"}, "dtype must be one of fp32, fp16"),
        (None, {"quantization": "int5"}, "quantization must be one of int4, int8"),
        (without_weights, {}, "model.safetensors"),
        (of_another_kind, {}, "bert"),
    ],
)
def test_bad_input_is_an_error_of_one_line(tmp_path, damage, settings, message):
    src = save_model(tmp_path / "model")
    if damage is not None:
        damage(src)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        export_onnx(src, tmp_path / "graph", **settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "graph").exists()


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    src = save_model(tmp_path / "model")
    quantize_checkpoint(src, tmp_path / "quantized", bits=8)
    with pytest.raises(ValueError, match="quantized to int8 already"):
        export_onnx(tmp_path / "quantized", tmp_path / "graph", quantization="int4")


def test_groups_that_fit_no_block_are_refused(tmp_path):
    src = save_model(tmp_path / "model")
    quantize_checkpoint(src, tmp_path / "quantized", bits=8, group_size=8)
    with pytest.raises(ValueError, match="another group_size"):
        export_onnx(tmp_path / "quantized", tmp_path / "graph")


def foreign_operator(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[5].op_type = "NoSuchOperator"
    onnx.save(model, folder / "model.onnx")


def cut_graph(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.onnx.data", 5000)


def lose_weights(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def lose_graph(folder: Path) -> None:
    (folder / "model.onnx").unlink()


def foreign_graph(folder: Path) -> None:
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    a, b = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab")
    graph = onnx.helper.make_graph([node], "other", [a], [b])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")


def torch_model(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "model_type": "glm130b"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign_operator, "NoSuchOperator"),
        (cut_graph, r"cannot be run by onnxruntime"),
        (cut_weights, r"cannot be run by onnxruntime"),
        (lose_weights, r"model\.onnx\.data"),
        (lose_graph, r"model\.onnx"),
        (foreign_graph, "not exported by glm_hf"),
        (torch_model, "optimum-cli export glm-onnx"),
    ],
)
def test_damaged_graphs_are_errors_of_one_line(tmp_path, damage, message):
    export_onnx(save_model(tmp_path / "model"), tmp_path / "graph")
    damage(tmp_path / "graph")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph")
    assert "\n" not in str(error.value)


def test_a_graph_of_other_weights_is_noticed(tmp_path):
    export_onnx(save_model(tmp_path / "model"), tmp_path / "graph")
    other = save_model(tmp_path / "other", layer_norm_eps=0.1)
    with pytest.raises(ValueError, match="differ by"):
        verify_onnx(other, tmp_path / "graph")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(tmp_path, monkeypatch, package):
    src = save_model(tmp_path / "model")
    export_onnx(src, tmp_path / "graph")
    monkeypatch.setitem(sys.modules, package, None)
    calls = {
        "onnx": lambda: export_onnx(src, tmp_path / "again"),
        "onnxruntime": lambda: ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph"),
    }
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'glm-hf\[onnx\]'"):
        calls[package]()


def test_weights_outside_the_folder_are_not_read(tmp_path):
    export_onnx(save_model(tmp_path / "model"), tmp_path / "graph")
    (tmp_path / "elsewhere").write_bytes((tmp_path / "graph" / "model.onnx.data").read_bytes())
    model = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data):
        entry.value = "../elsewhere" if entry.key == "location" else entry.value
    onnx.save(model, tmp_path / "graph" / "model.onnx")
    with pytest.raises(ValueError, match="escapes"):
        ORTGLMForBlankInfilling.from_pretrained(tmp_path / "graph")


def test_folders_of_the_hubs_cache_hold_links(tmp_path):
    export_onnx(save_model(tmp_path / "model"), tmp_path / "graph")
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    (tmp_path / "cache" / "snapshots" / "0").mkdir(parents=True)
    for number, path in enumerate((tmp_path / "graph").iterdir()):
        path.rename(tmp_path / "cache" / "blobs" / str(number))
        (tmp_path / "cache" / "snapshots" / "0" / path.name).symlink_to(f"../../blobs/{number}")
    logits_of(ORTGLMForBlankInfilling.from_pretrained(tmp_path / "cache" / "snapshots" / "0"))


def test_the_tokenizer_comes_along(tmp_path):
    export_onnx(str(files("glm_hf") / "world_facts"), tmp_path / "graph")
    assert {path.name for path in (tmp_path / "graph").iterdir()} >= {"tokenizer.json", "LICENSE", "model.onnx"}
    assert "quantization_config" not in json.loads((tmp_path / "graph" / "config.json").read_text())

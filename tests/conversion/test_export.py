"""SAT checkpoints that we write are those of the original tool, tensor by tensor, in every direction."""

import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import CONFIGS, DATA, golden_config, golden_model
from safetensors.torch import load_file, save_file

from glm_hf import GLMConfig
from glm_hf.conversion import convert_sat_checkpoint, export, export_sat_checkpoint, reshard_sat_checkpoint
from glm_hf.conversion.formats import rank_writer
from glm_hf.conversion.streaming import stored_tensor

MIXIN_ROTARY = "mixins.rotary-embedding.rotary_emb.inv_freq"


@pytest.fixture(autouse=True)
def _many_blocks_and_segments(monkeypatch) -> None:
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(rank_writer, "SEGMENT_BYTES", 100_000)


def load_ranks(src: Path, mmap: bool = False) -> list[dict[str, torch.Tensor]]:
    paths = sorted((src / (src / "latest").read_text().strip()).iterdir())
    return [torch.load(path, weights_only=True, mmap=mmap)["module"] for path in paths]


def assert_same_checkpoint(src: Path, expected: Path) -> None:
    """Compare names, shapes, dtypes, strides and bytes on every rank."""
    ranks, expected_ranks = load_ranks(src), load_ranks(expected)
    assert len(ranks) == len(expected_ranks)
    for rank, expected_rank in zip(ranks, expected_ranks, strict=True):
        assert rank.keys() == expected_rank.keys()
        for name, tensor in expected_rank.items():
            assert rank[name].dtype == tensor.dtype, name
            assert torch.equal(rank[name], tensor), name
            assert rank[name].is_contiguous(), name


@pytest.fixture(scope="module", params=CONFIGS)
def model_folder(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    convert_sat_checkpoint(
        DATA / request.param / "sat_tp1", folder, config=golden_config(request.param), max_shard_size="100KB"
    )
    return request.param, folder


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_exported_checkpoint_is_the_original(tp_size, model_folder, tmp_path):
    name, folder = model_folder
    export_sat_checkpoint(folder, tmp_path / "sat", tp_size=tp_size)
    assert_same_checkpoint(tmp_path / "sat", DATA / name / f"sat_tp{tp_size}")


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1), (1, 2), (2, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_resharded_checkpoint_is_the_original_tools(before, after, name, tmp_path):
    reshard_sat_checkpoint(DATA / name / f"sat_tp{before}", tmp_path / "sat", tp_size=after)
    assert_same_checkpoint(tmp_path / "sat", DATA / name / f"sat_tp{after}")
    assert (tmp_path / "sat" / "latest").read_text().strip() == "49300"


def test_resharding_round_returns_the_same_files(tmp_path):
    reshard_sat_checkpoint(DATA / "cfg2" / "sat_tp1", tmp_path / "first", tp_size=1)
    previous = tmp_path / "first"
    for tp_size in (4, 2, 8, 1):
        reshard_sat_checkpoint(previous, tmp_path / str(tp_size), tp_size=tp_size)
        previous = tmp_path / str(tp_size)
    name = "49300/mp_rank_00_model_states.pt"
    assert (previous / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_come_back(dtype, tmp_path):
    golden_model("cfg1").to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    golden_model.cache_clear()  # it was cast in place
    export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2)
    convert_sat_checkpoint(tmp_path / "sat", tmp_path / "again", config=golden_config("cfg1"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_files_are_whole_for_every_reader(model_folder, tmp_path):
    export_sat_checkpoint(model_folder[1], tmp_path / "sat", tp_size=2)
    for path in (tmp_path / "sat" / "release").iterdir():
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert {name.partition("/")[0] for name in archive.namelist()} == {path.stem}
            assert len(archive.namelist()) == len(set(archive.namelist()))
    for read, mapped in zip(load_ranks(tmp_path / "sat"), load_ranks(tmp_path / "sat", mmap=True), strict=True):
        for name, tensor in read.items():
            assert torch.equal(mapped[name], tensor)
            assert mapped[name].data_ptr() % 64 == 0, name  # files are mapped at pages


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_checkpoint_is_cut_for_more_ranks_without_requantizing(bits, tp_size, tmp_path):
    src = DATA / "cfg2" / f"sat_int{bits}_tp2"
    reshard_sat_checkpoint(src, tmp_path / "sat", tp_size=tp_size)
    before, after = load_ranks(src), load_ranks(tmp_path / "sat")
    assert len(after) == tp_size
    for name in ("attention.dense.weight", "mlp.dense_4h_to_h.weight"):
        key = f"transformer.layers.3.{name}"
        assert torch.equal(torch.cat([r[key] for r in after], 1), torch.cat([r[key] for r in before], 1))
        for number, rank in enumerate(after):
            assert torch.equal(rank[f"{key}_scale"], before[number * 2 // tp_size][f"{key}_scale"])
    key = "transformer.layers.3.attention.query_key_value.weight_scale"
    assert torch.equal(torch.cat([r[key] for r in after]), torch.cat([r[key] for r in before]))


def test_iteration_is_kept(golden_ranks, write_sat, tmp_path):
    for rank in golden_ranks:
        rank["iteration"] = 49300
    reshard_sat_checkpoint(write_sat(golden_ranks), tmp_path / "out", tp_size=1)
    content = torch.load(tmp_path / "out" / "49300" / "mp_rank_00_model_states.pt", weights_only=True)
    assert content["iteration"] == 49300


@pytest.mark.parametrize("tp_size", [3, 0, -1, 16])
def test_size_that_does_not_divide_the_heads(tp_size, model_folder, tmp_path):
    name, folder = model_folder
    heads = golden_config(name).num_attention_heads
    message = rf"tp_size must divide num_attention_heads \({heads}\), got {tp_size}"
    with pytest.raises(ValueError, match=message):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=tp_size)
    with pytest.raises(ValueError, match=message):
        reshard_sat_checkpoint(DATA / name / "sat_tp2", tmp_path / "sat", tp_size=tp_size)
    assert not any(tmp_path.iterdir())


def test_quantized_checkpoint_cannot_be_joined(tmp_path):
    message = r"tp_size must be a multiple of 2, the number of ranks that quantized the model, .* got 1"
    with pytest.raises(ValueError, match=message):
        reshard_sat_checkpoint(DATA / "cfg2" / "sat_int4_tp2", tmp_path / "sat", tp_size=1)


def test_unknown_heads_are_not_cut(random_module, cut_module, write_sat, tmp_path):
    src = write_sat(cut_module(random_module(hidden=64, inner=32, vocab=32), 4))
    for tp_size in (1, 2, 4):
        reshard_sat_checkpoint(src, tmp_path / str(tp_size), tp_size=tp_size)
    for tp_size in (8, 3, 0):
        with pytest.raises(ValueError, match=r"does not tell how many heads .* must divide .* \(4\), got"):
            reshard_sat_checkpoint(src, tmp_path / "sat", tp_size=tp_size)


def test_frequencies_that_were_cut_come_back_whole(random_module, cut_module, write_sat, tmp_path):
    frequencies = (1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)).half()
    ranks = cut_module(random_module(hidden=64, inner=32, vocab=32), 2)
    for rank, part in zip(ranks, frequencies.chunk(2), strict=True):
        rank["module"][MIXIN_ROTARY] = part.clone()
    reshard_sat_checkpoint(write_sat(ranks), tmp_path / "out", tp_size=4)
    for rank in load_ranks(tmp_path / "out"):
        assert torch.equal(rank["transformer.layers.0.attention.rotary_emb.inv_freq"], frequencies)


def save_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(tmp_path) -> Path:
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", tmp_path / "hf", config=golden_config("cfg1"))
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("model.norm.bias"),
            r"hf: model.norm.bias is missing; expected the tensors of GLM",
        ),
        (lambda weights: weights.update(x=torch.ones(1)), r"hf: x is unknown; expected the tensors of GLMForBlank"),
        (
            lambda weights: weights.update({"model.norm.bias": torch.ones(3)}),
            r"model.norm.bias is \(3,\) torch.float32",
        ),
        (lambda weights: weights.update({"model.norm.bias": torch.ones(64).double()}), r"is F64; expected one of F16"),
        (
            lambda weights: weights.update({"model.norm.bias": torch.ones(64).char()}),
            r"norm.bias is \(64,\) torch.int8",
        ),
    ],
)
def test_folder_with_other_tensors(change, message, folder, tmp_path):
    save_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)


def test_folder_that_is_damaged_or_incomplete(folder, tmp_path):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: .*; make the folder again"):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"hf must hold a model, .* but has no model.safetensors"):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)
    with pytest.raises(FileNotFoundError, match=r"nowhere must hold a model, .* but has no config.json"):
        export_sat_checkpoint(tmp_path / "nowhere", tmp_path / "sat", tp_size=1)


def test_folder_of_another_kind(folder, tmp_path):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"must hold a glm130b model, got gpt2"):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)


def test_output_matrix_of_its_own(tmp_path):
    config = GLMConfig(**golden_config("cfg1").to_dict() | {"tie_word_embeddings": False})
    type(golden_model("cfg1"))(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"has an LM head of its own, which SAT checkpoints of GLM-130B cannot"):
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=1)


@pytest.mark.parametrize(
    "change", [{"layer_norm_eps": 1e-6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}]
)
def test_model_that_the_original_code_would_compute_otherwise(change, folder, tmp_path):
    config = GLMConfig.from_pretrained(folder).to_dict() | change
    GLMConfig(**config).save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"the model has {next(iter(change))} = .*, but the original code always"):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"bits": None},
        {"quant_method": "gptq"},
        {"group_size": 32},
        {"row_parallel_groups": "x"},
        {"modules_to_not_convert": "dense"},
        {"quantize_embeddings": 1},
        {"zero_points": True},
    ],
    ids=str,
)
def test_quantization_that_is_not_valid(change, tmp_path):
    convert_sat_checkpoint(DATA / "cfg2" / "sat_int4_tp2", tmp_path / "hf", config=golden_config("cfg2"))
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    fields["quantization_config"] |= change
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"config.json: .*{next(iter(change))}"):
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=2)


def test_vocabulary_that_cannot_be_cut(tmp_path):
    config = GLMConfig(**golden_config("cfg1").to_dict() | {"vocab_size": 162})
    type(golden_model("cfg1"))(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"tp_size must split dimension 0 of a tensor of shape \(162, 64\)"):
        export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=4)


def test_source_may_be_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(DATA / "cfg1" / "sat_tp2" / "49300")
    reshard_sat_checkpoint(".", tmp_path / "sat", tp_size=1)
    assert_same_checkpoint(tmp_path / "sat", DATA / "cfg1" / "sat_tp1")


@pytest.mark.parametrize("latest", ["..", ".", "49300/../49300", "/tmp"])
def test_latest_that_is_no_plain_name(latest, golden_ranks, write_sat, tmp_path):
    src = write_sat(golden_ranks)
    (src / "latest").write_text(latest)
    with pytest.raises(FileNotFoundError, match=r"sat/latest names .*, but \S+sat has no folder of that name"):
        reshard_sat_checkpoint(src, tmp_path / "out", tp_size=1)


def test_weights_are_those_that_transformers_loads(tmp_path):
    model = golden_model("cfg1")
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    for path in (tmp_path / "hf").glob("model-*"):
        path.unlink()
    model.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "hf")  # beside an index that is out of date
    export_sat_checkpoint(tmp_path / "hf", tmp_path / "sat", tp_size=1)
    [rank] = load_ranks(tmp_path / "sat")
    assert torch.equal(rank["transformer.final_layernorm.bias"], model.model.norm.bias)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
        ("model.safetensors.index.json", '{"weight_map": [1]}'),
        ("model.safetensors.index.json", "[" * 100_000),
        ("config.json", '{"model_type": "glm130b", "quantization_config": 5}'),
        ("config.json", '{"model_type": "glm130b", "dtype": "nonsense"}'),
        ("config.json", '{"model_type": "glm130b", "id2label": 5}'),
        ("config.json", '{"model_type": "glm130b", "rope_parameters": {"rope_theta": "x"}}'),
        ("config.json", "[]"),
    ],
)
def test_json_that_makes_no_sense(file, content, folder, tmp_path):
    if "index" in file:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)


def test_tensor_in_two_shards(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.bias": weights["model.norm.bias"]}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors") | {"model.norm.bias": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"b.safetensors: model.norm.bias is also in \S+a.safetensors"):
        export_sat_checkpoint(folder, tmp_path / "sat", tp_size=1)


def test_heads_of_a_model_as_wide_as_the_released_one(random_module, write_sat, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "GLMConfig", lambda: SimpleNamespace(hidden_size=96, num_attention_heads=6))
    src = write_sat([{"module": random_module(hidden=96, inner=48, vocab=48)}])
    reshard_sat_checkpoint(src, tmp_path / "three", tp_size=3)
    with pytest.raises(ValueError, match=r"tp_size must divide num_attention_heads \(6\), got 4"):
        reshard_sat_checkpoint(src, tmp_path / "four", tp_size=4)

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from golden import DATA, golden_config
from safetensors.torch import load_file, save_file

from glm_hf.conversion import convert_sat_checkpoint, export_sat_checkpoint, reshard_sat_checkpoint, verify_checkpoint
from glm_hf.conversion.streaming import stored_tensor

SRC = DATA / "cfg2" / "sat_tp2"
DENSE = "transformer.layers.1.attention.dense.weight"


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch) -> None:
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 3000)


@pytest.fixture
def download(tmp_path) -> Path:
    """Copy of a checkpoint in four ranks."""
    return shutil.copytree(DATA / "cfg2" / "sat_tp4", tmp_path / "sat")


def rank_file(src: Path, rank: int) -> Path:
    return src / "49300" / f"mp_rank_{rank:02d}_model_states.pt"


def flip(path: Path, name: str) -> None:
    """Flip a bit of a tensor in a rank file."""
    weight = torch.load(path, weights_only=True)["module"][name].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight) + 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["sat_tp1", "sat_tp4", "sat_int8_tp2", "sat_int4_tp1"])
def test_whole_download_has_no_problems(name):
    report = verify_checkpoint(DATA / "cfg2" / name)
    assert report.problems == []
    paths = (DATA / "cfg2" / name / "49300").iterdir()
    modules = [torch.load(path, weights_only=True)["module"] for path in paths]
    assert report.num_tensors == sum(map(len, modules))
    assert report.num_bytes == sum(tensor.nbytes for module in modules for tensor in module.values())


def test_every_damaged_file_is_named_with_its_tensors(download):
    flip(rank_file(download, 0), DENSE)
    flip(rank_file(download, 3), DENSE)
    flip(rank_file(download, 3), "transformer.word_embeddings.weight")
    rank_file(download, 1).write_bytes(rank_file(download, 1).read_bytes()[:-100])
    problems = sorted(verify_checkpoint(download).problems)
    assert len(problems) == 4
    assert re.search(rf"mp_rank_00_model_states.pt: {DENSE} is damaged: its CRC-32 is", problems[0])
    assert "mp_rank_01_model_states.pt is not a complete zip file of torch.save, copy it again" in problems[1]
    assert re.search(rf"mp_rank_03_model_states.pt: {DENSE} is damaged", problems[2])
    assert re.search(r"mp_rank_03_model_states.pt: transformer.word_embeddings.weight is damaged", problems[3])


def test_bytes_outside_of_the_model_are_checked_too(golden_ranks, write_sat):
    golden_ranks[1]["other"] = torch.arange(1000)
    src = write_sat(golden_ranks)
    assert verify_checkpoint(src).problems == []
    content = bytearray(rank_file(src, 1).read_bytes())
    content[content.index(torch.arange(1000).numpy().tobytes()) + 8] ^= 4
    rank_file(src, 1).write_bytes(content)
    [problem] = verify_checkpoint(src).problems
    assert re.search(r"mp_rank_01_model_states.pt: mp_rank_01_model_states/data/\d+ is damaged", problem)


def test_missing_rank_and_mixed_iterations_are_problems(download, golden_ranks, write_sat, tmp_path):
    rank_file(download, 2).unlink()
    [problem] = verify_checkpoint(download).problems
    assert "expected 4 ranks as the shapes tell, found 3: mp_rank_02_model_states.pt missing" in problem
    shutil.rmtree(download)
    golden_ranks[0]["iteration"], golden_ranks[1]["iteration"] = 1, 2
    [problem] = verify_checkpoint(write_sat(golden_ranks)).problems
    assert "is of iteration 2, but" in problem


def test_wrong_shape_is_a_problem(golden_ranks, write_sat):
    for rank in golden_ranks:
        rank["module"]["transformer.layers.0.mlp.dense_4h_to_h.bias"] = torch.zeros(65).half()
    [problem] = verify_checkpoint(write_sat(golden_ranks)).problems
    assert re.search(r"mlp.dense_4h_to_h.bias has shape \(65,\), expected \(64,\)", problem)


def test_download_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        verify_checkpoint(tmp_path / "nowhere")


@pytest.fixture
def folder(tmp_path) -> Path:
    convert_sat_checkpoint(SRC, tmp_path / "hf", config=golden_config("cfg2"))
    return tmp_path / "hf"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_both_sides_of_a_conversion_are_equal(tp_size, folder):
    other = DATA / "cfg2" / f"sat_tp{tp_size}"
    for sides in ((other, folder), (folder, other), (SRC, other)):
        report = verify_checkpoint(*sides)
        assert (report.num_tensors, report.num_bytes, report.problems) == (63, 701_920, [])


def test_folder_alone_has_no_problems(folder):
    report = verify_checkpoint(folder)
    assert (report.num_tensors, report.num_bytes, report.problems) == (63, 701_920, [])


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"quantization": "int4", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_cast_and_quantized_weights_are_compared_with_what_they_should_be(options, tmp_path):
    convert_sat_checkpoint(SRC, tmp_path / "hf", config=golden_config("cfg2"), **options)
    assert verify_checkpoint(SRC, tmp_path / "hf").problems == []
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.dense_h_to_4h.weight"
    weights[name][200, 3] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    [problem] = verify_checkpoint(SRC, tmp_path / "hf").problems
    assert problem.startswith(f"{name}[200, 3] is ")


def test_wrong_scale_is_found(tmp_path):
    convert_sat_checkpoint(SRC, tmp_path / "hf", config=golden_config("cfg2"), quantization="int4")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.1.attention.dense.weight_scale"][7, 0] *= 2
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    [problem] = verify_checkpoint(SRC, tmp_path / "hf").problems
    assert problem.startswith("model.layers.1.attention.dense.weight_scale[7, 0] is ")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_checkpoints_are_compared_at_any_size(bits, tmp_path):
    src = DATA / "cfg2" / f"sat_int{bits}_tp2"
    convert_sat_checkpoint(src, tmp_path / "hf", config=golden_config("cfg2"))
    reshard_sat_checkpoint(src, tmp_path / "four", tp_size=4)
    export_sat_checkpoint(tmp_path / "hf", tmp_path / "two", tp_size=2)
    for other in ("hf", "four", "two"):
        assert verify_checkpoint(src, tmp_path / other).problems == []


def test_first_difference_is_named_with_both_values(folder):
    weights = load_file(folder / "model.safetensors")
    embedding, bias = "model.embed_tokens.weight", "model.layers.2.attention.dense.bias"
    expected = weights[embedding][300, 7].item()
    weights[embedding][300, 7], weights[embedding][301, 0] = 1.5, 2.5
    weights[bias][9] = 0.25
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    problems = verify_checkpoint(SRC, folder).problems
    assert problems[0] == f"{embedding}[300, 7] is 1.5, expected {expected}"
    assert problems[1].startswith(f"{bias}[9] is 0.25, expected ")
    assert len(problems) == 2


def test_minus_zero_is_not_zero(golden_ranks, write_sat, tmp_path):
    name = "transformer.final_layernorm.bias"
    for rank in golden_ranks:
        rank["module"][name][5] = 0.0
    src = write_sat(golden_ranks)
    convert_sat_checkpoint(src, tmp_path / "hf", config=golden_config("cfg1"))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.bias"][5] = -0.0
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert verify_checkpoint(src, tmp_path / "hf").problems == ["model.norm.bias[5] is -0.0, expected 0.0"]


def test_damage_of_one_side_is_named_and_the_rest_compared(download, folder):
    flip(rank_file(download, 2), DENSE)
    report = verify_checkpoint(download, folder)
    assert report.num_tensors == 63
    [problem] = report.problems
    assert re.search(rf"mp_rank_02_model_states.pt: {DENSE} is damaged", problem)


@pytest.mark.parametrize(("src", "dst"), [("sat_int4_tp1", "sat_tp1"), ("sat_int4_tp1", "sat_int8_tp1")])
def test_sides_that_cannot_be_compared(src, dst):
    with pytest.raises(ValueError, match=r"were expected; compare a model with what was made from it"):
        verify_checkpoint(DATA / "cfg2" / src, DATA / "cfg2" / dst)


@pytest.mark.parametrize(("rows", "message"), [(330, "has more rows than expected"), (310, "has another shape")])
def test_more_or_fewer_rows_are_a_difference(rows, message, folder):
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat((embedding, embedding))[:rows].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    [problem] = verify_checkpoint(SRC, folder).problems
    assert f"model.embed_tokens.weight {message}" in problem


def test_another_model_differs(tmp_path):
    other = tmp_path / "other"
    convert_sat_checkpoint(DATA / "cfg1" / "sat_tp1", other, config=golden_config("cfg1"))
    with pytest.raises(ValueError, match=r"the second has 39 tensors of a model that is not quantized, but 63"):
        verify_checkpoint(SRC, other)

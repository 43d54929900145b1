"""NaN and infinity among weights: reported with tensor and index wherever weights are copied, refused when asked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline_files import TAG, part_files, random_model
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model, train_sentencepiece

from glm_hf.cli import main
from glm_hf.conversion import export_sat_checkpoint, quantize_checkpoint, verify_checkpoint
from glm_hf.folders.finite import first_not_finite

PLACES = {
    "model.layers.1.attention.dense.weight": (3, 4),
    "model.layers.0.input_layernorm.bias": (7,),
    "model.embed_tokens.weight": (100, 2),
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    save_tiny_model(folder / "model", train_sentencepiece(folder / "text.model"))
    return folder / "model"


@pytest.fixture(params=[*PLACES], ids=lambda name: name.removeprefix("model."))
def name(request) -> str:
    return request.param


@pytest.fixture(params=["nan", "inf", "-inf"])
def spoiled(request, name, healthy, tmp_path) -> Path:
    """A model with one value that is not finite."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in healthy.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights[name][PLACES[name]] = float(request.param)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(command: list[str], name: str, place: tuple[int, ...], capsys, caplog, made: Path | None = None) -> None:
    """Check that a command reports the value, and that it refuses it with --strict and leaves nothing."""
    where = f"{name}[{', '.join(map(str, place))}] is "
    assert main([*command, "--strict"]) == 1
    assert where in capsys.readouterr().err
    assert made is None or not (made.exists() or list(made.parent.glob(".*")))
    caplog.clear()
    assert main(command) == 0
    assert [where in line for line in caplog.messages if "not finite" in line] == [True]


@pytest.mark.parametrize("command", ["export-sat", "export-hub"])
def test_exports_report_it(command, spoiled, name, tmp_path, capsys, caplog):
    options = ["--tensor", "2"] if command == "export-sat" else []
    check(
        [command, str(spoiled), str(tmp_path / "out"), *options], name, PLACES[name], capsys, caplog, tmp_path / "out"
    )


def test_verifying_reports_it(spoiled, name, capsys, caplog):
    check(["verify", str(spoiled)], name, PLACES[name], capsys, caplog)
    [line] = verify_checkpoint(spoiled).not_finite
    assert line.startswith(name)
    assert verify_checkpoint(spoiled).problems == []
    assert verify_checkpoint(spoiled, strict=True).problems == [line]


def test_converting_and_resharding_report_it(spoiled, name, tmp_path, capsys, caplog):
    export_sat_checkpoint(spoiled, tmp_path / "sat", tp_size=2)
    config = json.loads((spoiled / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["convert", str(tmp_path / "sat"), str(tmp_path / "hf"), "--config", str(tmp_path / "config.json")]
    check(command, name, PLACES[name], capsys, caplog, tmp_path / "hf")
    command = ["reshard", str(tmp_path / "sat"), str(tmp_path / "sat1"), "--tensor", "1"]
    check(command, name, PLACES[name], capsys, caplog, tmp_path / "sat1")
    caplog.clear()
    assert verify_checkpoint(tmp_path / "sat").problems == []
    assert "not finite" in caplog.text
    assert verify_checkpoint(tmp_path / "sat", strict=True).problems


def test_quantizing_refuses_it_in_every_tensor(spoiled, name, tmp_path):
    for bits in (4, 8):
        with pytest.raises(ValueError, match=r"is .*, which is not finite: weights must be finite") as caught:
            quantize_checkpoint(spoiled, tmp_path / "out", bits=bits)
        assert str(caught.value).startswith(f"{name}[")
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_3d_training_report_it(tmp_path, capsys, caplog):
    model = random_model()
    name, place = "model.layers.1.mlp.dense_h_to_4h.weight", (41, 3)
    with torch.no_grad():
        model.get_parameter(name)[place] = torch.nan
    (tmp_path / "3d" / TAG).mkdir(parents=True)
    (tmp_path / "3d" / "latest").write_text(TAG)
    (tmp_path / "3d" / "parallel.json").write_text(json.dumps({"tp_size": 2, "pp_size": 1, "dp_size": 1}))
    model.config.save_pretrained(tmp_path / "3d")
    for file, content in part_files(model, 2).items():
        torch.save(content, tmp_path / "3d" / TAG / file)
    command = ["export-3d", str(tmp_path / "3d"), str(tmp_path / "hf")]
    check(command, name, place, capsys, caplog, tmp_path / "hf")


def test_filling_refuses_answers_from_it(healthy, spoiled, name, capsys):
    code = main(["fill", "--model", str(spoiled), "the [MASK] of people", "--max-new-tokens", "2"])
    captured = capsys.readouterr()
    if name == "model.embed_tokens.weight" and code == 0:  # an infinite score of a token that is banned
        return
    assert (code, captured.out) == (1, "")
    assert "the model's scores are not finite" in captured.err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_place_of_a_block_is_looked_at(dtype, value):
    block = torch.randn(5, 37).to(dtype)
    assert first_not_finite(block) is None
    for place in ((0, 0), (2, 16), (4, 36)):
        spoiled = block.clone()
        spoiled[place] = value
        assert first_not_finite(spoiled) == place
    assert first_not_finite(torch.full((3,), 127, dtype=torch.int8)) is None


def test_many_tensors_are_not_a_line_each(healthy: Path, tmp_path: Path, caplog, capsys: Callable) -> None:
    weights = {
        name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(healthy / "model.safetensors").items()
    }
    for path in healthy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(verify_checkpoint(tmp_path).not_finite) == len(weights)
    assert len(caplog.messages) == 11

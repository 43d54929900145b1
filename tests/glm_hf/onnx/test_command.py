"""`glm-hf export-onnx`, and the same as a subcommand of optimum."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from glm_hf.cli import main
from glm_hf.onnx import ORTGLMForBlankInfilling

FOLDER = str(files("glm_hf") / "world_facts")


def run_optimum(*words: object) -> subprocess.CompletedProcess:
    code = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", code, "export", "glm-onnx", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_optimum_finds_the_command_and_exports(tmp_path):
    result = run_optimum(
        "--model", FOLDER, tmp_path / "graph", "--dtype", "fp16", "--quantization", "int4", "--verify"
    )
    assert result.returncode == 0, result.stderr
    *lines, folder = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines][:2] == ["a short blank", "a long blank"]
    assert all(float(line.split()[-4].strip(",")) < 0.1 for line in lines)
    model = ORTGLMForBlankInfilling.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert model.session.quantized_here == 4


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", FOLDER, "OUT", "--opset", "17"], "opset must be from 24"),
        (["--model", "no-such-folder", "OUT"], "no-such-folder"),
    ],
)
def test_bad_input_is_one_line_for_optimum_too(tmp_path, words, reason):
    result = run_optimum(*(tmp_path / "graph" if word == "OUT" else word for word in words))
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if line]
    assert reason in line
    assert not (tmp_path / "graph").exists()


def test_a_repeated_command_says_that_it_is_complete(tmp_path, capsys):
    words = ["export-onnx", FOLDER, str(tmp_path / "graph")]
    assert [main(words), main(words)] == [0, 0]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(tmp_path / "graph")] * 2


def test_without_onnx_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export-onnx", FOLDER, str(tmp_path / "graph")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "glm-hf: error: ONNX graphs need onnx: pip install 'glm-hf[onnx]'"
    assert not Path(tmp_path / "graph").exists()

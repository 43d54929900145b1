"""Model folders that are damaged, hostile or of another kind: one line with the file's name, before any work."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_hf.cli import main

COMMANDS = {
    "fill": lambda model, out: ["fill", "--model", str(model), "the [MASK] of people"],
    "verify": lambda model, out: ["verify", str(model)],
    "quantize": lambda model, out: ["quantize", str(model), str(out), "--bits", "8"],
    "export-sat": lambda model, out: ["export-sat", str(model), str(out), "--tensor", "2"],
    "export-hub": lambda model, out: ["export-hub", str(model), str(out)],
    "analyze": lambda model, out: ["analyze", str(model), "--output", str(out)],
}
DEEP = "[" * 100_000
CONFIGS = [
    ("quantization_config", 5),
    ("quantization_config", {"quant_method": "glm130b", "bits": "4"}),
    ("quantization_config", {"quant_method": "glm130b", "bits": 4, "modules_to_not_convert": ["(((("]}),
    ("quantization_config", {"quant_method": "glm130b", "bits": 4, "group_size": 10**18}),
    ("quantization_config", {"bits": [4], "unknown": 1}),
    ("attn_implementation", True),
    ("attn_implementation", {"": 5}),
    ("vocab_size", 10**18),
    ("num_hidden_layers", 10**18),
    ("num_labels", 10**18),
    ("num_labels", "many"),
    ("intermediate_size", -1),
    ("hidden_size", 10**30),
    ("layer_norm_eps", "tiny"),
    ("dtype", "float99"),
    ("dtype", 16),
    ("rope_parameters", [1]),
    ("id2label", 5),
    ("model_type", "bert"),
    ("model_type", None),
    ("model_type", ["glm130b"]),
    ("auto_map", "configuration.Evil"),
]
OTHERS = {
    "config.json": ["", "null", "[]", "{", DEEP, '"glm130b"', "\x00\x01"],
    "generation_config.json": [
        *("null", "[]", "{", DEEP, '{"max_new_tokens": "x"}', '{"temperature": []}', '{"suppress_tokens": 5}'),
        *('{"eos_token_id": "x"}', '{"eos_token_id": [1000000000000]}', '{"do_sample": 1}'),
    ],
}
TOKENIZERS = {
    "tokenizer.json": ["", "null", "{}", "[]", "{", DEEP, '{"version": "1.0", "model": {"type": "none"}}'],
    "tokenizer_config.json": ["null", "[]", "{", DEEP, '{"model_max_length": []}', '{"mask_token": 5}'],
}


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def refuse(model, tmp_path, capsys) -> Callable[..., None]:
    """Function that checks that a command ends in one line that names a file, and leaves nothing."""

    def check(command: str, named: str = "") -> None:
        before = sorted(tmp_path.iterdir())
        assert main(COMMANDS[command](model, tmp_path / "out")) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert line.startswith("glm-hf: error: ")
        assert named in line
        assert len(line) < 1000
        assert sorted(tmp_path.iterdir()) == before

    return check


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        (command, field, value)
        for command in COMMANDS
        for field, value in CONFIGS
        if field != "auto_map" or command == "fill"  # the others choose no class by it
    ],
)
def test_a_config_of_other_types_or_ranges(command, field, value, model, refuse):
    change(model / "config.json", **{field: value})
    refuse(command, "model")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in OTHERS.items() for text in texts])
def test_files_that_hold_something_else(command, name, text, model, refuse):
    (model / name).write_text(text)
    refuse(command, name)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in TOKENIZERS.items() for text in texts])
def test_tokenizer_files_that_hold_something_else(name, text, model, refuse):
    (model / name).write_text(text)
    refuse("fill", "tokenizer")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("entry", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".", "config.json"])
def test_an_index_that_points_elsewhere(command, entry, model, refuse):
    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": entry}}))
    refuse(command, "model.safetensors.index.json names")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "text", ["{}", "null", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 5}}']
)
def test_an_index_without_files(command, text, model, refuse):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    refuse(command, "model.safetensors.index.json")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_that_never_end(command, name, model, refuse):
    (model / name).unlink()
    named = "model" if command == "verify" else name  # of which it may be a checkpoint of the original code
    os.mkfifo(model / name)
    refuse(command, named)
    (model / name).unlink()
    (model / name).symlink_to("/dev/zero")
    refuse(command, named)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("fill", "verify")])
def test_a_destination_that_is_a_loop_of_links(command, model, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert main(COMMANDS[command](model, tmp_path / "out")) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast, PreTrainedModel
class Evil(PretrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("model_type", ["evil", "bert", "glm130b"])
@pytest.mark.parametrize("command", ["fill", "train"])
def test_code_in_a_folder_never_runs_whatever_stdin_answers(model_type, command, model, tmp_path, monkeypatch, capsys):
    import io

    (model / "evil.py").write_text(EVIL.format(marker=str(tmp_path / "harm")))
    auto_map = {
        "AutoConfig": "evil.Evil",
        "AutoModelForMaskedLM": "evil.Evil",
        "AutoTokenizer": ["evil.EvilTokenizer"] * 2,
    }
    change(model / "config.json", model_type=model_type, auto_map=auto_map)
    change(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 20)))
    (tmp_path / "text.jsonl").write_text('{"text": "people"}\n' * 9)
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(model)},
                "data": {"train": [{"path": str(tmp_path / "text.jsonl")}], "cache": str(tmp_path / "cache")},
                "training": {
                    "output_dir": str(tmp_path / "run"),
                    "max_steps": 1,
                    "use_cpu": True,
                    "report_to": "none",
                },
            }
        )
    )
    arguments = ["train", str(tmp_path / "run.yaml")] if command == "train" else COMMANDS["fill"](model, None)
    code = main(arguments)
    assert not (tmp_path / "harm").exists()
    if model_type != "glm130b":
        assert code == 1
        assert "code that comes with a model is not run" in capsys.readouterr().err

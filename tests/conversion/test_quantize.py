"""Folders that are quantized block by block hold what transformers gives when it quantizes the model while loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import DATA, golden_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig
from glm_hf.cli import main
from glm_hf.conversion import convert_sat_checkpoint, export_sat_checkpoint, quantize_checkpoint, verify_checkpoint
from glm_hf.conversion.streaming import stored_tensor

SAT = DATA / "cfg2" / "sat_tp1"
DENSE = "model.layers.2.mlp.dense_4h_to_h.weight"
SETTINGS = [
    {"bits": bits, "group_size": group_size, "quantize_embeddings": quantize_embeddings}
    for bits in (4, 8)
    for group_size in (None, 10)
    for quantize_embeddings in (False, True)
]


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch) -> None:
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", 3000)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """Golden cfg2 in fp16, in several shards."""
    folder = tmp_path_factory.mktemp("plain") / "hf"
    convert_sat_checkpoint(SAT, folder, config=golden_config("cfg2"), max_shard_size="50KB")
    return folder


@pytest.fixture
def plain(converted, tmp_path) -> Path:
    """Copy of it that may be changed."""
    return shutil.copytree(converted, tmp_path / "plain")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_weight(folder: Path, name: str, change: dict) -> None:
    """Set single weights of a tensor in a sharded folder."""
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(shard)
    for index, value in change.items():
        weights[name][index] = value
    save_file(weights, shard, {"format": "pt"})


def assert_same_weights(folder: Path, other: Path) -> None:
    first, second = read_weights(folder), read_weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_folder_is_the_one_that_transformers_quantizes_and_saves(settings, plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "quantized", **settings, max_shard_size="30KB")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=GLMQuantizationConfig(**settings))
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(tmp_path / "quantized", tmp_path / "saved")
    assert read_config(tmp_path / "quantized") == read_config(tmp_path / "saved")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 5
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_rows_are_those_of_the_converter(bits, plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "quantized", bits=bits)
    options = {"config": golden_config("cfg2"), "quantization": f"int{bits}"}
    convert_sat_checkpoint(SAT, tmp_path / "direct", **options)
    for path in (tmp_path / "direct").iterdir():
        assert (tmp_path / "quantized" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_other_dtypes_and_an_output_matrix_of_its_own(dtype, is_tied, tmp_path):
    config = GLMConfig(**golden_config("cfg1").to_dict() | {"tie_word_embeddings": is_tied})
    GLMForBlankInfilling(config).to(dtype).save_pretrained(tmp_path / "plain")
    settings = {"bits": 4, "group_size": 16, "quantize_embeddings": True}
    quantize_checkpoint(tmp_path / "plain", tmp_path / "quantized", **settings)
    loaded = GLMForBlankInfilling.from_pretrained(
        tmp_path / "plain", quantization_config=GLMQuantizationConfig(**settings)
    )
    loaded.save_pretrained(tmp_path / "saved")
    assert_same_weights(tmp_path / "quantized", tmp_path / "saved")
    assert read_config(tmp_path / "quantized") == read_config(tmp_path / "saved")
    assert ("lm_head.weight_scale" in read_weights(tmp_path / "quantized")) != is_tied
    assert verify_checkpoint(tmp_path / "plain", tmp_path / "quantized").problems == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_weights_are_quantized_in_the_dtype_that_the_config_tells(dtype, plain, tmp_path):
    (plain / "config.json").write_text(json.dumps(read_config(plain) | {"dtype": dtype}))
    quantize_checkpoint(plain, tmp_path / "quantized", bits=8)
    model = GLMForBlankInfilling.from_pretrained(plain, quantization_config=GLMQuantizationConfig(bits=8))
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(tmp_path / "quantized", tmp_path / "saved")
    assert read_config(tmp_path / "quantized")["dtype"] == (dtype or "float16")


def test_small_files_travel_along_and_weights_of_other_kinds_do_not(plain, tmp_path):
    texts = {"tokenizer.json": "{}", "tokenizer_config.json": "{1}", "README.md": "of mine", "LICENSE": "mine"}
    others = {"pytorch_model.bin": "weights", "model.gguf": "weights", ".gitattributes": "hidden"}
    others |= {"modeling_x.py": "pass", "__init__.py": "", "notes.txt": "private"}
    for name, text in (texts | others).items():
        (plain / name).write_text(text)
    (plain / "checkpoint-500").mkdir()
    quantize_checkpoint(plain, tmp_path / "quantized", bits=4)
    found = {path.name for path in (tmp_path / "quantized").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", *texts}
    for name in ("generation_config.json", *texts):
        assert (tmp_path / "quantized" / name).read_bytes() == (plain / name).read_bytes()
    before, after = read_config(plain), read_config(tmp_path / "quantized")
    assert after.pop("quantization_config") == GLMQuantizationConfig(bits=4).to_dict()
    assert after == before


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_verify_compares_with_what_it_was_made_from(settings, plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "quantized", **settings)
    for source in (plain, SAT, DATA / "cfg2" / "sat_tp4", tmp_path / "quantized"):
        assert verify_checkpoint(source, tmp_path / "quantized").problems == []
    assert verify_checkpoint(tmp_path / "quantized").num_tensors == len(read_weights(tmp_path / "quantized"))
    weights = load_file(tmp_path / "quantized" / "model.safetensors")
    weights[f"{DENSE}_scale"][7, -1] *= 2
    save_file(weights, tmp_path / "quantized" / "model.safetensors", {"format": "pt"})
    [problem] = verify_checkpoint(plain, tmp_path / "quantized").problems
    assert problem.startswith(f"{DENSE}_scale[7, {weights[f'{DENSE}_scale'].shape[1] - 1}] is ")


def test_export_takes_whole_rows_of_the_linears_only(plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "rows", bits=4)
    export_sat_checkpoint(tmp_path / "rows", tmp_path / "sat", tp_size=1)
    assert verify_checkpoint(tmp_path / "sat", DATA / "cfg2" / "sat_int4_tp1").problems == []
    for name, value in (("group_size", 10), ("quantize_embeddings", True)):
        quantize_checkpoint(plain, tmp_path / name, bits=4, **{name: value})
        with pytest.raises(
            ValueError, match=rf"quantized with {name} = {value}, but SAT checkpoints have the linears"
        ):
            export_sat_checkpoint(tmp_path / name, tmp_path / "refused", tp_size=1)
        assert not (tmp_path / "refused").exists()


def test_export_refuses_linears_that_were_left_alone(plain, tmp_path):
    config = GLMQuantizationConfig(modules_to_not_convert=["dense_4h_to_h"])
    GLMForBlankInfilling.from_pretrained(plain, quantization_config=config).save_pretrained(tmp_path / "saved")
    assert verify_checkpoint(plain, tmp_path / "saved").problems == []
    with pytest.raises(ValueError, match=r"quantized with modules_to_not_convert = \['dense_4h_to_h'\]"):
        export_sat_checkpoint(tmp_path / "saved", tmp_path / "sat", tp_size=1)


def assert_refused(src: Path, dst: Path, message: str, **settings: object) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        quantize_checkpoint(src, dst, **{"bits": 4} | settings)
    assert "\n" not in str(caught.value)
    assert not hasattr(caught.value, "__notes__")
    assert not [path for path in dst.parent.iterdir() if path.name.startswith(f".{dst.name}")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, r"bits must be 4 or 8, got 3"),
        ({"group_size": 32}, r"group_size must divide the 80 input features of model.layers.0.attention.query_key"),
        (
            {"group_size": 5},
            r"query_key_value.weight has 80 columns, which 4 bits cannot pack in 16 groups; use 8 bits or",
        ),
        ({"group_size": 0}, r"group_size must be a positive integer or None for whole rows, got 0"),
        ({"max_shard_size": "many"}, r"many"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings, message, plain, tmp_path):
    assert_refused(plain, tmp_path / "quantized", message, **settings)
    assert not (tmp_path / "quantized").exists()


def test_odd_columns_need_8_bits(tmp_path):
    config = GLMConfig(**golden_config("cfg1").to_dict() | {"intermediate_size": 33})
    GLMForBlankInfilling(config).save_pretrained(tmp_path / "plain")
    assert_refused(tmp_path / "plain", tmp_path / "quantized", r"dense_4h_to_h.weight has 33 .* use 8 bits")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "quantized", bits=8)
    assert verify_checkpoint(tmp_path / "plain", tmp_path / "quantized").problems == []


def test_source_that_is_quantized_already_or_missing(plain, tmp_path):
    quantize_checkpoint(plain, tmp_path / "quantized", bits=8)
    assert_refused(tmp_path / "quantized", tmp_path / "again", r"quantized is quantized to int8 already; quantize the")
    assert_refused(tmp_path / "nothing", tmp_path / "again", r"nothing must hold a model.* has no config.json")
    (plain / "model-00002-of-00016.safetensors").unlink()
    assert_refused(plain, tmp_path / "again", r"has no model-00002-of-00016.safetensors")


def test_destination_that_holds_something(plain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert_refused(plain, tmp_path / "out", r"out exists already; choose another folder or remove it")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_leave_nothing(value, plain, tmp_path):
    change_weight(plain, DENSE, {(3, 4): value})
    assert_refused(plain, tmp_path / "out", rf"{DENSE}\[3, 4\] is .*: weights must be finite", max_shard_size="30KB")
    assert not (tmp_path / "out").exists()


def test_rows_of_zeros_are_quantized_to_zeros(plain, tmp_path):
    change_weight(plain, DENSE, {3: 0.0})
    quantize_checkpoint(plain, tmp_path / "quantized", bits=8, group_size=10)
    weights = read_weights(tmp_path / "quantized")
    assert not weights[DENSE][3].any()
    assert not weights[f"{DENSE}_scale"][3].any()
    assert weights[DENSE][2].any()


def test_command_gives_the_same_folder(plain, tmp_path, capsys):
    settings = {"bits": 4, "group_size": 10, "quantize_embeddings": True, "max_shard_size": "50KB"}
    quantize_checkpoint(plain, tmp_path / "expected", **settings)
    options = ["--bits", "4", "--group-size", "10", "--quantize-embeddings", "--max-shard-size", "50KB"]
    assert main(["quantize", str(plain), str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    for path in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "4", "--group-size", "32"], "group_size must divide the 80 input features of model.layers.0"),
        (["--bits", "8", "--max-shard-size", "many"], "many"),
    ],
)
def test_command_names_what_is_wrong_in_one_line(options, message, plain, tmp_path, capsys):
    assert main(["quantize", str(plain), str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("glm-hf: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--bits", "3"], ["--bits", "4", "--group-size", "many"]])
def test_command_that_is_wrong_exits_with_two(options, plain, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["quantize", str(plain), str(tmp_path / "out"), *options])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_interrupted_command_goes_on_or_begins_again(plain, tmp_path, capsys, monkeypatch):
    command = ["quantize", str(plain), str(tmp_path / "out"), "--max-shard-size", "50KB", "--bits"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("glm_hf.conversion.quantize.write_index", interrupt)
        assert main([*command, "4"]) == 130
    assert "parts are finished; run the same command to resume" in capsys.readouterr().err
    assert main([*command, "8"]) == 1
    assert "start again with resume=False (--no-resume)" in capsys.readouterr().err
    assert main([*command, "8", "--no-resume"]) == 0
    assert verify_checkpoint(plain, tmp_path / "out").problems == []

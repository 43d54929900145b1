import io
import json
import shutil

import pytest
import torch
from golden import DATA, golden_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from glm_hf import GLMTokenizer
from glm_hf.cli import main

TEXT = "the people [MASK] the time"
TWO = "the [MASK] people have [MASK] time"


def last_line(text):
    return text.strip().splitlines()[-1]


@pytest.fixture
def config_file(tmp_path):
    golden_config("cfg1").to_json_file(tmp_path / "config.json")
    return tmp_path / "config.json"


def test_fill_prints_each_text_filled(run, model_folder):
    code, out, _ = run("fill", "--model", model_folder, TEXT, "the work of", "--max-new-tokens", 4)
    fill = pipeline("fill-mask", model=str(model_folder))
    expected = [fill(text, top_k=1, max_new_tokens=4)[0]["sequence"] for text in (TEXT, "the work of")]
    assert (code, out.splitlines()) == (0, expected)


def test_fill_reads_lines_from_stdin(run, model_folder, monkeypatch):
    lines = [TEXT, TWO] * 5
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    code, out, _ = run("fill", "--model", model_folder, "--max-new-tokens", 3)
    assert code == 0
    assert len(out.splitlines()) == 10
    assert out.splitlines()[:2] * 5 == out.splitlines()


def test_fill_prints_proposals_with_probabilities(run, model_folder):
    code, out, _ = run("fill", "--model", model_folder, TEXT, "--top-k", 3, "--max-new-tokens", 3)
    assert code == 0
    assert len(out.splitlines()) == 3
    scores = [float(line.split()[0]) for line in out.splitlines()]
    assert scores == sorted(scores, reverse=True)


def test_fill_prints_json(run, model_folder):
    code, out, _ = run("fill", "--model", model_folder, TEXT, TWO, "--json", "--num-beams", 2, "--max-new-tokens", 3)
    one, two = map(json.loads, out.splitlines())
    assert code == 0
    assert (one["text"], two["text"]) == (TEXT, TWO)
    assert [len(one["blanks"]), len(two["blanks"])] == [1, 2]
    assert "[MASK]" not in one["filled"] + two["filled"]
    assert one["blanks"][0][0].keys() == {"score", "token", "token_str", "sequence"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text 2: the text is empty"),
        ("[MASK]", "text 2: the text holds nothing but masks"),
        ("a [MASK] b [gMASK]", "text 2: the text mixes"),
        ("people " * 2100, "text 2: the text has"),
    ],
)
def test_bad_text_is_one_line_with_its_number(run, model_folder, text, message):
    code, out, err = run("fill", "--model", model_folder, TEXT, text)
    assert (code, len(out.splitlines())) == (1, 1)  # the good text before it is filled
    assert last_line(err).startswith(f"glm-hf: error: {message}")


def test_fill_uses_the_small_model_unless_told_otherwise(run):
    code, out, _ = run("fill", "The capital of France is [MASK].", "法国的首都是[MASK]。")
    assert (code, out.splitlines()) == (0, ["The capital of France is Paris.", "法国的首都是巴黎。"])


def test_missing_model_is_one_line(run, tmp_path):
    code, _, err = run("fill", "--model", tmp_path / "nothing", TEXT)
    assert code == 1
    assert err.startswith("glm-hf: error: there is no folder")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["train"], ["fill", "text", "--top-k", "0"], ["unknown"], ["convert", "a"]])
def test_wrong_command_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["convert"], ["fill"], ["export-hub"], ["train"]])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == 0
    assert "usage: glm-hf" in capsys.readouterr().out


def test_convert_makes_a_folder_that_loads(run, config_file, tmp_path):
    code, out, _ = run(
        "convert", DATA / "cfg1" / "sat_tp2", tmp_path / "model", "--config", config_file, "--dtype", "float32"
    )
    assert (code, out.strip()) == (0, str(tmp_path / "model"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32


def test_convert_reports_what_is_wrong_and_writes_nothing(run, config_file, tmp_path):
    code, _, err = run("convert", tmp_path / "sat", tmp_path / "model", "--config", config_file)
    assert code == 1
    assert err.startswith("glm-hf: error: ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_convert_names_a_config_value_that_does_not_fit(run, tmp_path):
    code, _, err = run("convert", DATA / "cfg1" / "sat_tp2", tmp_path / "model")
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "vocabulary" in err


def test_export_hub_makes_a_folder(run, model_folder, tmp_path):
    code, out, _ = run("export-hub", model_folder, tmp_path / "hub")
    assert (code, out.strip()) == (0, str(tmp_path / "hub"))
    assert (tmp_path / "hub" / "modeling_glm.py").is_file()
    code, out, err = run("export-hub", model_folder, tmp_path / "hub")
    assert (code, out.strip()) == (0, str(tmp_path / "hub"))
    assert (tmp_path / "hub" / "config.json").write_text("{}")
    code, _, err = run("export-hub", model_folder, tmp_path / "hub")
    assert code == 1
    assert "exists already" in err
    assert run("export-hub", model_folder, tmp_path / "hub", "--overwrite")[0] == 0


def test_bug_keeps_its_traceback(model_folder, monkeypatch):
    monkeypatch.setattr("glm_hf.cli.fill.describe", None)
    with pytest.raises(TypeError):
        main(["fill", "--model", str(model_folder), TEXT])


def test_input_that_is_no_text_is_one_line(run, model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\xfe [MASK]\n"), errors="surrogateescape"))
    code, out, err = run("fill", "--model", model_folder)
    assert (code, out) == (1, "")
    assert "utf-8" in last_line(err)


def test_damaged_weights_are_one_line(run, model_folder, tmp_path):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = run("fill", "--model", broken, TEXT)
    assert code == 1
    assert last_line(err).startswith("glm-hf: error: ")


SAT = DATA / "cfg1" / "sat_tp2"


def test_export_reshard_and_verify_go_round(run, config_file, tmp_path):
    assert run("convert", SAT, tmp_path / "hf", "--config", config_file)[:2] == (0, f"{tmp_path / 'hf'}\n")
    assert run("export-sat", tmp_path / "hf", tmp_path / "four", "--tp-size", 4)[:2] == (0, f"{tmp_path / 'four'}\n")
    assert run("reshard", tmp_path / "four", tmp_path / "two", "--tp-size", 2)[:2] == (0, f"{tmp_path / 'two'}\n")
    for other in ("hf", "four", "two"):
        code, out, err = run("verify", SAT, tmp_path / other)
        assert (code, out, err) == (0, "39 tensors, 327,360 bytes checked, 0 problems\n", "")
    modules = [torch.load(path, weights_only=True)["module"] for path in (SAT / "49300").iterdir()]
    num_bytes = sum(tensor.nbytes for module in modules for tensor in module.values())
    code, out, _ = run("verify", tmp_path / "two")
    assert (code, out) == (0, f"84 tensors, {num_bytes:,} bytes checked, 0 problems\n")


def test_verify_prints_every_problem_and_fails(run, config_file, tmp_path):
    run("convert", SAT, tmp_path / "hf", "--config", config_file, "--dtype", "float32")
    run("convert", DATA / "cfg1" / "sat_tp1", tmp_path / "other", "--config", config_file)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.bias"][3] = 1
    weights["model.norm.weight"][4] = 2
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    code, out, err = run("verify", tmp_path / "hf", tmp_path / "other")
    assert code == 1
    assert out.splitlines()[0].endswith("2 problems")
    assert [line.partition(" is ")[0] for line in out.splitlines()[1:]] == [
        "model.norm.weight[4]",
        "model.norm.bias[3]",
    ]
    assert last_line(err).startswith("glm-hf: error: 2 problems, the first: model.norm.weight[4] is 2.0, expected ")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_convert_quantizes(quantization, run, config_file, tmp_path):
    assert run("convert", SAT, tmp_path / "hf", "--config", config_file, "--quantization", quantization)[0] == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["bits"] == int(quantization[3:])
    assert run("verify", SAT, tmp_path / "hf")[0] == 0


def test_dry_run_prints_the_plan_and_writes_nothing(run, config_file, tmp_path):
    code, out, _ = run(
        "convert", SAT, tmp_path / "hf", "--config", config_file, "--dry-run", "--max-shard-size", "100KB"
    )
    assert code == 0
    assert "source   2 ranks, 327,360 bytes in " in out
    assert "tensors  39 in float16\n" in out
    assert "shards   4, the largest of " in out
    assert "disk     327,360 bytes needed, " in out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_interrupted_conversion_goes_on_or_begins_again(run, config_file, tmp_path, monkeypatch):
    command = ["convert", SAT, tmp_path / "hf", "--config", config_file, "--max-shard-size", "100KB"]
    with monkeypatch.context() as patch:
        patch.setattr("glm_hf.conversion.convert.write_index", interrupt)
        code, _, err = run(*command)
    assert code == 130
    assert last_line(err) == "glm-hf: error: interrupted; 4 of 4 parts are finished; run the same command to resume"
    code, _, err = run(*command, "--dtype", "float32")
    assert code == 1
    assert "had other options or another version of glm_hf; start again with resume=False (--no-resume)" in err
    assert run(*command, "--dtype", "float32", "--no-resume")[0] == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["export-sat", "reshard"])
def test_number_of_ranks_must_be_given(command, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, str(SAT), str(tmp_path / "x")])
    assert caught.value.code == 2
    assert "--tp-size" in capsys.readouterr().err


def test_fill_encodes_every_text_once(run, model_folder, monkeypatch):
    encoded, encode = [], GLMTokenizer._encode_plus

    def noted(self, text, *args, **options):
        encoded.append(text)
        return encode(self, text, *args, **options)

    monkeypatch.setattr(GLMTokenizer, "_encode_plus", noted)
    texts = ["the time of [MASK] work", "people [MASK] time", "the work of [MASK] is [MASK]"]
    assert run("fill", "--model", model_folder, *texts, "--max-new-tokens", 2)[0] == 0
    assert encoded == texts

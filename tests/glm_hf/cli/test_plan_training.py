import json
import sys
import types

import pytest

from glm_hf.cli import main
from glm_hf.configuration_glm import GLMConfig

PAPER = ["plan", "--train", "--preset", "130b", "--tensor", 4, "--pipeline", 8, "--data", 24, "--global-batch", 4224]


def test_the_run_of_the_paper_is_planned(run):
    code, out, err = run(*PAPER, "--micro-batch", 1, "--sequence", 2048, "--gpu", "A100-40GB")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("128.7 billion parameters in fp16, tensor 4 x pipeline 8 x data 24 = 768 A100-40GB")
    assert len(lines) == 2 + 1 + 8 + 1 + 5
    assert out == run(*PAPER)[1]  # these are the defaults


def test_json_holds_what_was_asked_for(run):
    code, out, _ = run(
        *PAPER, "--json", "--precision", "bf16", "--target-share", 0.5, "--schedule", "naive", "--partition",
        "9,9,9,9,9,9,8,8", "--micro-batch", 2, "--sequence", 1024, "--tflops", 400, "--gpu-memory", "80GiB",
        "--node-bandwidth", 100, "--link-bandwidth", 10, "--gpus-per-node", 4, "--compute-efficiency", 0.4,
        "--link-efficiency", 0.6, "--reserve", "1GiB", "--sequence-parallel", "--recompute", "selective",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    degrees = {"tp_size": 4, "pp_size": 8, "dp_size": 24, "partition": [9, 9, 9, 9, 9, 9, 8, 8]}
    assert found["parallel"] == {**degrees, "sequence_parallel": True}
    names = ("micro_batch", "global_batch", "sequence", "precision", "recompute", "target_share", "schedule")
    assert [found[name] for name in names] == [2, 4224, 1024, "bf16", "selective", 0.5, "naive"]
    assert found["checkpointing"] is True
    assert found["machine"] == {
        "gpu": {
            "name": "A100-40GB (changed)", "tflops": 400, "tflops_fp32": 400, "memory": 80 * 2**30,
            "node_bandwidth": 100, "link_bandwidth": 10, "gpus_per_node": 4,
        },
        "compute_efficiency": 0.4,
        "link_efficiency": 0.6,
    }  # fmt: skip
    assert found["reserve"] == 2**30


def test_what_does_not_fit_exits_with_one(run):
    code, out, err = run(*PAPER, "--no-checkpointing")
    assert code == 1
    assert out.startswith("128.7 billion parameters")
    assert err.startswith("glm-hf: error: does not fit: needs ")
    assert "fits with --recompute full" in err
    assert len(err.splitlines()) == 1
    assert run(*PAPER, "--no-checkpointing", "--gpu", "A100-80GB")[0] == 0


def test_folder_is_planned_by_its_config(run, tmp_path):
    GLMConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=96).save_pretrained(
        tmp_path
    )
    code, out, _ = run("plan", tmp_path, "--train", "--pipeline", 2, "--json")
    found = json.loads(out)
    assert (code, found["num_micro_batches"], found["sequence"]) == (0, 2, 2048)
    assert [stage["layers"] for stage in found["stages"]] == [[0, 1], [2, 3]]


def test_quantized_model_is_refused(run, tmp_path):
    GLMConfig(quantization_config={"quant_method": "glm130b", "bits": 4}).save_pretrained(tmp_path)
    code, out, err = run("plan", tmp_path, "--train")
    assert (code, out) == (1, "")
    assert "is quantized, whose weights cannot be trained" in err


def test_timeline_is_written(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run(*PAPER, "--global-batch", 192, "--timeline", tmp_path / "step.png")
    assert code == 0
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_timeline_without_matplotlib_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr("glm_hf.cli.plan.find_spec", lambda name: None)
    code, out, err = run(*PAPER, "--timeline", tmp_path / "step.png")
    assert (code, out) == (1, "")
    assert err == "glm-hf: error: --timeline needs matplotlib: pip install 'glm-hf[plot]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PAPER, "--bits", 4], "--bits belongs to --devices, not to --train"),
        ([*PAPER, "--context", 4], "--context belongs to --devices, not to --train"),
        (
            ["plan", "--preset", "130b", "--devices", "80GiB*8", "--no-checkpointing"],
            "--no-checkpointing belongs to --train, not to --devices",
        ),
        (
            ["plan", "--preset", "130b", "--devices", "80GiB*8", "--micro-batch", 1],
            "--micro-batch belongs to --train, not to --devices",
        ),
        ([*PAPER, "--gpu", "A100"], "gpu must be one of V100-32GB, A100-40GB, "),
        ([*PAPER, "--data", 25], "global_batch must be a multiple of micro_batch times dp_size (1 x 25), got 4224"),
        ([*PAPER, "--tensor", 0], "tp_size must be an integer of at least 1, got 0"),
        ([*PAPER, "--gpu-memory", "40"], "a size needs a unit"),
    ],
)
def test_wrong_options_are_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"glm-hf: error: {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--preset", "130b"],
        ["plan", "--train"],
        ["plan", "--preset", "130b", "--train", "--devices", "24GiB"],
        [*PAPER, "--precision", "int8"],
        [*PAPER, "--recompute", "none", "--no-checkpointing"],
        [*PAPER, "--partition", "9,x"],
        ["export-3d", "checkpoint"],
    ],
)
def test_wrong_command_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "export-3d"])
def test_commands_have_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    assert "usage: glm-hf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"max_shard_size": "5GB", "resume": True, "overwrite": False, "strict": False}),
        (
            ["--max-shard-size", "1GB", "--no-resume", "--strict", "--overwrite"],
            {"max_shard_size": "1GB", "resume": False, "overwrite": True, "strict": True},
        ),
    ],
)
def test_export_3d_passes_its_options_on(run, monkeypatch, options, expected):
    calls = []
    module = types.ModuleType("export_3d")
    module.export_3d_checkpoint = lambda src, dst, **settings: calls.append((src, dst, settings))
    monkeypatch.setitem(sys.modules, "glm_hf.conversion.export_3d", module)
    assert run("export-3d", "checkpoint", "model", *options)[:2] == (0, "model\n")
    assert calls == [("checkpoint", "model", expected)]

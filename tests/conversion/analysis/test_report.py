"""Analyses of weights, against numpy on whole tensors and a quantization that is written down here once more."""

import json
import logging
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_hf import GLMConfig, GLMForBlankInfilling
from glm_hf.cli import main
from glm_hf.conversion import quantize_checkpoint
from glm_hf.conversion.analysis import tensor as tensor_analysis
from glm_hf.conversion.analysis.report import analyze_weights, describe_analysis, write_analysis
from glm_hf.conversion.analysis.tensor import Scheme, measure
from glm_hf.conversion.streaming import stored_tensor
from glm_hf.quantization import quantize_weight

HIDDEN, INNER, VOCAB, LAYERS = 24, 40, 50, 2
KINDS = {
    "embed_tokens": (VOCAB, HIDDEN),
    "attention.query_key_value": (3 * HIDDEN, HIDDEN),
    "attention.dense": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h": (2 * INNER, HIDDEN),
    "mlp.dense_4h_to_h": (HIDDEN, INNER),
}
GROUP_SIZES = (8, 12, 10, 24)  # dividing both widths, the first, the second, and being a whole row
SCHEMES = {"int8": (8, None), "int4": (4, None)} | {f"int4-g{size}": (4, size) for size in GROUP_SIZES}
PLOTS = ("distribution.png", "error.png", "statistics.png")


@pytest.fixture
def save_model(tmp_path, special_ids):
    def save(dtype=torch.float16, max_shard_size="5GB", **settings):
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}
        model = GLMForBlankInfilling(GLMConfig(num_attention_heads=2, **(sizes | special_ids | settings)))
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape) * 0.01 * (number + 1) + 0.003)
                parameter.view(-1)[7] = number - 5.5  # an outlier in most
        model.to(dtype).save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
        return tmp_path / "model"

    return save


@pytest.fixture
def change_weight(save_model):
    """Function that saves a model with one weight changed, and returns its folder."""

    def change(name, index, value, dtype=torch.float16):
        folder = save_model(dtype)
        weights = load_file(folder / "model.safetensors")
        weights[name][index] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def load_weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def dequantized(weight, bits, group_size):
    """Return what the released rule makes of a matrix, in fp16 arithmetic of numpy."""
    largest = {8: 127, 4: 7}[bits]
    groups = weight.astype(np.float16).reshape(len(weight), -1, group_size or weight.shape[1])
    scale = np.abs(groups).max(-1, keepdims=True) / np.float16(largest)
    codes = np.clip(np.round(groups / np.where(scale == 0, np.float16(1), scale)), -largest, largest)
    return (codes * scale).reshape(weight.shape).astype(np.float64)


def require_equal_to_numpy(tensor, weight):
    """Compare everything but errors with what numpy finds in the whole matrix, in fp64."""
    weight = weight.double().numpy()
    centred = weight - weight.mean()
    z = centred / weight.std()
    rows = np.abs(weight).max(1)
    expected = {
        "mean": weight.mean(),
        "std": weight.std(),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
    }
    assert {key: tensor[key] for key in expected} == pytest.approx(expected, rel=1e-11)
    assert (tensor["min"], tensor["max"]) == (weight.min(), weight.max())
    assert tensor["share_beyond_6_std"] == (np.abs(z) > 6).sum() / weight.size
    expected = {"min": rows.min(), "median": np.median(rows), "mean": rows.mean(), "max": rows.max()}
    assert tensor["row_magnitude"] == pytest.approx(expected, rel=1e-12)
    edges = np.concatenate([[-np.inf], np.arange(-80, 81) / 8, [np.inf]])
    assert tensor["histogram"] == np.histogram(z, edges)[0].tolist()
    assert (tensor["shape"], tensor["num_weights"]) == (list(weight.shape), weight.size)


def require_equal_errors(tensor, weight):
    weight = weight.float().numpy()
    fitting = {name: scheme for name, scheme in SCHEMES.items() if weight.shape[1] % (scheme[1] or 1) == 0}
    assert tensor["quantization"].keys() == fitting.keys()
    for name, (bits, group_size) in fitting.items():
        error = weight.astype(np.float64) - dequantized(weight, bits, group_size)
        relative = np.sqrt((error**2).sum() / (weight.astype(np.float64) ** 2).sum())
        found = tensor["quantization"][name]
        assert found["relative_rms_error"] == pytest.approx(relative, rel=1e-11), name
        assert found["largest_error"] == np.abs(error).max(), name
        assert found["snr"] == pytest.approx(-20 * np.log10(relative), rel=1e-11), name


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_analysis_is_that_of_the_whole_tensors(dtype, max_shard_size, save_model):
    folder = save_model(dtype, max_shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    weights = load_weights(folder)
    tensors = analyze_weights(folder, group_sizes=GROUP_SIZES)["tensors"]
    assert len(tensors) == 1 + 4 * LAYERS
    for tensor in tensors:
        require_equal_to_numpy(tensor, weights[tensor["name"]])
        require_equal_errors(tensor, weights[tensor["name"]])
        assert tensor["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("block_bytes", "weights_at_once"), [(1, 2**17), (2**22, 1), (500, 100), (400, 170)])
def test_analysis_does_not_depend_on_blocks(block_bytes, weights_at_once, save_model, monkeypatch):
    folder = save_model()
    monkeypatch.setattr(stored_tensor, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(tensor_analysis, "WEIGHTS_AT_ONCE", weights_at_once)
    weights = load_weights(folder)
    for tensor in analyze_weights(folder, group_sizes=GROUP_SIZES)["tensors"]:
        require_equal_to_numpy(tensor, weights[tensor["name"]])
        require_equal_errors(tensor, weights[tensor["name"]])


def test_every_linear_has_its_layer_and_kind(save_model):
    tensors = analyze_weights(save_model())["tensors"]
    linears = [kind for kind in KINDS if "." in kind]
    places = [(None, "embed_tokens")] + [(layer, kind) for layer in range(LAYERS) for kind in linears]
    assert [(tensor["layer"], tensor["kind"]) for tensor in tensors] == places
    assert [tuple(tensor["shape"]) for tensor in tensors] == [KINDS[kind] for _, kind in places]
    for tensor in tensors:
        prefix = "model." if tensor["layer"] is None else f"model.layers.{tensor['layer']}."
        assert tensor["name"] == f"{prefix}{tensor['kind']}.weight"


def test_output_matrix_is_analyzed_where_it_is_not_tied(save_model):
    analysis = analyze_weights(save_model(tie_word_embeddings=False))
    assert [tensor["kind"] for tensor in analysis["tensors"] if tensor["layer"] is None] == ["embed_tokens", "lm_head"]


def test_kinds_hold_the_means_over_layers(save_model):
    analysis = analyze_weights(save_model(), group_sizes=GROUP_SIZES)
    assert list(analysis["kinds"]) == list(KINDS)
    for kind, means in analysis["kinds"].items():
        tensors = [tensor for tensor in analysis["tensors"] if tensor["kind"] == kind]
        assert (means["num_tensors"], means["num_weights"]) == (len(tensors), len(tensors) * np.prod(KINDS[kind]))
        for key in ("std", "kurtosis", "share_beyond_6_std"):
            assert means[key] == pytest.approx(np.mean([tensor[key] for tensor in tensors]))
        for scheme in SCHEMES:
            errors = [tensor["quantization"].get(scheme, {}).get("relative_rms_error") for tensor in tensors]
            expected = None if None in errors else pytest.approx(np.mean(errors))
            assert means["relative_rms_error"][scheme] == expected


def test_bits_per_weight_are_those_that_are_stored(save_model):
    folder = save_model()
    weights = load_weights(folder)
    for tensor in analyze_weights(folder, group_sizes=GROUP_SIZES)["tensors"]:
        for name, found in tensor["quantization"].items():
            bits, group_size = SCHEMES[name]
            stored = quantize_weight(weights[tensor["name"]], bits=bits, group_size=group_size)
            assert found["bits_per_weight"] == pytest.approx(
                sum(8 * part.nbytes for part in stored) / tensor["num_weights"]
            )


def measure_matrix(weight, **schemes):
    return measure(lambda: iter(weight.split(3)), tuple(weight.shape), schemes)


@pytest.mark.parametrize(("outlier", "is_far"), [(0.61, True), (0.59, False), (-0.61, True)])
def test_share_beyond_6_std_counts_both_tails(outlier, is_far):
    weight = torch.tensor([0.1, -0.1]).repeat(50_000).view(10, -1)  # std 0.1
    weight[4, 2] = outlier
    assert measure_matrix(weight)["share_beyond_6_std"] == is_far / 100_000


def test_histogram_counts_what_lies_outside():
    weight = torch.tensor([0.1, -0.1]).repeat(50_000).view(10, -1)
    weight[0, 0], weight[1, 0], weight[2, 0] = 5, -5, -6
    histogram = measure_matrix(weight)["histogram"]
    assert (histogram[0], histogram[-1], sum(histogram)) == (2, 1, 100_000)


def test_small_spread_around_a_large_mean_is_exact():
    weight = 1000 + torch.randn(11, 64) * 1e-3
    found, expected = measure_matrix(weight), weight.double().numpy()
    assert found["std"] == pytest.approx(expected.std(), rel=1e-9)
    assert found["mean"] == pytest.approx(expected.mean(), rel=1e-15)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_what_is_undefined_for_equal_weights_is_null(value):
    found = measure_matrix(torch.full((7, 6), value), int4=Scheme(bits=4, group_size=None))
    assert (found["std"], found["kurtosis"], found["share_beyond_6_std"]) == (0, None, 0)
    error = found["quantization"]["int4"]
    assert (error["relative_rms_error"] is None, error["snr"] is None) == (value == 0, value == 0)
    json.dumps(found, allow_nan=False)


def test_no_error_has_no_signal_to_noise_ratio():
    weight = torch.tensor([[7.0, -3.0, 0.0, 1.0]])
    error = measure_matrix(weight, int4=Scheme(bits=4, group_size=None))["quantization"]["int4"]
    assert (error["relative_rms_error"], error["largest_error"], error["snr"]) == (0, 0, None)


def test_groups_that_divide_no_weight_are_left_out_with_a_warning(save_model, caplog):
    analysis = analyze_weights(save_model(), group_sizes=(128, 8))
    assert list(analysis["schemes"]) == ["int8", "int4", "int4-g8"]
    assert [record.getMessage() for record in caplog.records] == [
        "groups of 128 are left out: they divide no input features, [24, 40]"
    ]


@pytest.mark.parametrize("group_size", [0, -8, 3])
def test_group_size_must_be_even(group_size, save_model):
    with pytest.raises(ValueError, match=f"group_size must be even and positive, got {group_size}"):
        analyze_weights(save_model(), group_sizes=(group_size,))


def test_odd_rows_have_no_int4(save_model):
    analysis = analyze_weights(save_model(intermediate_size=41), group_sizes=(8,))
    schemes = {tensor["kind"]: list(tensor["quantization"]) for tensor in analysis["tensors"]}
    assert schemes["mlp.dense_4h_to_h"] == ["int8"]
    assert schemes["attention.dense"] == ["int8", "int4", "int4-g8"]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_folder_is_refused(bits, save_model, tmp_path):
    quantize_checkpoint(save_model(), tmp_path / "quantized", bits=bits)
    with pytest.raises(ValueError, match=f"is quantized to int{bits} already; analyze the model that is not"):
        write_analysis(tmp_path / "quantized", tmp_path / "a" / "analysis")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("weights_at_once", [1, 2**17])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.dense_h_to_4h.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(name, value, weights_at_once, change_weight, monkeypatch, tmp_path):
    monkeypatch.setattr(tensor_analysis, "WEIGHTS_AT_ONCE", weights_at_once)
    folder = change_weight(name, (31, 5), float(value))
    with pytest.raises(ValueError, match=rf"^{name}: \[31, 5\] is {value}, but weights must be finite$"):
        write_analysis(folder, tmp_path / "analysis")
    assert not list(tmp_path.glob("*analysis*"))
    assert not list(tmp_path.glob(".analysis*"))


def test_weights_too_large_for_fp16_are_named(change_weight):
    name = "model.layers.0.attention.dense.weight"
    with pytest.raises(ValueError, match=f"^{name}: weights must be finite in fp16"):
        analyze_weights(change_weight(name, (3, 5), 1e6, torch.bfloat16))


def png_size(path):
    """Return width and height in the header of a PNG file."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[12:16] == b"IHDR"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


@pytest.mark.parametrize(
    ("group_sizes", "error_size"), [((), (1260, 690)), ((8,), (1890, 690)), ((8, 12), (1260, 1230))]
)
def test_folder_holds_json_and_plots(group_sizes, error_size, save_model, tmp_path):
    pytest.importorskip("matplotlib")
    folder = save_model()
    analysis = write_analysis(folder, tmp_path / "new" / "analysis", group_sizes=group_sizes)
    assert sorted(path.name for path in (tmp_path / "new" / "analysis").iterdir()) == ["analysis.json", *PLOTS]
    sizes = [png_size(tmp_path / "new" / "analysis" / name) for name in PLOTS]
    assert sizes == [(1890, 1230), error_size, (1890, 690)]
    assert json.loads((tmp_path / "new" / "analysis" / "analysis.json").read_text()) == analysis


@pytest.mark.filterwarnings("error")
def test_constant_weights_and_one_layer_can_be_plotted(save_model, tmp_path):
    pytest.importorskip("matplotlib")
    folder = save_model(num_hidden_layers=1, tie_word_embeddings=False)
    weights = {name: torch.zeros_like(weight) for name, weight in load_weights(folder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_analysis(folder, tmp_path / "analysis", group_sizes=(8,))
    assert {path.name for path in (tmp_path / "analysis").glob("*.png")} == set(PLOTS)


def test_json_has_the_documented_fields(save_model):
    folder = save_model()
    analysis = json.loads(json.dumps(analyze_weights(folder, group_sizes=(8,)), allow_nan=False))
    assert list(analysis) == ["version", "model", "units", "schemes", "histogram_edges", "kinds", "tensors"]
    assert (analysis["version"], analysis["model"]) == (1, str(folder))
    assert analysis["schemes"] == {
        "int8": {"bits": 8, "group_size": None},
        "int4": {"bits": 4, "group_size": None},
        "int4-g8": {"bits": 4, "group_size": 8},
    }
    edges = analysis["histogram_edges"]
    assert edges == [-10 + number / 8 for number in range(161)]
    identity = {"name", "layer", "kind", "shape", "dtype", "num_weights"}
    spread = {"mean", "std", "min", "max", "kurtosis", "share_beyond_6_std", "row_magnitude", "histogram"}
    errors = {"relative_rms_error", "largest_error", "snr", "bits_per_weight"}
    for tensor in analysis["tensors"]:
        assert tensor.keys() == identity | spread | {"quantization"}
        assert len(tensor["histogram"]) == len(edges) + 1
        assert all(error.keys() == errors for error in tensor["quantization"].values())
    explained = {name for names in analysis["units"] for name in names.split(", ")}
    assert explained == spread | errors | {"histogram_edges"}


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_there_is_json_and_one_line(save_model, tmp_path, caplog):
    write_analysis(save_model(), tmp_path / "analysis", group_sizes=(8,))
    assert [path.name for path in (tmp_path / "analysis").iterdir()] == ["analysis.json"]
    assert caplog.record_tuples == [
        (
            "glm_hf.conversion.analysis.report",
            logging.WARNING,
            "matplotlib is not installed, so there will be no plots: pip install 'glm-hf[plot]'",
        )
    ]


def test_finished_analysis_is_not_overwritten(save_model, tmp_path):
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "analysis.json").write_text("{}")
    with pytest.raises(FileExistsError, match="analysis exists already; choose another folder or remove it"):
        write_analysis(save_model(), tmp_path / "analysis")
    assert (tmp_path / "analysis" / "analysis.json").read_text() == "{}"


def test_table_has_a_line_per_kind(save_model):
    analysis = analyze_weights(save_model(), group_sizes=(10,))
    header, *rows = (line.split() for line in describe_analysis(analysis).splitlines())
    assert header[-4:] == ["std", "int8", "int4", "int4-g10"]
    assert [row[0] for row in rows] == list(KINDS)
    for kind, *cells in rows:
        means = analysis["kinds"][kind]
        errors = ["-" if error is None else f"{100 * error:.2f}%" for error in means["relative_rms_error"].values()]
        assert cells[:2] == [f"{means['num_weights']:,}", f"{means['std']:.5f}"]
        assert cells[-3:] == errors
        assert (errors[-1] == "-") == (kind != "mlp.dense_4h_to_h")


def test_command_prints_the_table_and_writes_the_folder(save_model, tmp_path, capsys, monkeypatch):
    folder = save_model()
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", str(folder), "--group-size", "8", "--group-size", "12"]) == 0
    table = describe_analysis(json.loads((tmp_path / "analysis" / "analysis.json").read_text()))
    assert capsys.readouterr().out == f"{table}\nanalysis\n"
    assert table.splitlines()[0].endswith("int8    int4  int4-g8  int4-g12")
    assert main(["analyze", str(folder), "--group-size", "8"]) == 1
    assert "analysis exists already" in capsys.readouterr().err
    assert main(["analyze", str(folder), "--group-size", "8", "--output", "other"]) == 0
    assert (tmp_path / "other" / "analysis.json").exists()


def test_command_groups_by_128_unless_told_otherwise(save_model, tmp_path, capsys):
    folder = save_model(hidden_size=128)
    assert main(["analyze", str(folder), "--output", str(tmp_path / "analysis")]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("int8    int4  int4-g128")


@pytest.mark.parametrize(
    ("arguments", "code"), [(["analyze", "missing"], 1), (["analyze", ".", "--group-size", "x"], 2)]
)
def test_command_tells_what_is_wrong_by_its_exit_code(arguments, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(arguments)
    except SystemExit as exit:
        found = exit.code
    assert found == code
    assert capsys.readouterr().err.startswith("glm-hf: error: missing must hold a model" if code == 1 else "usage:")
    assert not list(tmp_path.iterdir())
